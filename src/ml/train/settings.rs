//! The settings of a training, and what follows from them.

use std::path::PathBuf;

use super::best::Watch;
use super::optim;
use super::sampler::Sampling;
use super::schedule::{Schedule, Shape};
use crate::ml::loss::Objective;

/// The settings of a training, by transformers' names.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What is minimised.
    pub objective: Objective,
    /// The id that fills batches up.
    pub pad: u32,
    /// Rows in a micro-batch.
    pub batch_size: usize,
    /// Rows in a batch of the evaluation.
    pub eval_batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// How often all rows are seen.
    pub epochs: f64,
    /// The number of steps, instead of `epochs`.
    pub max_steps: Option<u64>,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it changes.
    pub shape: Shape,
    /// Steps of warm-up; below 1, a share of all steps.
    pub warmup: f64,
    /// The optimiser.
    pub optimizer: optim::Settings,
    /// The largest norm of the gradient; 0 for no limit.
    pub max_grad_norm: f64,
    /// Whether layers are computed again in the backward.
    pub checkpointing: bool,
    /// Whether losses are scaled for f16 gradients.
    pub scaler: bool,
    /// Whether the adapter's dropout is at work.
    pub dropout: bool,
    /// The seed of everything random but the order.
    pub seed: u64,
    /// The seed of the order.
    pub data_seed: u64,
    /// The order.
    pub sampling: Sampling,
    /// Steps between evaluations; none for no evaluation.
    pub eval_every: Option<Every>,
    /// Steps between the logs that the callback gets.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// How many checkpoints are kept.
    pub keep: usize,
    /// What is watched in evaluations, if anything.
    pub watch: Option<Watch>,
    /// How many steps that are not finite are left out before one stops the training.
    pub skip_nan_steps: u64,
    /// The name of the rows' split, for messages.
    pub split: String,
    /// Where the last state is left for a training with more steps: see [`super::take_up`].
    pub leave: Option<PathBuf>,
    /// How many rows to train on were made of each row of the split.
    pub rows_each: usize,
    /// The stored weights that the training began with, each with its noun (`model`): looked through when something is not
    /// finite.
    pub sources: Vec<(&'static str, PathBuf)>,
}

/// How often something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// After so many steps.
    Steps(u64),
    /// After each epoch.
    Epoch,
}

/// How the rows fall into steps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) rows: usize,
    pub(super) batch: usize,
    pub(super) group: usize,
}

impl Plan {
    pub(super) fn micro_batches(self) -> usize {
        self.rows.div_ceil(self.batch)
    }

    /// The last group of an epoch may be smaller, and is a step all the same.
    pub(super) fn steps(self) -> u64 {
        self.micro_batches().div_ceil(self.group) as u64
    }
}

impl Settings {
    pub(super) fn plan(&self, rows: usize) -> Plan {
        Plan {
            rows,
            batch: self.batch_size.max(1),
            group: self.accumulation.max(1),
        }
    }

    /// The number of steps for so many rows.
    pub fn total_steps(&self, rows: usize) -> u64 {
        let steps = self.plan(rows).steps() as f64 * self.epochs;
        self.max_steps.unwrap_or(steps.ceil() as u64)
    }

    pub(super) fn schedule(&self, total: u64) -> Schedule {
        let warmup = if self.warmup < 1. {
            (total as f64 * self.warmup).ceil()
        } else {
            self.warmup
        };
        Schedule {
            shape: self.shape,
            warmup: warmup as u64,
            total,
        }
    }
}
