//! The keys of TRL's command line: arguments of `TrainingArguments`, `SFTConfig`, `DPOConfig`, `KTOConfig`, `RewardConfig`, `ORPOConfig`, `ModelConfig` and
//! `ScriptArguments`.

use super::Meaning::{Becomes, Is, Lacks, Needless};
use super::{TRAINING, Table};

pub(super) const MARKS: &[&str] = &[
    "model_name_or_path",
    "dataset_name",
    "use_peft",
    "per_device_train_batch_size",
    "num_train_epochs",
    "dataset_text_field",
    "torch_dtype",
    "output_dir",
];

pub(super) const KEYS: Table = &[
    (
        "model_name_or_path",
        Becomes("download_model.repo, or import_model.path of a folder"),
    ),
    ("model_revision", Is("download_model", "revision")),
    (
        "torch_dtype",
        Needless("weights keep their type; `bf16` and `fp16` say how products are computed"),
    ),
    (
        "dtype",
        Needless("weights keep their type; `bf16` and `fp16` say how products are computed"),
    ),
    (
        "attn_implementation",
        Needless("attention is computed without the large matrices in any case"),
    ),
    ("use_peft", Becomes("a stage `attach_lora`")),
    ("lora_r", Is("attach_lora", "r")),
    ("lora_alpha", Is("attach_lora", "lora_alpha")),
    ("lora_dropout", Is("attach_lora", "lora_dropout")),
    ("lora_target_modules", Is("attach_lora", "target_modules")),
    ("lora_modules_to_save", Is("attach_lora", "modules_to_save")),
    (
        "lora_task_type",
        Needless(
            "it follows from the stages: `add_score_head` makes a model for a sequence classification",
        ),
    ),
    ("use_rslora", Is("attach_lora", "use_rslora")),
    ("use_dora", Is("attach_lora", "use_dora")),
    ("load_in_4bit", Becomes("a stage `quantize`")),
    ("load_in_8bit", Lacks("`quantize` stores weights in 4 bits")),
    ("bnb_4bit_quant_type", Is("quantize", "scheme")),
    ("use_bnb_nested_quant", Is("quantize", "double_quant")),
    (
        "dataset_name",
        Becomes("download_dataset.repo, or import_dataset.path of a file"),
    ),
    (
        "datasets",
        Becomes("download_dataset or import_dataset, and its `columns`"),
    ),
    ("dataset_config", Is("download_dataset", "name")),
    ("dataset_train_split", Becomes("download_dataset.split")),
    ("dataset_test_split", Becomes("training.eval_split")),
    ("dataset_streaming", Needless("rows are read in a stream")),
    ("dataset_text_field", Becomes("import_dataset.columns.text")),
    ("dataset_num_proc", Needless("all cores are used")),
    ("dataset_kwargs", Needless("rows are read by their form")),
    ("max_length", Is("tokenize", "max_length")),
    ("max_seq_length", Is("tokenize", "max_length")),
    ("max_prompt_length", Is("tokenize", "max_prompt_length")),
    (
        "max_completion_length",
        Lacks("`max_length` bounds prompt and answer together"),
    ),
    ("truncation_mode", Is("tokenize", "truncation_mode")),
    ("packing_strategy", Is("train_sft", "packing_strategy")),
    ("completion_only_loss", Is(TRAINING, "completion_only_loss")),
    (
        "assistant_only_loss",
        Is("apply_chat_template", "assistant_only_loss"),
    ),
    ("chat_template_path", Is("apply_chat_template", "template")),
    ("eos_token", Lacks("special tokens are the model's")),
    (
        "pad_token",
        Needless("padding is left out of the computation"),
    ),
    ("beta", Is(TRAINING, "beta")),
    ("loss_type", Is(TRAINING, "loss_type")),
    ("loss_weights", Is("train_dpo", "loss_weights")),
    ("ld_alpha", Is("train_dpo", "ld_alpha")),
    ("f_divergence_type", Is("train_dpo", "f_divergence_type")),
    (
        "f_alpha_divergence_coef",
        Is("train_dpo", "f_alpha_divergence_coef"),
    ),
    ("discopop_tau", Is("train_dpo", "discopop_tau")),
    ("use_weighting", Is("train_dpo", "use_weighting")),
    (
        "center_rewards_coefficient",
        Is("train_reward", "center_rewards_coefficient"),
    ),
    ("desirable_weight", Is("train_kto", "desirable_weight")),
    ("undesirable_weight", Is("train_kto", "undesirable_weight")),
    ("cpo_alpha", Is("train_cpo", "cpo_alpha")),
    ("simpo_gamma", Is("train_cpo", "simpo_gamma")),
    ("label_smoothing", Is(TRAINING, "label_smoothing")),
    (
        "rpo_alpha",
        Lacks("`loss_type: [sigmoid, sft]` with `loss_weights` adds the likelihood"),
    ),
    (
        "precompute_ref_log_probs",
        Is(TRAINING, "precompute_ref_log_probs"),
    ),
    ("disable_dropout", Is(TRAINING, "disable_dropout")),
    ("num_proc", Needless("all cores are used")),
    ("max_samples", Becomes("import_dataset.max_rows")),
];
