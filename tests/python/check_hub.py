#!/usr/bin/env python3
"""Checks by hand that the hub of the tests is one for huggingface_hub, and that both programs fetch the same from it.

    pip install huggingface_hub==2.4.0
    cargo build && cargo test --test it --no-run        # the second tells the path of the tests' program
    python tests/python/check_hub.py target/debug/pipeline target/debug/deps/it-0123456789abcdef

Each row of the table is one situation; each program has a cache of its own. Files are compared byte by byte, and so are the
names of the cache's links and blobs, which both programs share in real life. Xet is switched off: the tests' hub has no store
of chunks behind it.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_opens_everything"
PAIRS = [{"prompt": "What is up?", "chosen": "The sky.", "rejected": "Nothing."}]


class Server:
    """The hub of the tests, which takes orders."""

    def __init__(self, program):
        command = [program, "--ignored", "--exact", "--nocapture", "hub::serve_another_program"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.endpoint = self.answer()["endpoint"]

    def answer(self):
        for line in self.process.stdout:
            # The harness writes the test's name before the first of ours.
            if "HUB {" in line:
                answer = json.loads(line[line.index("HUB ") + 4:])
                assert "error" not in answer, answer
                return answer
        raise SystemExit("the hub ended")

    def order(self, name, **values):
        print(json.dumps({name: values}), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)


def theirs():
    """What huggingface_hub does, in a process of its own: it reads the variables when it is imported."""
    import huggingface_hub
    from huggingface_hub import errors

    wanted = json.loads(sys.argv[2])
    repo, revision, kind = wanted["repo"], wanted["revision"], wanted["kind"]
    try:
        if wanted["files"] is None:
            folder = huggingface_hub.snapshot_download(repo, repo_type=kind, revision=revision)
        else:
            for name in wanted["files"]:
                path = huggingface_hub.hf_hub_download(repo, name, repo_type=kind, revision=revision)
                folder = path[: -len(name)].rstrip("/")
        print("THEIRS " + json.dumps({"folder": folder}))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        # "Not in the cache either" has the hub's refusal behind it.
        behind = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        print("THEIRS " + json.dumps({"refused": type(behind or error).__name__}))


class Case:
    """One situation: two caches, one question."""

    rows = []

    def __init__(self, server, name, place, pipeline):
        self.server, self.name, self.place, self.pipeline = server, name, place, pipeline
        self.their_home, self.our_home = place / "theirs", place / "ours"
        for home in (self.their_home, self.our_home):
            home.mkdir(parents=True, exist_ok=True)

    def variables(self, home, token, **more):
        kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        secret = {"HF_TOKEN": token} if token else {}
        return {
            **kept, "HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": self.server.endpoint,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **secret, **more,
        }

    def ask_theirs(self, repo, kind, revision, token, files, **more):
        wanted = json.dumps({"repo": repo, "kind": kind, "revision": revision, "files": files})
        command = [sys.executable, __file__, "--theirs", wanted]
        done = subprocess.run(command, env=self.variables(self.their_home, token, **more),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
        lines = [line for line in done.stdout.splitlines() if line.startswith("THEIRS ")]
        if not lines:
            raise SystemExit(f"{self.name}: huggingface_hub failed against the tests' hub:\n{done.stderr}")
        return json.loads(lines[0][7:])

    def ask_ours(self, repo, kind, revision, token, **more):
        project = self.place / "project"
        (project / ".pipeline").mkdir(parents=True, exist_ok=True)
        if kind == "model":
            stage = {"download_model": {"repo": repo, "revision": revision, "allow_patterns": ["*"]}}
        else:
            stage = {"download_dataset": {"repo": repo, "revision": revision}}
        recipe = {"version": 1, "stages": {"it": stage}}
        (project / "recipe.yaml").write_text(json.dumps(recipe))
        command = [self.pipeline, "run", "recipe.yaml"]
        return subprocess.run(command, cwd=project, env=self.variables(self.our_home, token, **more),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)

    def check(self, repo, expected=None, kind="model", revision="main", token=None, files=None, **more):
        """`expected` is the refusal: huggingface_hub's error and a piece of our sentence. `None` is success."""
        their = self.ask_theirs(repo, kind, revision, token, files, **more)
        our = self.ask_ours(repo, kind, revision, token, **more)
        said = our.stderr.strip().splitlines()
        if expected is not None:
            error, piece = expected
            good = their.get("refused") == error and our.returncode == 1 and piece in our.stderr
            theirs_said = their.get("refused", "fetched")
            return self.tell(good, theirs_said, f'"..{piece}.."' if piece in our.stderr else str(said[:3]), "")
        if "folder" not in their or our.returncode != 0:
            return self.tell(False, str(their), str(said[-3:]), "")
        folder = Path(their["folder"])
        within = folder.relative_to(self.their_home)
        mine = self.our_home / within
        wrong, count, size = [], 0, 0
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            twin = mine / name
            # A dataset's own files alone are fetched, not its README.
            if kind == "dataset" and not twin.exists() and name.suffix == ".md":
                continue
            count, size = count + 1, size + path.stat().st_size
            if not twin.exists() or not filecmp.cmp(path, twin, shallow=False):
                wrong.append(f"{name} differs")
            elif os.readlink(path) != os.readlink(twin):
                wrong.append(f"{name}: {os.readlink(path)} and {os.readlink(twin)}")
        refs = within.parents[1] / "refs" / revision
        if revision != folder.name and (self.their_home / refs).read_text() != (self.our_home / refs).read_text():
            wrong.append("refs differ")
        if kind == "model":
            results = list((self.place / "project/.pipeline/v1/artifacts").glob("*"))
            same = [self.same(folder, result) for result in results]
            if not any(same):
                wrong.append("the result differs from the snapshot")
        self.tell(not wrong and count > 0, "fetched", "fetched", f"{count} files, {size} bytes equal" if not wrong else "; ".join(wrong))

    @staticmethod
    def same(one, other):
        names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        listed = [name for name in names(other) if name not in ("manifest.json",)]
        return names(one) == listed and all(filecmp.cmp(one / n, other / n, shallow=False) for n in names(one))

    def tell(self, good, their, our, files):
        Case.rows.append((good, self.name, their, our, files))
        print(f"{'ok' if good else 'DIFFERS':>7}  {self.name:<44} {their:<24} {our:<34} {files}", flush=True)


LOGIN = """
import json, sys
import huggingface_hub as hub
from huggingface_hub.utils import get_stored_tokens
for word in sys.argv[1:]:
    if word == "login":
        hub.login(token="%s")
    elif word == "logout":
        hub.logout()
print("THEIRS " + json.dumps({"token": hub.get_token(), "stored": get_stored_tokens(),
                              "name": hub.whoami()["name"] if hub.get_token() else None}))
""" % TOKEN


def logins(case):
    """Who logs in by one program is logged in for the other, and the files are the same."""
    home = case.our_home

    def ours(*arguments, text=None):
        return subprocess.run([case.pipeline, *arguments], env=case.variables(home, None), input=text,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60, cwd=case.place)

    def theirs(*words):
        done = subprocess.run([sys.executable, "-c", LOGIN, *words], env=case.variables(home, None),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
        lines = [line for line in done.stdout.splitlines() if line.startswith("THEIRS ")]
        assert lines, done.stderr
        return json.loads(lines[0][7:])

    def files():
        return {name: (home / name).read_text() for name in ("token", "stored_tokens") if (home / name).exists()}

    assert ours("login", text=TOKEN + "\n").returncode == 0
    by_us = files()
    seen = theirs()
    case.name = "our login, seen by huggingface_hub"
    case.tell(seen == {"token": TOKEN, "stored": {"laptop": TOKEN}, "name": "somebody"}, str(seen["name"]), "logged in", "")
    theirs("logout")
    case.name = "its logout, seen by us"
    case.tell(not files() and ours("whoami").returncode == 1, "logged out", "logged out", "")
    theirs("login")
    case.name = "its login, seen by us"
    case.tell(ours("whoami").stdout.startswith("somebody\n"), "logged in", "somebody", "")
    case.name = "the files of both logins"
    case.tell(files() == by_us, "", "", "2 files equal" if files() == by_us else f"{files()} and {by_us}")
    assert ours("logout").returncode == 0
    case.name = "our logout, seen by huggingface_hub"
    case.tell(theirs() == {"token": None, "stored": {}, "name": None}, "logged out", "logged out", "")


def main():
    pipeline, program = (str(Path(path).resolve()) for path in sys.argv[1:3])
    scratch = Path(tempfile.mkdtemp(prefix="check_hub."))
    server = Server(program)
    order = server.order

    model = scratch / "files/model"
    shutil.copytree(ROOT / "tests/golden/model", model)
    (model / "sub folder/deep").mkdir(parents=True)
    (model / "sub folder/deep/ä b#1?+%.txt").write_text("odd\n")
    (model / "empty.txt").write_text("")
    (model / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    other = scratch / "files/other"
    shutil.copytree(ROOT / "tests/golden/model", other)
    (other / "README.md").write_text("# another commit\n")
    data = scratch / "files/data"
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text("# Pairs\n")
    (data / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 50))

    number = 0

    def case(name):
        nonlocal number
        number += 1
        return Case(server, name, scratch / f"{number:02}", pipeline)

    def repo(name, folder=model, kind="models", branch="main", gate=None):
        order("commit", repo=f"{kind}/{name}", branch=branch, folder=str(folder))
        if gate:
            order("gate", repo=f"{kind}/{name}", gate=gate)
        return name

    case("a model, whole").check(repo("a/model"))
    case("a dataset").check(repo("a/pairs", data, "datasets"), kind="dataset")
    case("file by file (hf_hub_download)").check(
        "a/model", files=[str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()])
    commit = order("commit", repo="models/a/model", branch="main", folder=str(model))["commit"]
    case("a commit").check("a/model", revision=commit)
    repo("a/model", other, branch="refs/pr/1")
    case("a revision with slashes").check("a/model", revision="refs/pr/1")
    moved = case("a branch, before it moves")
    moved.check(repo("a/moving"))
    repo("a/moving", other)
    moved.name = "the branch, moved"
    moved.check("a/moving")
    repo("a/old")
    order("rename", old="models/a/old", new="models/b/new")
    case("a renamed repository").check("a/old")
    repo("short")
    order("rename", old="models/short", new="models/long/short")
    case("a name of old without an owner").check("short")
    order("page", entries=2)
    case("a list by pages of two").check("a/model")
    order("page", entries=1000)

    gated = repo("a/gated", gate="gated")
    case("gated, without a token").check(gated, ("GatedRepoError", "is gated"))
    case("gated, with a token").check(gated, token=TOKEN)
    case("gated, with a wrong token").check(gated, ("HfHubHTTPError", "refuses the token"), token="hf_wrong")
    refused = repo("a/refused", gate="refused")
    case("gated, the licence not accepted").check(refused, ("GatedRepoError", "accept its licence"), token=TOKEN)
    private = repo("a/private", gate="private")
    case("private, without a token").check(private, ("RepositoryNotFoundError", "to nobody without a token"))
    case("private, with a token").check(private, token=TOKEN)
    disabled = repo("a/disabled", gate="disabled")
    case("taken down").check(disabled, ("DisabledRepoError", "Access to this resource is disabled"))
    case("no such repository").check("a/none", ("RepositoryNotFoundError", "(404)"), token=TOKEN)
    case("no such revision").check("a/model", ("RevisionNotFoundError", "no revision `none`"), revision="none")

    limit = {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"fixed window";"resolvers";q=500;w=300'}
    for name, status, headers in [
        ("429 with RateLimit", 429, limit), ("429 with Retry-After", 429, {"Retry-After": "1"}),
        ("503 with Retry-After", 503, {"Retry-After": "1"}), ("502 without a word", 502, {}),
    ]:
        busy = repo(f"busy/{len(Case.rows)}")
        # Each program comes by once. huggingface_hub asks once more for a list of files and for a file's headers only.
        order("busy", path=f"/{busy}/tree/", status=status, headers=headers, times=1)
        waited = case(f"{name}, in a list")
        their = waited.ask_theirs(busy, "model", "main", None, None)
        order("busy", path=f"/{busy}/", status=status, headers=headers, times=2)
        our = waited.ask_ours(busy, "model", "main", None)
        assert our.returncode == 0, our.stderr
        waited.check(busy)
    cut = repo("a/cut")
    broken = case("a body that breaks off (ours)")
    order("cut", path=f"/{cut}/resolve/", after=1000, times=1)
    our = broken.ask_ours(cut, "model", "main", None)
    assert our.returncode == 0, our.stderr
    broken.check(cut)

    swapped = case("our cache, read by huggingface_hub offline")
    assert swapped.ask_ours("a/model", "model", "main", None).returncode == 0
    shutil.rmtree(swapped.their_home)
    shutil.copytree(swapped.our_home, swapped.their_home, symlinks=True)
    names = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
    swapped.check("a/model", files=names, HF_HUB_OFFLINE="1")
    swapped = case("its cache, read by us offline")
    swapped.ask_theirs("a/model", "model", "main", None, None)
    shutil.rmtree(swapped.our_home)
    shutil.copytree(swapped.their_home, swapped.our_home, symlinks=True)
    swapped.check("a/model", HF_HUB_OFFLINE="1")

    for without in [["tree", "sizes"], ["tree", "sizes", "redirects"], ["tree", "sizes", "head"]]:
        order("mirror", without=without)
        mirror = case("a mirror without " + ", ".join(without))
        if "head" in without:
            our = mirror.ask_ours("a/model", "model", "main", None)
            order("mirror", without=[])
            assert our.returncode == 0, our.stderr
            mirror.check("a/model")
        else:
            mirror.check("a/model", files=names)
    order("mirror", without=[])
    logins(case("logins"))

    server.end()
    shutil.rmtree(scratch)
    bad = sum(not good for good, *_ in Case.rows)
    print(f"{len(Case.rows)} situations, {bad} differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    theirs() if sys.argv[1:2] == ["--theirs"] else main()
