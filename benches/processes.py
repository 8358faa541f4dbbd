"""A training by several processes against one: seconds a step, and how much of the ideal is left.

    cargo build --release --features mpi
    python3 benches/processes.py --pipeline target/release/pipeline [--rounds 3] [--steps 8] [--hidden 256] [--layers 4] [--most 4]

Two questions. Efficiency: two processes of one thread each against one process of two threads. Scaling: 1, 2 and 4 processes of one thread
each; more processes than cores tell nothing. Each round measures every candidate once, so that noise of the machine meets all alike; what is printed are
medians of rounds. The first two steps don't count, and a step is timed from metrics to metrics. Standard library only.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

RECIPE = """version: 1
stages:
  pairs: {{ import_dataset: {{ path: pairs.jsonl }} }}
  blank:
    create_model:
      dataset: pairs
      vocab_size: 2048
      hidden_size: {hidden}
      intermediate_size: {wide}
      num_hidden_layers: {layers}
      num_attention_heads: 8
      num_key_value_heads: 4
      max_position_embeddings: 512
  chats: {{ apply_chat_template: {{ dataset: pairs, template: chatml }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: blank, max_length: 256 }} }}
  adapter: {{ attach_lora: {{ model: blank, r: 16, lora_alpha: 16, target_modules: all-linear }} }}
  tuned:
    train_orpo:
      adapter: adapter
      dataset: tokens
      max_steps: {steps}
      per_device_train_batch_size: 2
      gradient_accumulation_steps: 8
      logging_steps: 1
      save_steps: 100000
"""
# They share one machine.
MPI = {
    "OMPI_MCA_oob_tcp_if_include": "lo",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def seconds_a_step(pipeline, folder, processes, threads):
    """The median time of a step, by a training of its own."""
    resources = f"stages.tuned.resources={{ processes: {processes}, cpus: {processes * threads} }}"
    command = [pipeline, "run", "r.yaml", "tuned", "--force", "tuned", "--json", "--cpus", "8", "--set", resources]
    run = subprocess.Popen(command, cwd=folder, env={**os.environ, **MPI}, stdout=subprocess.PIPE, text=True)
    times = []
    for line in run.stdout:
        event = json.loads(line)
        if event["event"] == "metrics" and event["stage"] == "tuned":
            times.append(time.monotonic())
        if event["event"] == "stage_failed":
            raise SystemExit(event["error"])
    if run.wait():
        raise SystemExit(f"{processes} processes failed")
    return statistics.median(later - earlier for earlier, later in zip(times[1:], times[2:]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--most", type=int, default=4, help="the most processes")
    arguments = parser.parse_args()
    pipeline = arguments.pipeline.resolve()
    cores = len(os.sched_getaffinity(0))
    candidates = {"1 process of 2 threads": (1, 2)}
    for processes in [1, 2, 4]:
        if processes <= arguments.most:
            candidates[f"{processes} process{'es' * (processes > 1)} of 1 thread"] = (processes, 1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / ".git").mkdir()
        words = [f"word{number}" for number in range(400)]
        text = lambda seed, count: " ".join(words[(seed * 31 + index * 7) % 400] for index in range(count))
        rows = [{"prompt": text(n, 30), "chosen": text(n + 1, 60), "rejected": text(n + 2, 60)} for n in range(64)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sizes = {"hidden": arguments.hidden, "wide": arguments.hidden * 3, "layers": arguments.layers, "steps": arguments.steps}
        (folder / "r.yaml").write_text(RECIPE.format(**sizes))
        subprocess.run([pipeline, "run", "r.yaml", "tokens", "adapter"], cwd=folder, stderr=subprocess.DEVNULL, check=True)
        rounds = []
        for number in range(arguments.rounds):
            seconds = {name: seconds_a_step(pipeline, folder, *how) for name, how in candidates.items()}
            rounds.append(seconds)
            print(f"round {number + 1}: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), flush=True)
    print(f"\nmedians of {arguments.rounds} rounds on {cores} cores, a step:")
    for name, (processes, threads) in candidates.items():
        crowded = "" if processes * threads <= cores else "   (more than there are cores)"
        print(f"  {name:24} {statistics.median(seconds[name] for seconds in rounds):.3f} s{crowded}")
    ratio = lambda of, to: statistics.median(seconds[of] / seconds[to] for seconds in rounds)
    if arguments.most >= 2:
        efficiency = ratio("1 process of 2 threads", "2 processes of 1 thread")
        print(f"efficiency of 2 processes of 1 thread against 1 process of 2 threads: {efficiency:.2f}")
    for processes in [2, 4]:
        if processes <= arguments.most:
            print(f"speed-up of {processes} processes over 1: {ratio('1 process of 1 thread', f'{processes} processes of 1 thread'):.2f}")


if __name__ == "__main__":
    main()
