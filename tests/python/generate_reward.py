#!/usr/bin/env python3
"""Recreates tests/golden/reward by TRL's RewardTrainer on the tiny model: logs of trainings, a reward model's `config.json` and an
adapter of one as transformers and PEFT write them, and the scores they give: to the rows, and to conversations with fixed answers.

pins: as in ../golden/generate.py. usage: python generate_reward.py
"""
import json
import shutil
import tempfile

# Sets torch up first.
from generate_dpo import GOLDEN, INIT, ROWS, arguments, logs, to_conversation

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

OUT = GOLDEN / "reward"
SCORE = torch.randn((1, 64), generator=torch.Generator().manual_seed(7)) * 0.05

ANSWERS = ["", "Yes.", "I don't know, sorry.\n\nAsk somebody else.", "Über 9.000 Meter 🏔"]

RUNS = {
    "base": {},
    "centered": {"center_rewards_coefficient": 0.5},
    "margin": {},
    "full": {"num_train_epochs": 1, "learning_rate": 5e-4},
    "nf4": {},
}


def rows(name):
    pairs = [to_conversation(row) for row in ROWS[:24]]
    if name == "margin":
        pairs = [{**pair, "margin": (number % 5) * 0.25 - 0.25} for number, pair in enumerate(pairs)]
    return pairs


def load(name):
    model = AutoModelForSequenceClassification.from_pretrained(str(GOLDEN / name), attn_implementation="eager", dtype=torch.float32, num_labels=1, device_map="cpu")
    with torch.no_grad():
        model.score.weight.copy_(SCORE[:, : model.config.hidden_size])
    return model


def lora():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"])


def run(name):
    values = arguments(**RUNS[name])
    del values["beta"]
    values["max_length"] = 400  # rows above it would be dropped
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    args = RewardConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **values)
    train = rows(name)
    model = load("model_nf4" if name == "nf4" else "model")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    made = RewardTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(train[:5]),
        processing_class=tokenizer,
        peft_config=None if name == "full" else lora(),
    )
    if name != "full":
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        set_peft_model_state_dict(made.model, {**INIT, "base_model.model.score.weight": SCORE[:, : model.config.hidden_size].clone()})
    made.train()
    history = logs(made)
    measured = made.evaluate()
    keep = {name: value for name, value in measured.items() if "runtime" not in name and "per_second" not in name and name != "epoch"}
    return made, {"args": values, "log_history": history, "eval": keep}


def scores(model, dataset):
    model.eval()
    out = []
    with torch.no_grad():
        for row in dataset:
            pair = [model(input_ids=torch.tensor([row[side]])).logits.item() for side in ("chosen_ids", "rejected_ids")]
            out.append(pair)
    return out


def conversations(model):
    """What the chat template prints of conversations with fixed answers, and the logit of a sequence classification for each."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    model.eval()
    out = []
    for number, row in enumerate(ROWS[:8]):
        prompt = to_conversation(row)["prompt"]
        for answer in (to_conversation(row)["rejected"][0]["content"], ANSWERS[number % len(ANSWERS)]):
            messages = [*prompt, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                score = model(**ids).logits.item()
            out.append({"prompt": prompt, "answer": answer, "ids": ids["input_ids"][0].tolist(), "score": score})
    return out


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    parts, scored = [], {}
    for name in RUNS:
        made, kept = run(name)
        if name == "base":
            ids = [{"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]} for row in made.train_dataset]
            lines = ",\n".join(json.dumps(row) for row in ids)
            (OUT / "ids.json").write_text("[\n" + lines + "\n]\n", encoding="utf-8")
            lines = ",\n".join(json.dumps(one) for one in conversations(made.model))
            (OUT / "conversations.json").write_text("[\n" + lines + "\n]\n", encoding="utf-8")
            made.model.save_pretrained(OUT / "adapter")
            (OUT / "adapter/README.md").unlink(missing_ok=True)
            settings = json.loads((OUT / "adapter/adapter_config.json").read_text())
            settings["base_model_name_or_path"] = "model"
            (OUT / "adapter/adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if name in ("base", "full"):
            scored[name] = scores(made.model, made.train_dataset)
        if name == "full":
            made.model.config.architectures = [type(made.model).__name__]  # as `save_pretrained` of the model
            made.model.config.save_pretrained(OUT)
        lines = ",\n".join(json.dumps(log) for log in kept["log_history"])
        parts.append(f'"{name}": {{"args": {json.dumps(kept["args"])}, "eval": {json.dumps(kept["eval"])}, "log_history": [\n{lines}\n]}}')
        print(name, kept["log_history"][0], kept["log_history"][-1], kept["eval"], sep="\n")
    (OUT / "runs.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    (OUT / "scores.json").write_text(json.dumps(scored) + "\n", encoding="utf-8")
    save_file({"score.weight": SCORE[:, : made.model.config.hidden_size].clone()}, OUT / "score.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
