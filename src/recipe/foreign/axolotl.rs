//! axolotl's keys.

use super::Meaning::{Becomes, Is, Lacks, Needless};
use super::{TRAINING, Table};

pub(super) const MARKS: &[&str] = &[
    "base_model",
    "datasets",
    "sequence_len",
    "micro_batch_size",
    "dataset_prepared_path",
    "val_set_size",
    "lora_target_linear",
    "flash_attention",
];

pub(super) const KEYS: Table = &[
    (
        "base_model",
        Becomes("download_model.repo, or import_model.path of a folder"),
    ),
    (
        "base_model_config",
        Needless("`config.json` lies beside the weights"),
    ),
    ("revision_of_model", Is("download_model", "revision")),
    (
        "base_model_ignore_patterns",
        Is("download_model", "ignore_patterns"),
    ),
    ("model_type", Needless("`config.json` names the family")),
    (
        "tokenizer_type",
        Needless("`tokenizer.json` is read as it is"),
    ),
    ("tokenizer_config", Needless("the tokenizer is the model's")),
    (
        "tokenizer_use_fast",
        Needless("`tokenizer.json` is read as it is"),
    ),
    (
        "is_llama_derived_model",
        Needless("`config.json` names the family"),
    ),
    (
        "is_mistral_derived_model",
        Needless("`config.json` names the family"),
    ),
    (
        "is_qwen_derived_model",
        Needless("`config.json` names the family"),
    ),
    ("load_in_4bit", Becomes("a stage `quantize`")),
    ("load_in_8bit", Lacks("`quantize` stores weights in 4 bits")),
    (
        "adapter",
        Becomes("a stage `attach_lora`, with `qlora` also `quantize`"),
    ),
    ("lora_model_dir", Becomes("import_adapter.path")),
    ("rl", Becomes("the kind of training")),
    ("rl_beta", Is(TRAINING, "beta")),
    ("dpo_beta", Is(TRAINING, "beta")),
    ("orpo_alpha", Is(TRAINING, "beta")),
    ("dpo_label_smoothing", Is("train_dpo", "label_smoothing")),
    ("dpo_use_weighting", Lacks("pairs are not weighted")),
    (
        "rpo_alpha",
        Lacks("`loss_type: [sigmoid, sft]` with `loss_weights` adds the likelihood"),
    ),
    ("cpo_alpha", Is("train_cpo", "cpo_alpha")),
    ("simpo_gamma", Is("train_cpo", "simpo_gamma")),
    (
        "datasets",
        Becomes("import_dataset or download_dataset, and its `columns`"),
    ),
    (
        "test_datasets",
        Lacks("an import with a split `test` is evaluated on"),
    ),
    (
        "shuffle_merged_datasets",
        Needless("rows are shuffled in training"),
    ),
    (
        "dataset_prepared_path",
        Needless("results are cached by themselves"),
    ),
    ("dataset_processes", Needless("all cores are used")),
    ("dataset_num_proc", Needless("all cores are used")),
    (
        "dataset_exact_deduplication",
        Lacks("rows are taken as they are"),
    ),
    ("push_dataset_to_hub", Lacks(super::PUBLISHES)),
    ("val_set_size", Becomes("split_dataset.test_size")),
    ("chat_template", Becomes("apply_chat_template.template")),
    (
        "chat_template_jinja",
        Is("apply_chat_template", "chat_template"),
    ),
    (
        "default_system_message",
        Lacks("the template's own is used; rows may have a column `system`"),
    ),
    ("sequence_len", Is("tokenize", "max_length")),
    (
        "excess_length_strategy",
        Needless("answers are cut, and cut rows are counted"),
    ),
    ("sample_packing", Is(TRAINING, "packing")),
    (
        "eval_sample_packing",
        Needless("evaluations need no packing"),
    ),
    (
        "sample_packing_eff_est",
        Needless("rows are packed before the training"),
    ),
    (
        "pad_to_sequence_len",
        Needless("padding is left out of the computation"),
    ),
    ("lora_r", Is("attach_lora", "r")),
    ("lora_alpha", Is("attach_lora", "lora_alpha")),
    ("lora_dropout", Is("attach_lora", "lora_dropout")),
    ("lora_target_modules", Is("attach_lora", "target_modules")),
    (
        "lora_target_linear",
        Becomes("attach_lora.target_modules: all-linear"),
    ),
    ("lora_modules_to_save", Is("attach_lora", "modules_to_save")),
    (
        "lora_fan_in_fan_out",
        Needless("no supported family has such layers"),
    ),
    (
        "lora_mlp_kernel",
        Needless("the fast path is chosen by itself"),
    ),
    (
        "lora_qkv_kernel",
        Needless("the fast path is chosen by itself"),
    ),
    (
        "lora_o_kernel",
        Needless("the fast path is chosen by itself"),
    ),
    (
        "peft_layers_to_transform",
        Is("attach_lora", "layers_to_transform"),
    ),
    ("peft_use_rslora", Is("attach_lora", "use_rslora")),
    ("peft_use_dora", Is("attach_lora", "use_dora")),
    (
        "peft_init_lora_weights",
        Is("attach_lora", "init_lora_weights"),
    ),
    (
        "merge_lora",
        Needless("a stage `merge` follows the training"),
    ),
    (
        "micro_batch_size",
        Is(TRAINING, "per_device_train_batch_size"),
    ),
    (
        "eval_batch_size",
        Is(TRAINING, "per_device_eval_batch_size"),
    ),
    ("num_epochs", Is(TRAINING, "num_train_epochs")),
    ("optimizer", Is(TRAINING, "optim")),
    ("lr_scheduler", Is(TRAINING, "lr_scheduler_type")),
    (
        "train_on_inputs",
        Becomes("train_sft.completion_only_loss, turned around"),
    ),
    ("evals_per_epoch", Becomes("training.eval_strategy: epoch")),
    (
        "eval_table_size",
        Needless("`evaluate` keeps answers to its first rows (`num_answers`)"),
    ),
    ("eval_max_new_tokens", Is("evaluate", "max_new_tokens")),
    (
        "saves_per_epoch",
        Needless("`save_steps` says how often; the same command resumes"),
    ),
    ("save_first_step", Needless("`save_steps` says how often")),
    ("bfloat16", Becomes("training.bf16")),
    ("float16", Becomes("training.fp16")),
    (
        "flash_attention",
        Needless("attention is computed without the large matrices in any case"),
    ),
    (
        "flash_attn_cross_entropy",
        Needless("the loss is computed in one pass over the logits anyway"),
    ),
    (
        "flash_attn_rms_norm",
        Needless("the fast path is chosen by itself"),
    ),
    (
        "attn_implementation",
        Needless("attention is computed without the large matrices in any case"),
    ),
    (
        "xformers_attention",
        Needless("attention is computed without the large matrices in any case"),
    ),
    (
        "sdp_attention",
        Needless("attention is computed without the large matrices in any case"),
    ),
    (
        "s2_attention",
        Lacks("shifted sparse attention is not computed"),
    ),
    ("special_tokens", Becomes("a stage `add_tokens`")),
    ("tokens", Becomes("add_tokens.tokens")),
    ("wandb_project", Lacks(super::WANDB)),
    ("wandb_entity", Lacks(super::WANDB)),
    ("wandb_watch", Lacks(super::WANDB)),
    ("wandb_name", Lacks(super::WANDB)),
    ("wandb_log_model", Lacks(super::WANDB)),
    ("strict", Needless("unknown keys are always mistakes")),
    ("debug", Needless("`pipeline show` looks inside a result")),
    ("plugins", Lacks("there are no plugins")),
];
