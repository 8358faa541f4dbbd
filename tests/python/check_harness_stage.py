#!/usr/bin/env python3
"""Runs lm-evaluation-harness as a stage on the model that a recipe merged, with a Python script between the other stages.

    pip install lm_eval==0.4.13 torch==2.15.0 transformers==5.23.0 datasets==5.2.0
    python tests/python/check_harness_stage.py [--program PROGRAM]

The stages: rows, a script that leaves some of them out, chats, tokens, an adapter on tests/golden/model, a training, the merged model, and on
that the harness (`run_command`, without network) and `evaluate_choices`. Both must come to the same accuracies. A second run must run nothing;
a change of the script runs what is behind it, and a change of the harness's script runs the harness alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from check_multiple_choice import GOLDEN, ROOT, TASK

FILTER = """import json, sys
import pyarrow.parquet as parquet
from pathlib import Path

rows, out, least = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
table = parquet.read_table(rows / "train.parquet")
with open(out / "train.jsonl", "w") as file:
    for row in table.to_pylist():
        if len(json.dumps(row)) >= least:
            file.write(json.dumps(row) + "\\n")
"""

HARNESS = f"TASK = {TASK!r}" + """
import json, sys
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

model, questions, out = sys.argv[1:]
Path("local_choices.yaml").write_text(TASK.format(file=questions, shots=0))
found = simple_evaluate(
    HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=1),
    tasks=["local_choices"],
    task_manager=TaskManager(include_path=".", include_defaults=False),
    bootstrap_iters=0,
)
results = found["results"]["local_choices"]
scores = {name: results[f"{name},none"] for name in ("acc", "acc_norm")}
Path(out, "scores.json").write_text(json.dumps(scores))
"""

RECIPE = """version: 1
stages:
  model: {{ import_model: {{ path: {model} }} }}
  pairs: {{ import_dataset: {{ path: {rows} }} }}
  long:
    run_command:
      command: [{python}, '{{file.script}}', '{{input.rows}}', '{{out}}', '{least}']
      inputs: {{ rows: pairs }}
      files: {{ script: filter.py }}
      output: dataset
  chats: {{ apply_chat_template: {{ dataset: long, tokenizer: model }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: model, max_length: 256, max_prompt_length: 128 }} }}
  adapter: {{ attach_lora: {{ model: model, r: 4, target_modules: all-linear }} }}
  tuned: {{ train_orpo: {{ adapter: adapter, dataset: tokens, max_steps: 4, learning_rate: 1.0e-2 }} }}
  merged: {{ merge: {{ adapter: tuned }} }}
  harness:
    run_command:
      command: [{python}, '{{file.script}}', '{{input.model}}', '{{file.questions}}', '{{out}}']
      inputs: {{ model: merged }}
      files: {{ script: harness.py, questions: questions.jsonl }}
      output: scores
      version_of: [{python}, -c, 'from importlib.metadata import version as v; print(v("lm_eval"), v("torch"), v("transformers"))']
  questions: {{ import_dataset: {{ path: questions.jsonl }} }}
  own: {{ evaluate_choices: {{ model: merged, dataset: questions }} }}
outputs:
  harness: out/harness
  own: out/own
"""


def stages_run(program, folder):
    """Runs the recipe and returns the names of the stages that were computed."""
    done = subprocess.run([program, "run", "--json", "recipe.yaml"], cwd=folder, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0:
        sys.exit("\n".join(str(event) for event in events if "fail" in event["event"]))
    return {event["stage"] for event in events if event["event"] == "stage_done"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=str(ROOT / "target/debug/pipeline"))
    program = str(Path(parser.parse_args().program).resolve())
    golden = ROOT / "tests/golden"
    os.environ["PIPELINE_ALLOW_PATHS"] = str(golden)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write(least):
            text = RECIPE.format(model=golden / "model", rows=golden / "rows.jsonl", python=sys.executable, least=least)
            (folder / "recipe.yaml").write_text(text)

        write(120)
        (folder / "filter.py").write_text(FILTER)
        (folder / "harness.py").write_text(HARNESS)
        (folder / "questions.jsonl").write_bytes((GOLDEN / "questions.jsonl").read_bytes())
        everything = stages_run(program, folder)
        assert len(everything) == 11, everything
        theirs, own = (json.loads((folder / f"out/{name}/scores.json").read_text())["base"] for name in ("harness", "own"))
        for metric, value in theirs.items():
            print(f"{metric}: {own[metric]:.6f}, by the harness {value:.6f}")
            assert own[metric] == value, metric
        table = subprocess.run([program, "table", "recipe.yaml", "--csv"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        print(table.stdout)

        assert stages_run(program, folder) == set()
        write(160)
        again = stages_run(program, folder)
        expected = everything - {"model", "pairs", "adapter", "questions"}
        assert again == expected, again
        (folder / "harness.py").write_text(HARNESS + "print(scores)\n")
        assert stages_run(program, folder) == {"harness"}
        print("nothing ran twice without need")


if __name__ == "__main__":
    main()
