#!/usr/bin/env python3
"""Recreates more.json: trainings of 12 steps by TRL's SFTTrainer with other losses than nll, and with rows that are split.

pins: as in ../generate.py. usage: python generate_more.py
"""
import json, os

from generate_sft import HERE, run

out = {
    "dft": run(True, False, num_train_epochs=2, loss_type="dft"),
    "smoothed": run(True, False, num_train_epochs=2, label_smoothing_factor=0.1),
    "split": run(False, True, max_length=96, per_device_train_batch_size=1, packing_strategy="bfd_split"),
}
with open(os.path.join(HERE, "more.json"), "w") as f: json.dump(out, f, indent=1)
