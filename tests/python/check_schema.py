#!/usr/bin/env python3
"""Checks the schema of recipes with the programs that read it: ajv in strict mode, and the YAML language server of editors.

    mkdir editors && npm install --prefix editors ajv@8 yaml-language-server@2
    python tests/python/check_schema.py editors

ajv compiles the schema and takes the shipped recipes. The language server tells mistakes, completes and explains, as it does in an editor.
Needs Node 20 and nothing else but Python 3.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "schemas/recipe.schema.json"
# Keywords that are for editors and for this program, which a strict reader is told of.
VOCABULARY = ["markdownDescription", "enumDescriptions", "markdownEnumDescriptions", "errorMessage", "x-artifact", "x-collect", "x-neutral"]
AJV = """
const Ajv = require("ajv/dist/2020").default;
const fs = require("fs");
const [schema, vocabulary] = [JSON.parse(fs.readFileSync(process.argv[2])), JSON.parse(process.argv[3])];
const ajv = new Ajv({ strict: true, allowUnionTypes: true, allErrors: true });
ajv.addVocabulary(vocabulary);
const validate = ajv.compile(schema);
const told = JSON.parse(fs.readFileSync(0)).map((recipe) => (validate(recipe) ? [] : ajv.errorsText(validate.errors)));
console.log(JSON.stringify(told));
"""
failed = []


def check(what, holds, shown=""):
    print(f"{'ok' if holds else 'WRONG':>6}  {what}" + ("" if holds else f": {shown}"))
    if not holds:
        failed.append(what)


class Server:
    """The language server behind its standard streams."""

    def __init__(self, editors):
        program = editors / "node_modules/yaml-language-server/bin/yaml-language-server"
        self.process = subprocess.Popen(["node", str(program), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = 0
        self.diagnostics = {}
        self.request("initialize", {
            "processId": None,
            "rootUri": ROOT.as_uri(),
            "capabilities": {
                "textDocument": {
                    "completion": {"completionItem": {"snippetSupport": True, "documentationFormat": ["markdown"]}},
                    "hover": {"contentFormat": ["markdown"]},
                    "publishDiagnostics": {},
                },
                "workspace": {"configuration": True},
            },
        })
        self.send("initialized", {})
        self.settings = {"yaml": {"schemas": {SCHEMA.as_uri(): "*.yaml"}, "validate": True, "hover": True, "completion": True}}
        self.send("workspace/didChangeConfiguration", {"settings": self.settings})
        # It asks for the settings before anything else.
        while self.read().get("method") != "workspace/configuration":
            pass

    def send(self, method, params, number=None):
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        if number is not None:
            message["id"] = number
        self.write(message)

    def write(self, message):
        body = json.dumps(message).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def read(self):
        length = 0
        while True:
            line = self.process.stdout.readline().strip()
            if not line:
                break
            name, value = line.split(b":")
            if name.lower() == b"content-length":
                length = int(value)
        message = json.loads(self.process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            self.diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif "id" in message and "method" in message:
            asked = message["method"] == "workspace/configuration"
            settings = [self.settings.get(item["section"]) for item in message["params"]["items"]] if asked else None
            self.write({"jsonrpc": "2.0", "id": message["id"], "result": settings})
        return message

    def request(self, method, params):
        self.number += 1
        self.send(method, params, self.number)
        while True:
            message = self.read()
            if message.get("id") == self.number and "method" not in message:
                return message.get("result")

    def opens(self, text):
        """A file in the editor; gives its address and the mistakes that are shown."""
        self.number += 1
        uri = (ROOT / f"recipes/check-{self.number}.yaml").as_uri()
        self.send("textDocument/didOpen", {"textDocument": {"uri": uri, "languageId": "yaml", "version": 1, "text": text}})
        while uri not in self.diagnostics:
            self.read()
        return uri, [(one["range"]["start"]["line"] + 1, one["message"]) for one in self.diagnostics[uri]]

    def at(self, method, text):
        """Asks at the mark `|` in a text."""
        before, _, after = text.partition("|")
        uri, _ = self.opens(before + after)
        line = before.count("\n")
        character = len(before) - before.rfind("\n") - 1
        params = {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}
        return self.request(method, params)

    def completes(self, text):
        found = self.at("textDocument/completion", text)
        items = found["items"] if isinstance(found, dict) else found or []
        return {item["label"]: item for item in items}

    def explains(self, text):
        found = self.at("textDocument/hover", text)
        return (found or {}).get("contents", {}).get("value", "")


# A recipe with one stage, which begins in line 3 and whose parameters begin in line 5.
def stage(kind, parameters):
    lines = "".join(f"      {line}\n" for line in parameters)
    return f"version: 1\nstages:\n  it:\n    {kind}:\n{lines}"


def recipes():
    import_yaml = ROOT / "recipes"
    return sorted(import_yaml.glob("*.yaml"))


def strict(editors):
    # Node reads JSON, and the language server below reads YAML; here are small recipes by hand.
    good = [
        {"version": 1, "stages": {"a": {"merge": {"adapter": "b"}}}},
        {"version": 1, "defaults": {"train_orpo": {"dataset": "t"}}, "stages": {"a": {"train_orpo": None}}},
        {"version": 1, "vars": {"r": 8}, "x-mine": [1], "stages": {"a": {"attach_lora": {"model": "m", "r": "${r}"}}}},
        {"version": 1, "stages": {"a": {"train_orpo": {"dataset": "t", "adapter": "l"}, "retries": 2, "resources": {"memory": "20GiB"}}}},
    ]
    bad = [
        {"version": 1, "stages": {"a": {"attach_lora": {"model": "m", "r": 0}}}},
        {"version": 1, "stages": {"a": {"attach_lora": {"model": "m", "lora_dropout": 1.5}}}},
        {"version": 1, "stages": {"a": {"trian_orpo": {}}}},
        {"version": 1, "stages": {"a": {"train_orpo": {}}}},
        {"version": 1, "stages": {"a": {"retries": 2}}},
        {"version": 1, "stages": {"a": {"merge": {"adapter": "b"}, "quantize": {"model": "c"}}}},
        {"version": 1, "stage": {}, "stages": {"a": {"merge": {"adapter": "b"}}}},
        {"version": 2, "stages": {"a": {"merge": {"adapter": "b"}}}},
    ]
    command = ["node", "-e", AJV.replace("process.argv[2]", "process.argv[1]").replace("process.argv[3]", "process.argv[2]"),
               str(SCHEMA), json.dumps(VOCABULARY)]
    done = subprocess.run(command, input=json.dumps(good + bad), capture_output=True, text=True, cwd=editors)
    check("ajv compiles the schema in strict mode without a word", done.returncode == 0 and not done.stderr, done.stderr[:2000])
    if done.returncode:
        return
    told = json.loads(done.stdout)
    for recipe, errors in zip(good + bad, told):
        check(f"ajv: {json.dumps(recipe['stages'])}", (errors == []) == (recipe in good), errors)


def editor(editors):
    server = Server(editors)
    for path in recipes():
        _, mistakes = server.opens(path.read_text())
        check(f"no mistake in {path.name}", mistakes == [], mistakes)

    def wrong(what, text, line, *words):
        _, mistakes = server.opens(text)
        fits = any(at == line and all(word in message for word in words) for at, message in mistakes)
        check(f"{what}: {mistakes[0][1] if mistakes else ''}", fits and len(mistakes) == 1, mistakes)

    wrong("a kind that is none", stage("trian_orpo", ["dataset: t"]), 4, "trian_orpo", "not allowed")
    wrong("a rank of 0", stage("attach_lora", ["model: m", "r: 0"]), 6, "1")
    wrong("a dropout above 1", stage("attach_lora", ["model: m", "lora_dropout: 1.5"]), 6, "1")
    wrong("a schedule that is none", stage("train_orpo", ["dataset: t", "adapter: l", "lr_scheduler_type: cosin"]), 7, "cosine", "linear")
    wrong("a parameter that is none", stage("train_orpo", ["dataset: t", "adapter: l", "lr: 1"]), 7, "lr", "not allowed")
    wrong("a parameter that is missing", stage("train_orpo", ["adapter: l"]), 4, "dataset")
    wrong("a stage without a kind", "version: 1\nstages:\n  it:\n    retries: 2\n", 4, "kind")

    kinds = server.completes("version: 1\nstages:\n  it:\n    |\n")
    check("kinds are offered", {"train_orpo", "merge", "tokenize", "retries"} <= set(kinds), list(kinds))
    parameters = server.completes(stage("train_orpo", ["dataset: t", "|"]))
    check("parameters are offered", {"beta", "learning_rate", "adapter"} <= set(parameters), list(parameters))
    values = server.completes(stage("train_orpo", ["dataset: t", "lr_scheduler_type: |"]))
    check("values are offered", {"cosine", "linear"} <= set(values), list(values))
    check("what is given is not offered", "dataset" not in parameters, list(parameters))
    top = server.completes("version: 1\n|\n")
    check("keys at the top are offered", {"stages", "defaults", "outputs", "vars"} <= set(top), list(top))
    below = server.completes("version: 1\ndefaults:\n  train_orpo:\n    |\nstages: {}\n")
    check("defaults are offered", "learning_rate" in below, list(below))

    told = server.explains(stage("attach_lora", ["model: m", "lora_drop|out: 0.1"]))
    check("hovering shows text, default and bounds", all(word in told for word in ["probability", "Default: `0.0`", "from 0 to below 1"]), told)
    check("an example is shown", "0.05" in told, told)
    told = server.explains(stage("train_o|rpo", ["dataset: t", "adapter: l"]))
    check("hovering over a kind explains it", "odds ratio" in told and "Makes:" in told, told)
    check("no backslash before a backtick, no broken paragraph", "\\`" not in told, told)
    server.process.terminate()
    server.process.wait(10)


def main():
    editors = Path(sys.argv[1]).resolve()
    strict(editors)
    editor(editors)
    print("all as it should be" if not failed else f"{len(failed)} wrong")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
