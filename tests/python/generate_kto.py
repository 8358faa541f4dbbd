#!/usr/bin/env python3
"""Recreates tests/golden/kto by TRL's KTOTrainer on the tiny model: token ids, and logs of trainings.

pins: as in ../golden/generate.py. usage: python generate_kto.py

As in generate_dpo.py the adapter of a 4-bit model is trained in f32.
"""
import json
import tempfile

# Sets torch up first.
from generate_dpo import GOLDEN, INIT, ROWS, arguments, load, lora, logs, to_conversation

from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from transformers import AutoTokenizer
from trl import KTOConfig, KTOTrainer

OUT = GOLDEN / "kto"

# Rows, then arguments. An evaluation by another batch size keeps the neighbours that batches of training would have.
RUNS = {
    "base": ("mixed", {}),
    "weights": ("mixed", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
    "apo_zero_unpaired": ("mixed", {"loss_type": "apo_zero_unpaired", "beta": 0.2}),
    "paired": ("paired", {"num_train_epochs": 1}),
    "short": ("mixed", {"max_length": 56}),
    "initial": ("mixed", {"num_train_epochs": 1}),
    "nf4": ("mixed", {}),
}  # fmt: skip


def rows(kind):
    pairs = [to_conversation(row) for row in ROWS[:24]]
    if kind == "paired":
        return pairs
    mixed = []
    for number, pair in enumerate(pairs):
        label = number % 3 != 1
        mixed.append({"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label})
    return mixed


def prepared(made):
    out = []
    for row in made.train_dataset:
        ids = {"prompt": row["prompt_ids"], "completion": row["completion_ids"], "label": row["label"]}
        if "KL_completion_ids" in row:
            ids["KL_completion"] = row["KL_completion_ids"]
        out.append(ids)
    return out


def run(name):
    kind, more = RUNS[name]
    values = arguments(**more)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    args = KTOConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **values)
    train = rows(kind)
    peft = lora()
    if name == "nf4":
        model = load("model_nf4", device_map="cpu")
    elif name == "initial":
        model, peft = PeftModel.from_pretrained(load("model"), GOLDEN / "adapter_init", is_trainable=True), None
    else:
        model = load("model")
    for module in model.modules():
        # On processors with bf16 bitsandbytes would repack 4-bit weights for evaluations, and compute these in bf16.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    made = KTOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(train[:5]),
        processing_class=tokenizer,
        peft_config=peft,
    )
    if peft is not None:
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(made.model, INIT)
    ids = prepared(made)
    made.train()
    history = logs(made)
    measured = made.evaluate()
    keep = {name: value for name, value in measured.items() if "runtime" not in name and "per_second" not in name and name != "epoch"}
    return ids, {"args": values, "log_history": history, "eval": keep}


def main():
    OUT.mkdir(exist_ok=True)
    ids, parts = {}, []
    for name in RUNS:
        own, made = run(name)
        if name in ("base", "paired", "weights"):
            ids[name] = own
        lines = ",\n".join(json.dumps(log) for log in made["log_history"])
        parts.append(f'"{name}": {{"args": {json.dumps(made["args"])}, "eval": {json.dumps(made["eval"])}, "log_history": [\n{lines}\n]}}')
        print(name, made["log_history"][0], made["eval"], sep="\n")
    (OUT / "runs.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in own) + "\n]" for name, own in ids.items()]
    (OUT / "ids.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
