//! What a training minimises: one entry point for the losses.

use std::collections::BTreeMap;

use anyhow::ensure;

use super::batch::{Batch, Row, Target};
use super::forward::Forward;
use super::linear::Pass;
use super::model::{Gradients, Llama};
use super::{orpo, sft};

/// Numbers by TRL's names.
pub type Metrics = BTreeMap<&'static str, f64>;

/// A loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// See [`super::orpo`].
    Orpo {
        /// The weight of the odds ratio.
        beta: f64,
    },
    /// See [`super::sft`].
    Sft {
        /// Whether the prompt's tokens are left out.
        completion_only: bool,
    },
}

/// A micro-batch's loss, its gradient by the log-probability of each target, and its metrics.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The loss.
    pub loss: f64,
    /// The gradient.
    pub gradient: Vec<f32>,
    /// What is logged beside the loss.
    pub metrics: Metrics,
}

impl Objective {
    /// The rows as one padded batch.
    pub fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(match self {
            Self::Orpo { .. } => Batch::pairs(rows, pad)?,
            Self::Sft { .. } => Batch::new(rows.iter().map(|row| row.chosen()).collect(), pad)?,
        })
    }

    /// The tokens whose log-probabilities the loss needs.
    pub fn targets(&self, batch: &Batch) -> Vec<Target> {
        match self {
            Self::Orpo { .. } => orpo::targets(batch),
            Self::Sft { completion_only } => sft::targets(batch, *completion_only),
        }
    }

    /// How much a micro-batch weighs in its accumulation group: TRL's ORPO gives each the same weight, transformers'
    /// language modelling counts tokens.
    pub fn weight(&self, targets: &[Target]) -> f64 {
        match self {
            Self::Orpo { .. } => 1.,
            Self::Sft { .. } => targets.len() as f64,
        }
    }

    fn outcome(
        &self,
        forward: &mut Forward<'_>,
        batch: &Batch,
        targets: &[Target],
    ) -> anyhow::Result<Outcome> {
        ensure!(!targets.is_empty(), "the batch has no token to learn");
        let certainty = matches!(self, Self::Sft { .. });
        let scores = forward.score(targets, certainty)?;
        match self {
            Self::Orpo { beta } => {
                let pairs = batch.sequences.len() / 2;
                let means = (
                    forward.mean_logit(0, pairs)?,
                    forward.mean_logit(pairs, pairs)?,
                );
                orpo::loss(batch, targets, &scores.logps, means, *beta)
            }
            Self::Sft { .. } => Ok(sft::loss(&scores)),
        }
    }

    /// The loss without a gradient.
    pub fn evaluate(&self, model: &Llama, batch: &Batch, pass: Pass) -> anyhow::Result<Outcome> {
        in_pool(|| {
            let mut forward = Forward::new(model, batch, pass, false)?;
            self.outcome(&mut forward, batch, &self.targets(batch))
        })
    }

    /// The loss of a micro-batch; its gradient times `scale` is added to `gradients`.
    pub fn differentiate(
        &self,
        model: &Llama,
        batch: &Batch,
        scale: f64,
        dropout: Option<u64>,
        checkpointing: bool,
        gradients: &mut Gradients,
    ) -> anyhow::Result<Outcome> {
        let pass = Pass {
            tape: true,
            adapter: true,
            dropout,
        };
        in_pool(|| {
            let mut forward = Forward::new(model, batch, pass, checkpointing)?;
            let outcome = self.outcome(&mut forward, batch, &self.targets(batch))?;
            if outcome.loss.is_finite() {
                let scaled: Vec<f32> = outcome
                    .gradient
                    .iter()
                    .map(|g| (f64::from(*g) * scale) as f32)
                    .collect();
                forward.backward(&scaled, gradients)?;
            }
            Ok(outcome)
        })
    }
}

/// Runs something on one of the threads that share its work: called from another, each operation would wake and wait for them.
pub(super) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
