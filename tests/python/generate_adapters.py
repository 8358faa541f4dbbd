#!/usr/bin/env python3
"""Recreates tests/golden/adapters/begin.safetensors and combined.safetensors by PEFT: how adapters on the tiny model begin, and what several of
them become.

pins: as in ../golden/generate.py. usage: python generate_adapters.py
"""
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden"
OUT = GOLDEN / "adapters"
PATHS = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]


def load():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)


def module(model, path):
    return model.get_submodule(f"base_model.model.{path}")


def begin():
    out = {}
    for kind in ("pissa", "olora", "orthogonal"):
        torch.manual_seed(3407)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["k_proj", "down_proj"], init_lora_weights=kind)
        model = get_peft_model(load(), config)
        for path in PATHS:
            layer = module(model, path)
            out[f"{kind}.{path}.a"] = layer.lora_A["default"].weight
            out[f"{kind}.{path}.b"] = layer.lora_B["default"].weight
            if kind != "orthogonal":
                out[f"{kind}.{path}.rest"] = layer.base_layer.weight
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in out.items()}, OUT / "begin.safetensors")


WAYS = {
    "svd": {},
    "linear": {},
    "cat": {},
    "ties": {"density": 0.4},
    "ties_frequency": {"combination_type": "ties", "density": 0.4, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.4, "svd_rank": 3},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6},
    "magnitude_prune": {"density": 0.3},
}


def combined():
    """Two adapters: that of run A, and a random one on some of the same modules. Products are kept, and of what is no product the matrices."""
    model = PeftModel.from_pretrained(load(), GOLDEN / "adapter_final", adapter_name="first")
    other = LoraConfig(r=8, lora_alpha=4, target_modules=["k_proj", "down_proj"])
    torch.manual_seed(1)
    model.add_adapter("second", other)
    out = {}
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
            path = name.removeprefix("base_model.model.").replace(".second.weight", "")
            if any(path.startswith(wanted) for wanted in PATHS):
                out[f"second.{path}"] = parameter.data
    for name, how in WAYS.items():
        how = {"combination_type": name, **how}
        torch.manual_seed(5)
        model.add_weighted_adapter(["first", "second"], [0.7, -0.4], name, **how)
        for path in PATHS:
            layer = module(model, path)
            if path == PATHS[0] or name in ("svd", "dare_linear"):
                out[f"{name}.{path}"] = layer.get_delta_weight(name)
        model.delete_adapter(name)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in out.items()}, OUT / "combined.safetensors")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    begin()
    combined()
