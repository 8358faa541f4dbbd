#!/usr/bin/env python3
"""Checks by hand that data is read as datasets, TRL, transformers and jinja2 read it, or refused with a sentence.

    pip install torch==2.15.0 transformers==5.23.0 trl==1.16.0 peft==0.21.2 datasets==5.2.0 jinja2==3.1.6 pyarrow==26.0.1
    cargo build
    python tests/python/check_data.py target/debug/pipeline            # a table; exit code 1 where something differs
    python tests/python/check_data.py target/debug/pipeline NAME ..    # some cases, with all that was said
    python tests/python/check_data.py --write                          # the right values to tests/golden/data/cases.json

The cases are in data_cases/, a module a group of kinds. Each is a small input as people have it. What is right comes from the
Python libraries alone; where `datasets` itself changes or loses data, the rows as they were written count. A case may also
allow a refusal, with the words that it has to say.
"""

import argparse
import base64
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from data_cases import arguments, content, documented, files, forms, reference, roles, stages

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "cases.json"
MODULES = (content, arguments, roles, forms, files, stages, documented)
# What no error may hold: words of bugs, escape bytes, places in the store.
CRUDE = ("bug in pipeline", "panicked", "by signal", "\x1b", "\\u001b", ".pipeline/v1", "Csv error", "Parquet error", "Arrow error", "EOF while parsing")
# What the recipe may not say where a parameter is meant to be there.
UNKNOWN = ("unknown parameter", "must be a text, not a list")


def all_cases():
    for module in MODULES:
        for cases, kind in module.cases():
            for case in cases:
                case.kind = kind
                yield case


def file(data):
    """A file's bytes as JSON; a text that repeats itself is written once."""
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text or "\ufeff" in text or "\r" in text:
            return {"base64": base64.b64encode(data).decode()}
        data = text
    if data.count("\n") > 200:
        pieces = []
        for line in data.splitlines(keepends=True):
            if pieces and pieces[-1]["text"] == line:
                pieces[-1]["times"] += 1
            else:
                pieces.append({"text": line, "times": 1})
        return {"pieces": pieces}
    return {"text": data}


def once(rows):
    """Rows, with equal neighbours written once."""
    made = []
    for row in rows:
        if made and {**made[-1], "times": 1} == {**row, "times": 1}:
            made[-1]["times"] += 1
        else:
            made.append({**row, "times": 1})
    return [{name: value for name, value in row.items() if (name, value) != ("times", 1)} for row in made]


def many(rows):
    return [{name: value for name, value in row.items() if name != "times"} for row in rows for _ in range(row.get("times", 1))]


def golden(case):
    """The case as the integration test reads it: files, stages, and every outcome that is right."""
    base = "model" if case.model is not None else "base"
    pairs = {name: value for name, value in {"path": "rows.jsonl", **case.pairs}.items() if value is not None}
    made = {"pairs": {"import_dataset": pairs}}
    if isinstance(case.stages, dict):
        made.update(case.stages)
    else:
        chats = {"dataset": "pairs", "tokenizer": base, **case.chats}
        if case.template is not None:
            chats["chat_template"] = case.template
        made["chats"] = {"apply_chat_template": chats}
    if case.compare in ("sft", "orpo") or case.stages == "tokens":
        made["tokens"] = {"tokenize": {"dataset": "chats", "tokenizer": base}}
    outcomes = []
    for rows, told in case.meanings():
        outcome = {"rows": once(reference.right(case, rows)), "told": told}
        if outcome not in outcomes:
            outcomes.append(outcome)
    if case.holds:
        outcomes = [{**outcome, **case.holds} for outcome in outcomes] or [{**case.holds, "told": case.told}]
    if case.refused is not None:
        outcomes.append({"refused": case.refused})
    assert outcomes, case.name
    written = {"name": case.name, "kind": case.kind, "files": {name: file(data) for name, data in case.files.items()}}
    if case.model is not None:
        written["model"] = case.model
    return {**written, "stages": made, "outcomes": outcomes}


def theirs(case, right):
    """What the Python libraries make of the files as they are, in short: their text, or how they refuse."""
    if case.loader is None:
        return "(no such reader)"
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_files(case.files, place)
        try:
            rows = reference.loaded(case, place)
            made = once(reference.right(case, rows))
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            return f"refuses: {type(causes[-1]).__name__}: {' '.join(str(causes[-1]).split())}"
    if any(outcome.get("rows") == made for outcome in right):
        return "the same"
    return "CHANGES IT: " + json.dumps(made, ensure_ascii=False)


def write_files(files, place):
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def prefixed(number, value, key=None):
    """A stage's parameters with the names of stages and the paths of a case. They are numbers, so that no word of an error comes
    from a case's name."""
    if isinstance(value, dict):
        return {name: prefixed(number, inner, name) for name, inner in value.items()}
    if isinstance(value, list) and key in ("path", "datasets"):
        return [prefixed(number, inner, key) for inner in value]
    if key == "path":
        return f"c{number}/{value}"
    if key in ("dataset", "tokenizer") and value != "base":
        return f"c{number}-{value}"
    return value


class Ours:
    """The program in a project of its own, where all cases are stages of few recipes."""

    def __init__(self, program, place):
        self.program = Path(program).resolve()
        self.place = place
        (place / ".pipeline").mkdir()
        reference.model_folder({}, place / "model")

    def run(self, *arguments):
        done = subprocess.run([self.program, *arguments], cwd=self.place, capture_output=True, timeout=1200, env={"HOME": str(self.place)})
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def recipe(self, cases):
        """The recipe of many cases, a stage a line, and whose the lines are."""
        written, owners = ["version: 1", "stages:", "  base: { import_model: { path: model } }"], {}
        for number, case in cases:
            model = {"model": {"import_model": {"path": "model"}}} if "model" in case else {}
            for stage, does in {**model, **case["stages"]}.items():
                written.append(f"  c{number}-{stage}: {json.dumps(prefixed(number, does), ensure_ascii=False)}")
                owners[len(written)] = number
        (self.place / "all.yaml").write_text("\n".join(written) + "\n", encoding="utf-8")
        return owners

    def mistakes(self, owners, error):
        """The mistakes of a recipe by the number of their case, without the lines that are quoted."""
        found = {}
        for mistake in error.split("\n\n"):
            place = re.search(r"--> all\.yaml:(\d+):", mistake)
            if place and int(place[1]) in owners:
                words = "\n".join(line for line in mistake.splitlines() if not re.match(r"\s*(\d*\s*\||-->)", line))
                found.setdefault(owners[int(place[1])], []).append(words)
        return {number: "\n".join(words) for number, words in found.items()}

    def outcomes(self, cases, sources):
        """What came of each case: rows by split and what was told, or the words of the refusal."""
        made, left = {}, list(enumerate(cases))
        for number, case in left:
            write_files(sources[case["name"]].files, self.place / f"c{number}")
            if "model" in case:
                reference.model_folder(case["model"], self.place / f"c{number}/model")
        while True:
            # A recipe with a mistake stops all of it, so these are found first.
            owners = self.recipe(left)
            code, _, error = self.run("validate", "all.yaml")
            if code == 0:
                break
            mistakes = self.mistakes(owners, error)
            if not mistakes:
                raise SystemExit(f"the recipe is refused: {error}")
            made.update({cases[number]["name"]: {"refused": words} for number, words in mistakes.items()})
            left = [(number, case) for number, case in left if number not in mistakes]
        code, out, error = self.run("run", "all.yaml", "--keep-going", "--json", "--jobs", "2")
        events = {}
        for line in out.splitlines():
            event = json.loads(line)
            events.setdefault(event.get("stage", "").split("-")[0], []).append(event)
        if not events:
            raise SystemExit(f"the run said nothing: {error}")
        # Equal stages run once; what was told belongs to all of them.
        told = {}
        for name, mine in self.by_stage(events).items():
            words = [event["text"] for event in mine if event["event"] == "message"]
            for event in mine:
                if event["event"] == "stage_done":
                    told.setdefault((name.split("-")[1], event["artifact"]), []).extend(words)
        for number, case in left:
            made[case["name"]] = self.outcome(events[f"c{number}"], told)
        return made

    @staticmethod
    def by_stage(events):
        made = {}
        for event in (event for mine in events.values() for event in mine if "-" in event.get("stage", "")):
            made.setdefault(event["stage"], []).append(event)
        return made

    def outcome(self, mine, told):
        failed = [event["error"] for event in mine if event["event"] == "stage_failed"]
        if failed:
            return {"refused": "\n".join(failed)}
        words = [event["text"] for event in mine if event["event"] == "message"]
        artifacts = {}
        for event in mine:
            if event["event"] in ("stage_done", "stage_fresh"):
                stage = event["stage"].split("-")[1]
                artifacts[stage] = event["artifact"]
                if event["event"] == "stage_fresh":
                    words += told.get((stage, event["artifact"]), [])
        return {"told": "\n".join(words), "splits": {stage: self.splits(artifact) for stage, artifact in artifacts.items() if stage != "model"}}

    def splits(self, artifact):
        import pyarrow.parquet as pq

        made = {}
        for path in sorted((self.place / ".pipeline/v1/artifacts" / artifact).glob("*.parquet")):
            made.setdefault(path.stem.split("-0000")[0], []).extend(pq.read_table(path).to_pylist())
        return made


def row_of(stages_rows, number, wanted):
    """The values of ours that a right row names."""
    chats = stages_rows["chats"]["train"][number]
    made = {}
    for name in wanted:
        if name in ("ids", "rejected_ids"):
            tokens = stages_rows["tokens"]["train"][number]
            prompt = tokens["prompt_ids"] if name == "ids" else tokens.get("rejected_prompt_ids") or tokens["prompt_ids"]
            made[name] = prompt + tokens["chosen_ids" if name == "ids" else "rejected_ids"]
        elif name == "text":
            made[name] = chats["prompt"] + chats["chosen"]
        else:
            made[name] = chats.get(name)
    if "prompt" in wanted and chats.get("rejected") is not None:
        made["rejected"] = chats["rejected"]
    return made


def said(words, text):
    """The words that are missing; `a|b` is there with either."""
    return [word for word in words if not any(each in text for each in word.split("|"))]


def judge(case, ours):
    """Verdict and, where it differs, the reason."""
    if "refused" in ours:
        text = ours["refused"]
        crude = [word for word in CRUDE + UNKNOWN if word in text]
        allowed = [outcome for outcome in case["outcomes"] if "refused" in outcome]
        if crude:
            return "DIFFERS", f"the error holds {crude[0]!r}"
        if not allowed:
            return "DIFFERS", "refused, and should be read"
        missing = said(allowed[0]["refused"], text)
        return ("DIFFERS", f"the error doesn't say {', '.join(missing)}") if missing else ("refused, told", "")
    reasons = []
    for outcome in case["outcomes"]:
        reason = "read, and should be refused" if "refused" in outcome else differs(outcome, ours)
        if reason is None:
            return "same", ""
        reasons.append(reason)
    return "DIFFERS", reasons[0]


def differs(outcome, ours):
    splits = ours["splits"]
    if "rows" in outcome:
        right = many(outcome["rows"])
        stage = "tokens" if right and "ids" in right[0] else "chats"
        count = len(splits[stage].get("train", []))
        if count != len(right):
            return f"{count} rows instead of {len(right)}"
        for number, row in enumerate(right):
            made = row_of(splits, number, row)
            for name in made:
                if made[name] != row.get(name):
                    return f"row {number + 1}, {name}: {apart(made[name], row.get(name))}"
    for split, count in outcome.get("counts", {}).items():
        if len(splits["chats"].get(split, [])) != count:
            return f"{len(splits['chats'].get(split, []))} rows of {split} instead of {count}"
    if "all" in outcome:
        train, test = splits["chats"]["train"], splits["chats"]["test"]
        if len(train) + len(test) != outcome["all"] or not outcome["test"][0] <= len(test) <= outcome["test"][1]:
            return f"{len(train)} rows of train and {len(test)} of test"
        shared = {row["prompt"] for row in train} & {row["prompt"] for row in test}
        if "apart" in outcome and shared:
            return f"{len(shared)} prompts are in train and in test"
    missing = said(outcome["told"], ours["told"])
    if missing:
        return f"it doesn't tell {', '.join(missing)}"
    return None


def apart(ours, right, around=40):
    """Where two values begin to differ."""
    if not isinstance(ours, (str, list)) or type(ours) is not type(right):
        return f"{json.dumps(ours, ensure_ascii=False)[:80]} instead of {json.dumps(right, ensure_ascii=False)[:80]}"
    start = next((at for at, (one, other) in enumerate(zip(ours, right)) if one != other), min(len(ours), len(right)))
    begin = max(0, start - 8)
    cut = lambda value: (".." if begin else "") + json.dumps(value[begin : start + around], ensure_ascii=False) + (".." if start + around < len(value) else "")
    return f"{cut(ours)} instead of {cut(right)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", nargs="?")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="write the goldens")
    parser.add_argument("--known", action="store_true", help="write the names of what differs to tests/golden/data/differs.txt")
    parser.add_argument("--no-loading", action="store_true", help="leave out what datasets makes of the files")
    options = parser.parse_args()
    cases = list(all_cases())
    repeated = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    assert not repeated, repeated
    if options.names:
        cases = [case for case in cases if case.name in options.names]
    made, failed = [], []
    for case in cases:
        try:
            made.append(golden(case))
        except Exception as error:
            failed.append(f"{case.name}: the reference fails: {type(error).__name__}: {error}")
    if failed:
        raise SystemExit("\n".join(failed))
    if options.write:
        GOLDEN.parent.mkdir(exist_ok=True)
        # A case a line, so that changes can be read.
        text = "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in made) + "\n]\n"
        GOLDEN.write_text(text, encoding="utf-8")
        print(f"{len(made)} cases, {len(text)} bytes")
    if options.program is None:
        return
    sources = {case.name: case for case in cases}
    with tempfile.TemporaryDirectory() as place:
        ours = Ours(options.program, Path(place)).outcomes(made, sources)
    table, counts = [], {}
    for case in made:
        verdict, reason = judge(case, ours[case["name"]])
        they = "" if options.no_loading else theirs(sources[case["name"]], case["outcomes"])
        mine = ours[case["name"]]
        shown = "refused: " + " ".join(mine["refused"].split()) if "refused" in mine else json.dumps(once(mine["splits"].get("chats", {}).get("train", [])), ensure_ascii=False)
        length = 100_000 if options.names else 160
        table.append((case["kind"], case["name"], they[:length], shown[:length], verdict, reason))
        counts.setdefault(case["kind"], Counter())[verdict] += 1
        if options.names:
            print(json.dumps(case, indent=1, ensure_ascii=False), "\n", mine.get("told", ""))
    if options.known:
        names = [name for _, name, _, _, verdict, _ in table if verdict == "DIFFERS"]
        (GOLDEN.parent / "differs.txt").write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
    print("kind | case | reference | ours | verdict")
    for kind, name, they, shown, verdict, reason in table:
        print(f"{kind} | {name} | {they} | {shown} | {verdict}{': ' + reason if reason else ''}")
    print("\nkind | cases | same | refused, told | DIFFERS")
    for kind, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{kind} | {count.total()} | {count['same']} | {count['refused, told']} | {count['DIFFERS']}")
    sys.exit(any(verdict == "DIFFERS" for *_, verdict, _ in table))


if __name__ == "__main__":
    main()
