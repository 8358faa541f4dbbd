"""Compares what `assistant_only_loss` learns with the masks that TRL's `SFTTrainer` makes, over TRL's chat templates.

    python tests/python/check_masks.py [PROGRAM] [--write]

It needs transformers 5.23, trl 1.16, pyarrow and the program (target/debug/pipeline). For each template in TRL's wheel it makes rows of
the conversations below, tokenizes them as `SFTTrainer` does (`apply_chat_template` with `return_assistant_tokens_mask`), and runs a recipe
with `assistant_only_loss` on the same rows. Ids and masks must be equal.

* A training template (`*_training.jinja`, with `{% generation %}`) is compared with itself.
* Another one is compared with its training template, on the rows whose ids are the same in both: the program finds the turns by
  rendering, from the end of the generation prompt. Rows that it refuses are counted, and those of templates whose training template
  begins or ends the turn elsewhere ("masks differ" of gptoss, glm4moe, qwen2_5 and others) are printed.

Only a difference from a training template is a failure. transformers leaves out all but the first token of a character that ends a turn,
which is told as "half a character".

With --write it writes tests/golden/templates/masks.json instead: templates of our own with the same constructs, and what transformers
makes of some conversations.

The templates stay in the wheel. The tokenizer is the golden one with the templates' special tokens, and `trim_offsets` off: with it on,
transformers finds no token at white space, and masks the rest of the conversation or nothing.
"""

import copy
import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter

import pyarrow.parquet as parquet
import trl
from check_templates import CONVERSATIONS, TOOL, assistant, calls, result, system, user, utils
from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATES = pathlib.Path(os.path.dirname(trl.__file__), "chat_templates")

MORE = {
    "three turns": {"messages": [system("S"), user("a"), assistant("A b"), user("c"), assistant("D e\n"), user("f"), assistant("G 😀")]},
    "emoji at the edges": {"messages": [user("😀"), assistant("😀x😀"), user("é"), assistant("é")]},
    "white space": {"messages": [user(" a "), assistant("  b  "), user("\n"), assistant("\n\nc\n\n")]},
    "a question at the end": {"messages": [user("a"), assistant("b"), user("c")]},
    "thinking in both": {"messages": [user("a"), assistant("b", reasoning_content="x"), user("c"), assistant("d", reasoning_content="y")]},
    "long chain": {"messages": [user("a"), calls({"city": "A"}), result("1"), calls({"city": "B"}, "again"), result("2"), assistant("b")], "tools": [TOOL]},
    "text that looks like a turn": {"messages": [user("<|im_end|>"), assistant("say <|im_end|> to end"), user("b"), assistant("c")]},
}

HEAD = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}"
# Shapes of training templates in our own words.
OWN = {
    "a branch": HEAD + "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|eot_id|>{% endgeneration %}{% else %}{{ message.content }}<|eot_id|>{% endif %}{% endfor %}",
    "white space": """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' -%}
        {{ message.role }}:
        {%- generation -%}
            {{ message.content | trim }}
            <|eot_id|>
        {%- endgeneration %}

    {% else %}
        {{- message.role }}: {{ message.content }}
    {% endif -%}
{%- endfor %}
""",
    "two tags": HEAD + """
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content %}
            {%- generation %}{{ '<think>' ~ message.reasoning_content ~ '</think>' }}{% endgeneration %}
        {%- endif %}
        {{- ' says: ' }}
        {%- generation %}{{ (message.content or '') ~ '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{ message.content ~ '<|eot_id|>' }}{% endif %}
{%- endfor %}""",
    "tools": HEAD + """
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}' }}
                {%- if not loop.last %}{{ ',' }}{% endif %}
            {%- endfor %}
            {{- '<|eot_id|>\\n' }}
        {%- endgeneration %}
    {%- else %}
        {%- if message.role == 'tool' %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}{{ '<|eot_id|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}""",
    "an end of its own": HEAD + """
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content ~ '<|eot_id|>\\n' }}{% endgeneration %}
    {%- else %}{{ message.content ~ '<|eot_id|>\\n' }}{% endif %}
{%- endfor %}
{%- if messages[-1].role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ eos_token }}{% endif %}""",
}
WRITTEN = ["one turn", "system", "two turns", "tool call", "reasoning", "empty content", "three turns", "a question at the end", "text that looks like a turn"]


def write():
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        # With the golden tokenizer's own special tokens alone.
        tokenizer = model_folder(pathlib.Path(folder, "model"), special=False)
        for title, template in OWN.items():
            for name in WRITTEN:
                conversation = {**{**CONVERSATIONS, **MORE}[name]}
                conversation.pop("add_generation_prompt", None)
                made = by_trl(tokenizer, template, conversation)
                if made:
                    messages = utils._alias_reasoning_fields(conversation["messages"])
                    cases.append({"template": title, "conversation": name, **conversation, "messages": messages, "ids": list(made[0]), "mask": "".join(map(str, made[1]))})
    lines = [json.dumps(case, ensure_ascii=False) for case in cases]
    text = '{"templates": ' + json.dumps(OWN, indent=1) + ',\n"cases": [\n' + ",\n".join(lines) + "\n]}\n"
    (ROOT / "tests/golden/templates/masks.json").write_text(text, encoding="utf-8")
    print(f"{len(cases)} cases written")


def model_folder(folder, special=True):
    """The golden model with a tokenizer that knows the templates' special tokens."""
    shutil.copytree(ROOT / "tests/golden/model", folder)
    tokens = set()
    for path in TEMPLATES.glob("*.jinja") if special else []:
        source = path.read_text(encoding="utf-8")
        tokens |= set(re.findall(r"<\|[A-Za-z_]+\|>|</?[a-z_]+of_[a-z_]+>|\[/?[A-Z_]+\]|<[｜|][^<>'\" ]+[｜|]>", source))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"trim_offsets": true', '"trim_offsets": false'), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return AutoTokenizer.from_pretrained(folder)


def by_trl(tokenizer, template, conversation):
    """Ids and mask as `tokenize_fn` of SFTTrainer has them; none where it fails or finds no token."""
    extras = {name: value for name, value in conversation.items() if name not in ("messages", "add_generation_prompt", "tools")}
    try:
        processed = tokenizer.apply_chat_template(
            copy.deepcopy(conversation["messages"]), chat_template=template, tools=conversation.get("tools"), tokenize=True,
            return_dict=True, return_assistant_tokens_mask=True, **extras,
        )
    except Exception:
        return None
    ids, mask = processed["input_ids"], processed["assistant_masks"]
    return (ids, mask) if 1 in mask else None


def by_the_program(program, folder, model, template, rows):
    """Ids and masks of the rows by their names, and why rows were refused."""
    made, refused = {}, {}
    rows = dict(rows)
    (folder / "template.jinja").write_text(template, encoding="utf-8", newline="")
    recipe = {
        "version": 1,
        "stages": {
            "rows": {"import_dataset": {"path": "rows.jsonl"}},
            "base": {"import_model": {"path": str(model)}},
            "chats": {"apply_chat_template": {"dataset": "rows", "template": "template.jinja", "tokenizer": "base", "assistant_only_loss": True, "date": "2024-07-06"}},
            "tokens": {"tokenize": {"dataset": "chats", "tokenizer": "base", "max_length": 100000}},
        },
        "outputs": {"tokens": "made/tokens"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    while rows:
        keys = sorted({key for row in rows.values() for key in row} - {"add_generation_prompt"})
        kwargs = [key for key in keys if key not in ("messages", "tools")]
        with open(folder / "rows.jsonl", "w") as file:
            for row in rows.values():
                line = {"messages": row["messages"], "tools": row.get("tools"), "chat_template_kwargs": {key: row[key] for key in kwargs if key in row} or None}
                file.write(json.dumps(line) + "\n")
        done = subprocess.run([program, "run", "recipe.yaml", "--allow-path", str(model)], cwd=folder, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
        if done.returncode == 0:
            table = parquet.read_table(folder / "made/tokens/train.parquet").to_pylist()
            assert len(table) == len(rows), (len(table), len(rows), done.stderr)
            for name, row in zip(rows, table):
                made[name] = (row["prompt_ids"] + row["chosen_ids"], row["assistant_masks"])
            return made, refused
        found = re.search(r"row (\d+) of", done.stderr)
        if not found:
            raise SystemExit(done.stderr)
        name = list(rows)[int(found[1]) - 1]
        refused[name] = done.stderr[found.start() : found.start() + 300].split("\n")[0]
        del rows[name]
    return made, refused


def main():
    if "--write" in sys.argv:
        return write()
    program = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/debug/pipeline")
    conversations = {**CONVERSATIONS, **MORE}
    table, failed = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tokenizer = model_folder(folder / "model")
        for path in sorted(TEMPLATES.glob("*.jinja")):
            name, source = path.stem, path.read_text(encoding="utf-8")
            training = path if name.endswith("_training") else TEMPLATES / f"{name}_training.jinja"
            if not training.exists():
                continue
            if not name.endswith("_training") and "{% generation" in source:
                continue
            # Gemma's images and the like are no rows of text.
            rows = {}
            for key, conversation in conversations.items():
                if key == "parts" and "content'] is string" not in source and "['type']" not in source:
                    # A list of parts is text to the program, and printed as a list by such a template.
                    continue
                conversation = {**conversation, "add_generation_prompt": False}
                trained = by_trl(tokenizer, training.read_text(encoding="utf-8"), conversation)
                try:
                    ids = tokenizer.apply_chat_template(conversation["messages"], chat_template=source, tools=conversation.get("tools"), tokenize=True, return_dict=True, **{k: v for k, v in conversation.items() if k not in ("messages", "tools", "add_generation_prompt")})["input_ids"]
                except Exception:
                    continue
                if trained and ids == trained[0]:
                    rows[key] = (conversation, trained)
            work = folder / name
            work.mkdir()
            made, refused = by_the_program(program, work, folder / "model", source, {key: row for key, (row, _) in rows.items()})
            counts = Counter()
            for key, (_, want) in rows.items():
                if key in refused:
                    kind = "refused"
                    if name.endswith("_training"):
                        print(f"{name}, {key}: {refused[key]}")
                elif list(want[0]) != made[key][0]:
                    kind = "ids differ"
                elif list(want[1]) != made[key][1]:
                    more = [i for i, a, b in zip(want[0], want[1], made[key][1]) if a != b]
                    half = all("\ufffd" in tokenizer.decode([i]) for i in more)
                    kind = "half a character" if half else "masks differ"
                else:
                    kind = "same"
                counts[kind] += 1
                if kind.endswith("differ"):
                    decode = lambda ids, mask: [tokenizer.decode([i for i, m in zip(ids, mask) if m == bit]) for bit in (0, 1)]
                    print(f"{name}, {key}: {kind}\n  TRL:  {decode(*want)}\n  here: {decode(*made[key])}")
            if name.endswith("_training"):
                failed += counts["ids differ"] + counts["masks differ"] + counts["refused"]
            table[name] = counts
    kinds = ["same", "half a character", "refused", "masks differ", "ids differ"]
    print(f"{'template':44}" + "".join(f"{kind:>18}" for kind in kinds))
    for name, counts in table.items():
        print(f"{name:44}" + "".join(f"{counts[kind]:18}" for kind in kinds))
    total = sum(table.values(), Counter())
    print(f"{f'{len(table)} templates':44}" + "".join(f"{total[kind]:18}" for kind in kinds))
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
