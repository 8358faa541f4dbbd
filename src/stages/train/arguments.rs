//! The parameters that all trainings have, by transformers' names, with transformers' and TRL's defaults or a word on what differs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::report_to::ReportTo;
use crate::engine::{Input, Neutral, Problem};
use crate::ml::train::optim::{self, LoraPlus, Momentum, Optim};
use crate::ml::train::sampler::SamplingStrategy;
use crate::ml::train::schedule::{SchedulerKwargs, SchedulerType};
use crate::ml::train::{EvalStrategy, Every, LossLimit, Settings, Watch};
use crate::stages::artifacts::{Adapter, Model, Tokens};
use crate::stages::rules::Rules;

/// The settings of an optimiser, by torch's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimArgs {
    /// The decay rate of the sum of gradients by which `sgd` steps; 0, the default, for each gradient alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    #[schemars(extend("examples" = [0.9]))]
    momentum: Option<f64>,
    /// What is left out of each gradient but the first one, 0 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    dampening: Option<f64>,
    /// Whether the step looks ahead (Nesterov's momentum).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nesterov: Option<bool>,
}

impl OptimArgs {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn momentum(&self) -> Momentum {
        Momentum {
            momentum: self.momentum.unwrap_or(0.),
            dampening: self.dampening.unwrap_or(0.),
            nesterov: self.nesterov.unwrap_or(false),
        }
    }

    /// What is wrong with them, as torch would refuse it.
    fn mistake(&self, optim: Optim) -> Option<&'static str> {
        let Momentum {
            momentum,
            dampening,
            nesterov,
        } = self.momentum();
        if optim != Optim::Sgd && !self.is_empty() {
            Some("only `optim: sgd` takes settings")
        } else if nesterov && (momentum <= 0. || dampening > 0.) {
            Some("`nesterov` needs a `momentum` above 0 and no `dampening`")
        } else {
            None
        }
    }
}

/// The learning rate of matrices beside the embeddings with LoRA+, PEFT's default.
const LORAPLUS_LR_EMBEDDING: f64 = 1e-6;

/// What every method of training is told beside its own parameters.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainingArguments {
    /// The model to train; with `adapter`, the frozen base of the adapter, dense or in 4 bits. It may be left out where `adapter`
    /// is given: then it is the model that the adapter was made for.
    #[schemars(extend("examples" = ["base4"]))]
    pub model: Input<Model>,
    /// The adapter to train. Without one, every weight of the model is trained and the stage makes a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["lora"]))]
    pub adapter: Option<Input<Adapter>>,
    /// The token ids to train on.
    #[schemars(extend("examples" = ["tokens"]))]
    pub dataset: Input<Tokens>,
    /// The split of the dataset to train on.
    #[serde(default = "train_split")]
    pub train_split: String,
    /// The split to evaluate on during training, if `eval_strategy` asks for it.
    #[serde(default = "eval_split")]
    pub eval_split: String,
    /// The number of passes over all rows. A fraction of a pass is possible.
    ///
    /// A higher number continues a finished training where it ended, if the result is exactly that of a longer training from the
    /// start: the learning rate must not depend on the total number of steps (`constant`; `constant_with_warmup` and `inverse_sqrt`
    /// with `warmup_steps` of 1 or more, or 0), and the earlier training must not have stopped early or gone back to its best
    /// weights. The log says whether it continues.
    #[serde(default = "epochs")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [1, 0.5]))]
    num_train_epochs: f64,
    /// The number of steps to train; -1 leaves it to `num_train_epochs`. A higher number continues a finished training under the
    /// same conditions.
    #[serde(default = "max_steps")]
    #[schemars(extend("minimum" = -1))]
    #[schemars(extend("examples" = [1000]))]
    max_steps: i64,
    /// The number of rows in a micro-batch. Together with `gradient_accumulation_steps` it gives the rows of a step.
    #[serde(default = "batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [4]))]
    per_device_train_batch_size: usize,
    /// The number of rows in a batch of an evaluation.
    #[serde(default = "batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [4]))]
    per_device_eval_batch_size: usize,
    /// The number of micro-batches whose gradients are averaged for one step; the last step of an epoch may have fewer. Small
    /// micro-batches are computed together while their activations fit in 512 MiB; results don't change.
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [8]))]
    gradient_accumulation_steps: usize,
    /// How the learning rate changes over the training, after the warm-up.
    #[serde(default)]
    lr_scheduler_type: SchedulerType,
    /// The settings of `lr_scheduler_type`, by transformers' names.
    #[serde(default, skip_serializing_if = "SchedulerKwargs::is_empty")]
    #[schemars(extend("examples" = [{"num_cycles": 3}, {"min_lr_rate": 0.1}]))]
    lr_scheduler_kwargs: SchedulerKwargs,
    /// The number of steps over which the learning rate rises from 0; a number below 1 is a share of all steps.
    #[serde(default)]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [100, 0.1]))]
    warmup_steps: f64,
    /// The share of all steps over which the learning rate rises from 0. It is used only if `warmup_steps` is 0.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.1]))]
    warmup_ratio: f64,
    /// The optimiser. TRL's default: `adamw_torch_fused`, which gives the same numbers.
    #[serde(default)]
    optim: Optim,
    /// The settings of `sgd` beside learning rate and weight decay. Other optimisers have none.
    #[serde(default, skip_serializing_if = "OptimArgs::is_empty")]
    #[schemars(extend("examples" = [{"momentum": 0.9}]))]
    optim_args: OptimArgs,
    /// How many times the learning rate of B is that of A in each pair of an adapter (LoRA+, arXiv 2402.12354); 16 is the paper's value.
    /// Biases, norms and DoRA's magnitudes learn like B. Without it all learn alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [16]))]
    loraplus_lr_ratio: Option<f64>,
    /// With `loraplus_lr_ratio`, the highest learning rate of both matrices beside the embeddings; 1e-6 if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    loraplus_lr_embedding: Option<f64>,
    /// The decay rate of AdamW's first moment, the running mean of gradients; for Lion, of the mean by whose sign it steps.
    #[serde(default = "beta1")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    adam_beta1: f64,
    /// The decay rate of AdamW's second moment, the running mean of squared gradients; for Lion, of the mean that it keeps.
    #[serde(default = "beta2")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    adam_beta2: f64,
    /// A small number that AdamW adds to the square root of its second moment, so that it never divides by 0.
    #[serde(default = "epsilon")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    adam_epsilon: f64,
    /// The decoupled weight decay: at each step, weights shrink by this times the learning rate. Norms and biases don't decay.
    #[serde(default)]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [0.01]))]
    weight_decay: f64,
    /// The largest norm of the gradient: a longer one is scaled down to it. 0 turns clipping off.
    #[serde(default = "max_grad_norm")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [0.3]))]
    max_grad_norm: f64,
    /// Whether layers are computed a second time in the backward pass instead of being kept: less memory, more time, the same
    /// numbers.
    #[serde(default = "yes")]
    gradient_checkpointing: Neutral<bool>,
    /// Whether the output of the layers below the lowest adapter is kept on disk for the next epoch and the next evaluation: the
    /// same numbers without computing these layers again. It helps adapters on upper layers alone (`layers_to_transform`), and
    /// takes 4 bytes for each token and hidden feature while the training runs.
    #[serde(default)]
    pub cache_frozen_layers: Neutral<bool>,
    /// Whether padding is left out of the computation. Losses and gradients are the same; only ORPO's `logits/chosen` and
    /// `logits/rejected` differ, because in TRL their means include the padding. TRL's default: `false`; its `ORPOTrainer` always
    /// pads.
    #[serde(default = "padding_free")]
    pub padding_free: bool,
    /// Whether matrix products are computed in bf16; everything else stays in f32. TRL's default: `true`, unless `fp16` is on; many
    /// CPUs compute faster in f32.
    #[serde(default)]
    pub bf16: bool,
    /// Whether matrix products are computed in f16, with a dynamic loss scale.
    #[serde(default)]
    pub fp16: bool,
    /// The seed of everything random: dropout, and the order of rows unless `data_seed` is given.
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
    /// The number of steps between evaluations, for `eval_strategy: steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [50]))]
    eval_steps: Option<u64>,
    /// Whether the result has the weights of the best evaluation instead of the last ones.
    #[serde(default)]
    load_best_model_at_end: bool,
    /// The metric by which evaluations are compared, and which `reduce_lr_on_plateau` and `greedy` follow; the prefix `eval_` may be left out.
    /// TRL's default: none, which means `loss`
    /// too.
    #[serde(default = "loss")]
    #[schemars(extend("examples" = ["rewards/margins"]))]
    metric_for_best_model: String,
    /// Whether a larger value of the metric is better. By default it is, unless the metric's name ends with `loss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    greater_is_better: Option<bool>,
    /// The number of evaluations in a row without improvement after which the training ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [3]))]
    early_stopping_patience: Option<u64>,
    /// By how much the metric has to improve to count as an improvement for `early_stopping_patience`.
    #[serde(default)]
    #[schemars(extend("minimum" = 0))]
    early_stopping_threshold: f64,
    /// The number of steps whose loss or gradient is NaN or infinite that are skipped, each with a warning. One more stops the
    /// training.
    #[serde(default)]
    #[schemars(extend("examples" = [2]))]
    skip_nan_steps: u64,
    /// A training whose loss is above this for `loss_watchdog_patience` steps in a row is stopped, with a checkpoint, instead of running on
    /// for nothing. Without it, a loss that explodes or no longer moves is only reported.
    #[serde(default, skip_serializing_if = "is_unset")]
    loss_watchdog_threshold: Neutral<Option<f64>>,
    /// How many steps in a row the loss may be above `loss_watchdog_threshold` before the training is stopped.
    #[serde(default = "loss_watchdog_patience")]
    #[schemars(extend("minimum" = 1))]
    loss_watchdog_patience: Neutral<u64>,
    /// The number of steps between the lines that are shown. `metrics.jsonl` and `trainer_state.json` in the result have every
    /// step.
    #[serde(default = "logging_steps")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [50]))]
    logging_steps: Neutral<u64>,
    /// The number of steps between checkpoints. An interrupted training goes on from the last one.
    #[serde(default = "save_steps")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [100]))]
    save_steps: Neutral<u64>,
    /// The number of checkpoints that are kept. TRL's default: none, which keeps all.
    #[serde(default = "save_total_limit")]
    #[schemars(extend("minimum" = 1))]
    save_total_limit: Neutral<usize>,
    /// Where else metrics are sent while the training runs: `none`, or one or several of `tensorboard` (event files below
    /// `TENSORBOARD_LOGGING_DIR`, by default `.pipeline/tensorboard`), `mlflow` (the server at `MLFLOW_TRACKING_URI`) and `trackio` (the
    /// server at `TRACKIO_SERVER_URL`). A tracker that can't be reached is a warning and holds nothing up.
    #[serde(default = "report_to")]
    report_to: Neutral<ReportTo>,
}

impl TrainingArguments {
    /// Checks the rules between the parameters.
    pub(super) fn check(&self, rules: &mut Rules) {
        rules.rule(
            self.max_steps != 0,
            "max_steps",
            "expected a number above 0, or -1",
        );
        rules.one_precision(self.bf16, self.fp16);
        rules.rule(
            self.eval_strategy != EvalStrategy::Steps
                || self.eval_steps.is_some_and(|steps| steps > 0),
            "eval_steps",
            "expected at least 1 with `eval_strategy: steps`",
        );
        let evaluates = self.eval_strategy != EvalStrategy::No;
        let mistake = self.lr_scheduler_kwargs.mistake(self.lr_scheduler_type);
        rules.rule(
            mistake.is_none(),
            "lr_scheduler_kwargs",
            mistake.as_deref().unwrap_or_default(),
        );
        rules.rule(
            evaluates || !self.lr_scheduler_type.follows_evaluations(),
            "lr_scheduler_type",
            "this schedule follows evaluations, expected an `eval_strategy` other than `no`",
        );
        let mistake = self.optim_args.mistake(self.optim);
        rules.rule(mistake.is_none(), "optim_args", mistake.unwrap_or_default());
        rules.rule(
            self.adapter.is_some() || self.loraplus_lr_ratio.is_none(),
            "loraplus_lr_ratio",
            "expected an `adapter`, of whose matrices it is",
        );
        rules.rule(
            self.loraplus_lr_ratio.is_some() || self.loraplus_lr_embedding.is_none(),
            "loraplus_lr_embedding",
            "expected `loraplus_lr_ratio` beside it",
        );
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
        let threshold = self.loss_watchdog_threshold.0.unwrap_or(0.);
        rules.rule(
            threshold.is_finite(),
            "loss_watchdog_threshold",
            "expected a finite number",
        );
    }

    /// The batch size of evaluations.
    pub(super) fn eval_batch_size(&self) -> usize {
        self.per_device_eval_batch_size
    }

    /// Whether so many processes have equally much to do in a step.
    pub(super) fn check_processes(&self, processes: usize) -> Result<(), Problem> {
        let (steps, rows) = (
            self.gradient_accumulation_steps,
            self.per_device_train_batch_size,
        );
        if steps.is_multiple_of(processes) {
            return Ok(());
        }
        let message = format!(
            "{processes} processes can't share `gradient_accumulation_steps: {steps}` evenly; expected a number that divides it"
        );
        let all = steps * rows;
        let hint = if all.is_multiple_of(processes) {
            format!(
                "a step has {all} rows, `per_device_train_batch_size` times `gradient_accumulation_steps`; with \
                 `gradient_accumulation_steps: {processes}` and `per_device_train_batch_size: {}` it has as many",
                all / processes
            )
        } else {
            format!("a step has {all} rows, which {processes} processes can't share evenly")
        };
        Err(Problem::new("processes", message).hint(hint))
    }

    /// The settings of the training. A learning rate and whether the adapter's dropout is at work are up to the method.
    pub(super) fn settings(&self, learning_rate: f64, dropout: bool) -> Settings {
        let watches = self.load_best_model_at_end || self.early_stopping_patience.is_some();
        let metric = &self.metric_for_best_model;
        let plain_metric = metric.strip_prefix("eval_").unwrap_or(metric);
        let embedding = self.loraplus_lr_embedding.unwrap_or(LORAPLUS_LR_EMBEDDING);
        Settings {
            batch_size: self.per_device_train_batch_size,
            eval_batch_size: self.per_device_eval_batch_size,
            accumulation: self.gradient_accumulation_steps,
            epochs: self.num_train_epochs,
            max_steps: u64::try_from(self.max_steps).ok(),
            learning_rate,
            scheduler: self.lr_scheduler_type,
            scheduler_kwargs: self.lr_scheduler_kwargs,
            scheduler_metric: plain_metric.to_owned(),
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
                momentum: self.optim_args.momentum(),
                lora_plus: self.loraplus_lr_ratio.map(|ratio| LoraPlus {
                    ratio,
                    embedding: embedding / learning_rate,
                }),
            },
            max_grad_norm: self.max_grad_norm,
            checkpointing: *self.gradient_checkpointing,
            loss_scaling: self.fp16,
            dropout,
            neftune_noise_alpha: None,
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
                metric: plain_metric.to_owned(),
                greater: self.greater_is_better.unwrap_or(!metric.ends_with("loss")),
                load: self.load_best_model_at_end,
                patience: self.early_stopping_patience,
                threshold: self.early_stopping_threshold,
            }),
            skip_nan_steps: self.skip_nan_steps,
            loss_limit: self.loss_watchdog_threshold.map(|threshold| LossLimit {
                threshold,
                patience: *self.loss_watchdog_patience,
            }),
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
fn is_unset(value: &Neutral<Option<f64>>) -> bool {
    value.is_none()
}
fn loss_watchdog_patience() -> Neutral<u64> {
    Neutral(3)
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
