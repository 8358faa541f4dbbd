#!/usr/bin/env python3
"""Writes tests/golden/defaults.json: the defaults of TRL, PEFT and transformers that our parameters are compared with.

    pip install torch trl==1.16.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
    python tests/python/dump_defaults.py

A test of the Rust program (tests/it/defaults.rs) holds each parameter's default against them. Where a class decides on a value only
when it is made (`bf16`, the compute type), that value counts.
"""

import dataclasses
import enum
import json
import os
import tempfile
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

OUT = Path(__file__).parents[1] / "golden/defaults.json"


def plain(value):
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, tuple)):
        return sorted(value)
    try:
        json.dumps(value)
    except TypeError:
        return str(value).removeprefix("torch.")
    return value


def fields(made):
    return {field.name: plain(getattr(made, field.name)) for field in dataclasses.fields(made)}


def training(config):
    place = tempfile.mkdtemp()
    values = fields(config(output_dir=place, use_cpu=True))
    # Paths, and what the machine or the day decides.
    # A list is made of the one word.
    values["report_to"] = values["report_to"] or "none"
    return {name: value for name, value in values.items() if name not in ("output_dir", "run_name", "logging_dir", "use_cpu") and place not in str(value)}


defaults = {
    "ORPOConfig": training(ORPOConfig),
    "CPOConfig": training(CPOConfig),
    "DPOConfig": training(DPOConfig),
    "KTOConfig": training(KTOConfig),
    "RewardConfig": training(RewardConfig),
    "SFTConfig": training(SFTConfig),
    "LoraConfig": {name: value for name, value in fields(LoraConfig()).items() if name not in ("runtime_config", "peft_version")},
    "BitsAndBytesConfig": {name: plain(value) for name, value in vars(BitsAndBytesConfig()).items() if not name.startswith("_") and name != "quant_method"},
}
OUT.write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")
print({name: len(values) for name, values in defaults.items()})
