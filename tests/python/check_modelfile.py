#!/usr/bin/env python3
"""Checks by hand that the TEMPLATE of a `Modelfile` renders as the chat template does.

    apt-get install golang-go    # 1.19 or later: the engine whose templates Ollama's are
    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0
    python tests/python/check_modelfile.py target/release/pipeline [--model FOLDER ..]

For each built-in chat template, with a tokenizer that puts a BOS before texts and with one that doesn't, a tiny model is exported, and for each
`--model` that model. The conversations below are then rendered by transformers from the chat template in the GGUF file, and by
`go_template.go` from the TEMPLATE as Ollama does it. What Ollama's own loading adds is taken into account: llama.cpp puts the BOS
there where the file says so. Conversations that the chat template refuses are left out.

Printed: a line each, with the number of conversations that are equal. A template without TEMPLATE is said to have none.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
from transformers import AutoTokenizer

from check_gguf_export import byte_level, export, sentence_piece, tiny

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_IN = {path.stem: path for path in sorted((REPOSITORY / "src/text/builtin").glob("*.jinja"))}
BUILT_IN["llama3"] = REPOSITORY / "recipes/templates/llama3.jinja"
TOKENIZERS = [("no BOS", lambda: byte_level("qwen2")), ("BOS", lambda: byte_level("llama3")), ("<s>", lambda: sentence_piece(False))]


def turns(*contents, system=None):
    roles = ["user", "assistant"]
    said = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + said


CONVERSATIONS = [
    turns("What is 3 < 4 & \"5\"?"),
    turns("Hello", "Hi.", "And now?"),
    turns("Hello", "Hi.", "And now?", "This.", "Then?"),
    turns("{{ .System }} {% if x %}", "{{ braces }}", "naïve — 你好 🙂"),
    turns("Two\n\nparagraphs\n- a\n- b", "Yes.\nNo.", "`code`"),
    turns("Hello", system="Be brief."),
    turns("Hello", "Hi.", "And now?", system="Be {{ kind }}\n\nand brief."),
    turns("Hello", "Hi.", "And now?", "This.", "Then?", system="You know <everything>."),
]


def template_of(modelfile):
    """The TEMPLATE of a `Modelfile`, or `None`."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.M | re.S)
    return found and found[1]


def check(program, engine, name, folder, work):
    """Prints a line; returns whether all is as expected."""
    file, told = export(program, folder, work, "f16")
    if file is None:
        print(f"{name:24} not exported: {told[-300:]}")
        return False
    template = template_of((file.parent / "Modelfile").read_text())
    if template is None:
        print(f"{name:24} has no TEMPLATE")
        return True
    fields = gguf.GGUFReader(file).fields
    value = lambda key: fields[key].contents() if key in fields else None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat_template = value("tokenizer.chat_template")
    begins = value("tokenizer.ggml.add_bos_token")
    tasks, expected = [], []
    for messages in CONVERSATIONS:
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True)
        except Exception:  # The template refuses it.
            continue
        if begins and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            text = text[len(tokenizer.bos_token) :]
        # A template that leaves a system message out says nothing about it.
        if messages[0]["role"] == "system" and messages[0]["content"] not in text:
            continue
        tasks.append({"template": template, "messages": messages})
        expected.append(text)
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    done = subprocess.run([engine], input=lines, capture_output=True, text=True, check=True)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    equal = sum(a == b for a, b in zip(made, expected, strict=True))
    print(f"{name:24} {equal} of {len(expected)} conversations equal", flush=True)
    for ours, theirs in zip(made, expected):
        if ours != theirs:
            print(f"  TEMPLATE: {ours!r}\n  template: {theirs!r}")
    return equal == len(expected) > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--model", nargs="*", default=[])
    args = parser.parse_args()
    program = str(Path(args.program).resolve())
    passed = []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        engine = work / "go_template"
        source = Path(__file__).with_name("go_template.go")
        subprocess.run(["go", "build", "-o", engine, source], check=True, env={**os.environ, "GO111MODULE": "off"})
        for kind, tokenizer in TOKENIZERS:
            folder = work / "model"
            tiny(folder, "LlamaConfig", {"num_hidden_layers": 1}, tokenizer())
            for name, path in BUILT_IN.items():
                (folder / "chat_template.jinja").write_text(path.read_text())
                passed.append(check(program, engine, f"{name}, {kind}", folder, work))
        for model in args.model:
            passed.append(check(program, engine, Path(model).name, Path(model).resolve(), work))
    print("all as expected" if all(passed) else "FAILED")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
