"""One training as a pair, ORPO or DPO: TRL + PEFT + transformers, and `pipeline`, on the same model, rows, adapter and settings.

    cargo build --release
    python3 benches/train_pair.py --pipeline target/release/pipeline --python VENV/bin/python --trl PATH/trl_bench.py \
        --preset small --model MODEL --data rows.parquet [--dtype f32] [--gc 0] [--steps 6] [--rounds 3] [--threads 2]

VENV holds the reference's packages. MODEL is what `trl_bench.py save-model --preset small --dtype f32 --out MODEL` wrote, in the
folder in which this is started (the tokenizer `tok-8192` is made beside it); without `--model` it is written anew. The rounds
alternate theirs and ours, so that noise of the machine meets both alike; quote the medians of the ratios, and CPU seconds where the
machine is busy.

What is counted: real tokens, which are prompt and answer of chosen and rejected, the prompt twice, no padding. The first step
counts on neither side. Their times are from the start of a step's first micro-batch to the end of its update; ours are from the
arrival of one step's metrics to the arrival of the next, so logging is in ours only. Memory is the process's peak: theirs includes
the preparation of the rows, ours has it done by earlier stages, in other processes.

With `--folder` both sides take whatever model lies in MODEL, real weights too, and `trl_bench.py` is not needed.

`--method dpo` compares DPO, for which theirs needs `--folder`: with the reference model in each step, or, by `--reference rows` for ours and
`--trl-reference rows` for theirs, computed before the first step (ours by `score_reference`, in a stage that isn't timed; nor is theirs).

`--ours KEY=VALUE` sets a further parameter of the training, `--quick` leaves their side out. Standard library only.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from pairs import PROJECTIONS, Measured, Project, median, schema, spread, table

# Tokens of each row by our tokens' table; run by the venv's Python, which has pyarrow.
COUNT = """
import json, sys, pyarrow.parquet as pq
lengths = []
for row in pq.read_table(sys.argv[1]).to_pylist():
    prompt, other = row["prompt_ids"], row.get("rejected_prompt_ids") or row["prompt_ids"]
    lengths.append(len(prompt) + len(row["chosen_ids"]) + len(other) + len(row["rejected_ids"]))
print(json.dumps(lengths))
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", required=True, type=Path)
    parser.add_argument("--python", required=True, type=Path)
    parser.add_argument("--trl", type=Path, help="trl_bench.py")
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "135m"])
    parser.add_argument("--model", type=Path, help="a folder of save-model, of the same preset and dtype")
    parser.add_argument("--folder", action="store_true", help="theirs loads MODEL too, whatever it is, by trl_folder.py; MODEL/adapter_init is its `adapter`")
    parser.add_argument("--data", required=True, type=Path, help="rows as Parquet or JSONL: system, prompt, chosen, rejected")
    parser.add_argument("--method", default="orpo", choices=["orpo", "dpo"])
    parser.add_argument("--reference", default="pass", choices=["pass", "rows"])
    parser.add_argument("--trl-reference", default="pass", choices=["pass", "rows"])
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--trl-dtype", choices=["f32", "bf16"], help="theirs, if it is to differ")
    parser.add_argument("--gc", type=int, default=0, choices=[0, 1])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accum", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="only our side")
    parser.add_argument("--save", type=Path, help="append each run as a line of JSON to this file")
    args = parser.parse_args()
    args.trl_dtype = args.trl_dtype or args.dtype
    if args.folder and not args.model or not args.folder and not args.trl:
        parser.error("expected --trl, or --folder with --model")
    if args.method == "dpo" and not args.folder and not args.quick:
        parser.error("--method dpo: expected --folder")
    if args.steps < 2:
        parser.error("--steps: expected at least 2, for the first one does not count")
    return args


def name_of(args):
    return args.model.name if args.folder else args.preset


def save_model(args, folder):
    command = [args.python, args.trl.resolve(), "save-model", "--preset", args.preset, "--dtype", args.dtype]
    subprocess.run([*command, "--rank", str(args.rank), "--out", folder], check=True, capture_output=True)


def recipe(args, model):
    """The same training as `trl_bench.py train`."""
    adapter_init = model / "adapter_init"
    if '"import_adapter"' in schema(args.pipeline):
        lora = {"import_adapter": {"path": str(adapter_init)}}
    else:
        # B is 0 either way, so the first losses agree; later ones differ by another A.
        lora = {"attach_lora": {"model": "base", "r": args.rank, "lora_alpha": 16, "target_modules": PROJECTIONS, "seed": 3407}}
    train = {
        "model": "base", "adapter": "lora", "dataset": "tokens", "beta": 0.1, "learning_rate": 2e-4, "lr_scheduler_type": "cosine",
        "max_steps": args.steps, "per_device_train_batch_size": args.batch, "gradient_accumulation_steps": args.accum,
        "optim": "adamw_torch", "gradient_checkpointing": bool(args.gc), "bf16": args.dtype == "bf16", "seed": 3407,
        "train_sampling_strategy": "sequential", "logging_steps": 1,
    }
    for setting in args.ours:
        key, _, value = setting.partition("=")
        train[key] = json.loads(value) if value[:1] in "0123456789-tfn\"[{" else value
    rows = args.steps * args.batch * args.accum
    stages = {
        "pairs": {"import_dataset": {"path": str(args.data.resolve()), "max_rows": rows}},
        "base": {"import_model": {"path": str(model)}},
        "chats": {"apply_chat_template": {"dataset": "pairs", "tokenizer": "base"}},
        "tokens": {"tokenize": {"dataset": "chats", "tokenizer": "base", "max_length": args.max_length}},
        "lora": lora,
        "tuned": {f"train_{args.method}": train},
    }
    if args.method == "dpo":
        stages["tokens"]["tokenize"]["trainer"] = "dpo"
    if args.reference == "rows":
        reference = {"model": "base", "dataset": "tokens", "bf16": args.dtype == "bf16"}
        stages["reference"] = {"score_reference": reference}
        train["dataset"] = "reference"
    return {"version": 1, "stages": stages, "outputs": {"tokens": "out/tokens"}}


def theirs(args):
    if args.folder:
        command = [args.python, Path(__file__).parent / "trl_folder.py", "train", "--model", args.model.resolve(), "--data", args.data.resolve()]
        command += ["--method", args.method, "--reference", args.trl_reference]
    else:
        command = [args.python, args.trl.resolve(), "train", "--preset", args.preset, "--data", args.data.resolve()]
    for name in ["steps", "batch", "accum", "rank", "threads", "gc", "max_length"]:
        command += [f"--{name.replace('_', '-')}", getattr(args, name)]
    told = Measured([*command, "--dtype", args.trl_dtype], None).last_object()
    return {
        "tokens_per_s": told["real_tok_per_s"], "cpu_s": told["cpu_s_per_step_median"], "peak_mb": told["peak_rss_mb"],
        "loss": told["loss"], "step_s": told["s_per_step_all"], "tokens_per_step": told["real_tok_per_step"],
    }


def ours(args, project, tokens):
    measured, _ = project.stage("tuned")
    steps = [(wall, cpu, event) for wall, cpu, event in measured.events() if event["event"] == "metrics"]
    steps = [step for step in steps if "loss" in step[2]["values"]]
    if len(steps) != args.steps:
        raise SystemExit(f"expected {args.steps} steps, but {len(steps)} were told")
    pairs = list(zip(steps, steps[1:]))
    return {
        "tokens_per_s": sum(tokens[1:]) / (steps[-1][0] - steps[0][0]), "cpu_s": median([b[1] - a[1] for a, b in pairs]),
        "peak_mb": measured.peak_mb, "loss": [round(event["values"]["loss"], 5) for _, _, event in steps],
        "step_s": [round(b[0] - a[0], 3) for a, b in pairs], "tokens_per_step": round(sum(tokens[1:]) / (len(tokens) - 1)),
    }


def main():
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="pair-model-") as temporary:
        model = args.model.resolve() if args.model else Path(temporary) / "model"
        if not args.model:
            save_model(args, model)
        project = Project(args.pipeline, recipe(args, model), args.threads)
        project.run("tokens", "lora", *(["reference"] if args.reference == "rows" else []))
        table_of_tokens = project.folder / "out/tokens/train.parquet"
        counted = subprocess.run([args.python, "-c", COUNT, table_of_tokens], capture_output=True, text=True, check=True)
        lengths = json.loads(counted.stdout)
        group = args.batch * args.accum
        tokens = [sum(lengths[start:start + group]) for start in range(0, len(lengths), group)]

        runs = {"theirs": [], "ours": []}
        for number in range(args.rounds):
            order = ["theirs", "ours"] if number % 2 == 0 else ["ours", "theirs"]
            for side in order:
                if side == "theirs" and args.quick:
                    continue
                result = theirs(args) if side == "theirs" else ours(args, project, tokens)
                runs[side].append(result)
                about = {"side": side, "preset": name_of(args), "data": args.data.name, "dtype": args.dtype if side == "ours" else args.trl_dtype}
                line = json.dumps({**about, "gc": args.gc, "threads": args.threads, **result})
                print(line, flush=True)
                if args.save:
                    with args.save.open("a") as file:
                        file.write(line + "\n")
        show(args, runs)


def show(args, runs):
    print(f"\n{args.method}, reference: ours {args.reference}, theirs {args.trl_reference}")
    print(f"{name_of(args)}, {args.dtype} (theirs {args.trl_dtype}), gc {args.gc}, {args.threads} threads, {args.data.name}, {args.rounds} rounds:\n")
    names = [("real tokens/s", "tokens_per_s", "{:.1f}"), ("CPU s a step", "cpu_s", "{:.3f}"), ("peak MB", "peak_mb", "{:.0f}")]
    rows = [["", "theirs", "ours", "ours / theirs"]]
    for title, name, form in names:
        mine, other = [run[name] for run in runs["ours"]], [run[name] for run in runs["theirs"]]
        ratio = spread([a / b for a, b in zip(mine, other)]) if other else "-"
        rows.append([title, spread(other, form) if other else "-", spread(mine, form), ratio])
    mine = runs["ours"][0]
    if runs["theirs"]:
        other = runs["theirs"][0]
        rows.append(["real tokens a step", other["tokens_per_step"], mine["tokens_per_step"], "same" if other["tokens_per_step"] == mine["tokens_per_step"] else "DIFFERENT"])
        far = max(abs(a - b) / abs(b) for a, b in zip(mine["loss"], other["loss"]))
        rows.append(["loss, first and last", f"{other['loss'][0]} {other['loss'][-1]}", f"{mine['loss'][0]} {mine['loss'][-1]}", f"within {far:.1e}"])
    table(rows)


if __name__ == "__main__":
    main()
