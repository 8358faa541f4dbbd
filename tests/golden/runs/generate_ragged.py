#!/usr/bin/env python3
"""Recreates i_ragged.json: an epoch of ORPO on 7 rows, two in a micro-batch, so that the last one has a single row.

pins: as in ../generate.py. usage: python generate_ragged.py
In the last step accelerate's `gather_for_metrics` takes 1 row of each micro-batch for `logps/*` and `rewards/*`, as the last one has.
`whole` has the same metrics of every step over all rows.
"""
import os
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import json, sys, tempfile
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
from accelerate import PartialState; PartialState(cpu=True)
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = os.path.dirname(os.path.abspath(__file__)); UP = os.path.dirname(HERE); sys.path.insert(0, UP)
from rows import ROWS, to_conversation
tok = AutoTokenizer.from_pretrained(os.path.join(UP, "model"))

def run(whole):
    base = AutoModelForCausalLM.from_pretrained(os.path.join(UP, "model"), attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, os.path.join(UP, "adapter_init"), is_trainable=True)
    d = dict(max_length=192, beta=0.1, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0, num_train_epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, optim="adamw_torch", weight_decay=0.01, max_grad_norm=1.0,
        gradient_checkpointing=False, bf16=False, fp16=False, seed=3407, train_sampling_strategy="sequential")
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **d)
    t = ORPOTrainer(model=model, args=args, train_dataset=Dataset.from_list([to_conversation(r) for r in ROWS[:7]]), processing_class=tok)
    if whole:
        t.accelerator.gather_for_metrics = t.accelerator.gather
    t.train()
    return d, [l for l in t.state.log_history if "loss" in l]

args, cut = run(False)
_, whole = run(True)
with open(os.path.join(HERE, "i_ragged.json"), "w") as f: json.dump(dict(args=args, log_history=cut, whole=whole), f, indent=1)
for a, b in zip(cut, whole):
    print(a["epoch"], {k: (a[k], b[k]) for k in a if a[k] != b[k]})
