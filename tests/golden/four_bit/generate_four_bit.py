#!/usr/bin/env python3
"""Recreates the 4-bit folders here: layouts of bitsandbytes other than the usual one, a PEFT adapter, and the logits of each.

pins: torch 2.15.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2, safetensors 0.8.0 (CPU)
usage: python generate_four_bit.py
"""
import copy
import json
import os

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(1)
SHAPE = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             initializer_range=0.12, tie_word_embeddings=False)
# Name, and what differs from the usual layout.
FOLDERS = [
    # Codes in a bfloat16 tensor, as FSDP wants them, and the head in 4 bits too.
    ("bf16_head", dict(bnb_4bit_quant_storage=torch.bfloat16, llm_int8_skip_modules=[])),
    # Codes in a float32 tensor, magnitudes in float32, some projections dense.
    ("f32_skip", dict(bnb_4bit_quant_storage=torch.float32, bnb_4bit_use_double_quant=False,
                           llm_int8_skip_modules=["lm_head", "down_proj", "model.layers.1.self_attn"])),
]
IDS = torch.tensor([[1, 5, 77, 30, 112, 9, 64, 100, 17, 2]])


def plain(model):
    """Computes as it does on a GPU: in the compute type, from codes that stay as they are."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits[0].float().contiguous()


def load(path):
    return plain(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", attn_implementation="eager"))


def dense(model):
    """The same model with every 4-bit weight dequantised."""
    out = LlamaForCausalLM(copy.deepcopy(model.config)).float().eval()
    out.config._attn_implementation = "eager"
    state = {}
    for name, tensor in model.named_parameters():
        module = model.get_submodule(name.rsplit(".", 1)[0])
        is_4bit = isinstance(module, bnb.nn.Linear4bit)
        state[name] = (F.dequantize_4bit(tensor.data, tensor.quant_state) if is_4bit else tensor.data).float()
    out.load_state_dict(state)
    return out


results = {"input_ids": IDS[0]}
for name, layout in FOLDERS:
    torch.manual_seed(5)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    base.save_pretrained(os.path.join(HERE, "tmp"))
    config = BitsAndBytesConfig(**(dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                        bnb_4bit_compute_dtype=torch.float32) | layout))
    model = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "tmp"), quantization_config=config, dtype=torch.float32, device_map="cpu")
    folder = os.path.join(HERE, name)
    model.save_pretrained(folder)
    model = load(folder)
    results[f"{name}.logits"] = logits(model)
    results[f"{name}.dequantised"] = logits(dense(model))
    if name == FOLDERS[0][0]:
        torch.manual_seed(6)
        adapter = get_peft_model(load(folder), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj", "up_proj"],
                                                         init_lora_weights=False, task_type="CAUSAL_LM"))
        adapter.save_pretrained(os.path.join(HERE, "adapter"))
        path = os.path.join(HERE, "adapter", "adapter_config.json")
        settings = json.load(open(path)) | {"base_model_name_or_path": None}
        json.dump(settings, open(path, "w"), indent=2, sort_keys=True)
    results[f"{name}.adapter"] = logits(plain(PeftModel.from_pretrained(load(folder), os.path.join(HERE, "adapter"))))
    merged = PeftModel.from_pretrained(dense(model), os.path.join(HERE, "adapter")).merge_and_unload()
    results[f"{name}.merged"] = logits(merged.eval())
save_file(results, os.path.join(HERE, "outputs.safetensors"), metadata={"format": "pt"})
for key, value in results.items():
    print(key, tuple(value.shape), value.flatten()[:3].tolist())
