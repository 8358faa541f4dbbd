"""What a case is, and the short ways of writing one."""

import json
from dataclasses import dataclass, field

# Templates of our own, each made for one trait that templates of real models have.
TOOLS = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]\n{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}<|end_header_id|>\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}[CALL]{{ c.function.name }}"
    " {{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}[/CALL]{% endfor %}{% endif %}"
    "{% if m.tool_call_id %}[ID]{{ m.tool_call_id }}[/ID]{% endif %}"
    "{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
# Walks along the parts of a content, as the templates of models for images do.
PARTS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}{% endif %}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
# Prints the whole message as JSON, so that nothing of it can hide.
WHOLE = (
    "{% for m in messages %}[{{ m | tojson }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
)
# A thought before the answer, as reasoning models have it.
THINK = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
    "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content if m.reasoning_content is string else '' }}</think>{% endif %}"
    "{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
# A thought under the name that gpt-oss has for it.
THINKING = THINK.replace("reasoning_content", "thinking")
# What `chat_template_kwargs` and `documents` say.
KWARGS = (
    "{% if documents %}{% for d in documents %}[DOC {{ d.title }}]{{ d.text }}\n{% endfor %}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}[NO THINKING]\n{% endif %}"
    "{% if level is defined %}[LEVEL {{ level | tojson }}]\n{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
# Content as it stands; the model's own template trims it.
EXACT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Nothing stands before an answer.
NO_PROMPT = "{% for m in messages %}{{ '<s>' if m.role == 'user' else '' }}{{ m.content }}{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass
class Case:
    """One input: its files, the stages it goes through, and what may come of it.

    `rows` are the rows as they are meant, in TRL's forms; the right texts are what TRL makes of them, and `told` are words of a
    message that has to come with them. `readings` are other meanings that are right, each rows and what is told. `refused` are words of an error that is right as well, or alone where no reading is
    given; `a|b` stands for either word.
    """

    name: str
    files: dict
    rows: list | None = None
    readings: list = field(default_factory=list)
    refused: list | None = None
    told: list = field(default_factory=list)
    # Parameters of `import_dataset` and `apply_chat_template` beside the usual ones.
    pairs: dict = field(default_factory=dict)
    chats: dict = field(default_factory=dict)
    stages: dict | None = None
    template: str | None = None
    model: dict | None = None
    # "texts": prompts and answers. "ids": token ids of SFTTrainer or ORPOTrainer as well. "text": whole texts only.
    compare: str = "texts"
    # How `datasets` is told to load the files: (builder, keywords), or none where it has no such form.
    loader: tuple | None = ("json", {})
    # From a row that `datasets` loaded to one in TRL's forms.
    convert: object = None
    # A property instead of rows, for stages that draw.
    holds: dict | None = None
    kind: str = ""

    def meanings(self):
        first = [(self.rows, self.told)] if self.rows is not None else []
        return first + [reading if isinstance(reading, tuple) else (reading, self.told) for reading in self.readings]


def jsonl(name, written, **more):
    """Rows as JSON lines, meant as they are written unless `rows` says something else."""
    text = written if isinstance(written, str) else lines(written)
    if "rows" not in more:
        more["rows"] = [json.loads(line) for line in text.split("\n") if line.strip()]
    return Case(name, {"rows.jsonl": text}, **more)


def chat(name, answer, question="hi", **more):
    """One row of `messages` with one exchange."""
    message = answer if isinstance(answer, dict) else assistant(answer)
    asked = question if isinstance(question, list) else [user(question)]
    return jsonl(name, [{"messages": [*asked, message]}], **more)


def refused(name, rows, words, **more):
    """JSON lines that are refused, or the file as it stands."""
    text = rows if isinstance(rows, str) else lines(rows)
    return Case(name, {"rows.jsonl": text}, refused=words, **more)
