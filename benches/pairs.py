"""What `train_pair.py` and `other_pairs.py` share: processes that are measured from outside, projects, medians.

Standard library only, Linux only: CPU seconds of a running process come from /proc.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# What LoRA is put beside on both sides.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cpu_seconds(pid):
    """User and system seconds of a running process, all threads, and of the processes that it started; steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Its own, and those of its processes that have ended.
    ticks = sum(int(field) for field in fields[11:15])
    children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return ticks / TICKS + sum(cpu_seconds(child) for child in children)


class Measured:
    """A process that ran: its wall and CPU seconds, peak memory in MB, and its lines as (wall, CPU, text) at arrival."""

    def __init__(self, command, folder, threads=None, extra_environment=None):
        environment = dict(os.environ, **(extra_environment or {}))
        if threads:
            environment.update(RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
        command = [str(part) for part in command]
        began = time.monotonic()
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True)
            self.lines = []
            for line in process.stdout:
                now = time.monotonic()
                try:
                    cpu = cpu_seconds(process.pid)
                except (OSError, IndexError):
                    cpu = float("nan")
                self.lines.append((now, cpu, line.rstrip("\n")))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.wall = time.monotonic() - began
            if process.returncode:
                complaints.seek(0)
                told = complaints.read().decode(errors="replace")[-3000:]
                raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{told}\n" + "\n".join(self.texts()[-5:]))
        self.cpu = usage.ru_utime + usage.ru_stime
        self.peak_mb = usage.ru_maxrss / 1024

    def texts(self):
        return [text for _, _, text in self.lines]

    def events(self):
        """JSON lines as (wall, CPU, object)."""
        return [(wall, cpu, json.loads(text)) for wall, cpu, text in self.lines if text.startswith("{")]

    def last_object(self):
        return self.events()[-1][2]


class Project:
    """A project of its own with one recipe, in a folder that is deleted afterwards."""

    def __init__(self, pipeline, recipe, threads=None):
        self.pipeline, self.threads, self.made = Path(pipeline).resolve(), threads, {}
        self.held = tempfile.TemporaryDirectory(prefix="pair-", dir=os.environ.get("PAIRS_TMP"))
        self.folder = Path(self.held.name)
        (self.folder / ".git").mkdir()
        if threads:
            # A stage has a process of its own, whose threads follow this alone.
            stages = {name: {**stage, "resources": {"cpus": threads}} for name, stage in recipe["stages"].items()}
            recipe = {**recipe, "stages": stages}
        # JSON is YAML.
        (self.folder / "recipe.yaml").write_text(json.dumps(recipe, indent=1))

    def run(self, *arguments):
        command = [self.pipeline, "run", "recipe.yaml", "--json", "--allow-path", "/", *arguments]
        measured = Measured(command, self.folder, self.threads)
        self.made.update((event["stage"], event["artifact"]) for _, _, event in measured.events() if event["event"] == "stage_done")
        return measured

    def stage(self, name):
        """Runs one stage whose inputs are fresh: (the process, the seconds that the stage told). Its last result is taken out of the
        store before, for a result that is there already is read once more and the new one deleted.

        The process's `with_commit` are the seconds from the start of the stage to its end, the way into the store included: digests
        that are not known yet, and waiting for the disk."""
        if name in self.made:
            shutil.rmtree(self.folder / ".pipeline/v1/artifacts" / self.made[name])
        measured = self.run(name, "--force", name)
        done = [event for _, _, event in measured.events() if event["event"] == "stage_done"]
        walls = [wall for wall, _, event in measured.events() if event["event"] in ("stage_started", "stage_done")]
        measured.with_commit = walls[-1] - walls[0]
        if [event["stage"] for event in done] != [name]:
            raise SystemExit(f"expected `{name}` alone to run, but these did: {[event['stage'] for event in done]}")
        return measured, done[0]["seconds"]


def schema(pipeline):
    """The recipe's JSON Schema of this `pipeline`, as text."""
    return subprocess.run([Path(pipeline).resolve(), "schema"], capture_output=True, text=True, check=True).stdout


def median(values):
    return statistics.median(values)


def spread(values, form="{:.2f}"):
    """The median, with the smallest and the largest where there are several."""
    middle = form.format(median(values))
    if len(values) < 2:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def table(rows):
    """Rows of texts as a table in Markdown; the first row is the head."""
    head, *body = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in [head, *body]) for place in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
    print("\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)]))
    sys.stdout.flush()
