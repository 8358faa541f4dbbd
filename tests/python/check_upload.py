#!/usr/bin/env python3
"""Checks by hand that the hub of the tests takes what huggingface_hub uploads, and that both programs put the same files there.

    pip install huggingface_hub==2.4.0
    cargo build && cargo test --test it --no-run        # the second tells the path of the tests' program
    python tests/python/check_upload.py target/debug/pipeline target/debug/deps/it-0123456789abcdef

Each row of the table is one situation: `upload_folder` and `pipeline publish` put the same folder into a repository each, and the files are
compared. Cards that we make are read and checked by huggingface_hub's own ModelCard. Xet is switched off, as in check_hub.py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_hub import ROOT, TOKEN, Server  # noqa: E402

READER = "hf_only_reads_things"


def theirs():
    """What huggingface_hub does, in a process of its own: it reads the variables when it is imported."""
    from huggingface_hub import HfApi, ModelCard, errors

    wanted = json.loads(sys.argv[2])
    api = HfApi()
    try:
        if "card" in wanted:
            card = ModelCard.load(wanted["card"])
            card.validate()
            print("THEIRS " + json.dumps(card.data.to_dict()))
            return
        if wanted.get("create", True):
            api.create_repo(wanted["repo"], repo_type=wanted["kind"], private=wanted.get("private"), exist_ok=True)
        if wanted.get("branch"):
            api.create_branch(wanted["repo"], branch=wanted["branch"], repo_type=wanted["kind"], exist_ok=True)
        info = api.upload_folder(repo_id=wanted["repo"], repo_type=wanted["kind"], folder_path=wanted["folder"],
                                 revision=wanted.get("branch"), create_pr=wanted.get("create_pr", False))
        print("THEIRS " + json.dumps({"commit": info.oid, "pr": info.pr_url}))
    except errors.HfHubHTTPError as error:
        print("THEIRS " + json.dumps({"refused": error.response.status_code}))


def main():
    pipeline, program = (str(Path(path).resolve()) for path in sys.argv[1:3])
    scratch = Path(tempfile.mkdtemp(prefix="check_upload."))
    server = Server(program)
    order = server.order
    bad = 0

    def variables(token):
        kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
        return {
            **kept, "HOME": str(scratch), "HF_HOME": str(scratch / "home"), "HF_ENDPOINT": server.endpoint, "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    def ask_theirs(token=TOKEN, **wanted):
        command = [sys.executable, __file__, "--theirs", json.dumps(wanted)]
        done = subprocess.run(command, env=variables(token), capture_output=True, text=True, timeout=120)
        lines = [line for line in done.stdout.splitlines() if line.startswith("THEIRS ")]
        if not lines:
            raise SystemExit(f"huggingface_hub failed against the tests' hub:\n{done.stderr}")
        return json.loads(lines[0][7:])

    def ask_ours(folder, repo, *more, token=TOKEN):
        command = [pipeline, "publish", str(folder), "--repo", repo, "--license", "mit", "--json", *more]
        return subprocess.run(command, cwd=scratch, env=variables(token), capture_output=True, text=True, timeout=120)

    def files(repo, branch="main"):
        return order("files", repo=repo, branch=branch)["files"]

    def tell(name, good, detail=""):
        nonlocal bad
        bad += not good
        print(f"{'ok' if good else 'DIFFERS':>7}  {name:<52} {detail}", flush=True)

    model = scratch / "model"
    shutil.copytree(ROOT / "tests/golden/model", model)
    (model / "empty.txt").write_text("")
    (model / "ä b.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    data = scratch / "data"
    (data / "data").mkdir(parents=True)
    (data / "data/train-00000-of-00001.parquet").write_bytes(os.urandom(5000))

    def both(name, folder, kind, our_arguments=(), branch="main", their_branch=None, **wanted):
        plural = f"{kind}s"
        tag = name.replace(" ", "-").replace(",", "")
        their = ask_theirs(repo=f"me/their-{tag}", kind=kind, folder=str(folder), branch=their_branch, **wanted)
        our = ask_ours(folder, f"me/our-{tag}", *our_arguments)
        if our.returncode != 0 or "refused" in their:
            return tell(name, False, f"{their} {our.stderr.strip()}")
        one, other = files(f"{plural}/me/their-{tag}", branch), files(f"{plural}/me/our-{tag}", branch)
        if kind == "dataset":
            one.pop("README.md", None), other.pop("README.md", None)
        tell(name, one == other and len(one) > 1, f"{len(one)} files equal" if one == other else f"{sorted(set(one) ^ set(other))}")

    both("a model", model, "model")
    both("a dataset", data, "dataset", ("--dataset",))
    both("a private model", model, "model", ("--private",), private=True)
    both("a branch", model, "model", ("--revision", "v1/x"), branch="v1/x", their_branch="v1/x")
    order("multipart", threshold=100_000, chunk=65_536)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes() + b" " * 300_000)
    both("large files in parts", model, "model")
    both("a proposal", model, "model", ("--create-pr",), branch="refs/pr/1", create_pr=True)

    again = ask_theirs(repo="me/our-a-model", kind="model", folder=str(model))
    ours = ask_ours(model, "me/our-a-model")
    done = json.loads(ours.stdout)[0]
    tell("theirs, then ours: nothing to send", not done["changed"] and done["commit"] == again["commit"], ours.stderr.strip())
    for name, token, repo, status in [("a token that reads", READER, "me/read", 403), ("a wrong token", "hf_wrong", "me/wrong", 401),
                                      ("somebody else's name", TOKEN, "openai/x", 403)]:
        their = ask_theirs(token=token, repo=repo, kind="model", folder=str(model))
        our = ask_ours(model, repo, token=token)
        tell(f"refused: {name}", their.get("refused") == status and our.returncode == 1 and f"({status})" in our.stderr,
             f"{their} {our.stderr.strip()[:100]}")

    adapter = scratch / "adapter"
    shutil.copytree(ROOT / "tests/golden/adapter_final", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "some/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    our = ask_ours(adapter, "me/card")
    assert our.returncode == 0, our.stderr
    card = ask_theirs(card="me/card")
    expected = {"license": "mit", "base_model": "some/base", "base_model_relation": "adapter", "library_name": "peft",
                "pipeline_tag": "text-generation", "tags": ["lora", "pipeline"]}
    tell("our card, read by ModelCard and validated", card == expected, "" if card == expected else str(card))

    server.end()
    shutil.rmtree(scratch)
    print(f"{bad} differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    theirs() if sys.argv[1:2] == ["--theirs"] else main()
