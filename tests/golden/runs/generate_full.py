#!/usr/bin/env python3
"""Recreates h_full.json: an epoch of ORPO on every weight, with torch's AdamW and with bitsandbytes' in 8 bits.

pins: as in ../generate.py. usage: python generate_full.py
Here most tensors are large enough for 8-bit moments (run E's are not); transformers keeps those of embeddings in 32 bits.
"""
import os
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import json, sys, tempfile
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
from accelerate import PartialState; PartialState(cpu=True)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = os.path.dirname(os.path.abspath(__file__)); UP = os.path.dirname(HERE); sys.path.insert(0, UP)
from rows import ROWS, to_conversation
tok = AutoTokenizer.from_pretrained(os.path.join(UP, "model"))

def run(optim):
    model = AutoModelForCausalLM.from_pretrained(os.path.join(UP, "model"), attn_implementation="eager", dtype=torch.float32)
    d = dict(max_length=192, beta=0.1, learning_rate=5e-4, lr_scheduler_type="linear", warmup_steps=1, num_train_epochs=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, optim=optim, weight_decay=0.01, max_grad_norm=1.0,
        gradient_checkpointing=False, bf16=False, fp16=False, seed=3407, train_sampling_strategy="sequential")
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **d)
    t = ORPOTrainer(model=model, args=args, train_dataset=Dataset.from_list([to_conversation(r) for r in ROWS[:24]]), processing_class=tok)
    t.train()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = getattr(t.optimizer, "optimizer", t.optimizer)
    eight = sorted(names[id(p)] for p, s in optimizer.state.items() if any(getattr(v, "dtype", None) == torch.uint8 for v in s.values()))
    groups = [dict(names=sorted(names[id(p)] for p in g["params"]), weight_decay=g["weight_decay"]) for g in optimizer.param_groups]
    # The length of each tensor's change: a digest of the result that a rounding does not upset.
    start = AutoModelForCausalLM.from_pretrained(os.path.join(UP, "model"), dtype=torch.float32).state_dict()
    moved = {n: (p.detach().double() - start[n].double()).norm().item() for n, p in model.named_parameters()}
    return dict(args=d, log_history=[l for l in t.state.log_history if "loss" in l], eight_bit=eight, groups=groups, moved=moved)

out = {optim: run(optim) for optim in ("adamw_torch", "adamw_8bit")}
with open(os.path.join(HERE, "h_full.json"), "w") as f: json.dump(out, f, indent=1)
