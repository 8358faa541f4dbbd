#!/usr/bin/env python3
"""Recreates sft.json: short trainings by TRL's SFTTrainer on the tiny model, whole sequences and answers only, packed and not.

pins: as in ../generate.py. usage: python generate_sft.py
The rows are ../tokenised.jsonl's chosen sequences (trl-1.16, eos <|end_of_text|>), the adapter is ../adapter_init.
"""
import os
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import json, tempfile
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
from accelerate import PartialState; PartialState(cpu=True)
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

HERE = os.path.dirname(os.path.abspath(__file__)); UP = os.path.dirname(HERE)
tok = AutoTokenizer.from_pretrained(os.path.join(UP, "model"))
rows = []
for line in open(os.path.join(UP, "tokenised.jsonl"), encoding="utf-8"):
    r = json.loads(line)
    if r["semantics"] == "trl-1.16" and r["eos"] == "end_of_text" and r["row"] < 24:
        rows.append(dict(input_ids=r["chosen_input_ids"], completion_mask=[int(l != -100) for l in r["chosen_labels"]]))
assert len(rows) == 24

def run(completion_only, packing, max_length=192, **kw):
    base = AutoModelForCausalLM.from_pretrained(os.path.join(UP, "model"), attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, os.path.join(UP, "adapter_init"), is_trainable=True)
    d = dict(max_length=max_length, packing=packing, completion_only_loss=completion_only, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2,
        num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, optim="adamw_torch", weight_decay=0.01,
        max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, fp16=False, seed=3407, train_sampling_strategy="sequential"); d.update(kw)
    args = SFTConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **d)
    t = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tok)
    lengths = t.train_dataset["seq_lengths"][:] if packing else None
    t.train()
    keep = ("step", "epoch", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens")
    logs = [{k: l[k] for k in keep} for l in t.state.log_history if "loss" in l]
    return dict(args=d, seq_lengths=lengths, log_history=logs)

def main():
    out = {
        "full": run(False, False),
        "completion_only": run(True, False),
        "packed_full": run(False, True, per_device_train_batch_size=1),
        "packed_completion_only": run(True, True, max_length=256, per_device_train_batch_size=1),
    }
    # Which rows go together: lengths with many ties, so that their order shows. Row number = the ids' value.
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 20, (200,), generator=g).tolist()
    packed = pack_dataset(Dataset.from_list([dict(input_ids=[i] * n) for i, n in enumerate(lengths)]), 32, "bfd")
    order = []
    for ids, ns in zip(packed["input_ids"], packed["seq_lengths"]):
        at = 0; bin = []
        for n in ns: bin.append(ids[at]); at += n
        order.append(bin)
    long = pack_dataset(Dataset.from_list([dict(input_ids=[i] * n) for i, n in enumerate([40, 3, 16, 32, 1])]), 16, "bfd")
    out["bins"] = dict(lengths=lengths, seq_length=32, bins=order, truncated=dict(lengths=[40, 3, 16, 32, 1], seq_length=16, seq_lengths=long["seq_lengths"][:]))
    with open(os.path.join(HERE, "sft.json"), "w") as f: json.dump(out, f, indent=1)

if __name__ == "__main__":
    main()
