#!/usr/bin/env python3
"""Recreates tests/golden/optimizers.safetensors and lion8bit_4500.safetensors: the steps of optimisers of transformers, torch and bitsandbytes
on given gradients.

pins: as in ../golden/generate.py. usage: python generate_optimizers.py
"""
import os
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="")
import torch
from bitsandbytes.optim import Lion
from safetensors.torch import save_file
from transformers.optimization import Adafactor

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden"
RATE, DECAY = 1e-2, 0.01
SHAPES = {"matrix": (24, 40), "vector": (50,)}

MADE = {
    "adafactor": lambda p: Adafactor(p, lr=RATE, weight_decay=DECAY, scale_parameter=False, relative_step=False),
    "lion": lambda p: Lion(p, lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY),
    "momentum": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=DECAY),
    "nesterov": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True, weight_decay=DECAY),
    "dampening": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, dampening=0.5, weight_decay=DECAY),
}


def main():
    generator = torch.Generator().manual_seed(11)
    out = {}
    for shape, dims in SHAPES.items():
        out[f"{shape}.p0"] = torch.randn(dims, generator=generator)
        for step in range(1, 6):
            # Of different sizes, so that Adafactor's clipping is seen, with some zeros.
            gradient = torch.randn(dims, generator=generator) * 10.0 ** (step - 3)
            gradient[torch.rand(dims, generator=generator) < 0.05] = 0
            out[f"{shape}.g{step}"] = gradient
    for name, make in MADE.items():
        parameters = {shape: torch.nn.Parameter(out[f"{shape}.p0"].clone()) for shape in SHAPES}
        optimizer = make(list(parameters.values()))
        for step in range(1, 6):
            for shape, parameter in parameters.items():
                parameter.grad = out[f"{shape}.g{step}"].clone()
            optimizer.step()
            for shape, parameter in parameters.items():
                out[f"{name}.{shape}.p{step}"] = parameter.detach().clone()
    save_file(out, GOLDEN / "optimizers.safetensors")

    eight = {"p0": torch.randn(4500, generator=generator)}
    parameter = torch.nn.Parameter(eight["p0"].clone())
    optimizer = Lion([parameter], lr=RATE, betas=(0.9, 0.99), weight_decay=DECAY, optim_bits=8)
    for step in range(1, 4):
        eight[f"g{step}"] = torch.randn(4500, generator=generator)
        parameter.grad = eight[f"g{step}"].clone()
        optimizer.step()
        state = optimizer.state[parameter]
        assert state["state1"].dtype == torch.uint8
        eight[f"p{step}"] = parameter.detach().clone()
        eight[f"state_{step}"] = state["state1"].clone()
        eight[f"absmax_{step}"] = state["absmax1"].clone()
    save_file(eight, GOLDEN / "lion8bit_4500.safetensors")


if __name__ == "__main__":
    main()
