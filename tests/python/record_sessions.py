#!/usr/bin/env python3
"""Runs the program at a pseudo-terminal, and records what people see or checks it.

    pip install pyte==0.8.2
    python tests/python/record_sessions.py target/debug/pipeline --check
    python tests/python/record_sessions.py target/debug/pipeline --record docs/sessions

With --check a training runs at several widths, once with a window that changes while it runs, once stopped by Ctrl-C and once at TERM=dumb:
no line that moves is wider than the window, and nothing of them is left when the program has ended. With --record the sessions of the
documentation are written as text, each with its command, from real runs at 100x30.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[2]
QUICK = ["--set", "stages.base.train_sft.max_steps=40", "--set", "stages.tuned.train_orpo.max_steps=20"]


class Session:
    """A command at a terminal."""

    def __init__(self, program, arguments, folder, columns=100, lines=30, term="xterm-256color", resize=None, stop_after=None):
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self.stream = pyte.Stream(self.screen)
        self.frames = []
        self.wide = []
        pid, self.master = pty.fork()
        if pid == 0:
            os.chdir(folder)
            environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": term, "LANG": "C.UTF-8"}
            os.execve(program, [program, *arguments], environment)
        self.size(columns, lines)
        started = time.monotonic()
        resizes = list(resize or [])
        while True:
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                try:
                    data = os.read(self.master, 65536)
                except OSError:
                    break
                if not data:
                    break
                self.take(data.decode(errors="replace"))
            elapsed = time.monotonic() - started
            if resizes and elapsed > resizes[0][0]:
                _, columns = resizes.pop(0)
                self.screen.resize(lines, columns)
                self.size(columns, lines)
            if stop_after and elapsed > stop_after:
                os.kill(pid, signal.SIGINT)
                stop_after = None
        self.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def size(self, columns, lines):
        self.columns = columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def take(self, text):
        # Lines that move are written with wrapping turned off.
        for moving in re.findall(r"\x1b\[\?7l(.*?)\x1b\[\?7h", text, re.S):
            lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", moving).split("\n")
            lines = [line.strip("\r") for line in lines]
            self.frames.append(lines)
            # The window may have changed between two reads.
            self.wide += [line for line in lines if len(line) > max(self.columns, 80)]
        self.stream.feed(text)

    def text(self):
        """All that is left: what scrolled away and what is on the screen."""
        history = ["".join(row[column].data for column in range(max(row, default=-1) + 1)) for row in self.screen.history.top]
        lines = [line.rstrip() for line in history + list(self.screen.display)]
        return "\n".join(lines).strip("\n")


def project():
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / ".pipeline").mkdir()
    return folder


def check(program):
    failures = 0

    def expect(condition, message, session):
        nonlocal failures
        if not condition:
            failures += 1
            print(f"FAILED {message}\n{session.text()}\n")

    moving = re.compile(r"[━╌⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]|stages, \d|\d s left| of \d+ steps")
    cases = [(f"{columns} columns", {"columns": columns}) for columns in (50, 80, 100, 200)]
    cases.append(("a window that changes", {"columns": 120, "resize": [(1, 60), (2, 200), (3, 50), (5, 90)]}))
    for name, settings in cases:
        folder = project()
        session = Session(program, ["run", "recipes/quickstart.yaml", *QUICK], folder, **settings)
        left = session.text()
        expect(session.code == 0, f"{name}: exit code {session.code}", session)
        expect(len(session.frames) > 10, f"{name}: {len(session.frames)} frames", session)
        expect(not session.wide, f"{name}: too wide {session.wide[:2]}", session)
        expect(not moving.search(left), f"{name}: left behind {moving.findall(left)}", session)
        done = re.findall(r"^ +done  (\w+)", left, re.M)
        expect(len(done) == 11 and len(set(done)) == 11, f"{name}: {done}", session)
        shutil.rmtree(folder)
        print(f"{name}: {len(session.frames)} frames, {len(left.splitlines())} lines left")

    folder = project()
    long = ["--set", "stages.base.train_sft.max_steps=5000"]
    session = Session(program, ["run", "recipes/quickstart.yaml", "base", *long], folder, stop_after=6)
    left = session.text()
    expect(session.code == 130, f"Ctrl-C: exit code {session.code}", session)
    expect("the same command goes on from there" in left, "Ctrl-C: no word of going on", session)
    expect(not moving.search(left), f"Ctrl-C: left behind {moving.findall(left)}", session)
    session = Session(program, ["plan", "recipes/quickstart.yaml", "base", *long], folder)
    expect("goes on at step" in session.text(), "Ctrl-C: the plan does not know", session)
    shutil.rmtree(folder)

    folder = project()
    session = Session(program, ["run", "recipes/quickstart.yaml", "tokens"], folder, term="dumb")
    expect(session.code == 0 and not session.frames, "TERM=dumb: lines move", session)
    expect("runs  tokens (tokenize)" in session.text(), "TERM=dumb: no plain lines", session)
    shutil.rmtree(folder)
    print("FAILED" if failures else "ok")
    return failures


def record(program, target):
    target.mkdir(parents=True, exist_ok=True)
    folder = project()
    quick = ["recipes/quickstart.yaml"]
    change = ["--set", "stages.tuned.train_orpo.beta=0.2"]
    sessions = [
        ("first-run", ["run", *quick]),
        ("nothing-to-do", ["run", *quick]),
        ("plan", ["plan", *quick, *change]),
        ("why", ["why", *quick, "tuned", *change]),
        ("second-run", ["run", *quick, *change]),
        ("log", ["log", *quick, "tuned"]),
        ("show", ["show", *quick, "scores", *change]),
        ("history", ["history", *quick]),
    ]
    for name, arguments in sessions:
        session = Session(program, arguments, folder)
        text = session.text().replace(str(folder), "~/pipeline")
        command = "$ pipeline " + " ".join(arguments)
        (target / f"{name}.txt").write_text(f"{command}\n{text}\n")
        if session.frames:
            # A training shows most.
            def worth(lines):
                return any("loss" in line for line in lines), len(lines), sum(map(len, lines))

            widest = max(session.frames, key=worth)
            (target / f"{name}.live.txt").write_text("\n".join(line.rstrip() for line in widest) + "\n")
        print(f"{name}: exit code {session.code}")
    shutil.rmtree(folder)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("program", type=Path)
    arguments.add_argument("--check", action="store_true")
    arguments.add_argument("--record", type=Path, metavar="FOLDER")
    arguments = arguments.parse_args()
    program = str(arguments.program.resolve())
    if arguments.record:
        record(program, arguments.record)
    sys.exit(1 if arguments.check and check(program) else 0)


if __name__ == "__main__":
    main()
