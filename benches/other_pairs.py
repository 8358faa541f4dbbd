"""The other pairs: preparing rows, NF4, merging and generating text, by the Python packages and by `pipeline`.

    cargo build --release
    python3 benches/other_pairs.py prep --pipeline target/release/pipeline --python VENV/bin/python --trl PATH/trl_bench.py \
        --model MODEL --data rows.jsonl
    python3 benches/other_pairs.py nf4 ..            (no --data)
    python3 benches/other_pairs.py merge ..          (no --data; --dtype is that of MODEL)
    python3 benches/other_pairs.py generate ..       (--data gives the prompts)
    python3 benches/other_pairs.py generate .. --peer llama.cpp --llama-python VENV2/bin/python --gguf MODEL.gguf [--dtype bf16] [--nf4]

VENV, `trl_bench.py` and MODEL are those of `train_pair.py`. Each round measures both sides once, in turn; the medians of the rounds
are shown. Ours are whole stages: the seconds that the runner tells, reading and writing included; CPU seconds are those of the whole
process, with the way into the store.

* prep: rows a second through `apply_chat_template` and `tokenize`, against datasets.map with two processes. `--ours-data` may give
  our side more rows of the same kind: a stage of a few milliseconds measures the disk.
* nf4: bytes of the projections' weights a second of CPU time through `quantize`, against bitsandbytes' quantise alone, on one thread.
* merge: seconds and the process's peak memory, against merge_and_unload and save_pretrained of a model that is loaded already; their
  memory includes the interpreter. Also until the files are on the disk for good: ours in the store, theirs after an fsync of each.
* generate: greedy tokens a second with a cache of keys and values, prompts included; ours is the difference of `evaluate` with
  answers and without. The answers must be the same texts. With llama.cpp, which takes the weights as GGUF (`llama_peer.py convert`),
  theirs are measured one prompt after the other and, with several, all in one batch; ours in bf16 or from NF4 where told so. Its
  side never ends an answer, so the model must not either: use one with random weights.

Standard library only.
"""

import argparse
import json
import struct
from pathlib import Path

from pairs import Measured, Project, median, spread, table

# Greedy answers by transformers, run by the venv's Python.
GENERATE = """
import json, sys, time, torch, pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, answers, limit, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompts = [row["prompt_ids"] for row in pq.read_table(tokens).to_pylist()[:answers]]
ask = lambda ids, limit: model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=limit, do_sample=False)
with torch.inference_mode():
    ask(prompts[0], 4)
    began, cpu = time.perf_counter(), time.process_time()
    made = [ask(ids, limit)[0, len(ids):].tolist() for ids in prompts]
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
print(json.dumps(dict(tokens=sum(map(len, made)), seconds=seconds, cpu_s=cpu, texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in made])))
"""

# A merge by PEFT, and the seconds until its files are on the disk too.
MERGE = """
import json, os, sys, tempfile, time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
torch.manual_seed(3407)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dict(f32=torch.float32, bf16=torch.bfloat16)[dtype])
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.01)
with tempfile.TemporaryDirectory(dir=".") as out:
    os.sync()
    began = time.perf_counter()
    model.merge_and_unload().save_pretrained(out)
    seconds = time.perf_counter() - began
    for path in [*(os.path.join(out, name) for name in os.listdir(out)), out]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    print(json.dumps(dict(seconds=seconds, with_commit=time.perf_counter() - began)))
"""

# The prompts' ids, and texts of ids.
PROMPTS = """
import json, sys, pyarrow.parquet as pq
print(json.dumps([row["prompt_ids"] for row in pq.read_table(sys.argv[1]).to_pylist()[:int(sys.argv[2])]]))
"""
TEXTS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer.decode(ids, skip_special_tokens=True) for ids in json.loads(sys.argv[2])]))
"""

LORA = {"model": "base", "r": 16, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False, "seed": 3407}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["prep", "nf4", "merge", "generate"])
    parser.add_argument("--pipeline", required=True, type=Path)
    parser.add_argument("--python", required=True, type=Path)
    parser.add_argument("--trl", required=True, type=Path, help="trl_bench.py")
    parser.add_argument("--model", required=True, type=Path, help="a folder of save-model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ours-data", type=Path)
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only our side")
    parser.add_argument("--peer", default="transformers", choices=["transformers", "llama.cpp"])
    parser.add_argument("--llama-python", type=Path, help="a Python with numpy and llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--nf4", action="store_true", help="our side generates from weights in NF4")
    args = parser.parse_args()
    if args.peer == "llama.cpp" and not (args.llama_python and args.gguf):
        parser.error("--peer llama.cpp needs --llama-python and --gguf")
    if args.what in ("prep", "generate") and not args.data:
        parser.error(f"{args.what} needs --data")
    return args


def reference(args, command, *options):
    return Measured([args.python, args.trl.resolve(), command, *options], None)


def stages(args, data=None, **more):
    base = {"base": {"import_model": {"path": str(args.model.resolve())}}}
    if data:
        base["pairs"] = {"import_dataset": {"path": str(data.resolve()), **({"max_rows": args.answers} if args.what == "generate" else {})}}
        base["chats"] = {"apply_chat_template": {"dataset": "pairs", "tokenizer": "base"}}
        base["tokens"] = {"tokenize": {"dataset": "chats", "tokenizer": "base", "max_length": args.max_length}}
    return {"version": 1, "stages": {**base, **more}, "outputs": {"tokens": "out/tokens"} if data else {}}


def rounds(args, theirs, ours):
    """Both sides' results by round."""
    results = {"theirs": [], "ours": []}
    for _ in range(args.rounds):
        for side, work in [("theirs", theirs), ("ours", ours)]:
            if side == "theirs" and args.quick:
                continue
            results[side].append(work())
            print(json.dumps({"side": side, **results[side][-1]}), flush=True)
    return results


def show(results, *lines):
    """A table: each line has a title, what it is called in theirs and in ours, and its form."""
    rows = [["", "theirs", "ours", "ours / theirs"]]
    for title, theirs, ours, form in lines:
        mine = [result[ours] for result in results["ours"]]
        other = [result[theirs] for result in results["theirs"]]
        rows.append([title, spread(other, form) if other else "-", spread(mine, form), f"{median(mine) / median(other):.2f}" if other else "-"])
    print()
    table(rows)


def prep(args):
    data = args.ours_data or args.data
    project = Project(args.pipeline, stages(args, data), args.threads)
    project.run("tokens")

    def ours():
        templated, seconds = project.stage("chats")
        tokenised, more = project.stage("tokens")
        done = [event["done"] for _, _, event in tokenised.events() if event["event"] == "progress"]
        rows = max(done)
        return {
            "template": rows / seconds, "tokenise": rows / more, "template_cpu": rows / templated.cpu, "tokenise_cpu": rows / tokenised.cpu,
            "peak_mb": max(templated.peak_mb, tokenised.peak_mb), "rows": rows, "seconds": [seconds, more],
        }

    def theirs():
        told = reference(args, "prep", "--data", args.data.resolve(), "--num-proc", args.threads, "--max-length", args.max_length).last_object()
        return {
            "template": told["template_rows_per_s"], "trl_template": told["trl_template_rows_per_s"], "tokenise": told["tokenise_rows_per_s"],
            "tokens_a_pair": told["tokens_per_row_pair"], "peak_mb": told["peak_rss_mb"],
        }

    results = rounds(args, theirs, ours)
    show(
        results, ("chat template, rows/s", "template", "template", "{:.0f}"), ("the same by TRL's own step", "trl_template", "template", "{:.0f}"),
        ("tokenise, rows/s", "tokenise", "tokenise", "{:.0f}"), ("peak MB", "peak_mb", "peak_mb", "{:.0f}"),
    )


def projections(model):
    """Bytes of the projections' weights, by the heads of the safetensors files."""
    total = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        for name, tensor in head.items():
            if name.endswith("_proj.weight"):
                begin, end = tensor["data_offsets"]
                total += end - begin
    return total


def nf4(args):
    project = Project(args.pipeline, stages(args, base4={"quantize": {"model": "base", "double_quant": True}}), 1)
    project.run("base")
    project.run("base4")
    read = projections(args.model)

    def ours():
        measured, seconds = project.stage("base4")
        return {"cpu": read / measured.cpu / 1e9, "wall": read / seconds / 1e9, "peak_mb": measured.peak_mb}

    def theirs():
        measured = reference(args, "nf4", "--threads", 1)
        told = measured.last_object()[args.dtype]
        return {"cpu": told["quantise_in_GBps"], "wall": told["quantise_in_GBps"], "peak_mb": measured.peak_mb}

    results = rounds(args, theirs, ours)
    show(results, ("GB/s of input a CPU second", "cpu", "cpu", "{:.3f}"), ("GB/s of input, elapsed", "wall", "wall", "{:.3f}"), ("peak MB", "peak_mb", "peak_mb", "{:.0f}"))


def merge(args):
    project = Project(args.pipeline, stages(args, lora={"attach_lora": LORA}, merged={"merge": {"model": "base", "adapter": "lora"}}), args.threads)
    project.run("lora")
    project.run("merged")

    def ours():
        measured, seconds = project.stage("merged")
        return {"seconds": seconds, "with_commit": measured.with_commit, "cpu": measured.cpu, "peak_mb": measured.peak_mb}

    def theirs():
        command = [args.python, "-c", MERGE, args.model.resolve(), args.dtype, args.threads]
        measured = Measured(command, project.folder, args.threads)
        return {**measured.last_object(), "peak_mb": measured.peak_mb}

    results = rounds(args, theirs, ours)
    shards = [path.stat().st_size / 2**20 for path in args.model.glob("*.safetensors")]
    show(results, ("seconds", "seconds", "seconds", "{:.2f}"), ("until on the disk", "with_commit", "with_commit", "{:.2f}"), ("peak MB", "peak_mb", "peak_mb", "{:.0f}"))
    print(f"\nThe largest shard has {max(shards):.0f} MB.")


def generate(args):
    score = {"model": "base", "dataset": "tokens", "max_new_tokens": args.max_new_tokens}
    more = {}
    if args.nf4:
        more["base4"] = {"quantize": {"model": "base", "double_quant": True}}
        score["model"] = "base4"
    if args.dtype == "bf16":
        score["bf16"] = True
    recipe = stages(
        args, args.data, without={"evaluate": {**score, "num_answers": 0}}, scores={"evaluate": {**score, "num_answers": args.answers}}, **more
    )
    recipe["outputs"]["scores"] = "out/scores"
    project = Project(args.pipeline, recipe, args.threads)
    project.run()
    answers = [json.loads(line)["base"] for line in (project.folder / "out/scores/answers.jsonl").read_text().splitlines()]
    most = args.answers * args.max_new_tokens
    tokens = project.folder / "out/tokens/train.parquet"
    made = {}

    def transformers():
        command = [args.python, "-c", GENERATE, args.model.resolve(), tokens, args.answers, args.max_new_tokens, args.threads]
        told = Measured(command, None, args.threads).last_object()
        made.update(count=told["tokens"], texts=told["texts"])
        return {"rate": told["tokens"] / told["seconds"], "cpu": told["cpu_s"] / told["tokens"] * 1000}

    def llama():
        prompts = project.folder / "prompts.json"
        if not prompts.exists():
            prompts.write_text(Measured([args.python, "-c", PROMPTS, tokens, args.answers], None).texts()[-1])
        script = Path(__file__).resolve().with_name("llama_peer.py")
        command = [args.llama_python, script, "generate", args.gguf.resolve(), prompts]
        command += ["--limit", args.max_new_tokens, "--threads", args.threads]
        told = Measured(command, None, args.threads).last_object()
        result = {"rate": told["tokens"] / told["seconds"], "cpu": told["cpu_s"] / told["tokens"] * 1000}
        made["ids"] = told["ids"]
        if args.answers > 1:
            told = Measured([*command, "--together"], None, args.threads).last_object()
        return {**result, "batch_rate": told["tokens"] / told["seconds"], "batch_cpu": told["cpu_s"] / told["tokens"] * 1000}

    def ours():
        without, seconds = project.stage("without")
        with_answers, more = project.stage("scores")
        count = made.get("count", most)
        return {"rate": count / (more - seconds), "cpu": (with_answers.cpu - without.cpu) / count * 1000}

    if args.peer == "transformers":
        results = rounds(args, transformers, ours)
        show(results, ("tokens/s", "rate", "rate", "{:.1f}"), ("CPU ms a token", "cpu", "cpu", "{:.1f}"))
    else:
        results = rounds(args, llama, ours)
        show(
            results, ("tokens/s, theirs one after the other", "rate", "rate", "{:.1f}"), ("tokens/s, theirs in one batch", "batch_rate", "rate", "{:.1f}"),
            ("CPU ms a token, one after the other", "cpu", "cpu", "{:.1f}"), ("CPU ms a token, in one batch", "batch_cpu", "cpu", "{:.1f}"),
        )
        if "ids" in made:
            ids = json.dumps(made["ids"])
            made["texts"] = json.loads(Measured([args.python, "-c", TEXTS, args.model.resolve(), ids], None).texts()[-1])
    if made:
        same = sum(a == b for a, b in zip(answers, made["texts"]))
        print(f"\n{same} of {len(answers)} answers are the same texts; {made.get('count', most)} tokens of at most {most}.")


if __name__ == "__main__":
    given = arguments()
    {"prep": prep, "nf4": nf4, "merge": merge, "generate": generate}[given.what](given)
