"""Ids and labels by SFTTrainer's preparation of a dataset, for chats and for plain texts: ids.json.

    python generate_ids.py

pins: as in ../generate.py. The chats are those of ../rows.jsonl by the template of ../model and by one without tokens between its
turns; `prompt` and `answer` are what the templates print, parted where the prompt alone and the whole chat begin to differ.
"""

import json
import os
import pathlib
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
from accelerate import PartialState

PartialState(cpu=True)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

torch.set_num_threads(1)
HERE = pathlib.Path(__file__).parent
UP = HERE.parent
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TEXTS = [
    "The quick brown fox.",
    " begins with a space",
    "ends with its EOS<|end_of_text|>",
    "ends with another<|eot_id|>",
    "<|begin_of_text|>begins with a BOS",
    "two\n\nparagraphs, Köln and 12345",
    "a" * 400,
]


def prepared(rows, eos, template=None, max_length=192):
    tokenizer = AutoTokenizer.from_pretrained(UP / "model")
    tokenizer.eos_token = eos
    if template:
        tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(UP / "model", dtype=torch.float32)
    args = SFTConfig(output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, max_length=max_length, eos_token=eos)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    data = trainer.train_dataset
    return tokenizer, [{"ids": row["input_ids"], "labels": row["labels"]} for row in data]


def chats():
    for line in open(UP / "rows.jsonl", encoding="utf-8"):
        row = json.loads(line)
        prompt = [{"role": "user", "content": row["prompt"]}]
        if row.get("system"):
            prompt.insert(0, {"role": "system", "content": row["system"]})
        yield {"prompt": prompt, "completion": [{"role": "assistant", "content": row["chosen"]}]}


def common(a, b):
    return len(os.path.commonprefix([a, b]))


out = []
for eos, template, max_length in [
    ("<|end_of_text|>", None, 192),
    ("<|eot_id|>", None, 192),
    ("<|end_of_text|>", PLAIN, 192),
    ("<|end_of_text|>", None, 48),
]:
    rows = list(chats())
    tokenizer, made = prepared(rows, eos, template, max_length)
    texts = []
    for row in rows:
        alone = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        border = common(alone, whole)
        texts.append({"prompt": whole[:border], "answer": whole[border:]})
    out.append({"kind": "chats", "eos": eos, "max_length": max_length, "texts": texts, "rows": made})
for eos in ["<|end_of_text|>", "<|eot_id|>"]:
    _, made = prepared([{"text": text} for text in TEXTS], eos)
    out.append({"kind": "texts", "eos": eos, "max_length": 192, "texts": [{"prompt": "", "answer": text} for text in TEXTS], "rows": made})
lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in out)
(HERE / "ids.json").write_text("[\n" + lines + "\n]\n", encoding="utf-8")
for case in out:
    print(case["kind"], case["eos"], len(case["texts"]), len(case["rows"]))
