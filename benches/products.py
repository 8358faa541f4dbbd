"""The table of products: instruction set x kind of weight x shape, ours beside torch's, on one thread.

    cargo bench -p pipeline-kernels --bench products --no-run
    python3 benches/products.py --bench target/release/deps/products-HASH --python VENV/bin/python [--rounds 5] [--isa avx2]
        [--model small] [--tokens 600]

`cargo bench -p pipeline-kernels --bench products` alone gives our side. VENV holds torch and bitsandbytes. Rounds of the two sides
alternate; figures are medians of GFLOP/s of a thread's CPU time, so other work on the machine disturbs them little. The share is that of the
set's peak, which our side measures around each product. Torch is kept to the same set by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and
MKL_ENABLE_INSTRUCTIONS. Its NF4 is bitsandbytes' `dequantize_4bit` followed by the product, as PEFT runs it on the CPU.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from pairs import median, table

# For each set: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS.
SETS = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}

THEIRS = """
import json, sys, time, torch
torch.set_num_threads(1)
tokens = int(sys.argv[2])
for case in json.load(open(sys.argv[1])):
    rows, columns, kind = case["rows"], case["columns"], case["kind"]
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    weight = torch.randn(rows, columns).to(dtype)
    x = torch.randn(tokens, rows if case["transposed"] else columns).to(dtype)
    if kind.startswith("NF4"):
        import bitsandbytes.functional as bnb
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
        dense = lambda: bnb.dequantize_4bit(packed, state)
    else:
        dense = lambda: weight
    def once():
        w = dense()
        return x @ w if case["transposed"] else torch.nn.functional.linear(x, w)
    with torch.no_grad():
        once()
        operations = 2 * rows * columns * tokens
        times = max(1, int(2e9 / operations))
        start = time.thread_time()
        for _ in range(times):
            once()
        spent = time.thread_time() - start
    print(json.dumps({**case, "gflops": operations * times / spent / 1e9}), flush=True)
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", required=True, type=Path, help="the program that `cargo bench --no-run` names")
    parser.add_argument("--python", type=Path, help="a Python with torch and bitsandbytes; without it, our side alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--isa", choices=list(SETS))
    parser.add_argument("--model")
    return parser.parse_args()


def lines(command, environment=None):
    told = subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def key(case):
    return tuple(case[name] for name in ["kind", "model", "weight", "rows", "columns", "transposed"])


def theirs(args, isa, cases):
    environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    names = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"]
    environment.update(zip(names, SETS[isa]))
    held = Path(os.environ.get("TMPDIR", "/tmp")) / f"products-{os.getpid()}.json"
    held.write_text(json.dumps([{name: case[name] for name in ["kind", "model", "weight", "rows", "columns", "transposed"]} for case in cases]))
    try:
        return lines([args.python, "-c", THEIRS, held, args.tokens], environment)
    finally:
        held.unlink()


def main():
    args = arguments()
    rows = [["set", "product", "model", "weight", "", "GFLOP/s", "share of the peak", "torch", "ours / torch"]]
    for isa in [args.isa] if args.isa else SETS:
        ours, other = {}, {}
        for number in range(args.rounds):
            command = [args.bench, "--json", "--rounds", "1", "--tokens", args.tokens, "--isa", isa]
            told = lines([*command, *(["--model", args.model] if args.model else [])])
            for case in told:
                ours.setdefault(key(case), []).append(case)
            if args.python and told:
                for case in theirs(args, isa, told):
                    other.setdefault(key(case), []).append(case["gflops"])
        for case, measured in ours.items():
            kind, model, weight, height, depth, transposed = case
            speed = median([one["gflops"] for one in measured])
            share = median([one["gflops"] / one["peak"] for one in measured])
            peer = median(other[case]) if case in other else None
            rows.append([
                isa, kind, model, f"{weight} {height} x {depth}", "transposed" if transposed else "", f"{speed:.1f}", f"{share:.2f}",
                f"{peer:.1f}" if peer else "-", f"{speed / peer:.2f}" if peer else "-",
            ])
    table(rows)


if __name__ == "__main__":
    main()
