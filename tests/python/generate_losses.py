#!/usr/bin/env python3
"""Recreates tests/golden/losses by TRL on the tiny model: what DPOTrainer and CPOTrainer log in trainings by each of their losses, and in
the evaluations between their steps.

pins: as in ../golden/generate.py. usage: python generate_losses.py
"""
import json
import tempfile

# Sets torch up first.
from generate_dpo import GOLDEN, INIT, ROWS, arguments, load, lora, run, to_conversation

from datasets import Dataset
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

OUT = GOLDEN / "losses"

# Five rows in batches of two, so that the last batch is smaller, after every fourth step.
EVALUATED = 5
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 4}

DPO = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "hinge": {"loss_type": ["hinge"], "beta": 0.5},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]},
    "ld_alpha": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "use_weighting": {"loss_type": ["sigmoid"], "use_weighting": True},
    "use_weighting_mixture": {"loss_type": ["ipo", "bco_pair"], "loss_weights": [1.0, 0.5], "use_weighting": True, "ld_alpha": 0.5},
    "forward_kl": {"loss_type": ["sigmoid"], "beta": 0.01, "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.95},
}

CPO = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.02},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "alphapo": {"loss_type": "alphapo", "beta": 0.5, "alpha": 0.1, "simpo_gamma": 0.2},
}


def evaluations(history):
    """What the evaluations told, without what their time was."""
    logs = [log for log in history if "eval_loss" in log]
    timed = ("runtime", "per_second")
    return [{name: value for name, value in log.items() if not any(word in name for word in timed)} for log in logs]


def dpo(**more):
    made, logged = run("loss", **more, **EVALUATIONS)
    logged["args"] = {name: value for name, value in logged["args"].items() if name not in EVALUATIONS}
    # The last one came after the training.
    return {**logged, "evaluations": evaluations(made.state.log_history)[:-1]}


def cpo(**more):
    values = arguments(**more)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model")
    folder = tempfile.mkdtemp()
    args = CPOConfig(output_dir=folder, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **values, **EVALUATIONS)
    rows = Dataset.from_list([to_conversation(row) for row in ROWS[:24]])
    evaluated = rows.select(range(EVALUATED))
    made = CPOTrainer(
        model=load("model"), args=args, train_dataset=rows, eval_dataset=evaluated, processing_class=tokenizer, peft_config=lora()
    )
    set_peft_model_state_dict(made.model, INIT)
    made.train()
    history = made.state.log_history
    return {"args": values, "log_history": [log for log in history if "loss" in log], "evaluations": evaluations(history)}


def write(name, runs):
    """A line for each step."""
    parts = []
    for key, made in runs.items():
        logs = ",\n".join(json.dumps(log) for log in made["log_history"])
        evaluated = ",\n".join(json.dumps(log) for log in made["evaluations"])
        parts.append(f'"{key}": {{"args": {json.dumps(made["args"])}, "log_history": [\n{logs}\n], "evaluations": [\n{evaluated}\n]}}')
    (OUT / name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main():
    OUT.mkdir(exist_ok=True)
    write("dpo.json", {name: dpo(**more) for name, more in DPO.items()})
    write("cpo.json", {name: cpo(**more) for name, more in CPO.items()})


if __name__ == "__main__":
    main()
