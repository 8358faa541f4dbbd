#!/usr/bin/env python3
"""Checks by hand that GGUF files become the models and tokenizers that transformers and llama.cpp make of them.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 llama-cpp-python==0.3.36 sentencepiece==0.2.1
    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python tests/python/check_gguf_import.py target/release/pipeline --models a.gguf b.gguf \
        --llama-cpp llama_cpp_python-0.3.36/vendor/llama.cpp [--only models|vocabularies|families]

models: each file is imported in float32, and its tensors are compared with those that transformers' `from_pretrained(gguf_file=..)` has,
bit by bit; its tokenizer with llama.cpp's own on texts in many scripts; the logits of the folder (transformers, float32) with llama.cpp's.
vocabularies: the files that llama.cpp tests its tokenizers with (`models/ggml-vocab-*.gguf` with `.inp` and `.out`), each made a tiny model.
families: a tiny model of each family, saved by transformers and converted by llama.cpp's own converter, is imported again: its tensors and
its logits are those of before. The tokenizer is that of the first of the models; for families that llama.cpp converts with SentencePiece alone
one is trained, and our ids are compared with SentencePiece's own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXTS = [
    "Hello, World! It's 2026; we've 12345 things & 3.14159 more.",
    "  two  spaces   three\tand a tab\t\tand\n\nnewlines\r\n  end  ",
    "Größe, façade, naïve, Ærøskøbing, Żółć, Čeština, İstanbul",
    "Привет, мир! Кириллица и ёжик.  Ελληνικά: άλφα βήτα.",
    "中文分词测试：今天天气很好，我们去公园。日本語のテキスト、ひらがなとカタカナ。한국어 텍스트도 있습니다.",
    "العربية من اليمين إلى اليسار ١٢٣٤ שלום עולם हिन्दी में पाठ ภาษาไทยไม่มีช่องว่าง",
    "😀😃🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️‍🔥 e\u0301 \u200b zero width",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n\tif (a != b && c >= 0x1F) { i++; }\n",
    "I'LL don't WE'RE they'd \u2019s `code` <tag attr=\"v\">text</tag> https://example.com/a?b=c#d",
    "<|im_start|>user\nHi<|im_end|>\n<start_of_turn>model\nok<end_of_turn>\n",
    "                                        deep\n\n\n\n\n\nmany",
    "",
    " ",
    "\n",
]


def run(program, folder, recipe):
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [program, "run", "recipe.yaml"], cwd=folder, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        raise SystemExit(f"{program} failed in {folder}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def imported(program, file, work, dtype="float32"):
    """The folder that the program makes of a file."""
    folder = Path(tempfile.mkdtemp(dir=work))
    shutil.copyfile(file, folder / "model.gguf")
    stage = {"import_model": {"path": "model.gguf", "dtype": dtype}}
    told = run(program, folder, {"version": 1, "stages": {"model": stage}, "outputs": {"model": "out"}})
    return folder / "out", told


def llama(file, **more):
    import llama_cpp

    return llama_cpp.Llama(str(file), verbose=False, n_ctx=512, n_threads=2, **more)


def compare_tokenizer(folder, file):
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = llama(file, vocab_only=True)
    different = []
    for text in TEXTS:
        mine = ours.encode(text, add_special_tokens=True).ids
        other = theirs.tokenize(text.encode(), add_bos=True, special=True)
        if mine != other:
            different.append((text, mine, other))
        decoded = ours.decode(ours.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        if decoded != text:
            different.append((text, "decoded", decoded))
    return different


def check_model(program, file, work):
    import torch
    from transformers import AutoModelForCausalLM

    folder, told = imported(program, file, work)
    print(f"== {Path(file).name}")
    for text, mine, other in compare_tokenizer(folder, file):
        print(f"   tokenizer differs on {text[:40]!r}:\n      {mine}\n      {other}")
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            str(Path(file).parent), gguf_file=Path(file).name, dtype=torch.float32
        )
    except Exception as error:  # noqa: BLE001
        theirs = None
        print(f"   transformers can't read it: {type(error).__name__}: {str(error)[:200]}")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if theirs is not None:
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        unequal = [name for name in mine if not torch.equal(mine[name], other[name])]
        print(f"   {len(mine)} tensors, {len(unequal)} differ from transformers' {unequal[:5]}")
        keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "max_position_embeddings", "rope_theta", "head_dim", "tie_word_embeddings"]
        a, b = ours.config.to_dict(), theirs.config.to_dict()
        odd = {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}
        print(f"   config: {odd or 'the same keys'}")
    model = llama(file, logits_all=True)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["The capital of France is", TEXTS[4], TEXTS[7]]:
        ids = tokenizer.encode(text).ids
        model.reset()
        model.eval(ids)
        other = np.array(model.scores[: len(ids)])
        with torch.no_grad():
            mine = ours(torch.tensor([ids])).logits[0].double().numpy()
        q, p = mine - np.logaddexp.reduce(mine, axis=1, keepdims=True), other - np.logaddexp.reduce(other.astype(float), axis=1, keepdims=True)
        kl = (np.exp(q) * (q - p)).sum(axis=1)
        agree = (mine.argmax(axis=1) == other.argmax(axis=1)).mean()
        print(f"   logits beside llama.cpp: KL {kl.mean():.2e} (most {kl.max():.2e}), same arg max {agree:.0%} of {len(ids)}")


def tiny_model_of(vocabulary, out):
    """A Llama with hardly any weights and the tokenizer of a file without weights."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(vocabulary)
    writer = GGUFWriter(str(out), "llama")
    count = 0
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        value = field.contents()
        if key == "tokenizer.ggml.tokens":
            count = len(value)
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=field.types[1])
        else:
            writer.add_key_value(key, value, field.types[0])
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(4)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    zeros = lambda *shape: np.zeros(shape, dtype=np.float32)
    writer.add_tensor("token_embd.weight", zeros(count, 4))
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
        writer.add_tensor(f"blk.0.{name}.weight", zeros(4, 4))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", zeros(4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_vocabularies(program, source, work):
    from tokenizers import Tokenizer

    for file in sorted((source / "models").glob("ggml-vocab-*.gguf")):
        name = file.stem.removeprefix("ggml-vocab-")
        tests, results = Path(f"{file}.inp"), Path(f"{file}.out")
        if not tests.exists():
            continue
        tiny = work / f"{name}.gguf"
        tiny_model_of(file, tiny)
        folder, told = imported(program, tiny, work)
        if not (folder / "tokenizer.json").exists():
            why = [line for line in told.splitlines() if "tokenizer" in line][:1]
            print(f"{name:16} no tokenizer: {why}")
            continue
        ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
        texts = tests.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        expected = [[int(id) for id in line.split()] for line in results.read_text().split("\n")]
        wrong = []
        for text, ids in zip(texts, expected):
            mine = ours.encode(text, add_special_tokens=False).ids
            if mine != ids:
                wrong.append((text, mine, ids))
        more = compare_tokenizer(folder, file)
        print(f"{name:16} {len(texts) - len(wrong)} of {len(texts)} as llama.cpp's own tests, "
              f"{len(TEXTS) - len({text for text, _, _ in more})} of {len(TEXTS)} of ours")
        for text, mine, ids in [*wrong, *more][:6]:
            print(f"   {text[:60]!r}\n      {str(mine)[:160]}\n      {str(ids)[:160]}")


SENTENCEPIECE = ["gemma", "gemma2"]


def sentencepiece_folder(work):
    """A tokenizer of SentencePiece, trained on our texts."""
    import sentencepiece

    folder = work / "sentencepiece"
    folder.mkdir()
    (folder / "texts.txt").write_text("\n".join(line for text in TEXTS for line in text.splitlines()) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.98, pad_id=0, eos_id=2, bos_id=1, unk_id=3, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=["<start_of_turn>", "\u2581\u2581"],
        minloglevel=2,
    )
    # SentencePiece's own file doesn't tell llama.cpp's converter which symbols are defined by users.
    symbols = {"4": {"content": "<start_of_turn>", "special": True}, "5": {"content": "\u2581\u2581", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": symbols}))
    return folder


def compare_sentencepiece(trained, folder):
    import sentencepiece
    from tokenizers import Tokenizer

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text for text in TEXTS if "\r" not in text]
    return [text for text in texts if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text)], len(texts)


def families(size):
    """Tiny configurations, by family."""
    import transformers as t

    common = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, vocab_size=size, pad_token_id=0)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    yield "llama", t.LlamaConfig(**common, tie_word_embeddings=False)
    yield "llama-biased", t.LlamaConfig(**common, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    yield "llama3", t.LlamaConfig(**{**common, "max_position_embeddings": 131072}, rope_parameters=llama3)
    yield "llama-linear", t.LlamaConfig(**common, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    yield "mistral", t.MistralConfig(**common, sliding_window=None, head_dim=32)
    yield "qwen2", t.Qwen2Config(**common, tie_word_embeddings=True)
    yield "qwen3", t.Qwen3Config(**common, head_dim=32)
    yield "smollm3", t.SmolLM3Config(**common)
    yield "granite", t.GraniteConfig(**common, embedding_multiplier=12.0, attention_multiplier=0.015625,
                                     residual_multiplier=0.22, logits_scaling=8.0)
    yield "gemma3", t.Gemma3TextConfig(**common, head_dim=32, query_pre_attn_scalar=32, sliding_window=8)
    yield "gemma3-full", t.Gemma3TextConfig(**common, head_dim=32, query_pre_attn_scalar=32, sliding_window=8,
                                            rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})
    yield "gemma2", t.Gemma2Config(**common, head_dim=32, query_pre_attn_scalar=32, sliding_window=8)
    yield "gemma", t.GemmaConfig(**common, head_dim=32)
    yield "olmo2", t.Olmo2Config(**common)
    yield "olmo3", t.Olmo3Config(**common, sliding_window=8)
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    yield "qwen3-yarn", t.Qwen3Config(**common, head_dim=32, rope_parameters=yarn)
    yield "phi3", t.Phi3Config(**common)
    long = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(6)], "long_factor": [2.0 + i for i in range(6)],
            "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    yield "phi3-long", t.Phi3Config(**common, original_max_position_embeddings=64, rope_parameters=long)


def check_families(program, source, tokenizer, work, wanted):
    import torch
    from transformers import AutoModelForCausalLM

    # transformers builds Qwen2's tokenizer anew, so that model has its own.
    tiny_model_of(source / "models/ggml-vocab-qwen2.gguf", work / "qwen2-vocabulary.gguf")
    qwen2, _ = imported(program, work / "qwen2-vocabulary.gguf", work)
    torch.manual_seed(20)
    size_of = lambda folder: len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    trained = sentencepiece_folder(work)
    special = ["qwen2", *SENTENCEPIECE]
    both = [(tokenizer, family) for family in families(size_of(tokenizer)) if family[0] not in special]
    both += [(qwen2, family) for family in families(size_of(qwen2)) if family[0] == "qwen2"]
    both += [(trained, family) for family in families(900) if family[0] in SENTENCEPIECE]
    for tokenizer, (name, config) in both:
        if wanted and name not in wanted:
            continue
        size = config.vocab_size
        folder = work / f"family-{name}"
        config.bos_token_id, config.eos_token_id = 1, 2
        before = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for key, value in before.named_parameters():
                if "norm" in key or "bias" in key:
                    value.add_(torch.randn_like(value) * 0.1)
        before.save_pretrained(folder)
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"]:
            if (tokenizer / file).exists():
                shutil.copy(tokenizer / file, folder / file)
        if name.startswith("phi3"):
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings["tokenizer_class"] = "GPT2Tokenizer"
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        file = work / f"{name}.gguf"
        environment = {**os.environ, "PYTHONPATH": f"{source}/gguf-py:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [sys.executable, str(source / "convert_hf_to_gguf.py"), str(folder), "--outtype", "f32", "--outfile", str(file)],
            capture_output=True, text=True, timeout=300, env=environment,
        )
        if done.returncode != 0:
            print(f"{name:14} llama.cpp's converter refuses it: {done.stderr.strip().splitlines()[-1][:200]}")
            continue
        try:
            out, _ = imported(program, file, work)
        except SystemExit as error:
            said = [line for line in str(error).splitlines() if "can't be used" in line or "not supported" in line]
            print(f"{name:14} refused: {said[:2]}")
            continue
        after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        mine, other = after.state_dict(), before.state_dict()
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        largest = max((mine[key] - other[key]).abs().max().item() for key in mine)
        ids = torch.randint(3, size, (2, 48))
        with torch.no_grad():
            distance = (after(ids).logits - before(ids).logits).abs().max().item()
        print(f"{name:14} {after.config.model_type:12} weights {largest:.1e}, logits {distance:.1e}")
        if tokenizer == trained:
            different, count = compare_sentencepiece(trained, out)
            print(f"{'':14} {count - len(different)} of {count} texts as SentencePiece {different[:2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--family", nargs="*", help="of the families, these only (llama3, gemma2, ..)")
    parser.add_argument("--only", choices=["models", "vocabularies", "families"])
    arguments = parser.parse_args()
    program = str(Path(arguments.program).resolve())
    wanted = lambda part: arguments.only in (None, part)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        if wanted("models"):
            for file in arguments.models:
                check_model(program, file, work)
        if wanted("vocabularies") and arguments.llama_cpp:
            check_vocabularies(program, arguments.llama_cpp.resolve(), work)
        if wanted("families") and arguments.llama_cpp and arguments.models:
            tokenizer, _ = imported(program, arguments.models[0], work)
            check_families(program, arguments.llama_cpp.resolve(), tokenizer, work, arguments.family)


main()
