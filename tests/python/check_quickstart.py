#!/usr/bin/env python3
"""Checks by hand that the Python stack reads what the quickstart made, and agrees with its numbers.

    pip install torch transformers peft bitsandbytes pyarrow datasets
    cargo run -- run recipes/quickstart.yaml
    python tests/python/check_quickstart.py target/debug/pipeline

transformers scores the merged model, PEFT the base with our adapter, and bitsandbytes the 4-bit base with it, on the rows
that `evaluate` scored.
"""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
# Also scores the merged model.
EXTRA = "  again: { evaluate: { model: merged, dataset: tokens, max_new_tokens: 40 } }\n\noutputs:"
TOLERANCE = 2e-5
failed = []


def pipeline(*arguments):
    command = [sys.argv[1], *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def check(what, ours, theirs, tolerance=TOLERANCE):
    difference = abs(ours - theirs) / max(abs(theirs), 1e-6)
    verdict = "ok" if difference <= tolerance else "DIFFERS"
    print(f"{verdict:>7}  {what}: {ours:.7f} here, {theirs:.7f} there, {difference:.1e} apart")
    if difference > tolerance:
        failed.append(what)


@torch.no_grad()
def logps(model, rows, answer):
    """The mean over rows of the mean log-probability of an answer's tokens."""
    means = []
    for row in rows:
        prompt, ids = row["prompt_ids"], row[answer]
        logits = model(torch.tensor([prompt + ids])).logits[0].float()
        scored = torch.log_softmax(logits[len(prompt) - 1:-1], dim=-1)
        means.append(scored.gather(1, torch.tensor(ids)[:, None]).mean().item())
    return sum(means) / len(means)


def main():
    recipe = ROOT / "recipes/.check.yaml"
    recipe.write_text((ROOT / "recipes/quickstart.yaml").read_text().replace("\noutputs:", EXTRA))
    try:
        events = pipeline("run", "--json", str(recipe)).splitlines()
    finally:
        recipe.unlink()
    events = [json.loads(line) for line in events]
    artifacts = {e["stage"]: ROOT / ".pipeline/v1/artifacts" / e["artifact"] for e in events if "artifact" in e}

    for stage in ("split", "chats", "tokens"):
        for split in ("train", "test"):
            path = artifacts[stage] / f"{split}.parquet"
            table = pq.read_table(path)
            loaded = datasets.load_dataset("parquet", data_files=str(path), split="train")
            same = loaded.num_rows == table.num_rows and loaded.to_list() == table.to_pylist()
            print(f"{'ok' if same else 'DIFFERS':>7}  {stage}/{split}: {table.num_rows} rows, {table.column_names}")
            if not same:
                failed.append(stage)
    rows = pq.read_table(artifacts["tokens"] / "test.parquet").to_pylist()

    merged = AutoModelForCausalLM.from_pretrained(artifacts["merged"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifacts["merged"])
    again = json.loads((artifacts["again"] / "scores.json").read_text())["base"]
    for answer in ("chosen", "rejected"):
        check(f"merged model, logps/{answer}", again[f"logps/{answer}"], logps(merged, rows, f"{answer}_ids"))
    answers = [json.loads(line) for line in (artifacts["again"] / "answers.jsonl").read_text().splitlines()]
    for row, answer in zip(rows, answers):
        prompt = torch.tensor([row["prompt_ids"]])
        ids = merged.generate(prompt, max_new_tokens=40, do_sample=False, attention_mask=torch.ones_like(prompt))
        text = tokenizer.decode(ids[0, prompt.shape[1]:], skip_special_tokens=True)
        same = text == answer["base"]
        print(f"{'ok' if same else 'DIFFERS':>7}  greedy answer: {text!r}")
        if not same:
            failed.append("greedy answer")
    chats = pq.read_table(artifacts["chats"] / "test.parquet").to_pylist()
    pairs = pq.read_table(artifacts["split"] / "test.parquet").to_pylist()
    rendered = all(
        tokenizer.apply_chat_template([{"role": "user", "content": pair["prompt"]}], tokenize=False, add_generation_prompt=True)
        == chat["prompt"]
        for pair, chat in zip(pairs, chats)
    )
    own = (ROOT / "recipes/templates/llama3.jinja").read_text()
    written = (artifacts["merged"] / "chat_template.jinja").read_text() == own == tokenizer.chat_template
    stops = merged.generation_config.eos_token_id
    stops_there = tokenizer.convert_tokens_to_ids("<|eot_id|>") in (stops if isinstance(stops, list) else [stops])
    for what, holds in (("chat template", rendered), ("the recipe's template is the model's", written), ("answers end at <|eot_id|>", stops_there)):
        print(f"{'ok' if holds else 'DIFFERS':>7}  {what}")
        if not holds:
            failed.append(what)

    base = AutoModelForCausalLM.from_pretrained(artifacts["base"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, artifacts["tuned"]).eval()
    for answer in ("chosen", "rejected"):
        check(f"PEFT and merged model, logps/{answer}", again[f"logps/{answer}"], logps(adapted, rows, f"{answer}_ids"))

    scores = json.loads((artifacts["scores"] / "scores.json").read_text())
    four = AutoModelForCausalLM.from_pretrained(artifacts["base4"], dtype=torch.float32).eval()
    for module in four.modules():
        # On processors with AVX512-BF16 it would compute in bf16, whatever the compute dtype.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for answer in ("chosen", "rejected"):
        check(f"bitsandbytes, logps/{answer}", scores["base"][f"logps/{answer}"], logps(four, rows, f"{answer}_ids"))
    four = PeftModel.from_pretrained(four, artifacts["tuned"]).eval()
    for answer in ("chosen", "rejected"):
        check(f"bitsandbytes + PEFT, logps/{answer}", scores["adapter"][f"logps/{answer}"], logps(four, rows, f"{answer}_ids"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
