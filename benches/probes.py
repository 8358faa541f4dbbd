"""What runs after each change: two stages, A then B, in `pipeline` and, where there is one, in DVC.

    python3 benches/probes.py --pipeline target/debug/pipeline [--dvc dvc]

`pipeline`: A imports JSON lines, B applies a chat template, B's result is an output. DVC: A drops comments, B makes upper case.
Each cell names the stages that ran, `-` for none. Standard library and git only.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path


class Pipeline:
    """Real stages."""

    name = "pipeline"

    def __init__(self, program, place):
        self.program, self.place = str(program.resolve()), place / "pipeline"
        self.place.mkdir()
        (self.place / ".git").mkdir()
        (self.place / "t.jinja").write_text("{{ strftime_now(\"%d\") }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        self.source(1, "a")
        self.recipe()

    def recipe(self, date="2026-01-01"):
        (self.place / "r.yaml").write_text(
            "version: 1\nstages:\n  A: { import_dataset: { path: src.jsonl } }\n"
            f"  B: {{ apply_chat_template: {{ dataset: A, template: t.jinja, date: \"{date}\" }} }}\n"
            "outputs:\n  B: out\n"
        )

    def source(self, comment, word, rows=50):
        space = " " * comment
        line = '{{"prompt": {0}"p{1} {2}", "chosen": "good", "rejected": "bad"}}\n'
        (self.place / "src.jsonl").write_text("".join(line.format(space, index, word) for index in range(rows)))

    def start(self):
        return subprocess.Popen(
            [self.program, "run", "r.yaml", "--json"], cwd=self.place, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    def ended(self, process):
        stdout, stderr = process.communicate()
        events = [json.loads(line) for line in stdout.splitlines()]
        ran = sorted(event["stage"] for event in events if event.get("event") == "stage_done")
        return "".join(ran) or "-", process.returncode, events, stderr

    def run(self):
        ran, code, _, stderr = self.ended(self.start())
        return ran if code == 0 else f"{ran} (exit {code}: {stderr.strip()})"

    def result(self):
        return sorted((path.name, path.read_bytes()) for path in (self.place / "out").rglob("*") if path.is_file())

    def touch(self):
        os.utime(self.place / "src.jsonl")

    def stored(self, stage):
        shown = subprocess.run(
            [self.program, "show", "r.yaml", stage], cwd=self.place, text=True, capture_output=True
        )
        if shown.returncode:
            raise SystemExit(shown.stderr)
        words = [Path(word) for word in shown.stdout.split() if "/artifacts/" in word]
        return self.place / words[0]

    def remove_intermediate(self):
        shutil.rmtree(self.stored("A"))

    def remove_output(self):
        shutil.rmtree(self.place / "out")

    def corrupt_output(self):
        self.damage(self.place / "out")

    def corrupt_stored(self):
        self.damage(self.stored("B"))

    @staticmethod
    def damage(folder):
        path = next(path for path in sorted(folder.rglob("*.parquet")))
        data = bytearray(path.read_bytes())
        path.unlink()
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def edit_parameter(self):
        self.recipe("2026-01-02")

    def slow(self):
        self.source(1, "slow", rows=1_500_000)

    def half_written(self):
        return any(path.stat().st_size for path in self.place.glob(".pipeline/v1/partial/*/**/*") if path.is_file())


class Dvc:
    """The commands that its users write."""

    name = "dvc"

    def __init__(self, program, place):
        self.program, self.place = str(program.resolve()), place / "dvc"
        self.place.mkdir()
        subprocess.run(["git", "init", "-q"], cwd=self.place, check=True)
        subprocess.run([self.program, "init", "-q"], cwd=self.place, check=True)
        self.source(1, "a")
        self.recipe()

    def recipe(self, upper="tr a-z A-Z", slow=""):
        (self.place / "dvc.yaml").write_text(
            "stages:\n"
            f"  A: {{cmd: \"echo A >> ran; {slow} grep -v '^#' src.txt > a.txt\", deps: [src.txt], outs: [a.txt]}}\n"
            f"  B: {{cmd: \"echo B >> ran; {upper} < a.txt > b.txt\", deps: [a.txt], outs: [b.txt]}}\n"
        )

    def source(self, comment, word):
        (self.place / "src.txt").write_text(f"# {comment}\n{word}\n")

    def start(self):
        return subprocess.Popen(
            [self.program, "repro"], cwd=self.place, text=True, start_new_session=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ended(self, process):
        stdout, _ = process.communicate()
        ran = self.place / "ran"
        text = "".join(sorted(ran.read_text().split())) if ran.exists() else ""
        return text or "-", process.returncode, [], stdout

    def run(self):
        (self.place / "ran").unlink(missing_ok=True)
        ran, code, _, told = self.ended(self.start())
        return ran if code == 0 else f"{ran} (exit {code}: {told.strip().splitlines()[-1][:120]})"

    def result(self):
        path = self.place / "b.txt"
        return path.read_bytes() if path.exists() else None

    def touch(self):
        os.utime(self.place / "src.txt")

    def remove_intermediate(self):
        (self.place / "a.txt").unlink()

    def remove_output(self):
        (self.place / "b.txt").unlink()

    def corrupt_output(self):
        (self.place / "b.txt").unlink()
        (self.place / "b.txt").write_text("HE")

    def corrupt_stored(self):
        for path in (self.place / ".dvc/cache").rglob("*"):
            if path.is_file() and path.read_bytes() == self.result():
                path.chmod(0o644)
                path.write_bytes(b"HE")

    def edit_parameter(self):
        self.recipe("tr  a-z A-Z")

    def slow(self):
        self.recipe(slow="echo half > a.txt; sleep 3;")
        self.source(1, "slow")

    def half_written(self):
        path = self.place / "a.txt"
        return path.exists() and path.read_text() == "half\n"


def probes(runner):
    """Pairs of a change and what ran."""
    yield "cold", runner.run()
    if not runner.result():
        raise SystemExit(runner.run())
    right = runner.result()
    yield "no-op", runner.run()
    runner.touch()
    yield "source touched", runner.run()
    runner.source(2, "a")
    yield "edit that leaves A's bytes alike", runner.run()
    runner.source(1, "a")
    yield "back to the old source", runner.run()
    runner.source(1, "b")
    yield "real edit", runner.run()
    runner.source(1, "a")
    yield "undo", runner.run()
    for name, change in (
        ("A's result deleted", runner.remove_intermediate),
        ("output deleted", runner.remove_output),
        ("output corrupted", runner.corrupt_output),
        ("B's result corrupted in the cache", runner.corrupt_stored),
    ):
        change()
        ran = runner.run()
        yield name, ran + ("" if runner.result() == right else ", output WRONG")
        if runner.result() != right:
            runner.remove_output()
            runner.run()
    yield "no-op after all that", runner.run()
    runner.edit_parameter()
    yield "B's parameter edited", runner.run()


def killed(runner):
    """A runner that is killed with half an output written."""
    runner.slow()
    process = runner.start()
    deadline = time.monotonic() + 60
    while not runner.half_written() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    was_running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    ran = runner.run()
    return ran + ("" if was_running else " (was done before the kill)")


def two_at_once(runner):
    """Two runners of the same work."""
    runner.slow()
    ran = runner.place / "ran"
    ran.unlink(missing_ok=True)
    first = runner.start()
    time.sleep(0.3)
    second = runner.start()
    (a, code_a, _, _), (b, code_b, events, told) = runner.ended(first), runner.ended(second)
    if runner.name == "dvc":
        a, b = a, "-"
    waited = [event for event in events if event.get("event") == "stage_waiting"]
    told = f", the second told {json.dumps(waited[0])}" if waited else f", {told.strip().splitlines()[-1][:150]}" if code_b else ""
    return f"{a} and {b}, exits {code_a} and {code_b}{told}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", required=True, type=Path)
    parser.add_argument("--dvc", type=Path)
    args = parser.parse_args()
    os.environ["DVC_NO_ANALYTICS"] = "1"
    candidates = [(Pipeline, args.pipeline)] + ([(Dvc, args.dvc)] if args.dvc else [])
    columns = []
    for kind, program in candidates:
        with tempfile.TemporaryDirectory() as place:
            rows = dict(probes(kind(program, Path(place))))
        with tempfile.TemporaryDirectory() as place:
            rows["kill -9 with half an output written, again"] = killed(kind(program, Path(place)))
        with tempfile.TemporaryDirectory() as place:
            rows["two runners at once"] = two_at_once(kind(program, Path(place)))
        columns.append(rows)
    print("| change | " + " | ".join(kind.name for kind, _ in candidates) + " |")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(rows[name] for rows in columns) + " |")


if __name__ == "__main__":
    main()
