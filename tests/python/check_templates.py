"""Compares chat templates as this program renders them with jinja2 as transformers sets it up.

    python tests/python/check_templates.py [--write] [--originals FOLDER]

It needs transformers 5.23, trl 1.16 and jinja2 3.1.6, and runs one test of the library (`cargo test --lib`), which renders the cases
that are given to it in a file. The templates are those in TRL's wheel, by the conversations below; they stay in the wheel. The
built-in templates (src/text/builtin) are compared with those that models came with: llama3, qwen3, gemma and phi3 with TRL's copies, the
others with files `chatml.jinja`, `zephyr.jinja`, `mistral.jinja` and `alpaca.jinja` in FOLDER, taken from the models OpenHermes 2.5,
Zephyr 7B beta, Mistral 7B Instruct v0.3 and from axolotl. With --write what the originals print becomes
tests/golden/templates/builtin.json. The constructs are those of template_constructs.py; with --write jinja2's values become tests/golden/templates/constructs.json, which
the library's own tests read.
"""

import copy
import datetime
import glob
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections import Counter

import transformers.utils.chat_template_utils as utils
import trl
from template_constructs import VARIABLES, constructs

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/templates/constructs.json"
BUILT_IN = ROOT / "tests/golden/templates/builtin.json"
TRL_TEMPLATES = os.path.join(os.path.dirname(trl.__file__), "chat_templates")
# The originals of the built-in templates, in TRL's wheel or in the folder that is given.
ORIGINALS = {
    "llama3": "llama3", "qwen3": "qwen3", "gemma": "gemma3", "phi3": "phi3",
    "chatml": None, "zephyr": None, "mistral": None, "alpaca": None,
}


class Day(datetime.datetime):
    """The day that `strftime_now` tells on both sides."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 6)


utils.datetime = Day

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city."},
                "days": {"type": "integer", "enum": [1, 2]},
                "options": {"type": "object", "properties": {"unit": {"type": ["string", "null"]}}, "required": ["unit"]},
                "list": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
ARGUMENTS = {"city": "Köln", "days": 2, "scale": 1.0, "at": None, "list": ["a", {"b": True}]}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(arguments, content=""):
    call = {"type": "function", "id": "c12345678", "function": {"name": "weather", "arguments": arguments}}
    return assistant(content, tool_calls=[call])


def result(content, **more):
    return {"role": "tool", "content": content, "name": "weather", "tool_call_id": "c12345678", **more}


CONVERSATIONS = {
    "one user": {"messages": [user("Hi")], "add_generation_prompt": True},
    "one turn": {"messages": [user("Hi "), assistant(" Hello.\n")]},
    "system": {"messages": [system("Be brief."), user("Hi"), assistant("Hello.")]},
    "two turns": {"messages": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")]},
    "generation prompt": {"messages": [system("S"), user("Hi"), assistant("Hello."), user("2+2?")], "add_generation_prompt": True},
    "tools": {"messages": [user("Weather?")], "tools": [TOOL], "add_generation_prompt": True},
    "tool call": {"messages": [user("Weather?"), calls(ARGUMENTS), result("21 °C"), assistant("It is 21 °C.")], "tools": [TOOL]},
    "call and text": {"messages": [user("Weather?"), calls({"city": "Bonn"}, "Let me see.")], "tools": [TOOL, TOOL]},
    "arguments as text": {"messages": [user("Weather?"), calls('{"city": "Bonn"}'), result("ok")], "add_generation_prompt": True},
    "reasoning": {"messages": [user("2+2?"), assistant("4", reasoning_content="add\nthem"), user("3+3?"), assistant("6", thinking="again")]},
    "think tags": {"messages": [user("2+2?"), assistant("<think>\nadd\n</think>\n\n4"), user("q"), assistant("<think>x</think>r")]},
    "no thinking": {"messages": [user("2+2?")], "add_generation_prompt": True, "enable_thinking": False},
    "parts": {"messages": [user([{"type": "text", "text": "name "}, {"type": "text", "text": "a tree"}]), assistant([{"type": "text", "text": "oak"}])]},
    "empty content": {"messages": [system(""), user(""), assistant("")]},
    "null content": {"messages": [user("Weather?"), calls({}, None), result("ok"), assistant("x")]},
    "two results": {"messages": [user("a"), calls({"city": "A"}), result("1"), result("2"), assistant("b"), user("c"), assistant("d")], "tools": [TOOL]},
    "assistant first": {"messages": [assistant("Hi"), user("x")]},
    "two assistants": {"messages": [user("Hi"), assistant("A"), assistant("B")]},
    "developer": {"messages": [{"role": "developer", "content": "D"}, user("x")], "add_generation_prompt": True},
}


def by_jinja2(source, variables):
    try:
        return {"text": utils._compile_jinja_template(source).render(**copy.deepcopy(variables))}
    except Exception as error:
        return {"error": type(error).__name__}


def by_the_program(cases):
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder, "cases.json"), pathlib.Path(folder, "made.json")
        given.write_text(json.dumps([{"source": source, "variables": variables} for source, variables in cases]))
        environment = {**os.environ, "TEMPLATE_CASES": str(given), "TEMPLATE_RESULTS": str(made)}
        command = ["cargo", "test", "--lib", "--", "--ignored", "--exact", "text::template::tests::renders_the_cases_of_a_file"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(made.read_text())


def built_in(folder):
    """Cases of the built-in templates: name, conversation, and what the original prints."""
    made = []
    for name, file in ORIGINALS.items():
        path = pathlib.Path(TRL_TEMPLATES, f"{file}.jinja") if file else pathlib.Path(folder, f"{name}.jinja")
        source = path.read_text(encoding="utf-8")
        for title, conversation in CONVERSATIONS.items():
            given = copy.deepcopy(conversation)
            given["messages"] = utils._alias_reasoning_fields(given["messages"])
            roles = {message["role"] for message in given["messages"]}
            # A message of a role that these don't know is left out by the originals, and refused by ours.
            if name in ("zephyr", "phi3") and roles & {"tool", "developer"}:
                continue
            # Axolotl's leaves a gap where ours has Alpaca's own sentence. The original's place of a system message is the last
            # question's, and none if an answer follows.
            if (name == "alpaca" and (given["messages"][0]["role"] != "system" or not given["messages"][0]["content"])) or (name == "mistral" and "system" in roles):
                continue
            printed = by_jinja2(source, {"tools": None, "documents": None, "add_generation_prompt": False, **TOKENS, **given})
            if "text" in printed:
                made.append({"template": name, "conversation": title, **given, "text": printed["text"]})
    return made


def verdict(expected, found):
    if "error" in expected:
        return "both fail" if "error" in found else "only jinja2 fails"
    if "error" in found:
        return "only we fail"
    return "same" if expected["text"] == found["text"] else "differs"


def addresses(expected):
    """Whether jinja2 prints where an object lies in memory, which is another text each time."""
    return " at 0x" in expected.get("text", "")


def main():
    names, cases = [], []
    for path in sorted(glob.glob(os.path.join(TRL_TEMPLATES, "*.jinja"))):
        source = open(path, encoding="utf-8", newline="").read()
        for name, conversation in CONVERSATIONS.items():
            variables = {"tools": None, "documents": None, "add_generation_prompt": False, **TOKENS, **copy.deepcopy(conversation)}
            variables["messages"] = utils._alias_reasoning_fields(variables["messages"])
            names.append((os.path.basename(path), name))
            cases.append((source, variables))
    if "--originals" in sys.argv:
        originals = built_in(sys.argv[sys.argv.index("--originals") + 1])
        ours = {name: ROOT / f"src/text/builtin/{name}.jinja" for name in ORIGINALS} | {"llama3": ROOT / "recipes/templates/llama3.jinja"}
        failed = 0
        for case in originals:
            variables = {name: value for name, value in case.items() if name not in ("template", "conversation", "text")}
            variables = {"tools": None, "documents": None, "add_generation_prompt": False, **TOKENS, **variables}
            if by_jinja2(ours[case["template"]].read_text(encoding="utf-8"), variables) != {"text": case["text"]}:
                failed += 1
                print(f"built-in {case['template']}, {case['conversation']}: differs from the original")
        print(f"{len(originals)} renderings of built-in templates by jinja2, {failed} of them differ from the originals'")
        if "--write" in sys.argv:
            lines = [json.dumps(case, ensure_ascii=False) for case in originals]
            BUILT_IN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    templates = len(cases)
    cases += [(source, VARIABLES) for source in constructs()]
    expected = [by_jinja2(source, variables) for source, variables in cases]
    found = by_the_program(cases)

    table = {}
    for (template, name), want, have in zip(names, expected, found):
        kind = verdict(want, have)
        table.setdefault(template, Counter())[kind] += 1
        if kind not in ("same", "both fail"):
            print(f"{template}, {name}: {kind}\n  jinja2: {want}\n  here:   {have}")
    kinds = ["same", "both fail", "differs", "only we fail", "only jinja2 fails"]
    print(f"{'template':44}" + "".join(f"{kind:>18}" for kind in kinds))
    for template, counts in table.items():
        print(f"{template:44}" + "".join(f"{counts[kind]:18}" for kind in kinds))
    total = sum(table.values(), Counter())
    print(f"{f'{len(table)} templates':44}" + "".join(f"{total[kind]:18}" for kind in kinds))

    pairs = list(zip(cases[templates:], expected[templates:], found[templates:]))
    kept = [(source, want, have) for (source, _), want, have in pairs if not addresses(want)]
    counts = Counter(verdict(want, have) for _, want, have in kept)
    print(f"{f'{len(kept)} constructs':44}" + "".join(f"{counts[kind]:18}" for kind in kinds))
    for source, want, have in kept:
        if verdict(want, have) not in ("same", "both fail"):
            print(f"  {verdict(want, have)}: {source!r}\n    jinja2: {want}\n    here:   {have}")
    if "--write" in sys.argv:
        GOLDEN.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"source": source, **want}, ensure_ascii=False) for source, want, _ in kept]
        variables = json.dumps(VARIABLES, ensure_ascii=False)
        GOLDEN.write_text('{"variables": ' + variables + ',\n"constructs": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    return total["differs"] + total["only we fail"]


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
