//! The settings of a training, and what follows from them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::best::Watch;
use super::optim;
use super::sampler::{Grouping, SamplingStrategy};
use super::schedule::{Schedule, SchedulerKwargs, SchedulerType};
use super::watchdog::LossLimit;

/// The settings of a training that don't depend on its model, its rows or its loss. The defaults are transformers'.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The number of rows in a micro-batch.
    pub batch_size: usize,
    /// The number of rows in a batch of an evaluation.
    pub eval_batch_size: usize,
    /// The number of micro-batches in a step.
    pub accumulation: usize,
    /// The number of epochs, that is, how often all rows are seen.
    pub epochs: f64,
    /// The number of steps, which takes precedence over `epochs`.
    pub max_steps: Option<u64>,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// The learning-rate schedule.
    pub scheduler: SchedulerType,
    /// The settings of the schedule.
    pub scheduler_kwargs: SchedulerKwargs,
    /// The metric of evaluations, without `eval_`, that a schedule follows which follows one.
    pub scheduler_metric: String,
    /// The number of warm-up steps; below 1, a share of all steps.
    pub warmup: f64,
    /// The settings of the optimiser.
    pub optimizer: optim::Settings,
    /// The norm to which gradients are clipped; 0 for no limit.
    pub max_grad_norm: f64,
    /// Whether layers are recomputed in the backward pass instead of being kept.
    pub checkpointing: bool,
    /// Whether losses are scaled for gradients in f16.
    pub loss_scaling: bool,
    /// Whether the adapter's dropout is applied.
    pub dropout: bool,
    /// The strength of the noise on the embeddings (NEFTune), if there is any.
    pub neftune_noise_alpha: Option<f64>,
    /// The seed of everything random but the order of rows.
    pub seed: u64,
    /// The seed of the order of rows.
    pub data_seed: u64,
    /// The order of rows.
    pub sampling: SamplingStrategy,
    /// How often the model is evaluated; `None` for never.
    pub eval_every: Option<Every>,
    /// The number of steps between the reported logs.
    pub log_every: u64,
    /// The number of steps between checkpoints.
    pub save_every: u64,
    /// The number of checkpoints that are kept.
    pub keep: usize,
    /// The metric that decides which evaluation is the best, if there is one.
    pub watch: Option<Watch>,
    /// The number of steps with values that are not finite that are skipped before the next one ends the training.
    pub skip_nan_steps: u64,
    /// When the loss stops the training; none for never.
    pub loss_limit: Option<LossLimit>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            batch_size: 8,
            eval_batch_size: 8,
            accumulation: 1,
            epochs: 3.,
            max_steps: None,
            learning_rate: 5e-5,
            scheduler: SchedulerType::default(),
            scheduler_kwargs: SchedulerKwargs::default(),
            scheduler_metric: "loss".to_owned(),
            warmup: 0.,
            optimizer: optim::Settings::default(),
            max_grad_norm: 1.,
            checkpointing: false,
            loss_scaling: false,
            dropout: true,
            neftune_noise_alpha: None,
            seed: 42,
            data_seed: 42,
            sampling: SamplingStrategy::default(),
            eval_every: None,
            log_every: 500,
            save_every: 500,
            keep: 2,
            watch: None,
            skip_nan_steps: 0,
            loss_limit: None,
        }
    }
}

/// When the model is evaluated in training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EvalStrategy {
    /// Never.
    #[default]
    No,
    /// Every `eval_steps` steps.
    Steps,
    /// After each epoch.
    Epoch,
}

/// How often something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// After each group of this many steps.
    Steps(u64),
    /// After each epoch.
    Epoch,
}

impl Settings {
    /// The division of this many rows into steps.
    pub(super) fn grouping(&self, rows: usize) -> Grouping {
        Grouping {
            rows,
            batch_size: self.batch_size.max(1),
            accumulation: self.accumulation.max(1),
        }
    }

    /// The number of steps of a training on this many rows.
    pub fn total_steps(&self, rows: usize) -> u64 {
        let steps = self.grouping(rows).steps() as f64 * self.epochs;
        self.max_steps.unwrap_or(steps.ceil() as u64)
    }

    /// The learning-rate schedule of a training of `total` steps.
    pub(super) fn schedule(&self, total: u64) -> Schedule {
        let warmup = if self.warmup < 1. {
            (total as f64 * self.warmup).ceil()
        } else {
            self.warmup
        };
        Schedule {
            scheduler: self.scheduler,
            kwargs: self.scheduler_kwargs,
            learning_rate: self.learning_rate,
            warmup: warmup as u64,
            total,
        }
    }
}
