#!/usr/bin/env python3
"""Checks that transformers and PEFT read what `add_tokens`, `attach_lora` with `trainable_token_indices` and `merge` write.

pins: as in ../golden/generate.py. usage: python tests/python/check_tokens.py target/debug/pipeline

The recipe is the one of tests/it/tokens.rs. Tokenizers are compared by their ids for texts with old and new tokens, weights of the merged model with
PEFT's `merge_and_unload`, and the embeddings with those after transformers' `resize_token_embeddings`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["a <tool>{}</tool> b", "<|im_start|>user\nin Köln", "<tool><tool> <|pad|><|im_start|>", "nothing new <too l>", " <tool> </tool>x"]
failed = []


def check(what, holds, shown=""):
    print(f"{'ok' if holds else 'WRONG':>6}  {what:60} {shown}")
    if not holds:
        failed.append(what)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def furthest(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def main():
    program = str(Path(sys.argv[1]).resolve())
    source = (ROOT / "tests/it/tokens.rs").read_text(encoding="utf-8")
    recipe = re.search(r'const RECIPE: &str = "\\\n(.*?)";\n', source, re.S)[1]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / ".pipeline").mkdir()
        shutil.copytree(ROOT / "tests/golden/model", folder / "model")
        rows = [{"prompt": f"Use the <tool> number {n}", "chosen": f"<tool>{n}</tool>", "rejected": "I can't."} for n in range(4)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        subprocess.run([program, "run", "recipe.yaml", "-q"], cwd=folder, check=True)
        out = folder / "out"

        theirs = AutoTokenizer.from_pretrained(folder / "model")
        theirs.add_tokens(["<tool>", "</tool>"])
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "pad_token": "<|pad|>"})
        ours = AutoTokenizer.from_pretrained(out / "wider")
        for text in TEXTS:
            ids = [made(text, add_special_tokens=False).input_ids for made in (ours, theirs)]
            check(f"ids of {text!r}", ids[0] == ids[1], ids[0])
            told = [made.decode(ids[0], skip_special_tokens=True) for made in (ours, theirs)]
            check(f"text of {text!r}", told[0] == told[1], told[0])
        check("pad_token", ours.pad_token_id == theirs.pad_token_id == 1026)
        check("special tokens", set(ours.all_special_tokens) == set(theirs.all_special_tokens), ours.all_special_tokens)

        base = load(folder / "model")
        torch.manual_seed(42)
        base.resize_token_embeddings(len(theirs), pad_to_multiple_of=16)
        wider = load(out / "wider")
        check("embeddings of resize_token_embeddings", furthest(base, wider) < 2e-8, furthest(base, wider))
        merged = load(out / "merged")
        for name in ["tuned", "whole"]:
            adapted = PeftModel.from_pretrained(load(out / "wider"), out / name)
            if name == "tuned":
                change = adapted.merge_and_unload()
                check("merge_and_unload", furthest(change, merged) < 1e-6, furthest(change, merged))
                rows = (merged.model.embed_tokens.weight - wider.model.embed_tokens.weight).abs().amax(1).nonzero().flatten().tolist()
                check("rows of the embeddings that differ", rows == [1024, 1025], rows)
                rows = (merged.lm_head.weight - wider.lm_head.weight).abs().amax(1).nonzero().flatten().tolist()
                check("rows of the head that differ", rows == [1024, 1025], rows)
            else:
                check("modules_to_save is read", adapted is not None)
        adapted = PeftModel.from_pretrained(load(out / "wider"), out / "tuned4")
        check("trained beside 4 bits is read", adapted is not None)
    sys.exit(f"wrong: {failed}" if failed else 0)


main()
