//! What people type for other programs and older versions, with ours. Only tables; `hints` looks them up.

/// Spellings of axolotl, LLaMA-Factory, torchtune, AutoTrain, TRL and older versions, with ours. A stage's parameter is
/// suggested only when the stage has it.
pub(super) const SPELLINGS: &[(&str, &[&str])] = &[
    ("evaluation_strategy", &["eval_strategy"]),
    ("do_eval", &["eval_strategy"]),
    ("max_completion_length", &["max_length", "max_new_tokens"]),
    ("max_tokens", &["max_new_tokens", "max_length"]),
    ("bnb_4bit_compute_dtype", &["compute_dtype"]),
    ("adam_eps", &["adam_epsilon"]),
    ("betas", &["adam_beta1"]),
    ("clip_grad", &["max_grad_norm"]),
    ("grad_clip", &["max_grad_norm"]),
    ("fp32", &["bf16"]),
    ("train_on_inputs", &["completion_only_loss"]),
    ("train_on_prompt", &["completion_only_loss"]),
    ("micro_batch_size", &["per_device_train_batch_size"]),
    ("batch_size", &["per_device_train_batch_size", "batch_size"]),
    ("train_batch_size", &["per_device_train_batch_size"]),
    (
        "eval_batch_size",
        &["per_device_eval_batch_size", "batch_size"],
    ),
    ("gradient_accumulation", &["gradient_accumulation_steps"]),
    ("grad_accum", &["gradient_accumulation_steps"]),
    ("grad_accumulation_steps", &["gradient_accumulation_steps"]),
    ("cutoff_len", &["max_length"]),
    ("sequence_len", &["max_length"]),
    ("sequence_length", &["max_length"]),
    ("max_seq_len", &["max_length"]),
    ("max_seq_length", &["max_length"]),
    ("model_max_length", &["max_length"]),
    ("block_size", &["max_length"]),
    ("max_prompt_len", &["max_prompt_length"]),
    ("orpo_alpha", &["beta"]),
    ("rl_beta", &["beta"]),
    ("pref_beta", &["beta"]),
    ("dpo_beta", &["beta"]),
    ("orpo_beta", &["beta"]),
    ("lambda", &["beta"]),
    ("lora_rank", &["r"]),
    ("lora_r", &["r"]),
    ("rank", &["r"]),
    ("alpha", &["lora_alpha"]),
    ("dropout", &["lora_dropout"]),
    ("lora_bias", &["bias"]),
    ("lora_target", &["target_modules"]),
    ("lora_target_modules", &["target_modules"]),
    ("lora_target_linear", &["target_modules"]),
    ("lora_attn_modules", &["target_modules"]),
    ("target", &["target_modules"]),
    ("lora_modules_to_save", &["modules_to_save"]),
    ("peft_use_rslora", &["use_rslora"]),
    ("rslora", &["use_rslora"]),
    ("trainable_tokens", &["trainable_token_indices"]),
    ("token_indices", &["trainable_token_indices"]),
    ("additional_special_tokens", &["special_tokens"]),
    ("new_tokens", &["tokens"]),
    ("num_epochs", &["num_train_epochs"]),
    ("epochs", &["num_train_epochs"]),
    ("max_steps_per_epoch", &["max_steps"]),
    ("lr", &["learning_rate"]),
    ("lr_scheduler", &["lr_scheduler_type"]),
    ("scheduler", &["lr_scheduler_type"]),
    ("warmup", &["warmup_ratio", "warmup_steps"]),
    ("num_warmup_steps", &["warmup_steps"]),
    ("optimizer", &["optim"]),
    ("optimiser", &["optim"]),
    ("gradient_clipping", &["max_grad_norm"]),
    ("clip_grad_norm", &["max_grad_norm"]),
    (
        "enable_activation_checkpointing",
        &["gradient_checkpointing"],
    ),
    ("activation_checkpointing", &["gradient_checkpointing"]),
    (
        "disable_gradient_checkpointing",
        &["gradient_checkpointing"],
    ),
    ("use_gradient_checkpointing", &["gradient_checkpointing"]),
    ("mixed_precision", &["bf16", "fp16"]),
    ("dtype", &["bf16", "fp16", "torch_dtype"]),
    ("random_state", &["seed"]),
    ("log_every_n_steps", &["logging_steps"]),
    ("base_model", &["model", "repo"]),
    ("model_name", &["model", "repo"]),
    ("model_name_or_path", &["model", "repo", "path"]),
    ("repo_id", &["repo"]),
    ("dataset_name", &["repo", "dataset"]),
    ("model_revision", &["revision"]),
    ("revision_of_model", &["revision"]),
    ("data_path", &["path", "dataset"]),
    ("data", &["dataset"]),
    ("datasets", &["dataset"]),
    ("train_dataset", &["dataset"]),
    ("eval_dataset", &["dataset"]),
    ("file", &["path"]),
    ("val_set_size", &["test_size"]),
    ("val_size", &["test_size"]),
    ("test_split", &["test_size"]),
    ("sample_packing", &["packing"]),
    ("neat_packing", &["packing"]),
    ("chat_template", &["template"]),
    ("chat_template_jinja", &["template"]),
    ("prompt_template", &["template"]),
    ("bnb_4bit_quant_type", &["scheme"]),
    ("quantization_method", &["scheme"]),
    ("quantization", &["scheme"]),
    ("bnb_4bit_use_double_quant", &["double_quant"]),
    ("use_double_quant", &["double_quant"]),
    ("adapter_name_or_path", &["adapter"]),
    ("lora_model_dir", &["adapter"]),
    ("peft_config", &["adapter"]),
    ("max_new_tokens", &["max_new_tokens", "generate_tokens"]),
];

/// Things other programs set on a training that are something else here.
pub(super) const ELSEWHERE: &[(&str, &str)] = &[
    (
        "use_peft",
        "a training with `adapter` trains the adapter, which an `attach_lora` stage makes",
    ),
    (
        "deepspeed",
        "weights are not divided among processes; leave it out. `resources: { processes: 2 }` beside the kind divides the rows of a step",
    ),
    (
        "fsdp",
        "weights are not divided among processes; leave it out. `resources: { processes: 2 }` beside the kind divides the rows of a step",
    ),
    (
        "ddp_timeout",
        "leave it out; `resources: { processes: 2 }` beside the kind divides the rows of a step",
    ),
    (
        "flash_attention",
        "attention is computed without the large matrices in any case; leave it out",
    ),
    (
        "flash_attn",
        "attention is computed without the large matrices in any case; leave it out",
    ),
    (
        "attn_implementation",
        "attention is computed without the large matrices in any case; leave it out",
    ),
    (
        "group_by_length",
        "padding is left out of the computation (`padding_free`), so rows need not be grouped by length",
    ),
    (
        "trust_remote_code",
        "no code of a repository is ever run; leave it out",
    ),
    (
        "load_in_4bit",
        "4-bit weights are made by a `quantize` stage; name that stage as `model`",
    ),
    (
        "load_in_8bit",
        "weights are quantised by a `quantize` stage, to 4 bits; name that stage as `model`",
    ),
    (
        "quantization_bit",
        "4-bit weights are made by a `quantize` stage; name that stage as `model`",
    ),
    (
        "quantize_base",
        "4-bit weights are made by a `quantize` stage; name that stage as `model`",
    ),
    (
        "output_dir",
        "`outputs:` at the top level says which folder a result is put into",
    ),
    (
        "export_dir",
        "`outputs:` at the top level says which folder a result is put into",
    ),
    (
        "overwrite_output_dir",
        "results are cached by their content, and `outputs:` says which folders they are put into",
    ),
    (
        "save_total_limit",
        "only the checkpoint that is needed to resume is kept",
    ),
    (
        "save_strategy",
        "`save_steps` says how often; the same command resumes",
    ),
    (
        "resume_from_checkpoint",
        "the same command resumes by itself",
    ),
    (
        "report_to",
        "the metrics of every step are kept with the result; `pipeline show` prints them",
    ),
    (
        "wandb_project",
        "`report_to: tensorboard` writes files that `wandb sync --sync-tensorboard` reads",
    ),
    (
        "plot_loss",
        "the metrics of every step are kept with the result; `pipeline plot` draws them",
    ),
    (
        "metric_logger",
        "the metrics of every step are kept with the result; `pipeline show` prints them",
    ),
    (
        "evals_per_epoch",
        "evaluation is a stage of its own, `evaluate`",
    ),
    ("merge_adapter", "merging is a stage of its own, `merge`"),
    (
        "apply_lora_to_mlp",
        "name the modules in `target_modules` of `attach_lora`",
    ),
    (
        "finetuning_type",
        "a training with `adapter` trains the adapter; one without trains the whole model",
    ),
    ("dataset_num_proc", "all cores are used"),
    ("preprocessing_num_workers", "all cores are used"),
    ("dataloader_num_workers", "all cores are used"),
    ("num_proc", "all cores are used"),
    (
        "hub_token",
        "set the environment variable `HF_TOKEN`; secrets are not written into recipes",
    ),
    (
        "token",
        "set the environment variable `HF_TOKEN`; secrets are not written into recipes",
    ),
    (
        "use_auth_token",
        "set the environment variable `HF_TOKEN`; secrets are not written into recipes",
    ),
    (
        "needs",
        "an edge is a parameter that names a stage, such as `dataset: chats`",
    ),
    (
        "depends_on",
        "an edge is a parameter that names a stage, such as `dataset: chats`",
    ),
    (
        "inputs",
        "an edge is a parameter that names a stage, such as `dataset: chats`",
    ),
];

/// The same word means something else inside one kind: the kind, the word, what to do.
pub(super) const WITHIN: &[(&str, &str, &str)] = &[
    (
        "quantize",
        "load_in_4bit",
        "this stage stores the weights in 4 bits already; leave it out",
    ),
    (
        "quantize",
        "bits",
        "this stage stores the weights in 4 bits, in the data type `scheme`; leave it out",
    ),
    (
        "quantize",
        "quantization_bit",
        "this stage stores the weights in 4 bits, in the data type `scheme`; leave it out",
    ),
    (
        "quantize",
        "load_in_8bit",
        "this stage stores the weights in 4 bits; 8 bits are not supported",
    ),
];

/// Words that a parameter of this name doesn't know: the parameter, the word, what to do.
pub(super) const VALUES: &[(&str, &str, &str)] = &[
    ("optim", "adamw", "did you mean `adamw_torch`?"),
    (
        "optim",
        "adam",
        "did you mean `adamw_torch`? It has decoupled weight decay, which is 0 by default",
    ),
    (
        "optim",
        "adamw_hf",
        "transformers removed it; `adamw_torch` gives the same updates",
    ),
    ("optim", "paged_adamw", "did you mean `paged_adamw_32bit`?"),
    (
        "scheme",
        "fp4",
        "`nf4` has the same size and a smaller error for weights; it is what QLoRA uses",
    ),
    ("scheme", "int8", "weights are quantised to 4 bits only"),
    (
        "init_lora_weights",
        "gaussian",
        "only the way of drawing A would differ: `true` draws it as PEFT does by default",
    ),
    ("init_lora_weights", "kaiming", "that is `true`"),
    (
        "init_lora_weights",
        "pissa_niter_16",
        "did you mean `pissa`? Its singular values are exact, so that there are no iterations to count",
    ),
    (
        "init_lora_weights",
        "pissa_niter_4",
        "did you mean `pissa`? Its singular values are exact, so that there are no iterations to count",
    ),
    (
        "init_lora_weights",
        "eva",
        "it is not computed here; `pissa` begins with the singular vectors of the weights",
    ),
    (
        "lr_scheduler_type",
        "reduce_on_plateau",
        "did you mean `reduce_lr_on_plateau`?",
    ),
    (
        "lr_scheduler_type",
        "wsd",
        "did you mean `warmup_stable_decay`?",
    ),
    ("optim", "lion", "did you mean `lion_32bit`?"),
    (
        "optim",
        "muon",
        "it is not computed here, and transformers has no such name",
    ),
    (
        "packing_strategy",
        "wrapped",
        "it would cut rows anywhere; `bfd_split` loses no token either",
    ),
    ("eval_strategy", "none", "did you mean `no`?"),
];

/// Kinds by what people mean: words, and the kinds that they may stand for.
pub(super) const KINDS_BY_MEANING: &[(&[&str], &[&str])] = &[
    (
        &[
            "sft",
            "finetune",
            "fine_tune",
            "supervised",
            "pretrain",
            "train_full",
        ],
        &["train_sft"],
    ),
    (&["orpo", "train_preference", "preference"], &["train_orpo"]),
    (&["dpo", "train_pref"], &["train_dpo"]),
    (&["cpo", "train_simpo", "alphapo"], &["train_cpo"]),
    (&["kto"], &["train_kto"]),
    (
        &["train", "training", "fit", "trainer"],
        &[
            "train_sft",
            "train_orpo",
            "train_dpo",
            "train_cpo",
            "train_kto",
            "train_reward",
        ],
    ),
    (
        &[
            "lora",
            "peft",
            "qlora",
            "adapter",
            "lora_config",
            "peft_config",
            "add_lora",
            "get_peft_model",
            "create_lora",
        ],
        &["attach_lora"],
    ),
    (
        &[
            "merge_lora",
            "merge_adapter",
            "merge_and_unload",
            "fuse",
            "merge_model",
        ],
        &["merge"],
    ),
    (
        &[
            "load_dataset",
            "dataset",
            "data",
            "datasets",
            "load_data",
            "read_dataset",
        ],
        &["download_dataset", "import_dataset"],
    ),
    (
        &[
            "load_model",
            "model",
            "base_model",
            "from_pretrained",
            "pretrained",
        ],
        &["download_model", "import_model"],
    ),
    (&["load_adapter"], &["download_adapter", "import_adapter"]),
    (
        &[
            "chat_template",
            "template",
            "format",
            "apply_template",
            "format_dataset",
            "chat",
        ],
        &["apply_chat_template"],
    ),
    (&["preprocess", "tokenizer", "encode"], &["tokenize"]),
    (
        &["train_test_split", "val_split", "test_split", "holdout"],
        &["split_dataset"],
    ),
    (
        &[
            "eval",
            "evaluation",
            "test",
            "benchmark",
            "score",
            "validate",
        ],
        &["evaluate"],
    ),
    (
        &[
            "quantise",
            "quantization",
            "bnb",
            "bitsandbytes",
            "nf4",
            "load_in_4bit",
        ],
        &["quantize"],
    ),
    (
        &["init_model", "new_model", "from_config", "random_model"],
        &["create_model"],
    ),
    (
        &[
            "add_special_tokens",
            "resize_token_embeddings",
            "resize_vocab",
            "new_tokens",
            "extend_tokenizer",
        ],
        &["add_tokens"],
    ),
];

/// What other programs have as a step and is no stage here.
pub(super) const NO_KIND: &[(&str, &str)] = &[
    (
        "generate",
        "`pipeline generate` answers prompts with a stage's model, and `evaluate` keeps answers to its first rows (`num_answers`)",
    ),
    (
        "inference",
        "`pipeline generate` and `pipeline chat` answer prompts with a stage's model",
    ),
    ("chat", "`pipeline chat` talks with a stage's model"),
    (
        "export",
        "`outputs:` at the top level puts a stage's result into a folder; `merge` makes a model that transformers loads, and `export_gguf` a file for llama.cpp and Ollama",
    ),
    (
        "save",
        "`outputs:` at the top level puts a stage's result into a folder",
    ),
    ("simpo", "it is `train_cpo` with `loss_type: simpo`"),
    (
        "ppo",
        "it is not computed here; `train_orpo`, `train_dpo`, `train_cpo` and `train_kto` learn from preferences",
    ),
    (
        "grpo",
        "it is not computed here; `train_orpo`, `train_dpo`, `train_cpo` and `train_kto` learn from preferences",
    ),
];
