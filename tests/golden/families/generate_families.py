#!/usr/bin/env python3
"""Recreates the folders here: tiny random models of further families, and what the Python stack makes of each.

pins: torch 2.15.0, transformers 5.23.0, trl 1.16.0, peft 0.21.2, datasets 5.2.0, bitsandbytes 0.50.2, safetensors 0.8.0 (CPU)
usage: python generate_families.py [--out DIR] [NAME...]

The tokenizer, the rows and the settings of the runs are those of ../generate.py. Each folder holds a model, an adapter whose B is
not 0, that adapter after the run, and:
  outputs.safetensors   logits of the last positions of a prompt: of the base, with the adapter, and after merging the trained
                        adapter by PEFT; in the later families also the base's hidden states there; and the merged weights of the
                        last layer
  run.json              the log of 12 steps of ORPO, and of 6 on the same model in bitsandbytes' NF4
  nf4.safetensors       the codes and the largest magnitudes that bitsandbytes makes of each projection, by the weight's name
  greedy.json           what the merged model goes on with, by `generate` and by hand with the gaps between the two largest logits
ropes.json has cosines and sines of every rope type at some positions, by configuration and length of the sequence.
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
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GraniteConfig,
                          LlamaConfig, MistralConfig, Olmo2Config, Olmo3Config, Phi3Config, Qwen2Config, Qwen3Config, SmolLM3Config)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = os.path.dirname(os.path.abspath(__file__))
UP = os.path.dirname(HERE)
sys.path.insert(0, UP)
from rows import ROWS, to_conversation

parser = argparse.ArgumentParser()
parser.add_argument("--out", default=HERE)
parser.add_argument("names", nargs="*", metavar="NAME", help="the models to make; all by default")
ARGUMENTS = parser.parse_args()
OUT = ARGUMENTS.out
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
SMALL = COMMON | dict(num_hidden_layers=2, num_key_value_heads=2, intermediate_size=64)
LATER = {
    # A layer with a rotary embedding and one without, which has a window.
    "smollm3": SmolLM3Config(**SMALL, no_rope_layer_interval=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=20),
    # Four factors, and biases everywhere.
    "granite": GraniteConfig(**SMALL, embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.4, logits_scaling=3.0,
                             attention_bias=True, mlp_bias=True, rope_theta=1e4, tie_word_embeddings=True),
    "gemma": GemmaConfig(**SMALL, head_dim=32, tie_word_embeddings=True),
    # Soft-caps that cap, and a window in every other layer.
    "gemma2": Gemma2Config(**SMALL, head_dim=32, query_pre_attn_scalar=48, attn_logit_softcapping=3.0, final_logit_softcapping=6.0,
                           sliding_window=16, tie_word_embeddings=True),
    # Two rotary embeddings; norms of q and k.
    "gemma3_text": Gemma3TextConfig(**SMALL, head_dim=32, query_pre_attn_scalar=24, sliding_window=16, sliding_window_pattern=2,
                                    rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                                     "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
                                    tie_word_embeddings=True),
    # Norms after the blocks, and over all of q and k.
    "olmo2": Olmo2Config(**SMALL, rope_theta=5e5, tie_word_embeddings=True),
    "olmo3": Olmo3Config(**SMALL, sliding_window=16, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=True,
                         rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                                                             "rope_theta": 5e5},
                                          "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}),
    # Fused projections, three quarters of each head rotated, and long factors for all sequences but the shortest ones. The tokens that are
    # generated cross that length.
    "phi3": Phi3Config(**COMMON | dict(hidden_size=128), num_hidden_layers=2, num_key_value_heads=2, partial_rotary_factor=0.75,
                       original_max_position_embeddings=48, rope_theta=1e4, tie_word_embeddings=True,
                       rope_scaling={"rope_type": "longrope", "short_factor": [1.0 + 0.05 * i for i in range(12)],
                                     "long_factor": [1.5 + 0.5 * i for i in range(12)]}),
}
FAMILIES |= LATER
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
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
    if config.model_type in LATER:
        # Embeddings that bfloat16 holds exactly, so that they take half the room.
        embeddings = model.get_input_embeddings().weight
        embeddings.data = embeddings.data.bfloat16().float()
    return model.eval()


def save_model(model, folder):
    model.save_pretrained(folder)
    if model.config.model_type in LATER:
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path)
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})


def with_adapter(model):
    torch.manual_seed(SEED)
    targets = FUSED if model.config.model_type == "phi3" else TARGETS
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules=targets, task_type="CAUSAL_LM")
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
    last = LAST // 2 if model.config.model_type in LATER else LAST
    return model.eval()(IDS).logits[0, -last:].contiguous().clone()


@torch.no_grad()
def hidden_states(model):
    states = model.eval()(IDS, output_hidden_states=True).hidden_states
    return torch.stack([state[0, -LAST // 2:] for state in states]).contiguous().clone()


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


def rope_cases():
    """Cosines and sines, one half of each, as transformers makes them anew for each length."""
    positions = [0, 1, 7, 40, 130]
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | factors
    cases = [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}),
        ("llama", {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ("llama", yarn),
        ("llama", yarn | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3}),
        ("llama", yarn | {"mscale": 0.8, "mscale_all_dim": 0.5}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
                   "original_max_position_embeddings": 64}),
        ("llama", longrope),
        ("llama", longrope | {"attention_factor": 1.1}),
        ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                  "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}),
        ("olmo3", {"full_attention": yarn | {"truncate": False}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e5}}),
    ]
    made = []
    for family, parameters in cases:
        own = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=256)
        if family == "phi3":
            config = Phi3Config(**own, original_max_position_embeddings=64, rope_parameters=copy.deepcopy(parameters))
        elif family == "olmo3":
            config = Olmo3Config(**own, layer_types=["full_attention", "sliding_attention"], rope_parameters=copy.deepcopy(parameters))
        else:
            config = LlamaConfig(**own, rope_parameters=copy.deepcopy(parameters))
        for length in (48, 300):
            ids = torch.tensor([[position for position in positions if position < length - 1] + [length - 1]])
            if family == "olmo3":
                rotary = Olmo3RotaryEmbedding(config)
                pairs = [rotary(torch.zeros(1), ids, kind) for kind in ("full_attention", "sliding_attention")]
            else:
                rotary = {"llama": LlamaRotaryEmbedding, "phi3": Phi3RotaryEmbedding}[family](config)
                pairs = [rotary(torch.zeros(1), ids)]
            halves = [[table[0, :, :table.shape[-1] // 2].tolist() for table in pair] for pair in pairs]
            made.append(dict(config=json.loads(config.to_json_string(use_diff=False)), length=length, positions=ids[0].tolist(), ropes=halves))
    return made


if not ARGUMENTS.names or "ropes" in ARGUMENTS.names:
    with open(os.path.join(OUT, "ropes.json"), "w") as file:
        json.dump(rope_cases(), file)
for name, config in FAMILIES.items():
    if ARGUMENTS.names and name not in ARGUMENTS.names:
        continue
    folder = os.path.join(OUT, name)
    base = new_model(config)
    save_model(base, folder)
    model = with_adapter(copy.deepcopy(base))
    save_adapter(model, os.path.join(folder, "adapter_init"))
    outputs = {"input_ids": IDS[0], "base": logits(base), "adapter_init": logits(model)}
    if name in LATER:
        outputs["hidden_states"] = hidden_states(base)
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
