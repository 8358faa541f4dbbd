//! The losses that trainings minimise, as pure functions of log-probabilities.
//!
//! A [`Loss`] says how rows become a batch, which tokens it scores, and what else it needs to know about them. The trainer
//! ([`crate::ml::train`]) runs the models and calls [`Loss::loss`], which returns the loss, its gradient with respect to each
//! log-probability, and the metrics that are logged. Nothing else depends on which loss it is.
//!
//! A new loss is a file here that implements the trait, and a stage that makes one (`stages::train`).

pub mod cpo;
pub mod dft;
pub mod dpo;
pub mod kto;
pub mod orpo;
mod pairs;
pub mod reward;
pub mod sft;
pub mod smoothed;

use std::collections::BTreeMap;

use super::model::batch::{Batch, Row, Target};
use super::model::head::{Positions, TokenStats};

pub use pairs::Preferences;

/// Metrics by the names that TRL gives them.
pub type Metrics = BTreeMap<&'static str, f64>;

/// What a loss needs beside the log-probabilities of its targets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Whether it needs the log-probabilities of the same targets under a reference model.
    pub reference: bool,
    /// Whether it needs the entropy and the arg max at each target.
    pub token_stats: bool,
    /// Whether it needs the mean over the vocabulary of the logits at each target.
    pub target_logits: bool,
    /// Whether the model's head gives one number at each target, which the loss takes in the place of log-probabilities.
    pub scores: bool,
    /// The positions of whose logits it needs the mean, once over the preferred sequences and once over the others.
    pub sequence_logits: Option<Positions>,
}

impl Needs {
    /// Those of a loss that compares answers with a reference model, and logs what TRL logs of them.
    pub(super) fn beside_reference() -> Self {
        Self {
            reference: true,
            token_stats: true,
            target_logits: true,
            ..Self::default()
        }
    }
}

/// A scored micro-batch. Slices have one element for each target.
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// The micro-batch.
    pub batch: &'a Batch,
    /// The scored tokens: those of [`Loss::targets`], in that order.
    pub targets: &'a [Target],
    /// Their log-probabilities, in nats; of a loss that [`Needs::scores`], their scores.
    pub logps: &'a [f64],
    /// Their log-probabilities under the reference model, in nats, if the loss needs them.
    pub reference_logps: Option<&'a [f64]>,
    /// The entropy and the arg max at each of them, if the loss needs them.
    pub token_stats: Option<&'a [TokenStats]>,
    /// The mean over the vocabulary of the logits at each of them, if the loss needs it.
    pub target_logits: Option<&'a [f64]>,
    /// The mean of all logits of the preferred sequences, and that of the others, if the loss needs them.
    pub sequence_logits: Option<[f64; 2]>,
    /// The mean over the sequences of [`Batch::mismatched`], if the batch has some, of the difference between the log-probability of the
    /// answer and that under the reference model, in nats.
    pub mismatched: Option<f64>,
}

/// The loss of a micro-batch.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The loss, a mean over the micro-batch.
    pub loss: f64,
    /// The gradient of the loss with respect to the log-probability, or the score, of each target (targets).
    pub gradient: Vec<f32>,
    /// The metrics that are logged beside the loss: those of [`Loss::metrics`] whose inputs are known.
    pub metrics: Metrics,
}

/// A loss, as a pure function of log-probabilities.
pub trait Loss: Send + Sync {
    /// Puts rows together as one batch, padded with the id `pad`.
    ///
    /// # Errors
    /// A row is empty, or lacks an answer that the loss needs.
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch>;

    /// The tokens that are scored, by default those of all answers. Those of one sequence are in the order of their positions.
    fn targets(&self, batch: &Batch) -> Vec<Target> {
        batch.answer_targets()
    }

    /// What it needs beside the log-probabilities of its targets.
    fn needs(&self) -> Needs;

    /// The part e of each target's probability that is spread over the vocabulary. Its scores are then `(1 - e) log p + e m` instead of `log p`,
    /// where `m` is the mean of the log-probabilities of all ids in its place.
    fn label_smoothing(&self) -> f64 {
        0.
    }

    /// The weight of a micro-batch with `targets` targets in its accumulation group. By default, as in TRL, all weigh the same.
    fn weight(&self, _targets: usize) -> f64 {
        1.
    }

    /// The names of its metrics beside `loss`.
    fn metrics(&self) -> &'static [&'static str];

    /// Whether TRL's trainer for this loss logs `num_tokens`, the number of tokens trained on so far.
    fn logs_num_tokens(&self) -> bool {
        false
    }

    /// Computes the loss, its gradient and its metrics from the scores alone.
    ///
    /// # Errors
    /// The loss is undefined for this micro-batch, or something that it needs is missing.
    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome>;
}

/// The logistic function `1 / (1 + e^-x)`, without overflow for any `x`.
fn sigmoid(x: f64) -> f64 {
    if x >= 0. {
        1. / (1. + (-x).exp())
    } else {
        x.exp() / (1. + x.exp())
    }
}

/// The logarithm of the logistic function, without overflow for any `x`.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.) - (-x.abs()).exp().ln_1p()
}
