# No packages beside Python's own.
"""Kills, damage, full disks and many runners at once: never another result than that of an undisturbed run.

    python tests/python/hammer.py --pipeline target/debug/pipeline [--kills 200] [--damages 250] [--disks 25] [--runners 8]

The recipe is the quickstart with short trainings. Full disks need the right to mount a file system in a namespace of one's own
(`unshare -Urm`); without it they are left out, and that is said.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
SHORT = [
    "--set", "stages.base.train_sft.max_steps=6", "--set", "stages.base.train_sft.save_steps=1",
    "--set", "stages.tuned.train_orpo.max_steps=6", "--set", "stages.tuned.train_orpo.save_steps=1",
    "--set", "stages.scores.evaluate.max_new_tokens=4",
]  # fmt: skip
RECIPE = "recipes/quickstart.yaml"


class Project:
    def __init__(self, pipeline, place):
        self.pipeline, self.place = pipeline, Path(place)
        shutil.copytree(HERE / "recipes", self.place / "recipes")
        (self.place / ".pipeline").mkdir()

    def start(self, *arguments):
        command = [self.pipeline, arguments[0], RECIPE, *arguments[1:], *SHORT]
        return subprocess.Popen(command, cwd=self.place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments):
        process = self.start("run", "--json", *arguments)
        out, err = process.communicate()
        return process.returncode, out, err

    def results(self, *arguments):
        """The content of every stage after a run, which has to succeed."""
        # Links to damaged files would be taken for somebody's edits.
        shutil.rmtree(self.place / "out", ignore_errors=True)
        code, out, err = self.run(*arguments)
        assert code == 0, out + err
        events = [json.loads(line) for line in out.splitlines()]
        return {event["stage"]: event["artifact"] for event in events if "artifact" in event}

    def files(self):
        found = [path for path in (self.place / ".pipeline").rglob("*") if path.is_file() and not path.is_symlink()]
        return [path for path in sorted(found) if "locks" not in path.parts]


def kills(project, right, count, dice):
    """Kills runs at random moments; now and then the store is emptied, so that all stages are met."""
    begun = time.monotonic()
    assert project.results() == right
    whole = time.monotonic() - begun
    done = 0
    while done < count:
        if done % 8 == 0:
            for name in ("artifacts", "records"):
                shutil.rmtree(project.place / ".pipeline/v1" / name, ignore_errors=True)
        process = project.start("run", "--json")
        time.sleep(dice.uniform(0, min(whole, 6.0)))
        done += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if done % 8 == 7:
            assert project.results() == right, "after kills"
            print(done, "kills", flush=True)
    assert project.results("--verify") == right
    return f"{done} kills"


def damages(project, right, count, dice):
    """Alters, cuts, empties, removes or lengthens files of a store; half of them keep their times."""
    done, seen = 0, {}
    while done < count:
        hidden = dice.random() < 0.5
        for path in dice.sample(project.files(), dice.randint(1, 6)):
            kind = dice.choice(["flip", "flip", "cut", "empty", "remove", "grow"])
            before = path.stat()
            path.chmod(0o644)
            data = bytearray(path.read_bytes())
            if kind == "flip" and data:
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
                with open(path, "r+b") as file:
                    file.write(data)
            elif kind in ("cut", "empty") and data:
                os.truncate(path, dice.randrange(len(data)) if kind == "cut" else 0)
            elif kind == "grow":
                with open(path, "ab") as file:
                    file.write(b"x")
            else:
                path.unlink()
            if hidden and path.is_file():
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            seen[kind] = seen.get(kind, 0) + 1
            done += 1
        found = project.results()
        assert found == right, f"after {seen}: {found}, expected {right}"
    assert project.results("--verify") == right
    return f"{done} damaged files {seen}"


def disks(pipeline, right, count, dice, place):
    """Runs on file systems that are too small, and then on the same with more room."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        return "no full disks: no right to mount"
    full = 0
    for number in range(count):
        project = Project(pipeline, Path(place) / f"disk{number}")
        kilobytes = dice.randint(60, 9000)
        run = " ".join([str(pipeline), "run", "--json", RECIPE, *SHORT])
        script = (
            f"mount -t tmpfs -o size={kilobytes}k none .pipeline && {{ {run} >first.txt 2>error.txt; echo $? >code; "
            f"mount -o remount,size=200m .pipeline && {run} >second.txt; }}"
        )
        ended = subprocess.run(["unshare", "-Urm", "sh", "-c", script], cwd=project.place, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        code = int((project.place / "code").read_text())
        full += code != 0
        if code:
            text = (project.place / "error.txt").read_text() + (project.place / "first.txt").read_text()
            assert "No space left" in text, text
        lines = (project.place / "second.txt").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        assert {event["stage"]: event["artifact"] for event in events if "artifact" in event} == right
        shutil.rmtree(project.place)
    return f"{full} of {count} disks were full"


def runners(project, right, count):
    processes = [project.start("run", "--json") for _ in range(count)]
    ran = 0
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        events = [json.loads(line) for line in out.splitlines()]
        assert {event["stage"]: event["artifact"] for event in events if "artifact" in event} == right
        ran += sum(event["event"] == "stage_done" for event in events)
    assert ran == len(right), f"{ran} stages ran, of {len(right)}"
    return f"{count} runners at once, each stage ran once"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, type=Path)
    for name, count in (("kills", 200), ("damages", 250), ("disks", 25), ("runners", 8)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=3407)
    args = parser.parse_args()
    pipeline, dice = args.pipeline.resolve(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        right = Project(pipeline, Path(place) / "right").results()
        print(len(right), "stages")
        print(runners(Project(pipeline, Path(place) / "runners"), right, args.runners), flush=True)
        print(disks(pipeline, right, args.disks, dice, place), flush=True)
        project = Project(pipeline, Path(place) / "hammered")
        print(damages_and_kills(project, right, args, dice), flush=True)


def damages_and_kills(project, right, args, dice):
    assert project.results() == right
    damaged = damages(project, right, args.damages, dice)
    print(damaged, flush=True)
    return kills(project, right, args.kills, dice)


if __name__ == "__main__":
    main()
