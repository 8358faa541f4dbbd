//! Did-you-mean: by edit distance, and by what people type for other programs.

use crate::engine::Kind;

use super::schema::Parameters;

/// The most names that a sentence lists, and the most characters of each.
const MOST_LISTED: usize = 100;
const LONGEST_NAME: usize = 100;
/// The most names that one is compared with.
const MOST_COMPARED: usize = 1000;

/// Spellings of axolotl, LLaMA-Factory, torchtune, AutoTrain, TRL and older versions, with ours. A stage's parameter is
/// suggested only when the stage has it.
const SPELLINGS: &[(&str, &[&str])] = &[
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
const ELSEWHERE: &[(&str, &str)] = &[
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
        "`outputs:` at the top level says where results are published",
    ),
    (
        "export_dir",
        "`outputs:` at the top level says where results are published",
    ),
    (
        "overwrite_output_dir",
        "results are stored by their content, and `outputs:` says where they are published",
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
        "the metrics of every step are kept with the result; `pipeline show` prints them",
    ),
    (
        "plot_loss",
        "the metrics of every step are kept with the result; `pipeline show` prints them",
    ),
    (
        "metric_logger",
        "the metrics of every step are kept with the result; `pipeline show` prints them",
    ),
    (
        "eval_strategy",
        "evaluation is a stage of its own, `evaluate`",
    ),
    ("eval_steps", "evaluation is a stage of its own, `evaluate`"),
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

/// The name most like `name`, when one is near enough to be meant.
pub(crate) fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    if name.len() > 200 {
        return None;
    }
    let lower = name.to_lowercase().replace('-', "_");
    let limit = match lower.chars().count() {
        0 => return None,
        1..=2 => 0,
        3..=5 => 1,
        6..=9 => 2,
        _ => 3,
    };
    known
        .into_iter()
        .take(MOST_COMPARED)
        // Bytes may be four a character, and lower case may be longer.
        .filter(|known| known.len() <= 4 * lower.len() + 12)
        .map(|known| {
            let other = known.to_lowercase();
            (strsim::damerau_levenshtein(&lower, &other), known)
        })
        .filter(|(distance, known)| *distance <= limit && *known != name)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// `a`, `b` and `c`.
pub(crate) fn list<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    joined(names, "and")
}

/// `a`, `b` or `c`.
pub(crate) fn either<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    joined(names, "or")
}

fn joined<'n>(names: impl IntoIterator<Item = &'n str>, word: &str) -> String {
    let mut names = names.into_iter();
    let quoted = |name: &str| match name.char_indices().nth(LONGEST_NAME) {
        Some((end, _)) => format!("`{}..`", name.get(..end).unwrap_or_default()),
        None => format!("`{name}`"),
    };
    let mut shown: Vec<String> = names.by_ref().take(MOST_LISTED).map(quoted).collect();
    match names.count() {
        0 => {}
        more => shown.push(format!("{more} more")),
    }
    match shown.split_last() {
        None => "nothing".to_owned(),
        Some((one, [])) => one.clone(),
        Some((last, rest)) => format!("{} {word} {last}", rest.join(", ")),
    }
}

/// Advice for a parameter that `kind` doesn't have.
pub(crate) fn parameter(name: &str, kind: &Kind, kinds: &'static [Kind]) -> String {
    let own = Parameters::from_kind(kind);
    let own: Vec<&str> = own
        .0
        .iter()
        .map(|parameter| parameter.name.as_str())
        .collect();
    let lower = name.to_lowercase().replace('-', "_");
    let ours = SPELLINGS.iter().find(|(foreign, _)| *foreign == lower);
    let ours = ours.map_or(&[][..], |(_, ours)| ours);
    if let Some(known) = ours.iter().find(|known| own.contains(*known)) {
        return format!("here it is called `{known}`");
    }
    if let Some(known) = nearest(name, own.iter().copied()) {
        return format!("did you mean `{known}`?");
    }
    // The same thing in another stage: by our name, or by a foreign one.
    for wanted in std::iter::once(&name).chain(ours) {
        let holders: Vec<&str> = kinds
            .iter()
            .filter(|other| other.name != kind.name && Parameters::from_kind(other).has(wanted))
            .map(|other| other.name)
            .collect();
        if !holders.is_empty() {
            let it = if *wanted == name {
                "it is".to_owned()
            } else {
                format!("here it is called `{wanted}`,")
            };
            return format!("{it} a parameter of {}", list(holders));
        }
    }
    if let Some((_, elsewhere)) = ELSEWHERE.iter().find(|(foreign, _)| *foreign == lower) {
        return (*elsewhere).to_owned();
    }
    if own.is_empty() {
        return format!("`{}` takes no parameters", kind.name);
    }
    format!("`{}` takes {}", kind.name, list(own))
}

/// Advice for a kind that doesn't exist.
pub(crate) fn kind(name: &str, kinds: &[Kind]) -> String {
    match nearest(name, kinds.iter().map(|kind| kind.name)) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("the kinds are {}", list(kinds.iter().map(|kind| kind.name))),
    }
}
