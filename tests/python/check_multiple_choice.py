#!/usr/bin/env python3
"""Compares `evaluate_choices` with lm-evaluation-harness on the questions of tests/golden/choices.

    pip install lm_eval==0.4.13 torch==2.15.0 transformers==5.23.0 datasets
    python tests/python/check_multiple_choice.py [--model FOLDER] [--program PROGRAM] [--num-fewshot N] [--write]

Both compute in f32, with the harness's own task for JSON files: `Question: {{question}}\\nAnswer:`, a space, and each choice. Every
log-likelihood must agree to 1e-4 of its size and both accuracies exactly; ties are told. The model is tests/golden/model if none is given,
whose tokenizer begins each text with a BOS.

With --num-fewshot the first N other questions stand before each one with their answers (the harness's sampler `first_n`).

With --write it writes tests/golden/choices/expected.json, or expected_fewshot.json for --num-fewshot 2, which tests beside the code read,
instead of running the program.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/choices"

TASK = """task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: {shots}
fewshot_config:
  sampler: first_n
  split: test
metric_list:
  - metric: acc
  - metric: acc_norm
"""

RECIPE = """version: 1
stages:
  model: {{ import_model: {{ path: {model} }} }}
  questions: {{ import_dataset: {{ path: {file} }} }}
  scores: {{ evaluate_choices: {{ model: model, dataset: questions, num_fewshot: {shots} }} }}
outputs:
  scores: out/scores
"""


def by_harness(model, file, shots):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "local_choices.yaml").write_text(TASK.format(file=file, shots=shots))
        manager = TaskManager(include_path=folder, include_defaults=False)
        lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
        found = simple_evaluate(lm, tasks=["local_choices"], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["local_choices"], key=lambda sample: sample["doc_id"])
    results = found["results"]["local_choices"]
    return {
        "acc": results["acc,none"],
        "acc_norm": results["acc_norm,none"],
        "log_likelihoods": [[float(one[0][0]) for one in sample["resps"]] for sample in samples],
    }


def by_program(program, model, file, shots):
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=model, file=file, shots=shots))
        allowed = ["--allow-path", str(model), "--allow-path", str(file.parent)]
        subprocess.run([program, "run", str(recipe), *allowed], check=True, cwd=folder)
        out = Path(folder) / "out/scores"
        scores = json.loads((out / "scores.json").read_text())["base"]
        lines = (out / "answers.jsonl").read_text().splitlines()
        sums = [json.loads(line)["log_likelihoods"]["base"] for line in lines]
    return {**scores, "log_likelihoods": sums}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=ROOT / "tests/golden/model")
    parser.add_argument("--program", default=str(ROOT / "target/debug/pipeline"))
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    model, file = arguments.model.resolve(), GOLDEN / "questions.jsonl"
    shots = arguments.num_fewshot
    expected = by_harness(model, file, shots)
    if arguments.write:
        name = "expected_fewshot.json" if shots else "expected.json"
        (GOLDEN / name).write_text(json.dumps(expected, indent=1) + "\n")
        return
    found = by_program(str(Path(arguments.program).resolve()), model, file, shots)
    worst = 0.0
    for ours, theirs in zip(found["log_likelihoods"], expected["log_likelihoods"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            worst = max(worst, abs(a - b) / max(1.0, abs(b)))
    for name in ("acc", "acc_norm"):
        print(f"{name}: {found[name]:.6f}, by the harness {expected[name]:.6f}")
        assert found[name] == expected[name], name
    print(f"{len(expected['log_likelihoods'])} questions; the largest relative difference of a log-likelihood is {worst:.2e}")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
