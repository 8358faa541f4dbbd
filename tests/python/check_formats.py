#!/usr/bin/env python3
"""Checks by hand that PEFT, transformers and bitsandbytes load what we write, that we load what they write, and that all agree.

    pip install torch transformers peft bitsandbytes pyarrow
    cargo build
    python tests/python/check_formats.py target/debug/pipeline

Adapters of every kind are trained here and scored there, and the other way about; 4-bit models and merged ones likewise. The
numbers are mean log-probabilities of answers, which every logit of the model goes into.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-5
failed = []

START = """\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl, max_rows: 100 } }
  split: { split_dataset: { dataset: pairs, test_size: 0.1 } }
  base: { create_model: { dataset: split, vocab_size: 400, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2,
                          num_attention_heads: 4, num_key_value_heads: 2, initializer_range: 0.1 } }
  chats: { apply_chat_template: { dataset: split, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 96, max_prompt_length: 48 } }
  tied: { create_model: { dataset: split, vocab_size: 400, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2,
                          num_attention_heads: 4, num_key_value_heads: 2, initializer_range: 0.1, tie_word_embeddings: true } }
  tied4: { quantize: { model: tied } }
  base4: { quantize: { model: base } }
  single: { quantize: { model: base, double_quant: false } }
"""

# Name, base, and what `attach_lora` is told beside the model.
OURS = [
    ("plain", "base", "target_modules: all-linear"),
    ("rslora", "base", "target_modules: all-linear, use_rslora: true, lora_alpha: 4"),
    ("patterns", "base", "target_modules: all-linear, rank_pattern: { q_proj: 2, 'layers.1.mlp.down_proj': 5 }, alpha_pattern: { '.*mlp.*': 3 }"),
    ("saved", "base", "target_modules: [q_proj], modules_to_save: [embed_tokens, lm_head, norm]"),
    ("dora", "base", "target_modules: all-linear, use_dora: true"),
    ("ordered", "base", "target_modules: all-linear, alpha_pattern: { q_proj: 2, 'layers.1.self_attn.q_proj': 64, 'mlp.*': 1 }"),
    ("regex", "base", "target_modules: '.*layers\\.1\\..*(?<!k)_proj', exclude_modules: [up_proj]"),
    ("layers", "base", "target_modules: [q_proj, up_proj], layers_to_transform: 1, layers_pattern: layers"),
    ("head", "base", "target_modules: [v_proj, lm_head]"),
    ("both_ends", "base", "target_modules: [v_proj, lm_head, embed_tokens], use_rslora: true"),
    ("tied_saved", "tied", "target_modules: [v_proj], modules_to_save: [embed_tokens]"),
    ("tied_saved_head", "tied", "target_modules: [v_proj], modules_to_save: [lm_head]"),
    ("tied_saved4", "tied4", "target_modules: [v_proj], modules_to_save: [embed_tokens]"),
    ("tied_head", "tied", "target_modules: [v_proj, lm_head]"),
    ("tied_both_ends", "tied", "target_modules: [v_proj, lm_head, embed_tokens]"),
    ("plain4", "base4", "target_modules: all-linear"),
    ("saved4", "base4", "target_modules: [q_proj, up_proj], modules_to_save: [lm_head]"),
    ("dora4", "base4", "target_modules: all-linear, use_dora: true"),
    ("loftq", "single", "target_modules: all-linear, init_lora_weights: loftq, loftq_from: base"),
]
# Name, base, and what PEFT is told.
THEIRS = [
    ("their_plain", "base", dict(target_modules="all-linear")),
    ("their_rslora", "base", dict(target_modules="all-linear", use_rslora=True, lora_alpha=3)),
    ("their_patterns", "base", dict(target_modules="all-linear", rank_pattern={r"layers\.1\..*q_proj": 5}, alpha_pattern={"down_proj": 9})),
    ("their_saved", "base", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    ("their_dora", "base", dict(target_modules="all-linear", use_dora=True)),
    ("their_regex", "base", dict(target_modules=r".*layers\.[01]\..*(q|up)_proj")),
    ("their_ends", "base", dict(target_modules=["v_proj", "lm_head", "embed_tokens"])),
    ("their_tied_saved", "tied", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"])),
    ("their_tied_ensure", "tied", dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("their_tied_whole", "tied", dict(target_modules=["v_proj"])),
    ("their_tied_ends", "tied", dict(target_modules=["v_proj", "embed_tokens"])),
]
# Layouts of bitsandbytes that `quantize` doesn't make.
LAYOUTS = [
    ("bnb_bf16", dict(bnb_4bit_quant_storage=torch.bfloat16)),
    ("bnb_f32_single", dict(bnb_4bit_quant_storage=torch.float32, bnb_4bit_use_double_quant=False)),
    ("bnb_head", dict(llm_int8_skip_modules=[])),
    ("bnb_skip", dict(llm_int8_skip_modules=["lm_head", "down_proj", "model.layers.1.self_attn"])),
]
# Another way of speaking than the base's, with another end of answers.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|end_of_text|>' if m.role == 'user' else '<|eot_id|>' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
SPOKEN = f"""\
  spoken: {{ apply_chat_template: {{ dataset: split, tokenizer: base, chat_template: {json.dumps(TEMPLATE)} }} }}
  spoken_tokens: {{ tokenize: {{ dataset: spoken, tokenizer: base, max_length: 96 }} }}
  spoken_new: {{ attach_lora: {{ model: base4, r: 4 }} }}
  spoken_tuned: {{ train_orpo: {{ model: base4, adapter: spoken_new, dataset: spoken_tokens, max_steps: 2 }} }}
  spoken_merged: {{ merge: {{ model: base, adapter: spoken_tuned }} }}
  spoken_full: {{ train_sft: {{ model: base, dataset: spoken_tokens, max_steps: 2 }} }}
"""
# PEFT adds matrices beside tied embeddings into the one tensor that both ends share, which its adapter does not compute.
MERGED_WRONGLY = ["tied_head", "tied_both_ends", "their_tied_ends"]
TRAIN = "dataset: tokens, max_steps: 6, learning_rate: 5.0e-3, per_device_train_batch_size: 4, lr_scheduler_type: constant"


def recipe():
    """What is made here alone."""
    text = START + SPOKEN
    for name, base, settings in OURS:
        text += f"  {name}_new: {{ attach_lora: {{ model: {base}, r: 4, {settings} }} }}\n"
        text += trained(name, base, f"{name}_new")
    return text


def trained(name, base, start):
    return f"""\
  {name}: {{ train_orpo: {{ model: {base}, adapter: {start}, {TRAIN} }} }}
  {name}_scores: {{ evaluate: {{ model: {base}, adapter: {name}, dataset: tokens, num_answers: 0 }} }}
  {name}_merged: {{ merge: {{ model: {base}, adapter: {name} }} }}
  {name}_again: {{ evaluate: {{ model: {name}_merged, dataset: tokens, num_answers: 0 }} }}
"""


def run(folder, text):
    """The folders of all stages' results."""
    (folder / "recipe.yaml").write_text(text)
    command = [Path(sys.argv[1]).resolve(), "run", "--json", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return {e["stage"]: folder / ".pipeline/v1/artifacts" / e["artifact"] for e in events if "artifact" in e}


def check(what, ours, theirs, tolerance=TOLERANCE):
    difference = abs(ours - theirs) / max(abs(theirs), 1e-6)
    verdict = "ok" if difference <= tolerance else "DIFFERS"
    print(f"{verdict:>7}  {what}: {ours:.7f} here, {theirs:.7f} there, {difference:.1e} apart", flush=True)
    if not difference <= tolerance:
        failed.append(what)


def claim(what, holds):
    print(f"{'ok' if holds else 'DIFFERS':>7}  {what}", flush=True)
    if not holds:
        failed.append(what)


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules():
        # On processors with AVX512-BF16 bitsandbytes would compute in bf16, whatever the compute dtype.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logps(model, rows, answer):
    means = []
    for row in rows:
        prompt, ids = row["prompt_ids"], row[f"{answer}_ids"]
        logits = model.eval()(torch.tensor([prompt + ids])).logits[0].float()
        scored = torch.log_softmax(logits[len(prompt) - 1:-1], dim=-1)
        means.append(scored.gather(1, torch.tensor(ids)[:, None]).mean().item())
    return sum(means) / len(means)


def agree(what, folder, side, model, rows):
    scores = json.loads((folder / "scores.json").read_text())[side]
    for answer in ("chosen", "rejected"):
        check(f"{what}, logps/{answer}", scores[f"logps/{answer}"], logps(model, rows, answer))


def adapter_agrees(name, base, made, rows):
    """An adapter of ours beside its base, and merged into it."""
    alone = load(made[base])
    agree(f"{name}: base alone", made[f"{name}_scores"], "base", alone, rows)
    adapted = PeftModel.from_pretrained(alone, made[name])
    agree(f"{name}: PEFT with our adapter", made[f"{name}_scores"], "adapter", adapted, rows)
    merged = load(made[f"{name}_merged"])
    agree(f"{name}: transformers with our merged model", made[f"{name}_again"], "base", merged, rows)
    agree(f"{name}: our merged model, PEFT's adapter", made[f"{name}_again"], "base", adapted, rows)
    if base in ("base", "tied") and name not in MERGED_WRONGLY:
        theirs = adapted.merge_and_unload().state_dict()
        ours = merged.state_dict()
        far = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        print(f"         {name}: merged weights are {far:.1e} apart at most")
        claim(f"{name}: merged weights have PEFT's names and values", ours.keys() == theirs.keys() and far < 1e-5)
        claim(f"{name}: the head is the embeddings as with PEFT", merged.config.tie_word_embeddings == adapted.config.tie_word_embeddings)


def tied_models(folder, made, rows):
    """Models whose `config.json` says that they are tied, with a head in their files: as they are, and trained whole."""
    text = recipe()
    names = ("copied", "different", "only_head")
    for name in names:
        (folder / name).mkdir()
        for file in made["tied"].iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
        weights = load_file(made["tied"] / "model.safetensors")
        embeddings = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embeddings.clone() if name != "different" else embeddings.flip(0).contiguous()
        if name == "only_head":
            del weights["model.embed_tokens.weight"]
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        text += f"""\
  {name}: {{ import_model: {{ path: {name} }} }}
  {name}_first: {{ evaluate: {{ model: {name}, dataset: tokens, num_answers: 0 }} }}
  {name}_full: {{ train_sft: {{ model: {name}, {TRAIN} }} }}
  {name}_scores: {{ evaluate: {{ model: {name}_full, dataset: tokens, num_answers: 0 }} }}
"""
    made = run(folder, text)
    for name in names:
        agree(f"{name}: as it is", made[f"{name}_first"], "base", load(folder / name), rows)
        agree(f"{name}: trained whole", made[f"{name}_scores"], "base", load(made[f"{name}_full"]), rows)
        keys = load_file(made[f"{name}_full"] / "model.safetensors").keys()
        claim(f"{name}: a head in the file only where it is its own", ("lm_head.weight" in keys) == (name == "different"))


def adapter_of_peft(folder, base, name, settings):
    """A folder that PEFT saved, of an adapter that changes the model."""
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(**(dict(r=3, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM") | settings)))
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder / name, save_embedding_layers=True if name == "their_tied_whole" else "auto")


def models_of_bitsandbytes(folder, made):
    """The base in 4 bits by bitsandbytes, saved by transformers; ours has to be the same."""
    for name, double in (("bnb", True), ("bnb_single", False)):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                                    bnb_4bit_compute_dtype=torch.float32)
        AutoModelForCausalLM.from_pretrained(made["base"], dtype=torch.float32, quantization_config=config, device_map="cpu").save_pretrained(folder / name)
        theirs = load_file(folder / name / "model.safetensors")
        ours = load_file(made["base4" if double else "single"] / "model.safetensors")
        claim(f"{name}: the tensors have the same names", ours.keys() == theirs.keys())
        other = [key for key in ours if ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key])]
        if double:
            # On a CPU bitsandbytes looks the 8-bit codes of magnitudes up in a coarse grid.
            near = [key for key in other if not key.endswith((".absmax", ".nested_absmax", ".bitsandbytes__nf4"))]
            codes = [(ours[key].int() - theirs[key].int()).abs() for key in other if key.endswith(".absmax")]
            share = sum((c > 0).sum().item() for c in codes) / sum(v.numel() for key, v in ours.items() if key.endswith(".absmax"))
            print(f"         {name}: {share:.2%} of the magnitudes have a neighbouring code")
            claim(f"{name}: all but the magnitudes' codes is the same to the bit", not near and all(c.max() <= 1 for c in codes))
        else:
            claim(f"{name}: every tensor is the same to the bit", not other)


def layouts_of_bitsandbytes(folder, made):
    for name, layout in LAYOUTS:
        config = BitsAndBytesConfig(**(dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                            bnb_4bit_compute_dtype=torch.float32) | layout))
        AutoModelForCausalLM.from_pretrained(made["base"], dtype=torch.float32, quantization_config=config, device_map="cpu").save_pretrained(folder / name)


def speaks_as_trained(made):
    """The template of a training is that of its model, for transformers too."""
    chats = pq.read_table(made["spoken"] / "test.parquet").to_pylist()
    pairs = pq.read_table(made["split"] / "test.parquet").to_pylist()
    for name in ("spoken_merged", "spoken_full"):
        tokenizer = AutoTokenizer.from_pretrained(made[name])
        user = lambda pair: [{"role": "user", "content": pair["prompt"]}]
        whole = lambda pair: user(pair) + [{"role": "assistant", "content": pair["chosen"]}]
        same = all(
            tokenizer.apply_chat_template(user(pair), tokenize=False, add_generation_prompt=True) == chat["prompt"]
            and tokenizer.apply_chat_template(whole(pair), tokenize=False) == chat["prompt"] + chat["chosen"]
            for pair, chat in zip(pairs, chats)
        )
        claim(f"{name}: transformers renders as we did", same and tokenizer.chat_template == TEMPLATE)
        stops = load(made[name]).generation_config.eos_token_id
        wanted = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
        claim(f"{name}: generation stops at {stops}", sorted(stops) == sorted(wanted))
    beside = (made["spoken_tuned"] / "chat_template.jinja").read_text()
    claim("the adapter has the template beside it", beside == TEMPLATE)


def main():
    folder = Path(tempfile.mkdtemp())
    (folder / ".git").mkdir()
    (folder / "pairs.jsonl").write_text((ROOT / "recipes/data/pairs.jsonl").read_text())
    made = run(folder, recipe())
    rows = pq.read_table(made["tokens"] / "test.parquet").to_pylist()

    for name, base, _ in OURS:
        adapter_agrees(name, base, made, rows)

    tied_models(folder, made, rows)
    for name, base, settings in THEIRS:
        adapter_of_peft(folder, made[base], name, settings)
    models_of_bitsandbytes(folder, made)
    layouts_of_bitsandbytes(folder, made)
    speaks_as_trained(made)
    text = recipe()
    for name, base, _ in THEIRS:
        text += f"  {name}_in: {{ import_adapter: {{ path: {name} }} }}\n"
        text += f"  {name}_first: {{ evaluate: {{ model: {base}, adapter: {name}_in, dataset: tokens, num_answers: 0 }} }}\n"
        text += trained(name, base, f"{name}_in")
    folders = ["bnb", "bnb_single"] + [name for name, _ in LAYOUTS]
    for name in folders:
        text += f"  {name}: {{ import_model: {{ path: {name} }} }}\n"
        text += f"  {name}_lora_new: {{ attach_lora: {{ model: {name}, r: 4, target_modules: all-linear }} }}\n"
        text += trained(f"{name}_lora", name, f"{name}_lora_new")
    made = run(folder, text)
    for name, base, _ in THEIRS:
        loaded = PeftModel.from_pretrained(load(made[base]), folder / name)
        agree(f"{name}: PEFT's adapter here", made[f"{name}_first"], "adapter", loaded, rows)
        adapter_agrees(name, base, made, rows)
        before, after = (json.loads((where / "adapter_config.json").read_text()) for where in (folder / name, made[name]))
        claim(f"{name}: the settings have the keys that they had", before.keys() == after.keys())
    for name in folders:
        adapter_agrees(f"{name}_lora", name, made, rows)
    print(f"\n{len(failed)} differences" if failed else "\nno difference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
