#!/usr/bin/env python3
"""Recreates ends/, targets.json and the tied folders' values: adapters at embeddings and head, on bases whose head is their embeddings and on others.

pins: torch 2.15.0, transformers 5.23.0, peft 0.21.2. usage: python generate_ends.py, behind generate_adapters.py
The bases are made of model/: `tied` without `lm_head.weight`, `copied` with an equal one, `different` with one of its own, `only_head` with
nothing but the head, each with `tie_word_embeddings: true`; `model` is untied. For each adapter its folder is as `save_pretrained` leaves it,
and ends/outputs.safetensors has logits, loss, gradients, and the logits of PEFT's merged model. PEFT adds matrices beside tied embeddings
into the one tensor that both ends share, which is not what the adapter computes; such models have no `merged`.
"""
import os
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import json, shutil, tempfile, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1); torch.use_deterministic_algorithms(True)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__)); P = lambda *a: os.path.join(HERE, *a)
SEED = 3407
IDS = torch.tensor([[(7 * i * i + 3 * i + 5) % 64 for i in range(24)]])
out = {"input_ids": IDS[0]}
bases = {}

def base_folder(kind, scratch):
    if kind == "model": return P("model")
    folder = os.path.join(scratch, kind); os.makedirs(folder)
    config = json.load(open(P("model", "config.json"))); config["tie_word_embeddings"] = True
    json.dump(config, open(os.path.join(folder, "config.json"), "w"))
    weights = load_file(P("model", "model.safetensors"))
    if kind == "tied": del weights["lm_head.weight"]
    if kind == "copied": weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if kind == "only_head": del weights["model.embed_tokens.weight"]
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    return folder

def load(kind): return AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32, attn_implementation="eager")
def logits(model):
    with torch.no_grad(): return model.eval()(IDS).logits[0].float()
def gradients(name, model):
    model.train().zero_grad(); loss = model(IDS, labels=IDS).loss; loss.backward(); out[f"{name}.loss"] = loss.detach()
    for n, p in model.named_parameters():
        if p.requires_grad and ("embed" in n or "head" in n): out[f"{name}.grad.{n.replace('.default', '')}"] = p.grad

def case(name, base="model", merge=True, grad=True, save={}, **config):
    config = dict(dict(r=2, lora_alpha=4, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"), **config)
    torch.manual_seed(SEED)
    model = get_peft_model(load(base), LoraConfig(**config))
    g = torch.Generator().manual_seed(2)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad: p.data += 0.2 * torch.randn(p.shape, generator=g)
    where = P("ends", name); shutil.rmtree(where, ignore_errors=True); model.save_pretrained(where, **save)
    os.path.exists(os.path.join(where, "README.md")) and os.remove(os.path.join(where, "README.md"))
    loaded = PeftModel.from_pretrained(load(base), where, is_trainable=True)
    out[f"{name}.logits"] = logits(loaded)
    assert torch.equal(out[f"{name}.logits"], logits(model)), name
    if grad: gradients(name, loaded)
    if merge:
        merged = PeftModel.from_pretrained(load(base), where).merge_and_unload()
        out[f"{name}.merged"] = logits(merged)
        assert (out[f"{name}.merged"] - out[f"{name}.logits"]).abs().max() < 1e-3, name
        out[f"{name}.tied"] = torch.tensor([int(merged.config.tie_word_embeddings)])
    saved = json.load(open(os.path.join(where, "adapter_config.json"))); saved["base_model_name_or_path"] = None
    json.dump(saved, open(os.path.join(where, "adapter_config.json"), "w"), indent=2, sort_keys=True)

def first_match():
    """Patterns in an order of their own: `save_pretrained` would sort them."""
    where = P("ends", "patterns")
    shutil.rmtree(where, ignore_errors=True); shutil.copytree(P("plain"), where)
    saved = json.load(open(os.path.join(where, "adapter_config.json")))
    saved["alpha_pattern"] = {"q_proj": 2, "layers.1.self_attn.q_proj": 64, r"(?<=layers\.0\.)mlp.down_proj": 9}
    json.dump(saved, open(os.path.join(where, "adapter_config.json"), "w"), indent=2)
    out["patterns.logits"] = logits(PeftModel.from_pretrained(load("model"), where))

def begun():
    """What PEFT draws for both ends."""
    torch.manual_seed(SEED)
    model = get_peft_model(load("model"), LoraConfig(r=2, target_modules=["lm_head", "embed_tokens", "v_proj"], task_type="CAUSAL_LM"))
    for n, p in model.named_parameters():
        if p.requires_grad: out[f"begun.{n.replace('.default', '')}"] = p.detach().clone()

TARGETS = [
    dict(target_modules=["q_proj", "v_proj"]), dict(target_modules=None), dict(target_modules="all-linear"), dict(target_modules="ALL-Linear"),
    dict(target_modules=["proj"]), dict(target_modules=["self_attn"]), dict(target_modules=["q_proj", "c_attn"]), dict(target_modules=[]),
    dict(target_modules=["lm_head"]), dict(target_modules=["embed_tokens", "1.mlp.up_proj"]), dict(target_modules=["norm"]),
    dict(target_modules=r".*\.layers\.[0-3]\..*(q|k)_proj"), dict(target_modules=r"layers\.0\..*q_proj"), dict(target_modules=r".*self_attn.*"),
    dict(target_modules=r".*(?<!k)_proj"), dict(target_modules=r".*\.(?!.*gate)\w+_proj"), dict(target_modules=r"(?i).*Q_PROJ"), dict(target_modules=r"lm_head|.*o_proj"),
    dict(target_modules=["q_proj"], layers_to_transform=[1, 3]), dict(target_modules=["q_proj"], layers_to_transform=2), dict(target_modules=["q_proj"], layers_to_transform=[]),
    dict(target_modules=["q_proj"], layers_to_transform=[99]), dict(target_modules=["q_proj", "model.layers.5.mlp.up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"), dict(target_modules=["q_proj"], layers_to_transform=[1, 2], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h"), dict(target_modules=["q_proj"], layers_pattern="layers"), dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=[]),
    dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[0]), dict(target_modules=["1.self_attn.q_proj"], layers_to_transform=[1, 11]),
    dict(target_modules=r".*q_proj", layers_to_transform=[1]), dict(target_modules="all-linear", layers_to_transform=[1]), dict(target_modules=r".*q_proj", layers_pattern="layers"),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]), dict(target_modules="all-linear", exclude_modules=r".*\.(0|2)\..*"), dict(target_modules=["q_proj"], exclude_modules=["layers"]),
    dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), dict(target_modules=["q_proj"], exclude_modules=r".*"), dict(target_modules="all-linear", exclude_modules=["1.mlp.up_proj", "lm_head"]), dict(target_modules=["q_proj"], exclude_modules=""),
    dict(target_modules=["q_proj", "v_proj"], modules_to_save=["v_proj"]), dict(target_modules="all-linear", modules_to_save=["mlp", "lm_head"]), dict(target_modules=["q_proj"], modules_to_save=["layers.1"]),
]

def targets():
    """Which modules PEFT chooses in a Llama of 12 layers, or that it refuses."""
    config = AutoConfig.from_pretrained(P("model")); config.num_hidden_layers = 12
    found = []
    for settings in TARGETS:
        with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
        entry = {"settings": settings}
        try:
            peft = get_peft_model(model, LoraConfig(r=1, task_type="CAUSAL_LM", **settings), low_cpu_mem_usage=True)
            entry["modules"] = sorted(peft.base_model.targeted_module_names)
        except (ValueError, RuntimeError) as error:
            entry["error"] = type(error).__name__; print(settings, "->", str(error).splitlines()[0][:150])
        found.append(entry)
    with open(P("targets.json"), "w") as file: file.write("[\n" + ",\n".join(json.dumps(entry) for entry in found) + "\n]\n")

with tempfile.TemporaryDirectory() as scratch:
    for kind in ("model", "tied", "copied", "different", "only_head"):
        bases[kind] = base_folder(kind, scratch); out[f"{kind}.logits"] = logits(load(kind))
    for kind in ("different", "copied"):
        model = load(kind); gradients(kind, model)
    tied = dict(base="tied")
    case("tied_saved_embed", **tied, modules_to_save=["embed_tokens"])
    case("tied_saved_head", **tied, modules_to_save=["lm_head"])
    case("tied_saved_both", **tied, modules_to_save=["embed_tokens", "lm_head"])
    case("tied_ensure", **tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    case("tied_embedding_layers", **tied, save=dict(save_embedding_layers=True))
    case("embedding_layers", save=dict(save_embedding_layers=True))
    case("lora_head", target_modules=["lm_head", "v_proj"], use_rslora=True)
    case("lora_embed", target_modules=["embed_tokens", "v_proj"], rank_pattern={"embed_tokens": 3})
    case("lora_both", target_modules=["embed_tokens", "lm_head"])
    case("lora_head_saved_embed", target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    case("tied_lora_head", **tied, merge=False, target_modules=["lm_head", "v_proj"])
    case("tied_lora_both", **tied, merge=False, target_modules=["embed_tokens", "lm_head"])
    case("tied_lora_ensure", **tied, merge=False, grad=False, target_modules=["embed_tokens"], ensure_weight_tying=True)
    first_match(); begun()
targets()
save_file({k: v.detach().contiguous().clone() for k, v in out.items()}, P("ends", "outputs.safetensors"), metadata={"format": "pt"})
