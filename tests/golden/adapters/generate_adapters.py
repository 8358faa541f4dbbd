#!/usr/bin/env python3
"""Recreates the files of this folder: adapters of every supported kind by PEFT, on a tiny Llama with biases.

pins: torch 2.15.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2. usage: python generate_adapters.py
Widths are multiples of 64, for bitsandbytes 0.50 on a CPU dequantises blocks that cross rows to other values than on CUDA.
Matrices are random on both sides, so that every adapter changes the logits. For each: the folder as `save_pretrained` leaves it, and in
outputs.safetensors the logits, the logits after `merge_and_unload`, and the gradients of the loss of the whole sequence.
"""
import os
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import inspect, json, shutil, tempfile, types
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
import bitsandbytes as bnb
import peft.utils.loftq_utils as loftq_utils
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__)); P = lambda *a: os.path.join(HERE, *a)
SEED = 3407
IDS = torch.tensor([[(7 * i * i + 3 * i + 5) % 64 for i in range(24)]])
out = {"input_ids": IDS[0]}

def shake(model, seed=1, size=0.1):
    g = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()): p.data += size * torch.randn(p.shape, generator=g)

def make_model():
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, initializer_range=0.15, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = LlamaForCausalLM(config).float(); shake(model); model.save_pretrained(P("model"))

def load(): return AutoModelForCausalLM.from_pretrained(P("model"), dtype=torch.float32, attn_implementation="eager")

def load_tied():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(P("model"), folder, dirs_exist_ok=True)
        config = json.load(open(os.path.join(folder, "config.json"))); config["tie_word_embeddings"] = True
        json.dump(config, open(os.path.join(folder, "config.json"), "w"))
        weights = load_file(P("model", "model.safetensors")); del weights["lm_head.weight"]
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

def load_nf4():
    model = AutoModelForCausalLM.from_pretrained(P("model_nf4"), dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = False
    return model

def logits(model):
    with torch.no_grad(): return model.eval()(IDS).logits[0].float()

def case(name, base=load, merge=True, **config):
    config = dict(dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"), **config)
    torch.manual_seed(SEED)
    model = get_peft_model(base(), LoraConfig(**config))
    with torch.no_grad(): model(IDS)
    g = torch.Generator().manual_seed(2)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad: p.data += 0.2 * torch.randn(p.shape, generator=g)
    shutil.rmtree(P(name), ignore_errors=True); model.save_pretrained(P(name)); os.path.exists(P(name, "README.md")) and os.remove(P(name, "README.md"))
    loaded = PeftModel.from_pretrained(base(), P(name), is_trainable=True)
    out[f"{name}.logits"] = logits(loaded)
    assert torch.equal(out[f"{name}.logits"], logits(model)), name
    loaded.train().zero_grad()
    loss = loaded(IDS, labels=IDS).loss; loss.backward()
    out[f"{name}.loss"] = loss.detach()
    for n, p in loaded.named_parameters():
        if p.requires_grad: out[f"{name}.grad.{n.replace('.default', '')}"] = p.grad
    if merge: out[f"{name}.merged"] = logits(PeftModel.from_pretrained(base(), P(name)).merge_and_unload())
    saved = json.load(open(P(name, "adapter_config.json"))); saved["base_model_name_or_path"] = None
    json.dump(saved, open(P(name, "adapter_config.json"), "w"), indent=2, sort_keys=True)

make_model(); out["logits"] = logits(load())
quantised = AutoModelForCausalLM.from_pretrained(P("model"), dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True,
    bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype=torch.float32), device_map="cpu")
for module in quantised.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = False
quantised.save_pretrained(P("model_nf4")); out["nf4.logits"] = logits(load_nf4())

case("plain")
case("rslora_patterns", use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
     rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "v_proj": 1}, alpha_pattern={"^model.layers.0.self_attn.q_proj": 5, "down_proj": 6})
case("dora", use_dora=True)
case("saved", modules_to_save=["lm_head", "embed_tokens", "norm"], target_modules=["v_proj"])
case("saved_tied", load_tied, merge=False, modules_to_save=["embed_tokens"], target_modules=["v_proj"])
case("saved_projection", modules_to_save=["up_proj"], target_modules=["v_proj"])
case("bias_all", bias="all")
case("bias_lora_only", bias="lora_only")
case("dora_nf4", load_nf4, merge=False, use_dora=True)

# LoftQ by PEFT's own function, which insists on another device than the CPU.
cpu = types.ModuleType("loftq_on_the_cpu"); exec(inspect.getsource(loftq_utils).replace('"cuda"', '"cpu"').replace("torch.cuda.empty_cache()", "pass"), cpu.__dict__)
state = load().state_dict()
for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
    for iterations in (1, 2):
        w, a, b = cpu.loftq_init(state[f"model.layers.0.{name}.weight"], num_bits=4, reduced_rank=4, num_iter=iterations)
        out[f"loftq.{iterations}.{name}.weight"], out[f"loftq.{iterations}.{name}.update"] = w, b @ a
        out[f"loftq.{iterations}.{name}.a_size"], out[f"loftq.{iterations}.{name}.b_size"] = a.norm(dim=1), b.norm(dim=0)
save_file({k: v.detach().contiguous().clone() for k, v in out.items()}, P("outputs.safetensors"), metadata={"format": "pt"})
