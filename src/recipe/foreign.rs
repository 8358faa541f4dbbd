//! Configs of other programs: what each of their keys is here. The same tables recognise a whole foreign config among recipes and
//! translate one into a recipe ([`translate`](super::translate)).

mod axolotl;
mod llama_factory;
mod trl;

use std::fmt::Write as _;

use serde_yaml::{Mapping, Value};

/// A program whose configs are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// axolotl.
    Axolotl,
    /// LLaMA-Factory.
    LlamaFactory,
    /// TRL's command line, whose configs hold the arguments of transformers, TRL and PEFT.
    Trl,
}

/// What a key of another program is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The same value of this parameter. [`TRAINING`] stands for the kind of training.
    Is(&'static str, &'static str),
    /// It decides about this, after a translation.
    Becomes(&'static str),
    /// It is not needed, because of this.
    Needless(&'static str),
    /// There is nothing like it: what there is instead.
    Lacks(&'static str),
}

/// Stands for the kind of the training, such as `train_sft`.
pub(super) const TRAINING: &str = "training";

/// What there is instead of an upload at the end of a training.
const PUBLISHES: &str =
    "`publish:` names a repository for a stage's result, and `pipeline publish` uploads it";

/// Why programs that divide weights among processes have no counterpart.
const SHARDED: &str = "weights are not divided among processes; `resources: { processes: n }` divides the rows of a step";
/// What settings of several processes are not needed for.
const PROCESSES: &str = "`resources: { processes: n }` beside the kind says all of it";
/// What there is instead of Weights & Biases.
const WANDB: &str = "wandb has no open server; `report_to: tensorboard` writes files that `wandb sync --sync-tensorboard` reads";

type Table = &'static [(&'static str, Meaning)];

/// Keys that are the same in several programs, after their own.
const COMMON: Table = &{
    use Meaning::{Becomes, Is, Lacks, Needless};

    [
        ("learning_rate", Is(TRAINING, "learning_rate")),
        ("weight_decay", Is(TRAINING, "weight_decay")),
        ("adam_beta1", Is(TRAINING, "adam_beta1")),
        ("adam_beta2", Is(TRAINING, "adam_beta2")),
        ("adam_epsilon", Is(TRAINING, "adam_epsilon")),
        ("max_grad_norm", Is(TRAINING, "max_grad_norm")),
        ("max_steps", Is(TRAINING, "max_steps")),
        ("warmup_steps", Is(TRAINING, "warmup_steps")),
        ("warmup_ratio", Is(TRAINING, "warmup_ratio")),
        (
            "gradient_accumulation_steps",
            Is(TRAINING, "gradient_accumulation_steps"),
        ),
        (
            "per_device_train_batch_size",
            Is(TRAINING, "per_device_train_batch_size"),
        ),
        (
            "per_device_eval_batch_size",
            Is(TRAINING, "per_device_eval_batch_size"),
        ),
        ("num_train_epochs", Is(TRAINING, "num_train_epochs")),
        ("lr_scheduler_type", Is(TRAINING, "lr_scheduler_type")),
        ("lr_scheduler_kwargs", Is(TRAINING, "lr_scheduler_kwargs")),
        ("optim", Is(TRAINING, "optim")),
        (
            "optim_args",
            Becomes("training.optim_args, a map: `momentum=0.9` is `{ momentum: 0.9 }`"),
        ),
        ("loraplus_lr_ratio", Is(TRAINING, "loraplus_lr_ratio")),
        (
            "loraplus_lr_embedding",
            Is(TRAINING, "loraplus_lr_embedding"),
        ),
        (
            "gradient_checkpointing",
            Is(TRAINING, "gradient_checkpointing"),
        ),
        (
            "gradient_checkpointing_kwargs",
            Needless("there is one way of checkpointing"),
        ),
        ("logging_steps", Is(TRAINING, "logging_steps")),
        ("logging_strategy", Needless("every step is in the result")),
        (
            "logging_first_step",
            Needless("every step is in the result"),
        ),
        ("save_steps", Is(TRAINING, "save_steps")),
        (
            "save_strategy",
            Needless("`save_steps` says how often; the same command resumes"),
        ),
        ("save_total_limit", Is(TRAINING, "save_total_limit")),
        (
            "save_safetensors",
            Needless("results are always safetensors"),
        ),
        (
            "load_best_model_at_end",
            Is(TRAINING, "load_best_model_at_end"),
        ),
        (
            "metric_for_best_model",
            Is(TRAINING, "metric_for_best_model"),
        ),
        ("greater_is_better", Is(TRAINING, "greater_is_better")),
        (
            "early_stopping_patience",
            Is(TRAINING, "early_stopping_patience"),
        ),
        (
            "loss_watchdog_threshold",
            Is(TRAINING, "loss_watchdog_threshold"),
        ),
        (
            "loss_watchdog_patience",
            Is(TRAINING, "loss_watchdog_patience"),
        ),
        ("eval_strategy", Is(TRAINING, "eval_strategy")),
        ("evaluation_strategy", Is(TRAINING, "eval_strategy")),
        ("eval_steps", Is(TRAINING, "eval_steps")),
        (
            "eval_on_start",
            Lacks("a stage `evaluate` on the model before the training does that"),
        ),
        ("do_train", Needless("a recipe says which stages there are")),
        (
            "do_eval",
            Needless("a stage `evaluate` follows the training"),
        ),
        ("bf16", Becomes("training.bf16")),
        ("fp16", Becomes("training.fp16")),
        ("tf32", Needless("it is a setting of GPUs")),
        ("seed", Becomes("`seed` of every stage")),
        ("data_seed", Is(TRAINING, "data_seed")),
        ("packing", Is(TRAINING, "packing")),
        ("padding_free", Is(TRAINING, "padding_free")),
        (
            "group_by_length",
            Needless("padding is left out of the computation (`padding_free`)"),
        ),
        ("output_dir", Becomes("outputs")),
        (
            "overwrite_output_dir",
            Needless("results are cached by their content"),
        ),
        (
            "resume_from_checkpoint",
            Needless("the same command resumes"),
        ),
        (
            "auto_resume_from_checkpoints",
            Needless("the same command resumes"),
        ),
        ("report_to", Is(TRAINING, "report_to")),
        (
            "run_name",
            Lacks("`pipeline runs --name` names a run afterwards"),
        ),
        ("push_to_hub", Lacks(PUBLISHES)),
        ("hub_model_id", Lacks(PUBLISHES)),
        ("hub_strategy", Lacks(PUBLISHES)),
        ("hub_private_repo", Lacks(PUBLISHES)),
        (
            "trust_remote_code",
            Needless("no code of a repository is ever run"),
        ),
        ("deepspeed", Lacks(SHARDED)),
        ("fsdp", Lacks(SHARDED)),
        ("fsdp_config", Lacks(SHARDED)),
        ("ddp_timeout", Needless(PROCESSES)),
        ("ddp_find_unused_parameters", Needless(PROCESSES)),
        ("local_rank", Needless(PROCESSES)),
        ("torch_compile", Needless("nothing has to be compiled")),
        (
            "use_liger_kernel",
            Needless("the loss is computed in one pass over the logits anyway"),
        ),
        ("dataloader_num_workers", Needless("all cores are used")),
        ("dataloader_pin_memory", Needless("it is a setting of GPUs")),
        (
            "dataloader_prefetch_factor",
            Needless("rows are read ahead anyway"),
        ),
        (
            "remove_unused_columns",
            Needless("columns are chosen by name"),
        ),
        (
            "neftune_noise_alpha",
            Is("train_sft", "neftune_noise_alpha"),
        ),
        (
            "label_smoothing_factor",
            Is("train_sft", "label_smoothing_factor"),
        ),
        (
            "include_tokens_per_second",
            Needless("speed is shown in any case"),
        ),
        (
            "plot_loss",
            Needless("`pipeline plot` and `pipeline report` draw the curves"),
        ),
    ]
};

impl Program {
    /// Every program.
    pub const ALL: [Self; 3] = [Self::Axolotl, Self::LlamaFactory, Self::Trl];

    /// What it calls itself.
    pub fn name(self) -> &'static str {
        match self {
            Self::Axolotl => "axolotl",
            Self::LlamaFactory => "LLaMA-Factory",
            Self::Trl => "TRL",
        }
    }

    /// What it is called on the command line.
    pub fn argument(self) -> &'static str {
        match self {
            Self::Axolotl => "axolotl",
            Self::LlamaFactory => "llamafactory",
            Self::Trl => "trl",
        }
    }

    fn table(self) -> Table {
        match self {
            Self::Axolotl => axolotl::KEYS,
            Self::LlamaFactory => llama_factory::KEYS,
            Self::Trl => trl::KEYS,
        }
    }

    /// Keys that hardly another program has.
    fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Axolotl => axolotl::MARKS,
            Self::LlamaFactory => llama_factory::MARKS,
            Self::Trl => trl::MARKS,
        }
    }

    pub(super) fn meaning(self, key: &str) -> Option<Meaning> {
        let found = |table: Table| table.iter().find(|(name, _)| *name == key);
        found(self.table())
            .or_else(|| found(COMMON))
            .map(|(_, meaning)| *meaning)
    }
}

/// The program that a config without stages is of, if it is one of another program's.
pub(crate) fn recognise(map: &Mapping) -> Option<Program> {
    if map.contains_key("stages") || map.contains_key("version") && map.contains_key("outputs") {
        return None;
    }
    let keys: Vec<&str> = map.keys().filter_map(Value::as_str).collect();
    let score = |program: Program| {
        let has = |names: &[&str]| keys.iter().filter(|key| names.contains(key)).count();
        let known = keys.iter().filter(|key| program.meaning(key).is_some());
        (known.count(), has(program.marks()))
    };
    let (program, (known, marks)) = Program::ALL
        .into_iter()
        .map(|program| (program, score(program)))
        .max_by_key(|(_, (known, marks))| known + 3 * marks)?;
    (known >= 3 && marks >= 1 && 2 * known > keys.len()).then_some(program)
}

/// The table from the keys of a config to ours, a line a key.
pub(crate) fn table(program: Program, map: &Mapping) -> String {
    let keys: Vec<&str> = map.keys().filter_map(Value::as_str).collect();
    let width = keys.iter().map(|key| key.chars().count()).max();
    let width = width.unwrap_or(0).min(40);
    let mut text = String::new();
    for key in keys {
        let here = match program.meaning(key) {
            Some(Meaning::Is(kind, parameter)) => format!("{kind}.{parameter}"),
            Some(Meaning::Becomes(what)) => what.to_owned(),
            Some(Meaning::Needless(why)) => format!("not needed: {why}"),
            Some(Meaning::Lacks(why)) => format!("not here: {why}"),
            None => "unknown".to_owned(),
        };
        _ = write!(text, "\n  {key:width$}  {here}");
    }
    text
}
