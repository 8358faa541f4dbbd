"""Ids by transformers' AutoTokenizer where the files beside tokenizer.json say something of tokens: cases.json.

    python generate_tokenizers.py

transformers 5.23, tokenizers 0.23; no hub access. The tokenizers are that of ../model and metaspace.json, a small byte-pair one of
Llama 2's make, trained here on ../rows.py. Each case replaces files of a model folder and tells what AutoTokenizer makes of some
texts, or which error it ends with.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent / "model"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1018, "eos_token_id": 1019, "vocab_size": 1024}
TEXTS = [
    "Hello <|tool|> there<|end_of_text|>",
    "<|begin_of_text|>a <|x|>  <|y|> b<|z|>c <|extra|><|eot_id|>",
    "<s>User: hi</s> <s> yes</s>\nno <tool>x</tool> y",
    "Straße and  two spaces\n\nnew",
    " leading and trailing ",
    "",
    "tree",
    "It's 12345 e\u0301 don'T",
]


def metaspace():
    sys.path.insert(0, str(HERE.parent))
    import rows

    texts = [json.dumps(value, ensure_ascii=False) for value in vars(rows).values() if isinstance(value, (list, tuple))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = [AddedToken(token, special=True, normalized=False) for token in ["<unk>", "<s>", "</s>"]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] in ("<unk>", "<s>", "</s>")]
    state["post_processor"] = json.loads(
        '{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],'
        ' "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],'
        ' "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}'
    )
    state["decoder"] = json.loads(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]).__getstate__()
    )
    (HERE / "metaspace.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    assert special


def token(content, **more):
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **flags, **more}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = {**FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|reserved_special_token_250|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DECODER = {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>")}

# name, tokenizer, files beside it
CASES = [
    ("as it is", "model", {"tokenizer_config.json": NAMED}),
    ("bos null", "model", {"tokenizer_config.json": {**NAMED, "bos_token": None}}),
    ("no bos", "model", {"tokenizer_config.json": {**FAST, "eos_token": "<|eot_id|>"}}),
    ("add_bos_token false", "model", {"tokenizer_config.json": {**NAMED, "add_bos_token": False}}),
    ("add_eos_token true", "model", {"tokenizer_config.json": {**NAMED, "add_bos_token": True, "add_eos_token": True}}),
    ("additional", "model", {"tokenizer_config.json": {**NAMED, "additional_special_tokens": ["<|tool|>", "<|x|>"]}}),
    ("extra list", "model", {"tokenizer_config.json": {**NAMED, "extra_special_tokens": ["<|tool|>"], "additional_special_tokens": ["<|y|>"]}}),
    ("extra as objects", "model", {"tokenizer_config.json": {**NAMED, "additional_special_tokens": [{"__type": "AddedToken", **token("<|x|>", lstrip=True)}, "<|y|>"]}}),
    ("extra dict", "model", {"tokenizer_config.json": {**NAMED, "extra_special_tokens": {"image_token": "<|x|>", "z": "<|z|>"}}}),
    ("model-specific", "model", {"tokenizer_config.json": {**NAMED, "tool_token": "<|tool|>"}}),
    ("known in vocab", "model", {"tokenizer_config.json": {**NAMED, "additional_special_tokens": ["the", "<|eot_id|>"]}}),
    ("decoder", "model", {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"1024": token("<|tool|>"), "1025": token("<|x|>", special=False, normalized=True)}}}),
    ("decoder out of order", "model", {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"1030": token("<|tool|>"), "1026": token("<|x|>"), "1018": token("<|begin_of_text|>")}}}),
    ("decoder with strips", "model", {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"1024": token("<|x|>", lstrip=True, rstrip=True), "1025": token("<|z|>", single_word=True)}}}),
    ("decoder changes flags", "model", {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"1019": token("<|end_of_text|>", lstrip=True)}}}),
    ("bos only there", "model", {"tokenizer_config.json": {**NAMED, "bos_token": "<|x|>"}}),
    ("pad only there", "model", {"tokenizer_config.json": {**NAMED, "pad_token": "<pad>"}}),
    ("special map", "model", {"tokenizer_config.json": FAST, "special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": token("<|eot_id|>"), "additional_special_tokens": ["<|x|>"]}}),
    ("special map wins", "model", {"tokenizer_config.json": NAMED, "special_tokens_map.json": {"eos_token": "<|eot_id|>"}}),
    ("special map beside decoder", "model", {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {}}, "special_tokens_map.json": {"eos_token": "<|eot_id|>", "extra_special_tokens": ["<|x|>"]}}),
    ("special map extra", "model", {"tokenizer_config.json": {**NAMED, "additional_special_tokens": ["<|y|>"]}, "special_tokens_map.json": {"extra_special_tokens": ["<|x|>", token("<|z|>")]}}),
    ("special map with null", "model", {"tokenizer_config.json": NAMED, "special_tokens_map.json": {"bos_token": None}}),
    ("added tokens file", "model", {"tokenizer_config.json": {**NAMED, "additional_special_tokens": ["<|x|>"]}, "added_tokens.json": {"<|tool|>": 1024, "<|x|>": 1025}}),
    ("added tokens file alone", "model", {"added_tokens.json": {"<|tool|>": 1024}, "special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}}),
    ("byte level as llama", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "LlamaTokenizer", "legacy": False}}),
    ("byte level as llama fast", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "LlamaTokenizerFast", "additional_special_tokens": ["<|x|>"]}}),
    ("backend", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "TokenizersBackend"}}),
    ("unknown class", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "NoSuchTokenizer"}}),
    ("split special", "model", {"tokenizer_config.json": {**NAMED, "split_special_tokens": True}}),
    ("metaspace fast", "metaspace", {"tokenizer_config.json": {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}}),
    ("llama", "metaspace", {"tokenizer_config.json": LLAMA}),
    ("llama fast", "metaspace", {"tokenizer_config.json": {**LLAMA, "tokenizer_class": "LlamaTokenizerFast"}}),
    ("llama legacy false", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": False, "added_tokens_decoder": DECODER}}),
    ("llama legacy true", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": True, "added_tokens_decoder": DECODER}}),
    ("llama no prefix", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": False, "add_prefix_space": False}}),
    ("llama prefix null", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": False, "add_prefix_space": None}}),
    ("llama tokens", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": False, "added_tokens_decoder": {**DECODER, "420": token("<tool>"), "421": token("</tool>", normalized=True, special=False)}}}),
    ("llama add eos", "metaspace", {"tokenizer_config.json": {**LLAMA, "legacy": False, "add_bos_token": False, "add_eos_token": True}}),
    ("llama without tokens", "metaspace", {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}),
    ("llama bos null", "metaspace", {"tokenizer_config.json": {**LLAMA, "bos_token": None}}),
    ("gpt2", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}}),
    ("gpt2 prefix", "model", {"tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}}),
    ("qwen2", "model", {"tokenizer_config.json": {**NAMED, "tokenizer_class": "Qwen2Tokenizer"}}),
    ("qwen2 without tokens", "model", {"tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast"}}),
    ("qwen2 metaspace", "metaspace", {"tokenizer_config.json": {**LLAMA, "tokenizer_class": "Qwen2Tokenizer"}}),
    ("llama without class", "metaspace", {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}),
]


def case(name, base, files):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        shutil.copy(MODEL / "tokenizer.json" if base == "model" else HERE / "metaspace.json", folder / "tokenizer.json")
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        made = {"name": name, "tokenizer": base, "files": files}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            return {**made, "error": type(error).__name__}
        return {
            **made,
            "class": type(tokenizer).__name__,
            "special": {key: [getattr(tokenizer, key), getattr(tokenizer, key + "_id")] for key in ("bos_token", "eos_token", "pad_token", "unk_token")},
            "length": len(tokenizer),
            "ids": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
            "ids_with_special": [tokenizer.encode(text) for text in TEXTS],
            "decoded": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in TEXTS],
        }


if __name__ == "__main__":
    if not (HERE / "metaspace.json").exists():
        metaspace()
    cases = [json.dumps(case(*each), ensure_ascii=False) for each in CASES]
    (HERE / "cases.json").write_text('{"texts": ' + json.dumps(TEXTS, ensure_ascii=False) + ',\n"cases": [\n' + ",\n".join(cases) + "\n]}\n", encoding="utf-8")
