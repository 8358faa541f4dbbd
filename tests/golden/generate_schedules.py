#!/usr/bin/env python3
"""Recreates lr_schedules_more.json: the learning-rate factors that lr_schedules.json lacks. pins: as in generate.py."""
import json, os
import torch
from transformers import get_scheduler

KINDS = {"cosine_with_restarts": [{}, {"num_cycles": 1}, {"num_cycles": 3}], "inverse_sqrt": [{}], "cosine": [{"num_cycles": 0.5}]}
out = []
for kind, variants in KINDS.items():
    for kwargs in variants:
        for warmup, total in ((0, 20), (3, 20), (7, 41)):
            p = torch.nn.Parameter(torch.zeros(1)); o = torch.optim.SGD([p], lr=1.0)
            s = get_scheduler(kind, o, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=kwargs)
            factors = []
            for _ in range(total + 1):
                factors.append(o.param_groups[0]["lr"]); o.step(); s.step()
            out.append(dict(kind=kind, kwargs=kwargs, warmup=warmup, total=total, factors=factors))
HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "lr_schedules_more.json"), "w") as f: json.dump(out, f)
