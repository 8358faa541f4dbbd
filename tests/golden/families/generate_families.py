#!/usr/bin/env python3
"""Recreates the folders here: tiny random models of further families, and what the Python stack makes of each.

pins: torch 2.15.0, transformers 5.23.0, trl 1.16.0, peft 0.21.2, datasets 5.2.0, bitsandbytes 0.50.2, safetensors 0.8.0 (CPU)
usage: python generate_families.py [--out DIR]

The tokenizer, the rows and the settings of the runs are those of ../generate.py. Each folder holds a model, an adapter whose B is
not 0, that adapter after the run, and:
  outputs.safetensors   logits of the last positions of a prompt: of the base, with the adapter, and after merging the trained
                        adapter by PEFT; and the merged weights of the last layer
  run.json              the log of 12 steps of ORPO, and of 6 on the same model in bitsandbytes' NF4
  nf4.safetensors       the codes and the largest magnitudes that bitsandbytes makes of each projection, by the weight's name
  greedy.json           what the merged model goes on with, by `generate` and by hand with the gaps between the two largest logits
"""
import argparse
import copy
import json
import os
import shutil
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import bitsandbytes as bnb
import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
from accelerate import PartialState

PartialState(cpu=True)
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, MistralConfig, Qwen2Config, Qwen3Config)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = os.path.dirname(os.path.abspath(__file__))
UP = os.path.dirname(HERE)
sys.path.insert(0, UP)
from rows import ROWS, to_conversation

parser = argparse.ArgumentParser()
parser.add_argument("--out", default=HERE)
OUT = parser.parse_args().out
SEED = 3407
tok = AutoTokenizer.from_pretrained(os.path.join(UP, "model"))
# Rows of all weights are multiples of 64: bitsandbytes on a CPU takes other magnitudes for shorter ones than it quantised with.
COMMON = dict(vocab_size=1024, hidden_size=64, intermediate_size=128, num_attention_heads=4, max_position_embeddings=512,
              initializer_range=0.12, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
FAMILIES = {
    # Biases of q, k and v; a head of its own.
    "qwen2": Qwen2Config(**COMMON, num_hidden_layers=2, num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=False),
    # Windows in the upper layers only.
    "qwen2_window": Qwen2Config(**COMMON, num_hidden_layers=3, num_key_value_heads=4, rope_theta=1e6, tie_word_embeddings=True,
                                use_sliding_window=True, sliding_window=20, max_window_layers=1),
    # Norms of q and k; heads wider than hidden_size / num_attention_heads.
    "qwen3": Qwen3Config(**COMMON, num_hidden_layers=2, num_key_value_heads=2, head_dim=32, rope_theta=1e6, tie_word_embeddings=True),
    # A window in all layers, shorter than the rows.
    "mistral": MistralConfig(**COMMON, num_hidden_layers=2, num_key_value_heads=1, rope_theta=1e4, rms_norm_eps=1e-5,
                             tie_word_embeddings=True, sliding_window=16),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = tok.apply_chat_template([{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "What is ORPO?"}],
                                 tokenize=True, add_generation_prompt=True, return_dict=False)
IDS = torch.tensor([PROMPT])
LAST = 8


def new_model(config):
    torch.manual_seed(SEED)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def with_adapter(model):
    torch.manual_seed(SEED)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def save_adapter(model, folder):
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    path = os.path.join(folder, "adapter_config.json")
    settings = json.load(open(path)) | {"base_model_name_or_path": None}
    settings["target_modules"] = sorted(settings["target_modules"])
    with open(path, "w") as file:
        json.dump(settings, file, indent=2, sort_keys=True)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits[0, -LAST:].contiguous().clone()


@torch.no_grad()
def greedy(model, count=20):
    ids, gaps = IDS.clone(), []
    for _ in range(count):
        top = model.eval()(ids).logits[0, -1].topk(2)
        gaps.append((top.values[0] - top.values[1]).item())
        ids = torch.cat([ids, top.indices[:1].view(1, 1)], 1)
    ids = ids[0, IDS.shape[1]:].tolist()
    generated = model.generate(IDS, max_new_tokens=count, do_sample=False, pad_token_id=tok.pad_token_id, eos_token_id=None)
    assert generated[0, IDS.shape[1]:].tolist() == ids
    return dict(prompt_ids=PROMPT, ids=ids, text=tok.decode(ids), top2_gap=gaps)


def train(model, epochs):
    folder = tempfile.mkdtemp()
    settings = dict(max_length=192, beta=0.1, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2, num_train_epochs=epochs,
                    per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, optim="adamw_torch", weight_decay=0.01,
                    max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, fp16=False, seed=SEED, train_sampling_strategy="sequential")
    args = ORPOConfig(output_dir=folder, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **settings)
    data = Dataset.from_list([to_conversation(row) for row in ROWS[:24]])
    trainer = ORPOTrainer(model=model, args=args, train_dataset=data, processing_class=tok)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer.model, [log for log in trainer.state.log_history if "loss" in log]


def in_4_bits(folder):
    """The saved model in NF4 without nested magnitudes, computing as it does on a GPU."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False,
                                bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu",
                                                 attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def codes(model):
    """The codes of the 4-bit weights, two a byte, and the largest magnitudes of their blocks."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            tensors[f"{name}.weight"] = module.weight.data.flatten().clone()
            tensors[f"{name}.weight.absmax"] = module.weight.quant_state.absmax.float().clone()
    return tensors


for name, config in FAMILIES.items():
    folder = os.path.join(OUT, name)
    base = new_model(config)
    base.save_pretrained(folder)
    model = with_adapter(copy.deepcopy(base))
    save_adapter(model, os.path.join(folder, "adapter_init"))
    outputs = {"input_ids": IDS[0], "base": logits(base), "adapter_init": logits(model)}
    model, log = train(model, 2)
    save_adapter(model, os.path.join(folder, "adapter_final"))
    merged = model.merge_and_unload()
    outputs["merged"] = logits(merged)
    last = f"model.layers.{config.num_hidden_layers - 1}."
    for key, tensor in merged.state_dict().items():
        if key.startswith(last):
            outputs[f"merged.{key}"] = tensor.detach().clone()
    save_file(outputs, os.path.join(folder, "outputs.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "greedy.json"), "w") as file:
        json.dump(greedy(merged), file, indent=1, ensure_ascii=False)
    quantised = in_4_bits(folder)
    save_file(codes(quantised), os.path.join(folder, "nf4.safetensors"), metadata={"format": "pt"})
    quantised = with_adapter(quantised)
    quantised_logits = logits(quantised)
    _, quantised_log = train(quantised, 1)
    with open(os.path.join(folder, "run.json"), "w") as file:
        json.dump(dict(log_history=log, nf4_log_history=quantised_log), file, indent=1)
    print(name, [round(entry["loss"], 4) for entry in log], [round(entry["loss"], 4) for entry in quantised_log])
