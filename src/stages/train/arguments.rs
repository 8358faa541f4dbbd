//! The parameters that all trainings have, by transformers' names, with transformers' and TRL's defaults or a word on what differs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::report_to::ReportTo;
use crate::engine::{Input, Neutral};
use crate::ml::train::optim::{self, Optim};
use crate::ml::train::sampler::SamplingStrategy;
use crate::ml::train::schedule::SchedulerType;
use crate::ml::train::{EvalStrategy, Every, Settings, Watch};
use crate::stages::artifacts::{Adapter, Model, Tokens};
use crate::stages::rules::Rules;

/// What every method of training is told beside its own parameters.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainingArguments {
    /// The model to train, or the frozen base of the adapter; with an adapter it may be stored in 4 bits.
    pub model: Input<Model>,
    /// The adapter to train. Without one every weight of the model is trained, and the stage makes a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Input<Adapter>>,
    /// The token ids to train on.
    pub dataset: Input<Tokens>,
    /// The split of the dataset to train on.
    #[serde(default = "train_split")]
    pub train_split: String,
    /// The split to evaluate on during training; see `eval_strategy`.
    #[serde(default = "eval_split")]
    pub eval_split: String,
    /// The number of passes over all rows; may be fractional. With a higher number the training goes on where an earlier one
    /// ended, if that is exactly the same as starting at the beginning: if the learning rate doesn't depend on the number of all
    /// steps (`constant`; `constant_with_warmup` and `inverse_sqrt` with `warmup_steps` of 1 or more, or 0), and the earlier one did not
    /// stop early or take its best weights. The log says which it does.
    #[serde(default = "epochs")]
    num_train_epochs: f64,
    /// The number of steps; -1 leaves it to `num_train_epochs`. With a higher number the training goes on as there.
    #[serde(default = "max_steps")]
    max_steps: i64,
    /// Rows in a micro-batch.
    #[serde(default = "batch_size")]
    per_device_train_batch_size: usize,
    /// Rows in a batch of an evaluation.
    #[serde(default = "batch_size")]
    per_device_eval_batch_size: usize,
    /// Micro-batches whose gradients are averaged for one step. The last step of an epoch may have fewer. Small ones go through the
    /// model together, as long as no more than 512 MiB has to be kept for the backward pass; the result is that of one after another.
    #[serde(default = "one")]
    gradient_accumulation_steps: usize,
    /// How the learning rate changes.
    #[serde(default)]
    lr_scheduler_type: SchedulerType,
    /// Steps over which the learning rate rises from 0; a number below 1 is a share of all steps.
    #[serde(default)]
    warmup_steps: f64,
    /// The same as a share of all steps; used only if `warmup_steps` is 0.
    #[serde(default)]
    warmup_ratio: f64,
    /// The optimiser. TRL's default: `adamw_torch_fused`, which gives the same numbers.
    #[serde(default)]
    optim: Optim,
    /// Decay rate of AdamW's first moment.
    #[serde(default = "beta1")]
    adam_beta1: f64,
    /// Decay rate of AdamW's second moment.
    #[serde(default = "beta2")]
    adam_beta2: f64,
    /// Added to the square root of AdamW's second moment, so that the division stays finite.
    #[serde(default = "epsilon")]
    adam_epsilon: f64,
    /// Decoupled weight decay, which norms and biases are exempt from.
    #[serde(default)]
    weight_decay: f64,
    /// The gradient is scaled down to this norm where it is larger; 0 for no clipping.
    #[serde(default = "max_grad_norm")]
    max_grad_norm: f64,
    /// Whether layers are computed a second time in the backward pass instead of being kept: less memory, the same numbers.
    #[serde(default = "yes")]
    gradient_checkpointing: Neutral<bool>,
    /// Whether the output of the layers below the lowest adapter is kept on disk, for the next epoch and the next evaluation: the
    /// same numbers, without computing these layers again. For adapters on upper layers alone (`layers_to_transform`); takes 4 bytes
    /// for each token and hidden feature while the training runs.
    #[serde(default)]
    pub cache_frozen_layers: Neutral<bool>,
    /// Whether padding is left out of the computation. Losses and gradients are the same; only ORPO's `logits/chosen` and
    /// `logits/rejected` differ, because in TRL their means include the padding. TRL's default: `false`; its `ORPOTrainer` always pads.
    #[serde(default = "padding_free")]
    pub padding_free: bool,
    /// Whether matrix products are computed in bf16; everything else stays in f32. TRL's default: `true`, unless `fp16` is on; many
    /// CPUs compute faster in f32.
    #[serde(default)]
    pub bf16: bool,
    /// Whether matrix products are computed in f16, with a dynamic loss scale.
    #[serde(default)]
    pub fp16: bool,
    /// The seed of everything random.
    #[serde(default = "seed")]
    seed: u64,
    /// The seed of the order of rows, if it is to differ from `seed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data_seed: Option<u64>,
    /// The order in which rows are seen.
    #[serde(default)]
    train_sampling_strategy: SamplingStrategy,
    /// When the model is evaluated during training.
    #[serde(default)]
    eval_strategy: EvalStrategy,
    /// Steps between evaluations, for `eval_strategy: steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eval_steps: Option<u64>,
    /// Whether the result has the weights of the best evaluation instead of the last ones.
    #[serde(default)]
    load_best_model_at_end: bool,
    /// The metric by which evaluations are compared, such as `loss` or `rewards/margins`; the prefix `eval_` may be left out. TRL's
    /// default: none, which means `loss` too.
    #[serde(default = "loss")]
    metric_for_best_model: String,
    /// Whether a larger value of the metric is better. By default it is, unless its name ends with `loss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    greater_is_better: Option<bool>,
    /// The training ends after this many evaluations in a row without improvement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    early_stopping_patience: Option<u64>,
    /// By how much the metric has to improve to count as an improvement for `early_stopping_patience`.
    #[serde(default)]
    early_stopping_threshold: f64,
    /// How many steps whose loss or gradient is NaN or infinite are skipped, each with a warning, before another one stops the
    /// training.
    #[serde(default)]
    skip_nan_steps: u64,
    /// Steps between the lines shown; the artifact's `metrics.jsonl` and `trainer_state.json` have every step.
    #[serde(default = "logging_steps")]
    logging_steps: Neutral<u64>,
    /// Steps between checkpoints, from which an interrupted training goes on.
    #[serde(default = "save_steps")]
    save_steps: Neutral<u64>,
    /// How many checkpoints are kept. TRL's default: none, which keeps all.
    #[serde(default = "save_total_limit")]
    save_total_limit: Neutral<usize>,
    /// Where else metrics are sent while the training runs: `none`, or one or several of `tensorboard` (event files below
    /// `TENSORBOARD_LOGGING_DIR`, by default `.pipeline/tensorboard`), `mlflow` (the server at `MLFLOW_TRACKING_URI`) and `trackio` (the
    /// server at `TRACKIO_SERVER_URL`). A tracker that can't be reached is told and holds nothing up.
    #[serde(default = "report_to")]
    report_to: Neutral<ReportTo>,
}

impl TrainingArguments {
    /// Checks the rules between the parameters.
    pub(super) fn check(&self, rules: &mut Rules) {
        rules.positive(self.num_train_epochs, "num_train_epochs");
        rules.rule(
            self.max_steps == -1 || self.max_steps > 0,
            "max_steps",
            "expected a number above 0, or -1",
        );
        for (count, parameter) in [
            (
                self.per_device_train_batch_size,
                "per_device_train_batch_size",
            ),
            (
                self.per_device_eval_batch_size,
                "per_device_eval_batch_size",
            ),
            (
                self.gradient_accumulation_steps,
                "gradient_accumulation_steps",
            ),
        ] {
            rules.at_least_1(count as u64, parameter);
        }
        rules.not_negative(self.warmup_steps, "warmup_steps");
        rules.rule(
            (0. ..=1.).contains(&self.warmup_ratio),
            "warmup_ratio",
            "expected a number between 0 and 1",
        );
        rules.fraction(self.adam_beta1, "adam_beta1");
        rules.fraction(self.adam_beta2, "adam_beta2");
        rules.positive(self.adam_epsilon, "adam_epsilon");
        rules.not_negative(self.weight_decay, "weight_decay");
        rules.not_negative(self.max_grad_norm, "max_grad_norm");
        rules.rule(
            !(self.bf16 && self.fp16),
            "fp16",
            "`bf16` and `fp16` exclude each other",
        );
        rules.rule(
            self.eval_strategy != EvalStrategy::Steps
                || self.eval_steps.is_some_and(|steps| steps > 0),
            "eval_steps",
            "expected at least 1 with `eval_strategy: steps`",
        );
        let evaluates = self.eval_strategy != EvalStrategy::No;
        rules.rule(
            evaluates || !self.load_best_model_at_end,
            "load_best_model_at_end",
            "expected an `eval_strategy` other than `no`, which tells what is best",
        );
        let patience = self.early_stopping_patience;
        rules.rule(
            evaluates || patience.is_none(),
            "early_stopping_patience",
            "expected an `eval_strategy` other than `no`, which tells when to stop",
        );
        rules.at_least_1(patience.unwrap_or(1), "early_stopping_patience");
        rules.not_negative(self.early_stopping_threshold, "early_stopping_threshold");
        rules.at_least_1(*self.logging_steps, "logging_steps");
        rules.at_least_1(*self.save_steps, "save_steps");
        rules.at_least_1(*self.save_total_limit as u64, "save_total_limit");
    }

    /// The batch size of evaluations.
    pub(super) fn eval_batch_size(&self) -> usize {
        self.per_device_eval_batch_size
    }

    /// The settings of the training. A learning rate and whether the adapter's dropout is at work are up to the method.
    pub(super) fn settings(&self, learning_rate: f64, dropout: bool) -> Settings {
        let watches = self.load_best_model_at_end || self.early_stopping_patience.is_some();
        let metric = &self.metric_for_best_model;
        Settings {
            batch_size: self.per_device_train_batch_size,
            eval_batch_size: self.per_device_eval_batch_size,
            accumulation: self.gradient_accumulation_steps,
            epochs: self.num_train_epochs,
            max_steps: u64::try_from(self.max_steps).ok(),
            learning_rate,
            scheduler: self.lr_scheduler_type,
            warmup: if self.warmup_steps > 0. {
                self.warmup_steps
            } else {
                self.warmup_ratio
            },
            optimizer: optim::Settings {
                optim: self.optim,
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                epsilon: self.adam_epsilon,
                weight_decay: self.weight_decay,
            },
            max_grad_norm: self.max_grad_norm,
            checkpointing: *self.gradient_checkpointing,
            loss_scaling: self.fp16,
            dropout,
            seed: self.seed,
            data_seed: self.data_seed.unwrap_or(self.seed),
            sampling: self.train_sampling_strategy,
            eval_every: match self.eval_strategy {
                EvalStrategy::No => None,
                EvalStrategy::Steps => Some(Every::Steps(self.eval_steps.unwrap_or(1))),
                EvalStrategy::Epoch => Some(Every::Epoch),
            },
            log_every: *self.logging_steps,
            save_every: *self.save_steps,
            keep: *self.save_total_limit,
            watch: watches.then(|| Watch {
                metric: metric.strip_prefix("eval_").unwrap_or(metric).to_owned(),
                greater: self.greater_is_better.unwrap_or(!metric.ends_with("loss")),
                load: self.load_best_model_at_end,
                patience: self.early_stopping_patience,
                threshold: self.early_stopping_threshold,
            }),
            skip_nan_steps: self.skip_nan_steps,
        }
    }
}

fn train_split() -> String {
    "train".into()
}
fn eval_split() -> String {
    "test".into()
}
fn epochs() -> f64 {
    3.
}
fn max_steps() -> i64 {
    -1
}
fn batch_size() -> usize {
    8
}
fn one() -> usize {
    1
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.999
}
fn epsilon() -> f64 {
    1e-8
}
fn max_grad_norm() -> f64 {
    1.
}
fn loss() -> String {
    "loss".into()
}
fn yes() -> Neutral<bool> {
    Neutral(true)
}
fn padding_free() -> bool {
    true
}
fn seed() -> u64 {
    42
}
fn logging_steps() -> Neutral<u64> {
    Neutral(10)
}
fn save_steps() -> Neutral<u64> {
    Neutral(500)
}
fn save_total_limit() -> Neutral<usize> {
    Neutral(2)
}
fn report_to() -> Neutral<ReportTo> {
    Neutral(ReportTo::default())
}
