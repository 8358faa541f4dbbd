"""Recreates assistant.json: a training by TRL's SFTTrainer with `assistant_only_loss` on the tiny model, packed and not.

    python generate_assistant.py

pins: as in ../generate.py. The conversations are made of ../rows.jsonl, several questions in each; the template, with `{% generation %}`,
is ../templates/llama3_generation.jinja, the adapter ../adapter_init. `rows` has the messages and the ids and labels that the trainer made
of them, each `log_history` what it logged.
"""

import json
import os
import pathlib
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
from accelerate import PartialState

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
PartialState(cpu=True)
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

HERE = pathlib.Path(__file__).parent
UP = HERE.parent
KEEP = ("step", "epoch", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens")


def conversations():
    rows = [json.loads(line) for line in open(UP / "rows.jsonl", encoding="utf-8")]
    rows = [row for row in rows if len(row["prompt"]) + len(row["chosen"]) < 160]
    turns = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] for row in rows]
    made = []
    for number in range(12):
        count = 1 + number % 3
        messages = sum((turns[(number + 5 * turn) % len(turns)] for turn in range(count)), [])
        if number % 4 == 0:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        if number % 5 == 3:
            messages.append({"role": "user", "content": "And then?"})
        made.append({"messages": messages})
    return made


def run(rows, packing):
    tokenizer = AutoTokenizer.from_pretrained(UP / "model")
    tokenizer.chat_template = (UP / "templates/llama3_generation.jinja").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(UP / "model", attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, UP / "adapter_init", is_trainable=True)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_length=256, packing=packing,
        assistant_only_loss=True, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2, num_train_epochs=1,
        per_device_train_batch_size=1 if packing else 2, gradient_accumulation_steps=2, logging_steps=1, optim="adamw_torch",
        weight_decay=0.01, max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, fp16=False, seed=3407,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    data = [{"ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
    trainer.train()
    logs = [{name: log[name] for name in KEEP} for log in trainer.state.log_history if "loss" in log]
    return data, logs


def main():
    rows = conversations()
    data, logs = run(rows, packing=False)
    _, packed = run(rows, packing=True)
    lines = [json.dumps({**row, **made}, ensure_ascii=False) for row, made in zip(rows, data)]
    text = '{"rows": [\n' + ",\n".join(lines) + '\n],\n"log_history": ' + json.dumps(logs) + ',\n"packed_log_history": ' + json.dumps(packed) + "}\n"
    (HERE / "assistant.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
