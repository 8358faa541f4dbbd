//! Losses: what a training minimises, as pure functions of log-probabilities.
//!
//! A [`Loss`] says how rows become a batch, which tokens it scores, and what else it wants to know of them. The trainer
//! ([`crate::ml::train`]) runs the models and calls [`Loss::loss`], which gives the loss, its gradient by each log-probability, and the
//! metrics that are logged. Nothing else knows which loss it is.
//!
//! A new loss is a file here that implements the trait, and a stage that makes one (`stages::train`).

pub mod dpo;
pub mod orpo;
mod pairs;
pub mod sft;

use std::collections::BTreeMap;

use super::model::batch::{Batch, Row, Target};
use super::model::head::TokenStats;

pub use pairs::Preferences;

/// Numbers by TRL's names.
pub type Metrics = BTreeMap<&'static str, f64>;

/// What a loss wants to know beside the log-probabilities of its targets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// The log-probabilities of the same targets by a reference model.
    pub reference: bool,
    /// Entropy and arg max at each target.
    pub token_stats: bool,
    /// The mean over the vocabulary of the logits at each target.
    pub target_logits: bool,
    /// The mean of all logits of the preferred sequences and of the others.
    pub sequence_logits: bool,
}

/// A micro-batch that went through the model. Slices have one element for each target.
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// The micro-batch.
    pub batch: &'a Batch,
    /// The tokens that were scored: those of [`Loss::targets`], in that order.
    pub targets: &'a [Target],
    /// Their log-probabilities, in nats.
    pub logps: &'a [f64],
    /// Their log-probabilities by the reference model, if the loss needs them.
    pub reference_logps: Option<&'a [f64]>,
    /// Entropy and arg max at each of them, if asked for.
    pub token_stats: Option<&'a [TokenStats]>,
    /// The mean over the vocabulary of the logits at each of them, if asked for.
    pub target_logits: Option<&'a [f64]>,
    /// The mean of all logits of the preferred sequences and of the others, if asked for.
    pub sequence_logits: Option<[f64; 2]>,
}

/// A micro-batch's loss.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The loss, a mean over the micro-batch.
    pub loss: f64,
    /// Its gradient by the log-probability of each target.
    pub gradient: Vec<f32>,
    /// What is logged beside the loss: of [`Loss::metrics`] those for which there is what they are made of.
    pub metrics: Metrics,
}

/// A loss.
pub trait Loss: Send + Sync {
    /// Rows as one padded batch.
    ///
    /// # Errors
    /// A row lacks an answer that the loss needs, or is empty.
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch>;

    /// The tokens that are scored. Those of a sequence come in the order of their positions.
    fn targets(&self, batch: &Batch) -> Vec<Target>;

    /// What it wants to know beside their log-probabilities.
    fn needs(&self) -> Needs;

    /// How much a micro-batch with so many targets weighs in its accumulation group. TRL gives each the same weight.
    fn weight(&self, _targets: usize) -> f64 {
        1.
    }

    /// The names of its metrics, beside `loss`.
    fn metrics(&self) -> &'static [&'static str];

    /// Whether TRL's trainer logs `num_tokens`, the tokens that were trained on so far.
    fn logs_num_tokens(&self) -> bool {
        false
    }

    /// The loss, its gradient and its metrics: a pure function of what was scored.
    ///
    /// # Errors
    /// The loss is undefined, or something is missing that it needs.
    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome>;
}

/// `1 / (1 + e^-x)`, without overflow.
fn sigmoid(x: f64) -> f64 {
    if x >= 0. {
        1. / (1. + (-x).exp())
    } else {
        x.exp() / (1. + x.exp())
    }
}

/// `log sigmoid(x)`, without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.) - (-x.abs()).exp().ln_1p()
}
