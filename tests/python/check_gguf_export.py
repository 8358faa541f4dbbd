#!/usr/bin/env python3
"""Checks by hand that llama.cpp and the `gguf` package take the files of `export_gguf`, and that they are the model.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 llama-cpp-python==0.3.36 numpy==2.4.6 safetensors==0.8.0
    python tests/python/check_gguf_export.py target/release/pipeline [--model FOLDER ..] [--only FAMILY ..] [--types f16 ..]

For a tiny model of each family (weights that f16 holds, a tokenizer of the family's kind trained on this script's texts) and for each
`--model`, every type is exported, and for a tiny model of each way of scaling rotary embeddings f16. Then, of each file:

- the `gguf` package reads all metadata and dequantises every tensor;
- llama.cpp loads it, gives the ids of transformers' tokenizer for a text in many scripts, and its logits are compared with transformers' of the
  model in f32;
- for f32 and f16 the greedy text of llama.cpp is that of transformers;
- its bytes are compared with what llama.cpp's own `llama_model_quantize` makes of the f16 file (types of all tensors, and their bytes where f16
  holds the weights), and the time of both is told.

Models that llama.cpp would compute in another way must be refused, with a reason that names what differs.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]
FTYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
TEXT = (
    "Hello, World! It's 2026; we've 12345 things & 3.14159 more.\n  two  spaces   three\tand a tab\t\tand\n\nnewlines\r\n  end  "
    "Größe, façade, naïve, Żółć, İstanbul. Привет, мир! Ελληνικά: άλφα. 中文分词测试：今天天气很好。日本語のテキスト、カタカナ。"
    "한국어 텍스트도 있습니다. العربية من اليمين ١٢٣٤ שלום हिन्दी में पाठ ภาษาไทย 😀🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️‍🔥\n"
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n\tif (a != b && c >= 0x1F) { i++; }\nI'LL don't WE'RE they'd `code`"
)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(kind):
    """A byte-level tokenizer that cuts words as `kind` does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    parts = {
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
        "dbrx": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
        "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
        "gpt2": [pre_tokenizers.ByteLevel(False)],
    }[kind]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    begin = tokenizer.token_to_id("<|begin|>")
    if kind in ("llama3", "dbrx"):
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


def sentence_piece(gemma):
    """A tokenizer as transformers makes it of SentencePiece's BPE, Gemma's or Llama 2's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    begin, end = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)|\n"), "isolated")
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + list(model["vocab"])
    vocab = {text: number for number, text in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if gemma else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ["<|im_start|>", "<|im_end|>"]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token="<unk>", clean_up_tokenization_spaces=False
    )


SIZES = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.06,
    pad_token_id=None,
)
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GEMMA = dict(
    head_dim=64, query_pre_attn_scalar=64, sliding_window=16, hidden_activation="gelu_pytorch_tanh", num_hidden_layers=6
)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)


def by_layer(full, sliding):
    """Rotary embeddings of layers without and with a window."""
    return {"full_attention": {"rope_type": "default", **full}, "sliding_attention": {"rope_type": "default", **sliding}}


def long_rope(original):
    return dict(
        sliding_window=None,
        original_max_position_embeddings=original,
        partial_rotary_factor=0.75,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            partial_rotary_factor=0.75,
            short_factor=[1 + number / 48 for number in range(24)],
            long_factor=[1 + number / 3 for number in range(24)],
            original_max_position_embeddings=original,
        ),
    )


# The name, transformers' configuration, what differs from SIZES, and the tokenizer.
FAMILIES = [
    ("llama", "LlamaConfig", dict(rope_parameters={"rope_theta": 5e5, **SCALED}), lambda: byte_level("llama3")),
    ("mistral", "MistralConfig", dict(sliding_window=None, head_dim=64), lambda: sentence_piece(False)),
    ("qwen2", "Qwen2Config", dict(tie_word_embeddings=True), lambda: byte_level("qwen2")),
    ("qwen3", "Qwen3Config", dict(head_dim=32), lambda: byte_level("qwen2")),
    ("smollm3", "SmolLM3Config", dict(tie_word_embeddings=True), lambda: byte_level("smollm")),
    (
        "granite",
        "GraniteConfig",
        dict(embedding_multiplier=6.0, attention_multiplier=0.02, residual_multiplier=0.4, logits_scaling=4.0),
        lambda: byte_level("smollm"),
    ),
    (
        "gemma",
        "GemmaConfig",
        dict(head_dim=64, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"),
        lambda: sentence_piece(True),
    ),
    ("gemma3", "Gemma3TextConfig", GEMMA, lambda: sentence_piece(True)),
    ("olmo2", "Olmo2Config", {}, lambda: byte_level("dbrx")),
    (
        "olmo3",
        "Olmo3Config",
        dict(sliding_window=16, rope_parameters=by_layer(dict(rope_theta=5e5, **YARN), dict(rope_theta=5e5))),
        lambda: byte_level("dbrx"),
    ),
    (
        "phi3",
        "Phi3Config",
        dict(sliding_window=None, original_max_position_embeddings=2048),
        lambda: byte_level("gpt2"),
    ),
    ("gemma2", "Gemma2Config", GEMMA, lambda: sentence_piece(True)),
]
# Ways of scaling, which the text is long enough to show.
ROPES = [
    ("qwen2-linear", "Qwen2Config", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e6)), lambda: byte_level("qwen2")),
    (
        "gemma3-linear",
        "Gemma3TextConfig",
        dict(**GEMMA, rope_parameters=by_layer(dict(rope_type="linear", factor=8.0, rope_theta=1e6), dict(rope_theta=1e4))),
        lambda: sentence_piece(True),
    ),
    ("qwen3-yarn", "Qwen3Config", dict(head_dim=64, rope_parameters=dict(rope_theta=1e6, **YARN)), lambda: byte_level("qwen2")),
    (
        "qwen3-yarn-1.7",
        "Qwen3Config",
        dict(head_dim=64, rope_parameters=dict(rope_theta=1e6, attention_factor=1.7, **YARN)),
        lambda: byte_level("qwen2"),
    ),
    ("phi3-short", "Phi3Config", long_rope(1024), lambda: byte_level("gpt2")),
    ("phi3-long", "Phi3Config", long_rope(32), lambda: byte_level("gpt2")),
]
# What must be refused, and a word of the reason.
REFUSED = [
    ("qwen3-llama3", "Qwen3Config", dict(rope_parameters=dict(rope_theta=1e6, **SCALED)), lambda: byte_level("qwen2"), "llama3"),
    (
        "olmo3-bases",
        "Olmo3Config",
        dict(sliding_window=16, rope_parameters=by_layer(dict(rope_theta=5e5), dict(rope_theta=1e4))),
        lambda: byte_level("dbrx"),
        "base",
    ),
    ("gemma-untied", "GemmaConfig", dict(tie_word_embeddings=False), lambda: sentence_piece(True), "tie_word_embeddings"),
    ("olmo2-tied", "Olmo2Config", dict(tie_word_embeddings=True), lambda: byte_level("dbrx"), "tie_word_embeddings"),
    ("qwen2-narrow", "Qwen2Config", dict(head_dim=32), lambda: byte_level("qwen2"), "wide"),
]


def tiny(folder, config, sizes, tokenizer):
    """A model folder with random weights that f16 holds."""
    torch.manual_seed(7)
    sizes = {**SIZES, **sizes, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    made = getattr(transformers, config)(**{**sizes, "eos_token_id": tokenizer.eos_token_id})
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
        weight.data = weight.data.to(torch.float16).to(torch.float32)
    model.save_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def export(program, folder, work, outtype):
    recipe = {
        "version": 1,
        "stages": {
            "base": {"import_model": {"path": str(folder)}},
            "gguf": {"export_gguf": {"model": "base", "outtype": outtype, "name": "m"}},
        },
        "outputs": {"gguf": f"out/{outtype}"},
    }
    (work / ".pipeline").mkdir(exist_ok=True)
    (work / "r.yaml").write_text(json.dumps(recipe))
    command = [program, "run", "r.yaml", "--allow-path", str(folder)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=900)
    if done.returncode:
        return None, done.stdout + done.stderr
    shown = subprocess.run([program, "show", "r.yaml", "gguf", "--json"], cwd=work, capture_output=True, text=True)
    (file,) = (work / "out" / outtype).glob("*.gguf")
    return file, shown.stdout


def tensors(file):
    reader = gguf.GGUFReader(file)
    for field in reader.fields.values():
        field.contents()
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
    return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in reader.tensors}


def reference(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = tokenizer(TEXT[:120])["input_ids"][:40]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        greedy = model.generate(
            torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False, repetition_penalty=1.0
        )
    return tokenizer, ids, logits, greedy[0].tolist()[len(ids) :]


def of_llama(file, ids, count):
    # Keys and values are kept in f32, so that nothing but the weights is rounded.
    llama = llama_cpp.Llama(
        str(file), n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0
    )
    llama.eval(ids)
    logits = torch.tensor(np.array(llama.scores[: len(ids)]))
    llama.reset()
    out = []
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(token)
        if len(out) == count:
            break
    return llama, logits, out


def quantised_by_llama(source, target, ftype):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 2
    start = time.monotonic()
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert failed == 0
    return time.monotonic() - start


def check(program, name, folder, types, exact):
    """Prints a line for each type; `exact`: f16 holds the weights."""
    tokenizer, ids, logits, greedy = reference(folder)
    want = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    failures = []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        half = None
        for outtype in types:
            start = time.monotonic()
            file, told = export(program, folder, work, outtype)
            seconds = time.monotonic() - start
            if file is None:
                reason = next((line for line in told.splitlines() if "error" in line or "failed" in line), told[-300:])
                print(f"{name:14} {outtype:7} not exported: {reason.strip()} FAILED")
                return [*failures, (name, outtype)]
            made = tensors(file)
            llama, found, out = of_llama(file, ids, len(greedy))
            apart = (found - found.mean(-1, keepdim=True)) - (logits - logits.mean(-1, keepdim=True))
            relative = (apart.norm() / (logits - logits.mean(-1, keepdim=True)).norm()).item()
            log_p, log_q = logits.log_softmax(-1), found.log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            same_ids = llama.tokenize(TEXT.encode(), add_bos=False, special=True) == want
            with_bos = llama.tokenize(b"Hello", add_bos=True, special=True) == tokenizer("Hello")["input_ids"]
            same_text = out == greedy
            line = f"{name:14} {outtype:7} {file.stat().st_size:>11} bytes, logits {relative:.1e}, KL {divergence:.1e}"
            line += f", ids {'same' if same_ids and with_bos else 'DIFFER'}, greedy {'same' if same_text else 'other'}"
            bad = not (same_ids and with_bos) or (outtype in ("f32", "f16") and not same_text)
            if outtype == "f16":
                half = file
            if half is not None and outtype in FTYPES:
                other = work / f"llama-{outtype}.gguf"
                theirs_seconds = quantised_by_llama(half, other, FTYPES[outtype])
                theirs = tensors(other)
                kinds = {key: value[0] for key, value in made.items()} == {key: value[0] for key, value in theirs.items()}
                order = list(made) == list(theirs)
                equal = sum(np.array_equal(made[key][1], theirs[key][1]) for key in made if key in theirs)
                line += f"; llama-quantize: types {'same' if kinds else 'DIFFER'}, order {'same' if order else 'differs'}"
                line += f", {equal} of {len(made)} tensors equal, {theirs_seconds:.1f} s (ours with its proof {seconds:.1f} s)"
                bad |= not kinds or (exact and equal != len(made))
            if bad:
                failures.append((name, outtype))
            print(line + (" FAILED" if bad else ""), flush=True)
            llama.close()
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--model", nargs="*", default=[])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--types", nargs="*", default=TYPES)
    args = parser.parse_args()
    program = str(Path(args.program).resolve())
    failures = []
    for name, config, sizes, tokenizer in FAMILIES:
        if args.only is None or name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                tiny(folder, config, sizes, tokenizer())
                failures += check(program, name, Path(folder), args.types, True)
    for name, config, sizes, tokenizer in ROPES:
        if args.only is None or name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                tiny(folder, config, sizes, tokenizer())
                failures += check(program, name, Path(folder), ["f16"], True)
    for name, config, sizes, tokenizer, reason in REFUSED:
        if args.only is None or name in args.only:
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as work:
                tiny(folder, config, sizes, tokenizer())
                file, told = export(program, Path(folder), Path(work), "f16")
                told = " ".join(told.split())
                refused = file is None and reason in told
                print(f"{name:14} {'refused: ' + told[told.find('llama.cpp') :][:160] if refused else 'NOT REFUSED: ' + told[-300:]}")
                failures += [] if refused else [(name, "f16")]
    for model in args.model:
        failures += check(program, Path(model).name, Path(model).resolve(), args.types, False)
    print(f"failed: {failures}" if failures else "all as expected")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
