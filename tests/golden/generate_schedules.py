#!/usr/bin/env python3
"""Recreates lr_schedules_more.json, the learning-rate factors that lr_schedules.json lacks, and lr_adaptive.json, the learning rates of the
schedules that follow evaluations. pins: as in generate.py."""
import json, math, os, random
import torch
from transformers import get_scheduler

KINDS = {
    "cosine_with_restarts": [{}, {"num_cycles": 1}, {"num_cycles": 3}],
    "inverse_sqrt": [{}, {"timescale": 30}],
    "cosine": [{"num_cycles": 0.5}, {"num_cycles": 1.5}],
    "polynomial": [{}, {"lr_end": 1e-4, "power": 2.0}],
    "cosine_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.1, "num_cycles": 1.0}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr": 1e-4, "warmup_lr_rate": 0.2}],
    "warmup_stable_decay": [
        {"num_decay_steps": 5},
        {"num_decay_steps": 6, "num_stable_steps": 4, "min_lr_ratio": 0.1, "warmup_type": "cosine", "decay_type": "linear"},
        {"num_decay_steps": 8, "min_lr_ratio": 0.05, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
    ],
}
HERE = os.path.dirname(os.path.abspath(__file__))
RATE = 2e-3
out = []
for kind, variants in KINDS.items():
    for kwargs in variants:
        for warmup, total in ((0, 20), (3, 20), (7, 41)):
            p = torch.nn.Parameter(torch.zeros(1)); o = torch.optim.SGD([p], lr=RATE)
            s = get_scheduler(kind, o, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=kwargs)
            factors = []
            for _ in range(total + 1):
                factors.append(o.param_groups[0]["lr"] / RATE); o.step(); s.step()
            out.append(dict(kind=kind, kwargs=kwargs, warmup=warmup, total=total, learning_rate=RATE, factors=factors))
with open(os.path.join(HERE, "lr_schedules_more.json"), "w") as f: json.dump(out, f)

ADAPTIVE = {
    "reduce_lr_on_plateau": [
        {"patience": 1},
        {"patience": 0, "factor": 0.5, "cooldown": 2, "min_lr": 1e-4},
        {"patience": 2, "factor": 0.7, "threshold": 0.02, "threshold_mode": "abs", "mode": "max"},
        {"patience": 0, "factor": 0.3, "eps": 1e-4, "threshold": 0.05},
    ],
    "greedy": [
        {"patience": 1, "min_lr": 1e-5},
        {"patience": 0, "factor": 0.6, "min_lr": 1e-4, "max_lr": 3e-3, "cooldown": 1, "warmup": 2},
        {"patience": 0, "factor": 0.5, "min_lr": 5e-4, "reset_start": 2, "cooldown": 1},
        {"patience": 1, "factor": 0.8, "min_lr": 1e-5, "smooth": True, "window_size": 3},
        {"patience": 0, "factor": 0.8, "mode": "max", "threshold_mode": "rel", "threshold": 0.01, "min_lr": 1e-4},
    ],
}
random.seed(7)
metrics = [round(2 * math.exp(-n / 8) + 1 + 0.3 * random.random() + (0.5 if 20 < n < 30 else 0), 4) for n in range(40)]
out = []
for kind, variants in ADAPTIVE.items():
    for kwargs in variants:
        p = torch.nn.Parameter(torch.zeros(1)); o = torch.optim.SGD([p], lr=RATE)
        s = get_scheduler(kind, o, scheduler_specific_kwargs=kwargs)
        rates = []
        for metric in metrics:
            s.step(metric); rates.append(o.param_groups[0]["lr"])
        assert len(set(rates)) > 2, (kind, kwargs, rates)
        out.append(dict(kind=kind, kwargs=kwargs, learning_rate=RATE, metrics=metrics, rates=rates))
with open(os.path.join(HERE, "lr_adaptive.json"), "w") as f: json.dump(out, f)
