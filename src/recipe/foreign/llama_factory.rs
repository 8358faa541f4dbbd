//! LLaMA-Factory's keys.

use super::Meaning::{Becomes, Is, Lacks, Needless};
use super::{TRAINING, Table};

pub(super) const MARKS: &[&str] = &[
    "finetuning_type",
    "cutoff_len",
    "lora_target",
    "template",
    "stage",
    "lora_rank",
    "dataset_dir",
    "pref_beta",
];

pub(super) const KEYS: Table = &[
    (
        "model_name_or_path",
        Becomes("download_model.repo, or import_model.path of a folder"),
    ),
    ("model_revision", Is("download_model", "revision")),
    ("adapter_name_or_path", Becomes("import_adapter.path")),
    (
        "cache_dir",
        Needless("the hub's shared cache is used (`HF_HUB_CACHE`)"),
    ),
    (
        "use_fast_tokenizer",
        Needless("`tokenizer.json` is read as it is"),
    ),
    (
        "resize_vocab",
        Needless("a stage `add_tokens` adds tokens and rows for them"),
    ),
    ("add_tokens", Becomes("add_tokens.tokens")),
    ("add_special_tokens", Becomes("add_tokens.special_tokens")),
    ("stage", Becomes("the kind of training")),
    (
        "finetuning_type",
        Becomes("a stage `attach_lora` for `lora`, none for `full`"),
    ),
    ("pref_loss", Becomes("the kind of training")),
    ("pref_beta", Is(TRAINING, "beta")),
    (
        "pref_ftx",
        Lacks("`loss_type: [sigmoid, sft]` with `loss_weights` adds the likelihood"),
    ),
    ("simpo_gamma", Is("train_cpo", "simpo_gamma")),
    (
        "ref_model",
        Becomes("train_dpo.ref_model: a stage that makes the model"),
    ),
    ("lora_rank", Is("attach_lora", "r")),
    ("lora_alpha", Is("attach_lora", "lora_alpha")),
    ("lora_dropout", Is("attach_lora", "lora_dropout")),
    (
        "lora_target",
        Becomes("attach_lora.target_modules; `all` is `all-linear`"),
    ),
    ("additional_target", Becomes("attach_lora.modules_to_save")),
    ("use_rslora", Is("attach_lora", "use_rslora")),
    ("use_dora", Is("attach_lora", "use_dora")),
    (
        "pissa_init",
        Lacks(
            "`init_lora_weights: pissa` of `attach_lora` goes with a stage `merge` with `weight: -1`, which takes what it begins with from the model",
        ),
    ),
    ("use_dft_loss", Becomes("train_sft.loss_type: dft")),
    (
        "create_new_adapter",
        Needless("`attach_lora` makes a new one, `import_adapter` goes on with one"),
    ),
    (
        "freeze_trainable_layers",
        Lacks("`layers_to_transform` of `attach_lora` chooses layers"),
    ),
    ("quantization_bit", Becomes("a stage `quantize`")),
    (
        "quantization_method",
        Needless("bitsandbytes' NF4 is what there is"),
    ),
    ("quantization_type", Is("quantize", "scheme")),
    ("double_quantization", Is("quantize", "double_quant")),
    (
        "dataset",
        Becomes("import_dataset or download_dataset, by `dataset_info.json`"),
    ),
    ("dataset_dir", Becomes("the folder of import_dataset.path")),
    ("eval_dataset", Lacks("`split_dataset` holds rows out")),
    ("media_dir", Lacks("rows are text")),
    (
        "template",
        Becomes("apply_chat_template.template; the model's own for most of its families"),
    ),
    ("cutoff_len", Is("tokenize", "max_length")),
    ("max_samples", Becomes("import_dataset.max_rows")),
    (
        "overwrite_cache",
        Needless("results are cached by their content"),
    ),
    ("preprocessing_num_workers", Needless("all cores are used")),
    (
        "preprocessing_batch_size",
        Needless("rows are read in a stream"),
    ),
    (
        "tokenized_path",
        Needless("results are cached by themselves"),
    ),
    ("streaming", Needless("rows are read in a stream")),
    (
        "mix_strategy",
        Lacks("datasets are joined one behind the other; `datasets` with weights interleaves them"),
    ),
    ("val_size", Becomes("split_dataset.test_size")),
    (
        "train_on_prompt",
        Becomes("train_sft.completion_only_loss, turned around"),
    ),
    (
        "mask_history",
        Becomes("apply_chat_template.assistant_only_loss, turned around"),
    ),
    ("neat_packing", Is(TRAINING, "packing")),
    (
        "default_system",
        Lacks("the template's own is used; rows may have a column `system`"),
    ),
    ("enable_thinking", Lacks("templates get no such setting")),
    (
        "flash_attn",
        Needless("attention is computed without the large matrices in any case"),
    ),
    (
        "enable_liger_kernel",
        Needless("the loss is computed in one pass over the logits anyway"),
    ),
    ("use_unsloth", Needless("the fast path is chosen by itself")),
    (
        "disable_gradient_checkpointing",
        Becomes("training.gradient_checkpointing, turned around"),
    ),
    ("upcast_layernorm", Needless("norms are in f32 anyway")),
    ("pure_bf16", Lacks("the trained weights are kept in f32")),
    (
        "save_only_model",
        Needless("the result is the model; checkpoints are apart from it"),
    ),
    ("export_dir", Becomes("outputs")),
    (
        "export_size",
        Lacks("`max_shard_size` is a setting of `create_model` alone"),
    ),
    (
        "export_device",
        Needless("merging takes one layer at a time"),
    ),
    (
        "export_legacy_format",
        Needless("results are always safetensors"),
    ),
    (
        "infer_backend",
        Needless("`pipeline chat` and `pipeline generate` answer prompts"),
    ),
];
