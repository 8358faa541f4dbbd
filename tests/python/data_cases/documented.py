"""The rows of the table of forms in docs/data.md, which have to give the conversations that it says."""

import json
import re
from pathlib import Path

from .case import CHATML, Case, assistant, lines, user

TABLE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def forms():
    cases = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        sample = re.match(r"`(\{.*?\})`", cells[2]) if len(cells) == 5 else None
        if not sample:
            continue
        row = json.loads(sample[1])
        meant = re.match(r"user: `(.*?)`; then `(.*?)`(?: and `(.*?)`)?", cells[3])
        name = f"documented_{len(cases) + 1}"
        if not meant:
            cases.append(Case(name, {"rows.jsonl": lines([row])}, rows=[row], compare="sft"))
            continue
        prompt, chosen, rejected = (text and text.encode().decode("unicode_escape") for text in meant.groups())
        right = {"prompt": [user(prompt)], "chosen": [assistant(chosen)]}
        if rejected is not None:
            right["rejected"] = [assistant(rejected)]
        cases.append(Case(name, {"rows.jsonl": lines([row])}, rows=[right], template=CHATML))
    assert len(cases) == 12, len(cases)
    return cases


def cases():
    return [(forms(), "the table of forms")]
