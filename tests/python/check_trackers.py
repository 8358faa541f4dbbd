#!/usr/bin/env python3
"""Checks by hand that the real trackers read what trainings send them, on this machine alone.

    pip install tensorboard==2.21.0 mlflow==3.5.0 'sqlalchemy<2.1' trackio==0.43.0
    python tests/python/check_trackers.py target/debug/pipeline

Runs a short training that reports to TensorBoard, to an MLflow server and to a trackio server. Then TensorBoard's own reader, MLflow's
REST API and trackio's own storage have to hold every number that the run told, and TensorBoard's reader those that `metrics` exports.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.argv[1]).resolve())
RECIPE = """version: 1
stages:
  pairs: { import_dataset: { path: %s } }
  split: { split_dataset: { dataset: pairs, test_size: 0.15 } }
  blank:
    create_model: { dataset: split, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
                    num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256 }
  chats: { apply_chat_template: { dataset: split, template: %s, tokenizer: blank } }
  tokens: { tokenize: { dataset: chats, tokenizer: blank, max_length: 128 } }
  tuned:
    train_orpo: { model: blank, dataset: tokens, max_steps: 12, logging_steps: 3, learning_rate: 1.0e-3, eval_strategy: steps,
                  eval_steps: 6, report_to: [tensorboard, mlflow, trackio] }
"""
failed = []


def check(what, good, more=""):
    print(f"{'ok' if good else 'FAILED':>7}  {what} {more}")
    if not good:
        failed.append(what)


def close(ours, theirs):
    return abs(ours - theirs) <= 1e-6 * max(abs(ours), abs(theirs), 1e-30)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(address, seconds=240):
    for _ in range(seconds):
        try:
            urllib.request.urlopen(address, timeout=5)
            return True
        except OSError:
            time.sleep(1)
    return False


def rest(address, path, body):
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=30))


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def tag(name):
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / ".pipeline").mkdir()
        (folder / "r.yaml").write_text(RECIPE % (ROOT / "recipes/data/pairs.jsonl", ROOT / "recipes/templates/llama3.jinja"))
        mlflow_port = free_port()
        mlflow_at = f"http://127.0.0.1:{mlflow_port}"
        mlflow = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port),
             "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        trackio_home = folder / "trackio"
        environment = {**os.environ, "TRACKIO_DIR": str(trackio_home), "TRACKIO_WRITE_TOKEN": "let-me-in", "HF_HUB_OFFLINE": "1"}
        trackio_port = free_port()
        serve = (
            "import trackio, time\n"
            f"trackio.show(open_browser=False, host='127.0.0.1', server_port={trackio_port}, block_thread=False)\n"
            "time.sleep(3600)\n"
        )
        trackio = subprocess.Popen([sys.executable, "-c", serve], env={**environment, "GRADIO_SERVER_PORT": str(trackio_port)},
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            check("mlflow answers", answers(f"{mlflow_at}/health"))
            trackio_at = None
            while line := trackio.stdout.readline():
                found = re.search(r"http://[\w.]+:\d+", line)
                if found:
                    trackio_at = found.group()
                    break
            check("trackio answers", trackio_at and answers(f"{trackio_at}/version"), trackio_at)
            variables = {
                **os.environ,
                "MLFLOW_TRACKING_URI": mlflow_at,
                "MLFLOW_EXPERIMENT_NAME": "ours",
                "TRACKIO_SERVER_URL": f"{trackio_at}/?write_token=let-me-in",
                "TRACKIO_PROJECT": "ours",
                "NO_PROXY": "127.0.0.1,localhost",
            }
            arguments = [PROGRAM, "run", "r.yaml", "--allow-path", str(ROOT / "recipes"), "--json", "--name", "checked"]
            ran = subprocess.run(arguments, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            check("the run ends well", ran.returncode == 0, ran.stderr[-2000:])
            check("and warns of nothing", "warning" not in ran.stderr, ran.stderr[-500:])
            told = [json.loads(line) for line in ran.stdout.splitlines()]
            told = [event for event in told if event["event"] == "metrics"]
            ours = {}
            for event in told:
                for name, value in event["values"].items():
                    ours.setdefault(name, {})[event["step"]] = value
            check("the run told numbers", len(ours) > 10 and "eval_loss" in ours, sorted(ours))

            found = scalars(folder / ".pipeline/tensorboard/r/tuned-checked")
            same = all(
                close(value, found.get(tag(name), {}).get(step, float("nan")))
                for name, values in ours.items() for step, value in values.items()
            )
            check("tensorboard reads all of them", same, sorted(found))

            experiment = json.load(urllib.request.urlopen(f"{mlflow_at}/api/2.0/mlflow/experiments/get-by-name?experiment_name=ours"))
            runs = rest(mlflow_at, "runs/search", {"experiment_ids": [experiment["experiment"]["experiment_id"]]})["runs"]
            check("mlflow has one run", len(runs) == 1)
            run = runs[0]
            check("with its name and end", (run["info"]["run_name"], run["info"]["status"]) == ("tuned-checked", "FINISHED"), run["info"])
            params = {param["key"]: param["value"] for param in run["data"]["params"]}
            check("with its parameters", params.get("max_steps") == "12" and params.get("model") == "blank", len(params))
            wrong = []
            for name, values in ours.items():
                address = f"{mlflow_at}/api/2.0/mlflow/metrics/get-history?run_id={run['info']['run_id']}&metric_key={name}&max_results=1000"
                history = json.load(urllib.request.urlopen(address)).get("metrics", [])
                history = {int(metric.get("step", 0)): metric["value"] for metric in history}
                pairs = {step: (value, history.get(step)) for step, value in values.items()}
                wrong += [(name, step, *pair) for step, pair in pairs.items() if pair[1] is None or not close(*pair)]
            check("mlflow has all numbers", not wrong, wrong[:3])

            script = (
                "import json\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
                "print(json.dumps({r: S.get_logs('ours', r) for r in S.get_runs('ours')}, default=str))"
            )
            stored = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            stored = json.loads(stored.stdout.splitlines()[-1])
            check("trackio has one run", list(stored) == ["tuned-checked"], list(stored))
            found = {}
            for log in stored.get("tuned-checked", []):
                for name, value in log.items():
                    if isinstance(value, (int, float)):
                        found.setdefault(name, {})[log["step"]] = value
            same = all(
                close(value, found.get(tag(name), {}).get(step, float("nan")))
                for name, values in ours.items() for step, value in values.items()
            )
            check("trackio has all numbers", same, sorted(found))

            # Exported afterwards: every step, from the result itself.
            arguments = ["metrics", "r.yaml", "--allow-path", str(ROOT / "recipes")]
            rows = subprocess.run([PROGRAM, *arguments, "--to", "json"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            rows = [json.loads(line) for line in rows.stdout.splitlines()]
            subprocess.run([PROGRAM, *arguments, "--to", "tensorboard", "-o", "logs"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            found = scalars(folder / "logs/tuned/run-1")
            same = all(
                close(value, found.get(tag(name), {}).get(row["step"], float("nan")))
                for row in rows for name, value in row.items()
                if name not in ("stage", "run", "step") and value is not None
            )
            check("tensorboard reads what is exported", same and len(found["train/loss"]) == 12, len(found))

            # Nobody there: the training does not mind, and it is said. The server has workers.
            os.killpg(mlflow.pid, signal.SIGKILL)
            mlflow.wait()
            arguments = [PROGRAM, "run", "r.yaml", "--allow-path", str(ROOT / "recipes"), "--force", "tuned"]
            ran = subprocess.run(arguments, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True)
            check("without mlflow the run ends well", ran.returncode == 0)
            check("and says so", "mlflow (`" in ran.stderr and "did not get all numbers" in ran.stderr, ran.stderr[-300:])
        finally:
            trackio.kill()
            if mlflow.poll() is None:
                os.killpg(mlflow.pid, signal.SIGKILL)
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
