"""TRL's side of a pair on a model that lies in a folder, for `train_pair.py --folder`: ORPOTrainer or DPOTrainer with LoRA on the CPU, one JSON line.

    trl_folder.py adapter --model MODEL --rank 16                  writes MODEL/adapter_init, which both sides start from
    trl_folder.py train --model MODEL --data rows.parquet --steps 6 --batch 2 --accum 2 --threads 2 [--method dpo [--reference rows]]

Needs torch, transformers, trl, peft and datasets in the versions of docs/performance.md.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time

from pairs import PROJECTIONS

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["adapter", "train"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--method", default="orpo", choices=["orpo", "dpo"])
    parser.add_argument("--reference", default="pass", choices=["pass", "rows"], help="for DPO, computed in each step or before the first")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"])
    for name, value in [("steps", 6), ("batch", 2), ("accum", 2), ("rank", 16), ("threads", 2), ("gc", 0), ("max-length", 512)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def load(args):
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(args.model)


def adapter(args):
    import peft
    import transformers

    model, _ = load(args)
    transformers.set_seed(3407)
    config = peft.LoraConfig(r=args.rank, lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=PROJECTIONS)
    peft.get_peft_model(model, config).save_pretrained(os.path.join(args.model, "adapter_init"))


def rows(args):
    from datasets import load_dataset

    kind = "parquet" if args.data.endswith(".parquet") else "json"
    table = load_dataset(kind, data_files=args.data, split="train").select(range(args.steps * args.batch * args.accum))

    def messages(row):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        answer = lambda name: [{"role": "assistant", "content": row[name]}]
        prompt = [*system, {"role": "user", "content": row["prompt"]}]
        return {"prompt": prompt, "chosen": answer("chosen"), "rejected": answer("rejected")}

    return table.map(messages, remove_columns=[name for name in table.column_names if name not in ("prompt", "chosen", "rejected")])


def orpo(args, model, tokens, settings):
    """The trainer's class, its settings and its model."""
    import peft
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Counting(ORPOTrainer):
        def get_batch_loss_metrics(self, model, batch, train_eval="train"):
            tokens[-1] += int(batch["chosen_attention_mask"].sum() + batch["rejected_attention_mask"].sum())
            return super().get_batch_loss_metrics(model, batch, train_eval)

    model = peft.PeftModel.from_pretrained(model, os.path.join(args.model, "adapter_init"), is_trainable=True)
    return Counting, ORPOConfig(**settings), {"model": model}


def dpo(args, model, tokens, settings):
    """The same for DPO. The adapter is the trainer's own, as a new one, so that its reference is the model without it."""
    import peft
    from trl import DPOConfig, DPOTrainer

    class Counting(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            tokens[-1] += int(inputs["attention_mask"].sum())
            return super()._compute_loss(model, inputs, return_outputs)

    config = peft.PeftConfig.from_pretrained(os.path.join(args.model, "adapter_init"))
    config.inference_mode = False
    return Counting, DPOConfig(precompute_ref_log_probs=args.reference == "rows", **settings), {"model": model, "peft_config": config}


def train(args):
    import peft
    import safetensors.torch
    import torch
    import transformers

    model, tokenizer = load(args)
    walls, cpus, tokens = [], [], [0]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            walls.append(time.perf_counter() - self.wall)
            cpus.append(time.process_time() - self.cpu)
            tokens.append(0)

    with tempfile.TemporaryDirectory() as out:
        settings = dict(
            output_dir=out, max_length=args.max_length, beta=0.1, learning_rate=2e-4, lr_scheduler_type="cosine", max_steps=args.steps,
            per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accum, logging_steps=1, optim="adamw_torch",
            gradient_checkpointing=bool(args.gc), bf16=args.dtype == "bf16", seed=3407, train_sampling_strategy="sequential",
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )
        trainer, settings, own = (orpo if args.method == "orpo" else dpo)(args, model, tokens, settings)
        trainer = trainer(args=settings, train_dataset=rows(args), processing_class=tokenizer, callbacks=[Clock()], **own)
        if "peft_config" in own:
            initial = safetensors.torch.load_file(os.path.join(args.model, "adapter_init", "adapter_model.safetensors"))
            peft.set_peft_model_state_dict(trainer.model, initial)
        torch.set_num_threads(args.threads)
        # The trainer prints its logs.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    counted = tokens[1:len(walls)]
    print(json.dumps({
        "real_tok_per_s": round(sum(counted) / sum(walls[1:]), 1), "cpu_s_per_step_median": round(statistics.median(cpus[1:]), 4),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "loss": losses,
        "s_per_step_all": [round(wall, 3) for wall in walls], "real_tok_per_step": round(sum(counted) / len(counted)),
    }))


if __name__ == "__main__":
    args = arguments()
    adapter(args) if args.command == "adapter" else train(args)
