#!/usr/bin/env python3
"""Makes what the reader of GGUF files is held against, from the `gguf` package's own tables and arithmetic.

    pip install gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0
    python tests/python/generate_gguf.py

src/ml/gguf/codebooks.bin has the codebooks of the i-quants, a u16 an entry (src/ml/gguf/codebooks.rs says how it is read).
tests/golden/gguf/blocks.safetensors has, for each type, random blocks (`Q4_K.blocks`) and the values that the package's `dequantize` makes of
them (`Q4_K.values`). Scales are finite; everything else is random bits, so that each bit of a block matters.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
BOOKS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]
# Where a block has numbers in f16, which random bits would make infinite or NaN now and then.
HALVES = {
    "F16": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "IQ2_XXS": [0],
    "IQ2_XS": [0],
    "IQ2_S": [0],
    "IQ3_XXS": [0],
    "IQ3_S": [0],
    "IQ1_S": [0],
    "TQ1_0": [52],
    "TQ2_0": [64],
}
PLAIN = ["F32", "F64", "BF16", "IQ1_M", "MXFP4"]


def codebooks():
    out = b""
    for name in BOOKS:
        kind = getattr(quants, name)
        kind.init_grid()
        entries = kind.grid.reshape(kind.grid_shape)
        codes = np.argmin(np.abs(entries[..., None] - np.array(kind.grid_map, dtype=np.float32)), axis=-1)
        bits = 3 if entries.shape[1] == 4 else 2
        packed = (codes.astype(np.uint16) << (np.arange(entries.shape[1], dtype=np.uint16) * bits)).sum(axis=1)
        out += packed.astype("<u2").tobytes()
    (ROOT / "src/ml/gguf/codebooks.bin").write_bytes(out)


def blocks():
    random = np.random.default_rng(20)
    tensors = {}
    for name in [*HALVES, *PLAIN]:
        kind = GGMLQuantizationType[name]
        values, size = GGML_QUANT_SIZES[kind]
        count = 3 if values == 256 else 6 if values > 1 else 40
        if name in ["F32", "F64", "BF16"]:
            numbers = random.normal(size=count) * 10.0 ** random.integers(-20, 20, size=count)
            raw = {"F32": numbers.astype("<f4"), "F64": numbers.astype("<f8")}
            raw["BF16"] = (raw["F32"].view("<u4") >> 16).astype("<u2")
            raw = raw[name].view(np.uint8)
        else:
            raw = random.integers(0, 256, size=(count, size), dtype=np.uint8)
            for at in HALVES.get(name, []):
                half = (random.normal(size=count) * 2.0 ** random.integers(-18, 8, size=count)).astype("<f2")
                raw[:, at : at + 2] = half.view(np.uint8).reshape(count, 2)
            if name == "IQ1_M":
                # The scale is in the highest four bits of four u16; its exponent's highest bit is cleared.
                raw[:, 55] &= 0xBF
            raw = raw.reshape(-1)
        if name == "F64":
            result = raw.view("<f8").astype(np.float32)
        else:
            result = quants.dequantize(raw, kind).reshape(-1).astype(np.float32)
        assert np.isfinite(result).all() or name == "MXFP4", name
        tensors[f"{name}.blocks"] = raw
        tensors[f"{name}.values"] = np.ascontiguousarray(result)
    out = ROOT / "tests/golden/gguf"
    out.mkdir(exist_ok=True)
    save_file(dict(sorted(tensors.items())), out / "blocks.safetensors")


codebooks()
blocks()
