#!/usr/bin/env python3
"""Makes what the quantisers of GGUF's blocks are held against, by llama.cpp itself.

    pip install llama-cpp-python==0.3.36 numpy==2.4.6 safetensors==0.8.0
    python tests/python/generate_gguf_blocks.py

tests/golden/gguf/quantised.safetensors has values (`values`) like those of weights, with outliers, equal values and zeros among them, and the
bytes that `ggml_quantize_chunk` makes of them for each type (`q4_K`).
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
# The name, ggml's number, the values of a block and its bytes.
TYPES = [
    ("Q4_0", 2, 32, 18),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
]


def library():
    for path in (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"):
        return ctypes.CDLL(str(path))
    raise SystemExit("llama-cpp-python has no libggml-base.so")


def main():
    random = np.random.default_rng(7)
    values = random.normal(size=(16, 256)).astype(np.float32) * np.float32(0.05)
    values[3] *= 1e-2
    values[5, ::41] *= 12
    values[7, 64:96] = 0.25
    values[7, 96:128] = -0.25
    values[9] = 0
    values[10, 32:] = 0
    values[11] = np.abs(values[11])
    values[12] = -np.abs(values[12])
    values[13] = random.uniform(-1, 1, size=256).astype(np.float32) ** 5 * 30
    values[14] = values[14].astype(np.float16).astype(np.float32)
    quantize = library().ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    number = ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p]
    tensors = {"values": values.reshape(-1)}
    for name, kind, block, size in TYPES:
        out = np.zeros(values.size // block * size, dtype=np.uint8)
        written = quantize(kind, values.ctypes.data, out.ctypes.data, 0, values.shape[0], values.shape[1], None)
        assert written == out.size
        tensors[name] = out
    save_file(tensors, ROOT / "tests/golden/gguf/quantised.safetensors")


if __name__ == "__main__":
    main()
