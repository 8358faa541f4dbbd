//! The parameters that all trainings have, by transformers' names, with transformers' and TRL's defaults or a word on what differs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ml::train::sampler::Sampling;
use crate::ml::train::schedule::Shape;
use crate::ml::train::{Every, optim};

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum SchedulerType {
    /// Down to 0 on a line.
    #[default]
    Linear,
    /// Down to 0 on half a cosine.
    Cosine,
    /// The same; transformers' default of one fall.
    CosineWithRestarts,
    /// Always the same, without warm-up.
    Constant,
    /// Always the same after the warm-up.
    ConstantWithWarmup,
    /// One over the square root of the step.
    InverseSqrt,
}

/// The optimiser.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(in crate::stages) enum Optim {
    /// AdamW with moments in f32.
    #[default]
    #[serde(rename = "adamw_torch")]
    AdamwTorch,
    /// The same.
    #[serde(rename = "adamw_torch_fused")]
    AdamwTorchFused,
    /// The same; where the moments live makes no difference here.
    #[serde(rename = "paged_adamw_32bit")]
    PagedAdamw32bit,
    /// AdamW with moments in blockwise 8 bits (bitsandbytes); those of embeddings and of small tensors stay in f32.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// The same under its other name.
    #[serde(rename = "adamw_bnb_8bit")]
    AdamwBnb8bit,
    /// The same; where the moments live makes no difference here.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
    /// Plain gradient descent.
    #[serde(rename = "sgd")]
    Sgd,
}

/// The order in which rows are seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum SamplingStrategy {
    /// Shuffled anew in each epoch, in the order that torch gives for the seed.
    #[default]
    Random,
    /// As they come.
    Sequential,
}

/// When the model is evaluated in training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum EvalStrategy {
    /// Never.
    #[default]
    No,
    /// Every `eval_steps` steps.
    Steps,
    /// After each epoch.
    Epoch,
}

impl SchedulerType {
    pub(in crate::stages) fn shape(self) -> Shape {
        match self {
            Self::Linear => Shape::Linear,
            Self::Cosine => Shape::Cosine,
            Self::CosineWithRestarts => Shape::CosineWithRestarts { cycles: 1 },
            Self::Constant => Shape::Constant,
            Self::ConstantWithWarmup => Shape::ConstantWithWarmup,
            Self::InverseSqrt => Shape::InverseSqrt,
        }
    }
}

impl Optim {
    pub(in crate::stages) fn kind(self) -> optim::Kind {
        match self {
            Self::AdamwTorch | Self::AdamwTorchFused | Self::PagedAdamw32bit => optim::Kind::AdamW,
            Self::Adamw8bit | Self::AdamwBnb8bit | Self::PagedAdamw8bit => optim::Kind::AdamW8bit,
            Self::Sgd => optim::Kind::Sgd,
        }
    }
}

impl SamplingStrategy {
    pub(in crate::stages) fn sampling(self) -> Sampling {
        match self {
            Self::Random => Sampling::Random,
            Self::Sequential => Sampling::Sequential,
        }
    }
}

/// When to evaluate, from two parameters.
pub(in crate::stages) fn every(strategy: EvalStrategy, steps: Option<u64>) -> Option<Every> {
    match strategy {
        EvalStrategy::No => None,
        EvalStrategy::Steps => Some(Every::Steps(steps.unwrap_or(1))),
        EvalStrategy::Epoch => Some(Every::Epoch),
    }
}

/// Declares a training's parameters: its own, and those that all trainings have.
macro_rules! training_parameters {
    (
        $(#[$about:meta])*
        pub struct $name:ident { $($own:tt)* }
        learning_rate = $learning_rate:literal;
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            /// The model to train, or the frozen base of the adapter; with an adapter it may be stored in 4 bits.
            model: Input<Model>,
            /// The adapter to train. Without one every weight of the model is trained, and the stage makes a model.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            adapter: Option<Input<Adapter>>,
            /// The token ids to train on.
            dataset: Input<Tokens>,
            /// The split of the dataset to train on.
            #[serde(default = "defaults::train_split")]
            train_split: String,
            /// The split to evaluate on in training; see `eval_strategy`.
            #[serde(default = "defaults::eval_split")]
            eval_split: String,
            $($own)*
            /// The highest learning rate.
            #[serde(default = "default_learning_rate")]
            learning_rate: f64,
            /// How often all rows are seen; may have a fraction. With a higher number the training goes on where it ended, if
            /// that is exactly the same as starting at the beginning: if the learning rate doesn't depend on the number of all
            /// steps (`constant`; `constant_with_warmup` and `inverse_sqrt` with `warmup_steps` of 1 or more, or 0), and it did not
            /// stop early or take its best weights. It says which it does.
            #[serde(default = "defaults::epochs")]
            num_train_epochs: f64,
            /// The number of steps; -1 leaves it to `num_train_epochs`, and a higher one goes on as there.
            #[serde(default = "defaults::max_steps")]
            max_steps: i64,
            /// Rows in a micro-batch.
            #[serde(default = "defaults::batch")]
            per_device_train_batch_size: usize,
            /// Rows in a batch of the evaluation.
            #[serde(default = "defaults::batch")]
            per_device_eval_batch_size: usize,
            /// Micro-batches whose gradients make one step. The last step of an epoch may have fewer. Small ones go through the
            /// model together, as long as that keeps at most 512 MiB for the way back; the result is that of one after another.
            #[serde(default = "defaults::one")]
            gradient_accumulation_steps: usize,
            /// How the learning rate changes.
            #[serde(default)]
            lr_scheduler_type: SchedulerType,
            /// Steps over which the learning rate rises from 0; a number below 1 is a share of all steps.
            #[serde(default)]
            warmup_steps: f64,
            /// The same as a share of all steps; counts where `warmup_steps` is 0.
            #[serde(default)]
            warmup_ratio: f64,
            /// The optimiser. TRL's default: `adamw_torch_fused`, which gives the same numbers.
            #[serde(default)]
            optim: Optim,
            /// Decay of AdamW's first moment.
            #[serde(default = "defaults::beta1")]
            adam_beta1: f64,
            /// Decay of AdamW's second moment.
            #[serde(default = "defaults::beta2")]
            adam_beta2: f64,
            /// Keeps AdamW's division finite.
            #[serde(default = "defaults::epsilon")]
            adam_epsilon: f64,
            /// Decoupled weight decay, not of norms and biases.
            #[serde(default)]
            weight_decay: f64,
            /// The largest norm of the gradient; 0 for no limit.
            #[serde(default = "defaults::norm")]
            max_grad_norm: f64,
            /// Whether layers are computed a second time instead of being kept for the backward: less memory, the same numbers.
            #[serde(default = "defaults::yes")]
            gradient_checkpointing: Neutral<bool>,
            /// Whether what the layers below the lowest adapter give is kept on disk, for the rows' next epoch and the next
            /// evaluation: the same numbers, without these layers' work. For adapters on upper layers alone
            /// (`layers_to_transform`); takes 4 bytes for each token and feature while the training runs.
            #[serde(default)]
            cache_frozen_layers: Neutral<bool>,
            /// Whether padding is left out of the computation. Losses and gradients are the same; only `logits/chosen` and
            /// `logits/rejected` differ, because TRL's means go over the padding too. TRL's default: `false`; its `ORPOTrainer` always pads.
            #[serde(default = "defaults::padding_free")]
            padding_free: bool,
            /// Whether matrix products run in bf16; all else stays in f32. TRL's default: `true`, unless `fp16` is on; a CPU computes
            /// faster in f32.
            #[serde(default)]
            bf16: bool,
            /// Whether matrix products run in f16, with a dynamic loss scale.
            #[serde(default)]
            fp16: bool,
            /// The seed of everything random.
            #[serde(default = "defaults::seed")]
            seed: u64,
            /// The seed of the rows' order, if it is to differ.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            data_seed: Option<u64>,
            /// The order in which rows are seen.
            #[serde(default)]
            train_sampling_strategy: SamplingStrategy,
            /// When the model is evaluated in training.
            #[serde(default)]
            eval_strategy: EvalStrategy,
            /// Steps between evaluations, for the strategy `steps`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            eval_steps: Option<u64>,
            /// Whether the weights of the best evaluation are the result, and not the last ones.
            #[serde(default)]
            load_best_model_at_end: bool,
            /// The metric of the evaluation that tells what is best, such as `loss` or `rewards/margins`; `eval_` before it may
            /// be left out. TRL's default: none, which means `loss` too.
            #[serde(default = "defaults::loss")]
            metric_for_best_model: String,
            /// Whether more of the metric is better. By default yes, unless its name ends with `loss`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            greater_is_better: Option<bool>,
            /// Ends the training after so many evaluations in a row without improvement.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            early_stopping_patience: Option<u64>,
            /// By how much the metric has to improve to count for `early_stopping_patience`.
            #[serde(default)]
            early_stopping_threshold: f64,
            /// How many steps whose loss or gradient is NaN or infinite are left out, each with a warning, before one more stops
            /// the training.
            #[serde(default)]
            skip_nan_steps: u64,
            /// Steps between the lines shown; the artifact's `metrics.jsonl` and `trainer_state.json` have every step.
            #[serde(default = "defaults::logging_steps")]
            logging_steps: Neutral<u64>,
            /// Steps between checkpoints, from which an interrupted training goes on.
            #[serde(default = "defaults::save_steps")]
            save_steps: Neutral<u64>,
            /// How many checkpoints are kept. TRL's default: none, which keeps all.
            #[serde(default = "defaults::save_total_limit")]
            save_total_limit: Neutral<usize>,
            /// Where else metrics go: only `none` so far.
            #[serde(default = "defaults::report_to")]
            report_to: Neutral<String>,
        }

        fn default_learning_rate() -> f64 {
            $learning_rate
        }

        impl $name {
            fn common_rules(&self) -> common::Rules {
                let mut rules = common::Rules::default();
                let positive = |x: f64| x > 0. && x.is_finite();
                let fraction = |x: f64| (0. ..1.).contains(&x);
                rules.rule(positive(self.learning_rate), "learning_rate", "expected a number above 0");
                rules.rule(positive(self.num_train_epochs), "num_train_epochs", "expected a number above 0");
                rules.rule(self.max_steps == -1 || self.max_steps > 0, "max_steps", "expected a number above 0, or -1");
                rules.rule(self.per_device_train_batch_size > 0, "per_device_train_batch_size", "expected at least 1");
                rules.rule(self.per_device_eval_batch_size > 0, "per_device_eval_batch_size", "expected at least 1");
                rules.rule(self.gradient_accumulation_steps > 0, "gradient_accumulation_steps", "expected at least 1");
                rules.rule(self.warmup_steps >= 0. && self.warmup_steps.is_finite(), "warmup_steps", "expected a number not below 0");
                rules.rule((0. ..=1.).contains(&self.warmup_ratio), "warmup_ratio", "expected a number between 0 and 1");
                rules.rule(fraction(self.adam_beta1), "adam_beta1", "expected a number from 0 to below 1");
                rules.rule(fraction(self.adam_beta2), "adam_beta2", "expected a number from 0 to below 1");
                rules.rule(positive(self.adam_epsilon), "adam_epsilon", "expected a number above 0");
                rules.rule(self.weight_decay >= 0. && self.weight_decay.is_finite(), "weight_decay", "expected a number not below 0");
                rules.rule(self.max_grad_norm >= 0. && self.max_grad_norm.is_finite(), "max_grad_norm", "expected a number not below 0");
                rules.rule(!(self.bf16 && self.fp16), "fp16", "`bf16` and `fp16` exclude each other");
                rules.rule(
                    self.eval_strategy != EvalStrategy::Steps || self.eval_steps.is_some_and(|steps| steps > 0),
                    "eval_steps",
                    "expected at least 1 with `eval_strategy: steps`",
                );
                let evaluates = self.eval_strategy != EvalStrategy::No;
                rules.rule(
                    evaluates || !self.load_best_model_at_end,
                    "load_best_model_at_end",
                    "expected an `eval_strategy` other than `no`, which tells what is best",
                );
                rules.rule(
                    evaluates || self.early_stopping_patience.is_none(),
                    "early_stopping_patience",
                    "expected an `eval_strategy` other than `no`, which tells when to stop",
                );
                rules.rule(self.early_stopping_patience != Some(0), "early_stopping_patience", "expected at least 1");
                let threshold = self.early_stopping_threshold;
                rules.rule(threshold >= 0. && threshold.is_finite(), "early_stopping_threshold", "expected a number not below 0");
                rules.rule(*self.logging_steps > 0, "logging_steps", "expected at least 1");
                rules.rule(*self.save_steps > 0, "save_steps", "expected at least 1");
                rules.rule(*self.save_total_limit > 0, "save_total_limit", "expected at least 1");
                rules.rule(*self.report_to == "none", "report_to", "expected `none`, the only one so far");
                rules
            }

            fn settings(&self, objective: Objective, dropout: bool) -> Settings {
                Settings {
                    objective,
                    pad: 0,
                    batch_size: self.per_device_train_batch_size,
                    eval_batch_size: self.per_device_eval_batch_size,
                    accumulation: self.gradient_accumulation_steps,
                    epochs: self.num_train_epochs,
                    max_steps: u64::try_from(self.max_steps).ok(),
                    learning_rate: self.learning_rate,
                    shape: self.lr_scheduler_type.shape(),
                    warmup: if self.warmup_steps > 0. {
                        self.warmup_steps
                    } else {
                        self.warmup_ratio
                    },
                    optimizer: optim::Settings {
                        kind: self.optim.kind(),
                        beta1: self.adam_beta1,
                        beta2: self.adam_beta2,
                        epsilon: self.adam_epsilon,
                        weight_decay: self.weight_decay,
                    },
                    max_grad_norm: self.max_grad_norm,
                    checkpointing: *self.gradient_checkpointing,
                    scaler: self.fp16,
                    dropout,
                    seed: self.seed,
                    data_seed: self.data_seed.unwrap_or(self.seed),
                    sampling: self.train_sampling_strategy.sampling(),
                    eval_every: common::every(self.eval_strategy, self.eval_steps),
                    log_every: *self.logging_steps,
                    save_every: *self.save_steps,
                    keep: *self.save_total_limit,
                    watch: (self.load_best_model_at_end || self.early_stopping_patience.is_some()).then(|| {
                        let metric = &self.metric_for_best_model;
                        Watch {
                            metric: metric.strip_prefix("eval_").unwrap_or(metric).to_owned(),
                            greater: self.greater_is_better.unwrap_or(!metric.ends_with("loss")),
                            load: self.load_best_model_at_end,
                            patience: self.early_stopping_patience,
                            threshold: self.early_stopping_threshold,
                        }
                    }),
                    skip_nan_steps: self.skip_nan_steps,
                    split: String::new(),
                    leave: None,
                    rows_each: 1,
                    sources: Vec::new(),
                }
            }
        }
    };
}
pub(in crate::stages) use training_parameters;

/// The defaults that all trainings share: transformers'.
pub(in crate::stages) mod defaults {
    use crate::engine::Neutral;

    pub(in crate::stages) fn train_split() -> String {
        "train".into()
    }
    pub(in crate::stages) fn eval_split() -> String {
        "test".into()
    }
    pub(in crate::stages) fn epochs() -> f64 {
        3.
    }
    pub(in crate::stages) fn max_steps() -> i64 {
        -1
    }
    pub(in crate::stages) fn batch() -> usize {
        8
    }
    pub(in crate::stages) fn one() -> usize {
        1
    }
    pub(in crate::stages) fn beta1() -> f64 {
        0.9
    }
    pub(in crate::stages) fn beta2() -> f64 {
        0.999
    }
    pub(in crate::stages) fn epsilon() -> f64 {
        1e-8
    }
    pub(in crate::stages) fn loss() -> String {
        "loss".into()
    }
    pub(in crate::stages) fn norm() -> f64 {
        1.
    }
    pub(in crate::stages) fn yes() -> Neutral<bool> {
        Neutral(true)
    }
    pub(in crate::stages) fn padding_free() -> bool {
        true
    }
    pub(in crate::stages) fn seed() -> u64 {
        42
    }
    pub(in crate::stages) fn logging_steps() -> Neutral<u64> {
        Neutral(10)
    }
    pub(in crate::stages) fn save_steps() -> Neutral<u64> {
        Neutral(500)
    }
    pub(in crate::stages) fn save_total_limit() -> Neutral<usize> {
        Neutral(2)
    }
    pub(in crate::stages) fn report_to() -> Neutral<String> {
        Neutral("none".into())
    }
}
