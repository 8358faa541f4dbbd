#!/usr/bin/env python3
"""Makes tests/golden/sampling: what transformers' logits processors make of random logits, and what it answers greedily.

    pip install torch==2.15.0 transformers==5.23.0 peft==0.21.0
    python tests/python/generate_sampling.py

scores.safetensors holds `logits` (rows, vocabulary), `ids` (rows, length) and, for each case of cases.json, `scores.<number>`: what is
left of the logits by the processors that `generate` puts together for these settings, in its order. answers.json holds greedy answers of
the golden model to conversations by its own chat template, with and without the trained adapter, with a repetition penalty and without.
completions.json holds ids of prompts and answers, and what transformers' cross entropy is over the answers of all rows, with the mean entropy
and how often the most probable token is the right one.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OUT = GOLDEN / "sampling"
ROWS, VOCABULARY, LENGTH = 4, 300, 40

CASES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "temperature": 0.7, "top_k": 0},
    {"do_sample": True, "temperature": 1.9, "top_k": 0},
    {"do_sample": True},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 7},
    {"do_sample": True, "top_k": 1000},
    {"do_sample": True, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "top_p": 0.3},
    {"do_sample": True, "top_k": 0, "top_p": 0.0},
    {"do_sample": True, "top_k": 0, "min_p": 0.05},
    {"do_sample": True, "top_k": 0, "min_p": 0.0},
    {"do_sample": True, "top_k": 0, "min_p": 1.0},
    {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    {"do_sample": True, "temperature": 1.5, "top_k": 100, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
    {"do_sample": True, "temperature": 0.2, "top_k": 5, "top_p": 0.99},
]

CHATS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "Name a bird."},
        {"role": "assistant", "content": "A robin."},
        {"role": "user", "content": "And a fish?"},
    ],
]


def scores():
    generator = torch.Generator().manual_seed(3407)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * torch.tensor([0.5, 1.0, 3.0, 6.0])[:, None]
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[:, 5] = ids[:, 4]  # one that occurs twice
    ids[:, 0] = logits.argmax(-1)  # the largest is penalised
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "model")
    tensors = {"logits": logits, "ids": ids.to(torch.int64)}
    for number, case in enumerate(CASES):
        config = GenerationConfig(**{**model.generation_config._get_default_generation_params(), **case})
        processors = model._get_logits_processor(config, input_ids_seq_length=LENGTH)
        tensors[f"scores.{number:02}"] = processors(ids, logits.clone()).contiguous()
    save_file(tensors, OUT / "scores.safetensors")
    (OUT / "cases.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in CASES) + "\n]\n")


def answers():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32), GOLDEN / "adapter_final")
    found = []
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        row = {"messages": chat, "prompt": prompt, "prompt_tokens": ids.shape[1]}
        for name, model in [("base", base), ("tuned", tuned)]:
            for penalty in [1.0, 1.3]:
                with torch.no_grad():
                    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                          max_new_tokens=24, repetition_penalty=penalty)
                made = made[0, ids.shape[1]:].tolist()
                ends = model.generation_config.eos_token_id
                ends = ends if isinstance(ends, list) else [ends]
                stop = made[-1] in ends
                made = made[:-1] if stop else made
                row[f"{name} {penalty}"] = {
                    "text": tokenizer.decode(made, skip_special_tokens=True), "ids": made,
                    "finish_reason": "stop" if stop else "length"}
        found.append(row)
    (OUT / "answers.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in found) + "\n]\n")


def completions():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32), GOLDEN / "adapter_final")
    rows = []
    for chat, answer in zip(CHATS, ["It scatters light.<|eot_id|>", "4<|eot_id|>", "A trout, or a salmon, or a shark.<|eot_id|>"]):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        rows.append({"prompt": encode(prompt), "chosen": encode(answer)})
    rows.append({"prompt": [], "chosen": tokenizer("A text without a prompt.").input_ids})
    found = {"rows": rows}
    for name, model in [("base", base), ("tuned", tuned)]:
        logps, entropies, right = [], [], []
        for row in rows:
            ids = torch.tensor([row["prompt"] + row["chosen"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double()
            first = max(len(row["prompt"]), 1) - 1
            logits, labels = logits[first:], ids[0, first + 1:]
            logp = logits.log_softmax(-1)
            logps += logp.gather(-1, labels[:, None])[:, 0].tolist()
            entropies += (-(logp.exp() * logp).sum(-1)).tolist()
            right += (logits.argmax(-1) == labels).double().tolist()
        mean = lambda values: sum(values) / len(values)
        found[name] = {"loss": -mean(logps), "entropy": mean(entropies), "mean_token_accuracy": mean(right), "tokens": len(logps)}
    (OUT / "completions.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    completions()
    scores()
    answers()
