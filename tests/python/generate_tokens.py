#!/usr/bin/env python3
"""Recreates tests/golden/tokens by transformers, PEFT and TRL: embeddings resized for new tokens, their ids in texts, and trainings by ORPO in
which PEFT's `trainable_token_indices` trains them, on a model whose head is its own and on one whose head is its embeddings.

pins: as in ../golden/generate.py. usage: python generate_tokens.py
"""
import json
import os
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import sys

import torch

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
from accelerate import PartialState

PartialState(cpu=True)
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

GOLDEN = Path(__file__).parents[1] / "golden"
OUT = GOLDEN / "tokens"
sys.path.insert(0, str(GOLDEN))
from rows import ROWS, to_conversation

SEED = 3407
PLAIN, SPECIAL = ["<tool>", "</tool>", "Köln"], ["<|im_start|>", "<|pad|>"]
TEXTS = ["a <tool>{}</tool> b", "<|im_start|>user\nin Köln, Kölner", "<tool><tool> <|pad|><|im_start|>", "nothing new <too l>"]
INPUT = [1018, 1024, 17, 300, 1027, 1025, 4, 1026]


def load(tied=False, dtype=torch.float32):
    folder = str(GOLDEN / "model")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager", dtype=dtype)
    if tied:
        # The file has a head of its own, which transformers would take.
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def tokenizer():
    made = AutoTokenizer.from_pretrained(GOLDEN / "model")
    assert made.add_tokens(PLAIN) == 3
    assert made.add_special_tokens({"additional_special_tokens": [SPECIAL[0]], "pad_token": SPECIAL[1]}) == 2
    return made


def resized(tied=False, dtype=torch.float32, **more):
    model = load(tied, dtype)
    torch.manual_seed(SEED)
    model.resize_token_embeddings(len(tokenizer()), **more)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    return model


def rows():
    """Conversations with the new tokens in questions and answers."""
    out = []
    for number, row in enumerate(ROWS[:24]):
        chat = to_conversation(row)
        chat = json.loads(json.dumps(chat))
        prompt, chosen, rejected = (chat[name][-1] for name in ("prompt", "chosen", "rejected"))
        prompt["content"] += [" <tool>", "", " in Köln"][number % 3]
        chosen["content"] = ["<tool>", "", "Köln "][number % 3] + chosen["content"] + "</tool>" * (number % 2)
        rejected["content"] += [" <|im_start|>", "</tool>"][number % 2]
        out.append(chat)
    return out


def run(tied, indices):
    model = resized(tied)
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", trainable_token_indices=indices
    )
    model = get_peft_model(model, lora)
    name = "tied" if tied else "untied"
    # By itself PEFT would save the whole embeddings, too, because the base's folder has fewer; see `resized_base` in the tests.
    model.save_pretrained(OUT / f"{name}_init", save_embedding_layers=False)
    values = dict(
        max_length=192, beta=0.1, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=2, num_train_epochs=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, optim="adamw_torch", weight_decay=0.01,
        max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, fp16=False, seed=SEED, train_sampling_strategy="sequential",
    )  # fmt: skip
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **values)
    made = ORPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer())
    ids = []
    for row in made.train_dataset:
        border = sum(label == -100 for label in row["chosen_labels"])
        prompt = row["chosen_input_ids"][:border]
        other = sum(label == -100 for label in row["rejected_labels"])
        assert prompt == row["rejected_input_ids"][:other]
        ids.append({"prompt": prompt, "chosen": row["chosen_input_ids"][border:], "rejected": row["rejected_input_ids"][other:]})
    made.train()
    model.save_pretrained(OUT / f"{name}_final", save_embedding_layers=False)
    history = [log for log in made.state.log_history if "loss" in log]
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([INPUT])).logits[0]
        # Read again by PEFT onto the resized base, and merged.
        again = PeftModel.from_pretrained(resized(tied), OUT / f"{name}_final").merge_and_unload()
        assert (again(torch.tensor([INPUT])).logits[0] - logits).abs().max() < 1e-4
    return history, ids, logits[-3:]


OUT.mkdir(exist_ok=True)
new = {}
for name, more in {
    "untied": {}, "tied": {"tied": True, "pad_to_multiple_of": 16}, "bf16": {"dtype": torch.bfloat16}, "normal": {"mean_resizing": False}
}.items():  # fmt: skip
    model = resized(**more)
    new[f"{name}.embeddings"] = model.model.embed_tokens.weight.detach()[1024:]
    if not more.get("tied"):
        new[f"{name}.head"] = model.lm_head.weight.detach()[1024:]
made = tokenizer()
facts = {
    "plain": PLAIN,
    "special": SPECIAL,
    "ids": {text: made.convert_tokens_to_ids(text) for text in PLAIN + SPECIAL},
    "texts": [{"text": text, "ids": made(text, add_special_tokens=False).input_ids} for text in TEXTS],
    "skipped": [made.decode(made(text, add_special_tokens=False).input_ids, skip_special_tokens=True) for text in TEXTS],
    "input": INPUT,
    "runs": {},
}
for tied, indices in [(False, {"embed_tokens": [1024, 1025, 1026, 1027], "lm_head": [1025, 1026, 1024]}), (True, [1024, 1026, 1025, 1027])]:
    name = "tied" if tied else "untied"
    facts["runs"][name], facts["rows"], new[f"{name}.logits"] = run(tied, indices)
new = {name: tensor.contiguous().clone() for name, tensor in new.items()}
save_file(new, OUT / "tensors.safetensors", metadata={"format": "pt"})
(OUT / "facts.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")
for folder in OUT.iterdir():
    for extra in ["README.md"]:
        (folder / extra).unlink(missing_ok=True) if folder.is_dir() else None
print(facts["ids"], facts["runs"]["tied"][0], facts["runs"]["untied"][-1])
