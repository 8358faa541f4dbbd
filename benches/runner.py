"""What the runner costs: CPU seconds of whole processes, medians; DVC beside it where there is one.

    cargo build --release && cargo build --release --bench copies
    python3 benches/runner.py --pipeline target/release/pipeline --copies target/release/deps/copies-* [--dvc dvc] [--repeat 7]

Each round measures every candidate once, so that noise of the machine meets all alike. Standard library only.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def fine(command, folder):
    """CPU seconds and wall seconds of a process."""
    began = time.monotonic()
    with open(os.devnull, "w") as null:
        process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=null, stderr=null)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def recipe(folder, stages):
    """A chain of real stages: an import and splits of splits are the cheapest there are."""
    folder.mkdir(parents=True)
    (folder / ".git").mkdir()
    rows = [json.dumps({"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"}) for i in range(20)]
    (folder / "d.jsonl").write_text("\n".join(rows))
    lines = ["version: 1", "stages:"]
    for index in range(stages):
        if index % 2 == 0:
            lines.append(f"  s{index}: {{ import_dataset: {{ path: d.jsonl, max_rows: {2 + index % 18} }} }}")
        else:
            lines.append(f"  s{index}: {{ split_dataset: {{ dataset: s{index - 1}, test_size: 1, seed: {index} }} }}")
    (folder / "r.yaml").write_text("\n".join(lines) + "\n")


def dvc_chain(folder, stages, dvc):
    folder.mkdir(parents=True)
    (folder / "s").write_text("hello\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([dvc, "init", "-q"], cwd=folder, check=True)
    lines = ["stages:"]
    for index in range(stages):
        source = f"f{index - 1}" if index else "s"
        lines.append(f"  s{index}: {{cmd: cat {source} > f{index}, deps: [{source}], outs: [f{index}]}}")
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", required=True, type=Path)
    parser.add_argument("--copies", required=True, type=Path)
    parser.add_argument("--dvc", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the big file")
    parser.add_argument("--files", type=int, default=100_000)
    args = parser.parse_args()
    pipeline, copies = args.pipeline.resolve(), args.copies.resolve()
    os.environ["DVC_NO_ANALYTICS"] = "1"
    rows = {}

    def note(name, value):
        rows.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        place = Path(place)
        for stages in (10, 100, 1000):
            recipe(place / f"real{stages}", stages)
            fine([pipeline, "run", "r.yaml"], place / f"real{stages}")
            (place / f"chain{stages}").mkdir()
            (place / f"chain{stages}/source").write_text("hello\n")
            fine([copies, "chain", ".", stages], place / f"chain{stages}")
        if args.dvc:
            dvc_chain(place / "dvc", 10, args.dvc)
            fine([args.dvc, "repro", "-q"], place / "dvc")
        files = place / "files"
        files.mkdir()
        note(f"artifact of {args.files} files, cold", fine([copies, "files", ".", args.files], files))
        big = place / "big"
        big.mkdir()
        (big / ".git").mkdir()
        model(big / "model", int(args.gib * 2**30))
        (big / "r.yaml").write_text("version: 1\nstages:\n  base: { import_model: { path: model } }\n")
        for _ in range(args.repeat):
            for stages in (10, 1000):
                note(f"no-op, {stages} real stages", fine([pipeline, "run", "r.yaml"], place / f"real{stages}"))
                note(f"no-op, {stages} copy stages", fine([copies, "chain", ".", stages], place / f"chain{stages}"))
            for stages in (1, 100):
                cold = place / "chain100"
                shutil.rmtree(cold / "store")
                note(f"cold, {stages} copy stages", fine([copies, "chain", ".", stages], cold))
            shutil.rmtree(place / "real100/.pipeline")
            note("cold, 100 real stages", fine([pipeline, "run", "r.yaml"], place / "real100"))
            note(f"artifact of {args.files} files, no-op", fine([copies, "files", ".", args.files], files))
            if args.dvc:
                note("no-op, 10 stages, DVC", fine([args.dvc, "repro", "-q"], place / "dvc"))
        for _ in range(min(args.repeat, 3)):
            shutil.rmtree(big / ".pipeline", ignore_errors=True)
            os.sync()  # or the run pays for pages of the model that are still on their way to the disk
            note(f"{args.gib} GiB model into the store", fine([pipeline, "run", "r.yaml"], big))
            used = subprocess.run(["du", "-sm", ".pipeline"], cwd=big, capture_output=True, text=True).stdout.split()[0]
            note(f"{args.gib} GiB model: MiB the store takes, by du", (float(used), 0.0))
            note(f"{args.gib} GiB model, no-op", fine([pipeline, "run", "r.yaml"], big))
    print("| what | CPU s | wall s | runs |\n|---|---|---|---|")
    for name, values in rows.items():
        seconds, wall = (statistics.median(column) for column in zip(*values))
        print(f"| {name} | {seconds:.4f} | {wall:.4f} | {len(values)} |")
    first, all_ = (statistics.median(v[0] for v in rows[f"cold, {n} copy stages"]) for n in (1, 100))
    print(f"| cold, CPU ms a copy stage, from 1 and 100 stages | {(all_ - first) / 99 * 1000:.2f} ms | | |")


def model(folder, size):
    """A Llama folder of about `size` bytes with one layer and a large vocabulary, random so that no file system can cheat."""
    folder.mkdir()
    hidden, inner, vocab = 1024, 64, max(2, size // (1024 * 4))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": 16, "num_hidden_layers": 1, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens": [vocab, hidden], "model.norm": [hidden],
        **{f"{layer}{name}_layernorm": [hidden] for name in ("input", "post_attention")},
        **{f"{layer}self_attn.{name}_proj": [hidden, hidden] for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj": [inner, hidden] for name in ("gate", "up")}, f"{layer}mlp.down_proj": [hidden, inner],
    }
    tensors, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        tensors[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for _ in range(end // 2**20):
            out.write(os.urandom(2**20))
        out.write(os.urandom(end % 2**20))


if __name__ == "__main__":
    main()
