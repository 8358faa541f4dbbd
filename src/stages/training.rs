//! What the trainings share: parameters by transformers' names, and the way from folders to a trained artifact.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, anyhow, ensure};
use candle_core::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::table::splits;
use crate::data::tokens::{self, TokenRow};
use crate::engine::{Context, Problem};
use crate::ml::adapter::Adapter;
use crate::ml::batch::Row;
use crate::ml::config::LlamaConfig;
use crate::ml::model::{Llama, Trained};
use crate::ml::optim;
use crate::ml::sampler::Sampling;
use crate::ml::save::{save_adapter, save_model};
use crate::ml::schedule::Shape;
use crate::ml::train::{Ending, Every, Settings, train};
use crate::ml::weights::Weights;
use crate::text::tokenizer::{Tokenizer, special_tokens};

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum SchedulerType {
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
pub(super) enum Optim {
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
    /// AdamW with moments in blockwise 8 bits (bitsandbytes).
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
pub(super) enum SamplingStrategy {
    /// Shuffled anew in each epoch, in the order that torch gives for the seed.
    #[default]
    Random,
    /// As they come.
    Sequential,
}

/// When the model is evaluated in training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum EvalStrategy {
    /// Never.
    #[default]
    No,
    /// Every `eval_steps` steps.
    Steps,
    /// After each epoch.
    Epoch,
}

impl SchedulerType {
    pub(super) fn shape(self) -> Shape {
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
    pub(super) fn kind(self) -> optim::Kind {
        match self {
            Self::AdamwTorch | Self::AdamwTorchFused | Self::PagedAdamw32bit => optim::Kind::AdamW,
            Self::Adamw8bit | Self::AdamwBnb8bit | Self::PagedAdamw8bit => optim::Kind::AdamW8bit,
            Self::Sgd => optim::Kind::Sgd,
        }
    }
}

impl SamplingStrategy {
    pub(super) fn sampling(self) -> Sampling {
        match self {
            Self::Random => Sampling::Random,
            Self::Sequential => Sampling::Sequential,
        }
    }
}

/// When to evaluate, from two parameters.
pub(super) fn every(strategy: EvalStrategy, steps: Option<u64>) -> Option<Every> {
    match strategy {
        EvalStrategy::No => None,
        EvalStrategy::Steps => Some(Every::Steps(steps.unwrap_or(1))),
        EvalStrategy::Epoch => Some(Every::Epoch),
    }
}

/// Problems with numbers that have to lie in a range.
#[derive(Default)]
pub(super) struct Rules(pub(super) Vec<Problem>);

impl Rules {
    pub(super) fn rule(&mut self, holds: bool, parameter: &str, message: &str) {
        if !holds {
            self.0.push(Problem::new(parameter, message));
        }
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
            /// How often all rows are seen; may have a fraction.
            #[serde(default = "defaults::epochs")]
            num_train_epochs: f64,
            /// The number of steps; -1 leaves it to `num_train_epochs`.
            #[serde(default = "defaults::max_steps")]
            max_steps: i64,
            /// Rows in a micro-batch.
            #[serde(default = "defaults::batch")]
            per_device_train_batch_size: usize,
            /// Rows in a batch of the evaluation.
            #[serde(default = "defaults::batch")]
            per_device_eval_batch_size: usize,
            /// Micro-batches whose gradients make one step. The last step of an epoch may have fewer.
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
            /// The optimiser.
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
            /// Whether matrix products run in bf16; all else stays in f32. TRL's default is true; here f32 is, which a CPU
            /// computes faster.
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
            /// Steps between the lines shown; the artifact's `metrics.jsonl` has every step.
            #[serde(default = "defaults::logging_steps")]
            logging_steps: Neutral<u64>,
            /// Steps between checkpoints, from which an interrupted training goes on.
            #[serde(default = "defaults::save_steps")]
            save_steps: Neutral<u64>,
            /// How many checkpoints are kept.
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
            fn common_rules(&self) -> $crate::stages::training::Rules {
                let mut rules = $crate::stages::training::Rules::default();
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
                    eval_every: training::every(self.eval_strategy, self.eval_steps),
                    log_every: *self.logging_steps,
                    save_every: *self.save_steps,
                    keep: *self.save_total_limit,
                }
            }
        }
    };
}
pub(super) use training_parameters;

/// The defaults that all trainings share: transformers'.
pub(super) mod defaults {
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
    pub(in crate::stages) fn norm() -> f64 {
        1.
    }
    pub(in crate::stages) fn yes() -> Neutral<bool> {
        Neutral(true)
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

/// The folders and splits of one training.
pub(super) struct Job<'a> {
    pub(super) model: &'a Path,
    pub(super) adapter: Option<&'a Path>,
    pub(super) dataset: &'a Path,
    pub(super) train_split: &'a str,
    pub(super) eval_split: &'a str,
    pub(super) compute: DType,
}

/// The rows of a split, as `ml` knows them.
pub(super) fn rows(dataset: &Path, split: &str, vocabulary: usize) -> anyhow::Result<Vec<Row>> {
    let read = tokens::read(dataset, split)?;
    let mut rows = Vec::with_capacity(read.len());
    for (number, row) in read.into_iter().enumerate() {
        let TokenRow {
            prompt_ids,
            chosen_ids,
            rejected_ids,
            rejected_prompt_ids,
        } = row;
        let all = [
            Some(&prompt_ids),
            Some(&chosen_ids),
            rejected_ids.as_ref(),
            rejected_prompt_ids.as_ref(),
        ];
        let largest = all.into_iter().flatten().flatten().max();
        ensure!(
            largest.is_none_or(|id| (*id as usize) < vocabulary),
            "row {number} of `{split}` has the token id {}, but the model knows only {vocabulary} ids; was it tokenized for another model?",
            largest.copied().unwrap_or_default(),
        );
        rows.push(Row {
            prompt: prompt_ids,
            chosen: chosen_ids,
            rejected: rejected_ids,
            rejected_prompt: rejected_prompt_ids,
            packed: Vec::new(),
        });
    }
    ensure!(!rows.is_empty(), "the split `{split}` has no rows");
    Ok(rows)
}

/// Whether a dataset has a split.
pub(super) fn has_split(dataset: &Path, split: &str) -> anyhow::Result<bool> {
    Ok(splits(dataset)?.contains_key(split))
}

/// The id that fills batches up: the tokenizer's pad token, or what the model's config names.
pub(super) fn pad_id(model: &Path, config: &LlamaConfig) -> u32 {
    let named = || {
        let special = special_tokens(model).ok()?;
        let pad = special.get("pad_token")?;
        Some(Tokenizer::load(model).ok()?.token(pad).ok()?.id)
    };
    let eos = config.eos_token_ids.first().copied();
    let pad = named().or(config.pad_token_id).or(eos).unwrap_or(0);
    if (pad as usize) < config.vocab_size {
        pad
    } else {
        0
    }
}

/// Trains, and fills the stage's output folder. `prepare` turns rows as they are stored into rows to train on.
pub(super) fn run(
    cx: &Context,
    job: &Job<'_>,
    mut settings: Settings,
    prepare: &dyn Fn(Vec<Row>) -> anyhow::Result<Vec<Row>>,
) -> anyhow::Result<()> {
    let config = LlamaConfig::read(job.model)?;
    settings.pad = pad_id(job.model, &config);
    let weights = Weights::open(job.model)?;
    let adapter = job.adapter.map(Adapter::load).transpose()?;
    let trained = if adapter.is_some() {
        Trained::Adapter
    } else {
        Trained::Everything
    };
    let device = Device::Cpu;
    let model = Llama::load(
        &config,
        &weights,
        adapter.as_ref(),
        trained,
        job.compute,
        &device,
    )?;
    drop(weights);
    let read = |split| rows(job.dataset, split, config.vocab_size).and_then(prepare);
    let train_rows = read(job.train_split)?;
    let eval_rows = if settings.eval_every.is_some() {
        read(job.eval_split)?
    } else {
        Vec::new()
    };
    cx.note("rows", train_rows.len());
    let count = model.parameters.iter().map(|p| p.var.elem_count());
    cx.note("trained_parameters", count.sum::<usize>());
    cx.note("steps", settings.total_steps(train_rows.len()));

    let mut tokens = 0u64;
    let ending = train(
        &model,
        &train_rows,
        &eval_rows,
        &settings,
        Some(cx.scratch()?),
        &mut |step| {
            tokens += step.tokens as u64;
            cx.progress(step.step, Some(step.total), "steps");
            for log in &step.logs {
                let mut values = log.values.clone();
                values.insert("epoch".into(), log.epoch);
                cx.metrics(log.step, values);
            }
            if cx.cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )?;
    cx.note("tokens", tokens);
    let history = match ending {
        Ending::Finished { history } => history,
        Ending::Interrupted { .. } => {
            cx.check_cancelled()?;
            return Err(anyhow!("interrupted"));
        }
    };
    match adapter {
        Some(adapter) => save_adapter(&model, adapter, cx.out())?,
        None => save_model(&model, job.model, cx.out())?,
    }
    let metrics = history.join("\n") + "\n";
    fs::write(cx.out().join("metrics.jsonl"), metrics).context("could not write `metrics.jsonl`")
}

#[cfg(test)]
mod tests;
