"""Compares the memory that trainings are estimated to take with what they took.

    python3 tests/python/estimate_memory.py --program target/release/pipeline --data pairs.jsonl --model small=DIR [--model ..]

Each model is a Hugging Face folder. Prints a Markdown table: the estimate that a training told before its first step, the
peak that the system measured for its process (VmHWM), and their ratio. Needs nothing beyond Python.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import tempfile


def recipe(model, data, case, rows, steps):
    stages = {
        "pairs": {"import_dataset": {"path": data, "max_rows": rows}},
        "base": {"import_model": {"path": model}},
        "chats": {"apply_chat_template": {"dataset": "pairs", "tokenizer": "base"}},
        "tokens": {"tokenize": {"dataset": "chats", "tokenizer": "base", "max_length": case["max_length"]}},
    }
    base = "base"
    if case["dtype"] == "nf4":
        stages["base4"] = {"quantize": {"model": "base"}}
        base = "base4"
    train = {
        "model": base,
        "dataset": "tokens",
        "max_steps": steps,
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_checkpointing": case["checkpointing"],
        "bf16": case["dtype"] == "bf16",
        "save_steps": 10_000,
        "logging_steps": 1,
    }
    if case["lora"]:
        stages["lora"] = {"attach_lora": {"model": base, "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}}
        train["adapter"] = "lora"
    stages["tuned"] = {case["kind"]: train}
    return {"version": 1, "stages": stages}


def measure(program, model, data, case, rows, steps, store):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe(model, data, case, rows, steps)))
        command = [program, "run", str(path), "--allow-path", "/", "--store", store, "--force", "tuned", "tuned"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{case}: {ended.stderr}")
    records = pathlib.Path(store, "v1", "records").glob("*.json")
    newest = max(records, key=lambda record: record.stat().st_mtime)
    notes = json.loads(newest.read_text())["notes"]
    return notes["estimate"], notes["peak_memory"]


def cases(quick):
    base = {"max_length": 512, "accumulation": 1, "lora": True, "checkpointing": False, "batch": 2}
    for kind, dtype, checkpointing in itertools.product(
        ["train_sft", "train_orpo", "train_dpo"], ["f32", "bf16", "nf4"], [False, True]
    ):
        yield base | {"kind": kind, "dtype": dtype, "checkpointing": checkpointing}
    if quick:
        return
    for batch, accumulation in [(1, 1), (8, 1), (1, 8)]:
        yield base | {"kind": "train_orpo", "dtype": "f32", "batch": batch, "accumulation": accumulation}
    for kind, checkpointing in [("train_sft", False), ("train_sft", True), ("train_dpo", True)]:
        yield base | {"kind": kind, "dtype": "f32", "lora": False, "checkpointing": checkpointing}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the main cases alone")
    parser.add_argument("--parts", action="store_true", help="with the parts of each estimate")
    args = parser.parse_args()
    print("| model | method | weights | trained | batch | checkpointing | estimate | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 1.0
    with tempfile.TemporaryDirectory() as store:
        for model in args.model:
            name, folder = model.split("=", 1)
            for case in cases(args.quick):
                found, peak = measure(args.program, folder, args.data, case, args.rows, args.steps, store)
                estimate = found["peak_memory"]
                ratio = estimate / peak
                worst = max(worst, ratio, 1 / ratio)
                print(
                    f"| {name} | {case['kind'].removeprefix('train_')} | {case['dtype']} | {'LoRA' if case['lora'] else 'all'} "
                    f"| {case['batch']} x {case['accumulation']} | {'yes' if case['checkpointing'] else 'no'} "
                    f"| {estimate / 1e6:.0f} MB | {peak / 1e6:.0f} MB | {ratio:.3f} |",
                    flush=True,
                )
                if args.parts:
                    parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in found["memory"].items())
                    print(f"    {found['counts']['longest_pass']} tokens: {parts}", flush=True)
    print(f"\nThe worst is a factor of {worst:.3f}.")


if __name__ == "__main__":
    main()
