#!/usr/bin/env python3
"""Makes what the reader of GGUF files is held against, from the `gguf` package's own tables and arithmetic.

    pip install gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0 tokenizers==0.23.3 llama-cpp-python==0.3.36
    python tests/python/generate_gguf.py

src/ml/gguf/codebooks.bin has the codebooks of the i-quants, a u16 an entry (src/ml/gguf/codebooks.rs says how it is read).
tests/golden/gguf/blocks.safetensors has, for each type, random blocks (`Q4_K.blocks`) and the values that the package's `dequantize` makes of
them (`Q4_K.values`). Scales are finite; everything else is random bits, so that each bit of a block matters.
tests/golden/gguf/llama.gguf is a tiny Llama as llama.cpp's converter would write it (permuted queries and keys, tied head, Llama 3's factors of
the rotary embedding, byte-level BPE), with a type for each projection; llama.safetensors has its weights by transformers' names, and
llama.json texts with the ids that llama.cpp makes of them.
"""

import json
import math
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants
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


HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS, THETA = 32, 64, 2, 1, 2, 500_000.0
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "The cat sat on the mat, and the dog ran in 2026!",
    "  spaces\tand\n\nnewlines  ",
    "größer, Привет, 中文, العربية, 😀",
    "def f(x): return x ** 2  # 12345",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def vocabulary():
    """Byte-level BPE with digits by themselves, as SmolLM has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS] + ["the cat and the dog return on the mat " * 9], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def llama():
    random = np.random.default_rng(21)
    out = ROOT / "tests/golden/gguf"
    writer = GGUFWriter(str(out / "llama.gguf"), "llama")
    writer.add_name("Tiny Llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, merges = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if id < 3 else TokenType.NORMAL for id in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    weights = {}

    def add(own, theirs, kind, *shape, heads=None):
        values = (random.normal(size=shape) * 0.05 + (len(shape) == 1)).astype(np.float32)
        kind = GGMLQuantizationType[kind]
        stored = quants.quantize(values, kind)
        writer.add_tensor(own, stored, raw_dtype=kind)
        read = quants.dequantize(stored, kind).astype(np.float32).reshape(shape)
        if heads:
            # Rows 2 i + p of a head are rows i + p d/2 in transformers.
            read = read.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        weights[theirs] = np.ascontiguousarray(read)

    head, (keys, inner) = HIDDEN // HEADS, (KEY_HEADS * HIDDEN // HEADS, INNER)
    add("token_embd.weight", "model.embed_tokens.weight", "Q8_0", len(tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", "F32", HIDDEN)
    factors = []
    for i in range(head // 2):
        wavelength = 2 * math.pi * THETA ** (2 * i / head)
        smooth = (8192 / wavelength - 1) / 3
        factors.append(1 if wavelength < 2048 else 8 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    for layer in range(LAYERS):
        own, theirs = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{own}.attn_norm.weight", f"{theirs}.input_layernorm.weight", "F32", HIDDEN)
        add(f"{own}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", "F32", HIDDEN)
        add(f"{own}.attn_q.weight", f"{theirs}.self_attn.q_proj.weight", "Q8_0", HIDDEN, HIDDEN, heads=HEADS)
        add(f"{own}.attn_k.weight", f"{theirs}.self_attn.k_proj.weight", "Q4_0", keys, HIDDEN, heads=KEY_HEADS)
        add(f"{own}.attn_v.weight", f"{theirs}.self_attn.v_proj.weight", "Q5_1", keys, HIDDEN)
        add(f"{own}.attn_output.weight", f"{theirs}.self_attn.o_proj.weight", "F16", HIDDEN, HIDDEN)
        add(f"{own}.ffn_gate.weight", f"{theirs}.mlp.gate_proj.weight", "BF16", inner, HIDDEN)
        add(f"{own}.ffn_up.weight", f"{theirs}.mlp.up_proj.weight", "Q5_0", inner, HIDDEN)
        add(f"{own}.ffn_down.weight", f"{theirs}.mlp.down_proj.weight", "Q4_1", HIDDEN, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(weights, out / "llama.safetensors")

    import llama_cpp

    model = llama_cpp.Llama(str(out / "llama.gguf"), vocab_only=True, verbose=False)
    cases = [{"text": text, "ids": model.tokenize(text.encode(), add_bos=True, special=True)} for text in TEXTS]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (out / "llama.json").write_text(f"[\n{lines}\n]\n")


codebooks()
blocks()
llama()
