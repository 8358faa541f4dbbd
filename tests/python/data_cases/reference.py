"""The right values: rows through datasets, TRL, transformers and jinja2, as a user of them would."""

import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", HF_DATASETS_CACHE=tempfile.mkdtemp())

import datasets
import transformers
from transformers import AutoTokenizer
from trl.data_utils import apply_chat_template, extract_prompt, maybe_convert_to_chatml, maybe_extract_prompt

datasets.disable_progress_bars()
datasets.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.disable(logging.WARNING)

MODEL = Path(__file__).resolve().parents[2] / "golden" / "model"
_tokenizers = {}


def model_folder(files, folder):
    """The tiny model with some of its files replaced by a text, left out (none), or with keys set anew."""
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    for name, change in (files or {}).items():
        path = folder / name
        if change is None:
            path.unlink()
        elif isinstance(change, dict):
            path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change["set"]}), encoding="utf-8")
        else:
            path.write_text(change, encoding="utf-8")
    return folder


def tokenizer(case):
    key = json.dumps(case.model, sort_keys=True)
    if key not in _tokenizers:
        _tokenizers[key] = AutoTokenizer.from_pretrained(model_folder(case.model, Path(tempfile.mkdtemp())))
    made = copy.deepcopy(_tokenizers[key])
    if case.template is not None:
        made.chat_template = case.template
    return made


def as_messages(row):
    """Texts as contents of messages, and `system` as the first of them: our reading of rows of plain texts."""
    row = dict(row)
    chosen = row.get("chosen")
    whole = isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) and chosen[0].get("role") not in (None, "assistant")
    if whole and isinstance(row.get("prompt"), str):
        # The answers hold the question as well, and TRL finds it there.
        del row["prompt"]
    for column, role in [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"), ("completion", "assistant")]:
        if isinstance(row.get(column), str):
            row[column] = [{"role": role, "content": row[column]}]
        elif isinstance(row.get(column), dict):
            row[column] = [row[column]]
    system = row.pop("system", None)
    if system:
        for column in ("prompt", "messages"):
            if row.get(column) and row[column][0].get("role") != "system":
                row[column] = [{"role": "system", "content": system}, *row[column]]
    return row


def texts(row, tok):
    """A row in TRL's forms as `prompt`, `chosen` and perhaps `rejected`."""
    row = {name: value for name, value in row.items() if value is not None}
    row = maybe_convert_to_chatml(as_messages(copy.deepcopy(row)))
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    extra = {"documents": row["documents"]} if "documents" in row else {}
    keep = {name: row[name] for name in ("prompt", "chosen", "rejected", "completion", "messages", "chat_template_kwargs") if name in row}
    if "chosen" in keep and "rejected" in keep:
        keep.pop("messages", None)
        keep = {**keep, **maybe_extract_prompt(keep)}
    if "chosen" in keep and "rejected" not in keep:
        keep["completion"] = keep.pop("chosen")
    if "completion" in keep:
        keep.pop("messages", None)
    if "messages" in keep:
        # SFT on a whole conversation; the last answer is what follows the rest.
        whole = apply_chat_template(keep, tok, tools=tools, **extra)["text"]
        messages = keep.pop("messages")
        if messages[-1]["role"] != "assistant":
            raise ValueError("the conversation doesn't end with an answer")
        made = apply_chat_template({**keep, "prompt": messages[:-1], "completion": messages[-1:]}, tok, tools=tools, **extra)
        if made["prompt"] + made["completion"] != whole:
            raise ValueError("prompt and answer aren't the whole conversation")
    else:
        made = apply_chat_template(keep, tok, tools=tools, **extra)
    if "completion" in made:
        made["chosen"] = made.pop("completion")
    return {name: made[name] for name in ("prompt", "chosen", "rejected") if name in made}


def sft_ids(rows, case):
    """The ids of SFTTrainer's own dataset, with the number of those that are no answer."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    tok = tokenizer(case)
    args = SFTConfig(output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, max_length=None, gradient_checkpointing=False, disable_tqdm=True)
    trainer = SFTTrainer(model=AutoModelForCausalLM.from_pretrained(MODEL), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
    return [{"ids": row["input_ids"]} for row in trainer.train_dataset]


def orpo_ids(rows, case):
    """The ids of ORPOTrainer's own dataset."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    torch.set_num_threads(1)
    tok = tokenizer(case)
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, max_length=1024, gradient_checkpointing=False, disable_tqdm=True)
    trainer = ORPOTrainer(model=AutoModelForCausalLM.from_pretrained(MODEL), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
    return [{"ids": row["chosen_input_ids"], "rejected_ids": row["rejected_input_ids"]} for row in trainer.train_dataset]


def right(case, rows):
    """What becomes of rows in TRL's forms: a list of rows with texts, whole texts or ids."""
    tok = tokenizer(case)
    if case.compare == "orpo":
        return orpo_ids([as_messages(row) for row in rows], case)
    if case.compare == "sft":
        return sft_ids(rows, case)
    as_it_is = lambda row: {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
    made = [as_it_is(row) if case.compare == "plain" or row.get("as_it_is") else texts(row, tok) for row in rows]
    if case.compare == "text":
        return [{"text": row["prompt"] + row["chosen"]} for row in made]
    return made


def loaded(case, folder):
    """The rows as `datasets` loads the files."""
    builder, keywords = case.loader
    keywords = dict(keywords)
    if builder == "disk":
        return datasets.load_from_disk(str(folder / keywords["path"])).to_list()
    files = keywords.pop("data_files", None) or [name for name in case.files]
    keywords["data_files"] = [str(folder / name) for name in ([files] if isinstance(files, str) else files)]
    made = datasets.load_dataset(builder, split="train", cache_dir=tempfile.mkdtemp(dir=folder), **keywords)
    return [dict(row) for row in made]
