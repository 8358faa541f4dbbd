#!/usr/bin/env python3
"""Recreates tests/golden/dpo by TRL's DPOTrainer on the tiny model: token ids, logs of trainings, and the adapter that one of them made.

pins: as in ../golden/generate.py. usage: python generate_dpo.py

TRL rounds the adapter of a 4-bit model to bf16. Here that is undone before the training begins, because pipeline trains it in f32.
TRL 1.16 has no label smoothing in its `sigmoid` loss. Its `aot` loss on batches of one pair sorts nothing and is the sigmoid loss with
label smoothing, so that run is the reference for it.
"""
import json
import os
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import sys

import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
from accelerate import PartialState

PartialState(cpu=True)
from datasets import Dataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import apply_chat_template

GOLDEN = Path(__file__).parents[1] / "golden"
OUT = GOLDEN / "dpo"
sys.path.insert(0, str(GOLDEN))
from rows import ROWS, to_conversation

INIT = load_file(GOLDEN / "adapter_init/adapter_model.safetensors")
# Prints no token of its own between the turns, so that merges cross the border of prompt and answer.
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TEXTS = [
    {"prompt": "", "chosen": "The quick brown fox jumps.", "rejected": "The quick brown fax jumps."},
    {"prompt": "", "chosen": "ends with its EOS<|end_of_text|>", "rejected": "ends without"},
    {"prompt": "", "chosen": "<|begin_of_text|>begins with a BOS", "rejected": "Köln and 12345"},
]


def arguments(**more):
    values = dict(
        max_length=192, beta=0.1, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2, num_train_epochs=2,
        per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        optim="adamw_torch", weight_decay=0.01, max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, fp16=False, seed=3407,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    values.update(more)
    return values


def load(name, **more):
    folder = str(GOLDEN / name)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **more)


def lora():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=targets, task_type="CAUSAL_LM")


def trainer(model, rows, evaluated=None, template=None, **more):
    values = arguments(**{name: value for name, value in more.items() if name not in ("peft_config", "ref_model")})
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    if template:
        tokenizer.chat_template = template
    args = DPOConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **values)
    made = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(evaluated) if evaluated else None,
        processing_class=tokenizer,
        peft_config=more.get("peft_config"),
        ref_model=more.get("ref_model"),
    )
    return made, values


def prepared(rows, template=None, max_length=192):
    """The ids that go into the model: prepared by the trainer and cut by its collator."""
    made, _ = trainer(load("model"), rows, template=template, max_length=max_length)
    out = []
    for row in made.train_dataset:
        batch = made.data_collator([row])
        sides = []
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            ids = ids[mask.bool()].tolist()
            border = len(ids) - int(answer.sum())
            sides.append((ids[:border], ids[border:]))
        (prompt, chosen), (other, rejected) = sides
        assert prompt == other
        out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made.processing_class, out


def ids():
    cases = []
    chats = [to_conversation(row) for row in ROWS[:24]]
    for template, max_length in [(None, 192), (PLAIN, 192), (None, 48)]:
        tokenizer, rows = prepared(chats, template, max_length)
        texts = [apply_chat_template(dict(chat), tokenizer) for chat in chats]
        texts = [{name: text[name] for name in ("prompt", "chosen", "rejected")} for text in texts]
        cases.append({"kind": "chats", "max_length": max_length, "texts": texts, "rows": rows})
    tokenizer, rows = prepared([dict(text) for text in TEXTS])
    cases.append({"kind": "texts", "max_length": 192, "texts": TEXTS, "rows": rows})
    return cases


def logs(made):
    return [log for log in made.state.log_history if "loss" in log]


def adapter(made):
    state = {name.replace(".default", ""): p.detach() for name, p in made.model.named_parameters() if ".lora_" in name and ".ref." not in name}
    return {name: p.contiguous().clone() for name, p in state.items()}


def run(kind, epochs=2, **more):
    rows = [to_conversation(row) for row in ROWS[:24]]
    evaluated = rows[:5]
    if kind in ("base", "nf4", "aot", "loss"):
        model = load("model_nf4", device_map="cpu") if kind == "nf4" else load("model")
        for module in model.modules():
            # On processors with bf16 bitsandbytes would repack 4-bit weights for evaluations, and compute these in bf16.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        made, values = trainer(model, rows, evaluated, peft_config=lora(), num_train_epochs=epochs, **more)
        set_peft_model_state_dict(made.model, INIT)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(made.model, INIT)
    elif kind == "initial":
        model = PeftModel.from_pretrained(load("model"), GOLDEN / "adapter_init", is_trainable=True)
        made, values = trainer(model, rows, evaluated, num_train_epochs=epochs, **more)
    elif kind == "second":
        second = PeftModel.from_pretrained(load("model"), GOLDEN / "adapter_final").merge_and_unload()
        model = PeftModel.from_pretrained(load("model"), GOLDEN / "adapter_init", is_trainable=True)
        made, values = trainer(model, rows, evaluated, ref_model=second, num_train_epochs=epochs, **more)
    elif kind == "full":
        made, values = trainer(load("model"), rows, evaluated, num_train_epochs=epochs, learning_rate=5e-4, **more)
    made.train()
    history = logs(made)
    measured = made.evaluate()
    keep = {name: value for name, value in measured.items() if "runtime" not in name and "per_second" not in name and name != "epoch"}
    return made, {"args": values, "log_history": history, "eval": keep}


def main():
    OUT.mkdir(exist_ok=True)
    cases = ids()
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (OUT / "ids.json").write_text("[\n" + lines + "\n]\n", encoding="utf-8")
    runs = {}
    made, runs["base"] = run("base")
    save_file(adapter(made), OUT / "adapter_final.safetensors", metadata={"format": "pt"})
    _, runs["initial"] = run("initial", 1)
    _, runs["second"] = run("second", 1)
    _, runs["full"] = run("full", 1)
    _, runs["aot"] = run("aot", 1, loss_type=["aot"], label_smoothing=0.1, per_device_train_batch_size=1, beta=0.5)
    _, runs["nf4"] = run("nf4")
    (OUT / "runs.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    for name, made in runs.items():
        print(name, made["log_history"][0], made["eval"], sep="\n")


if __name__ == "__main__":
    main()
