//! What a training minimises: one entry point for the losses.

pub mod orpo;
pub mod sft;

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};

use super::backend::ForwardPass;
use super::execution::Execution;
use super::model::Gradients;
use super::model::batch::{Batch, Row, Target};
use super::model::linear::{Drops, Pass};

/// Numbers by TRL's names.
pub type Metrics = BTreeMap<&'static str, f64>;

/// A loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// See [`self::orpo`].
    Orpo {
        /// The weight of the odds ratio.
        beta: f64,
    },
    /// See [`self::sft`].
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

    /// The outcome of each of the batches that went through the model.
    fn outcomes(
        &self,
        forward: &mut dyn ForwardPass,
        batches: &[&Batch],
    ) -> anyhow::Result<Vec<Outcome>> {
        let mut all = Vec::new();
        let mut parts = Vec::new();
        let mut first = 0;
        for &batch in batches {
            let targets = self.targets(batch);
            ensure!(!targets.is_empty(), "the batch has no token to learn");
            let start = all.len();
            all.extend(targets.iter().map(|target| Target {
                row: first + target.row,
                ..*target
            }));
            parts.push((batch, first, targets, start));
            first += batch.sequences.len();
        }
        let certainty = matches!(self, Self::Sft { .. });
        let scores = forward.score(&all, certainty)?;
        let outcomes = parts.into_iter().map(|(batch, first, targets, start)| {
            let span = start..start + targets.len();
            let logps = scores.logps.get(span.clone()).unwrap_or_default();
            match self {
                Self::Orpo { beta } => {
                    let pairs = batch.sequences.len() / 2;
                    let means = (
                        forward.mean_logit(first, pairs)?,
                        forward.mean_logit(first + pairs, pairs)?,
                    );
                    orpo::loss(batch, &targets, logps, means, *beta)
                }
                Self::Sft { .. } => {
                    let certainty = scores.certainty.as_ref().and_then(|all| all.get(span));
                    Ok(sft::loss(logps, certainty))
                }
            }
        });
        outcomes.collect()
    }

    /// The loss without a gradient.
    pub fn evaluate(
        &self,
        execution: &Execution<'_>,
        batch: &Batch,
        pass: Pass,
    ) -> anyhow::Result<Outcome> {
        in_pool(|| {
            let mut forward = execution.forward(&[batch], pass, false)?;
            let outcomes = self.outcomes(&mut *forward, &[batch])?;
            outcomes.into_iter().next().context("no outcome")
        })
    }

    /// The losses of some micro-batches, no more than [`Execution::pass_size`] says; of each the gradient times its scale is
    /// added to `gradients`, unless a loss is not finite.
    pub fn differentiate(
        &self,
        execution: &Execution<'_>,
        batches: &[(&Batch, f64)],
        dropout: Option<Drops>,
        checkpointing: bool,
        gradients: &mut Gradients,
    ) -> anyhow::Result<Vec<Outcome>> {
        let pass = Pass::learn(dropout);
        in_pool(|| {
            let (batches, scales): (Vec<&Batch>, Vec<f64>) = batches.iter().copied().unzip();
            let mut forward = execution.forward(&batches, pass, checkpointing)?;
            let outcomes = self.outcomes(&mut *forward, &batches)?;
            if outcomes.iter().all(|outcome| outcome.loss.is_finite()) {
                let scaled = outcomes.iter().zip(scales).flat_map(|(outcome, scale)| {
                    let gradient = outcome.gradient.iter();
                    gradient.map(move |g| (f64::from(*g) * scale) as f32)
                });
                forward.backward(&scaled.collect::<Vec<f32>>(), gradients)?;
            }
            Ok(outcomes)
        })
    }
}

/// Runs something on one of the threads that share its work: called from another, each operation would wake and wait for them.
pub(super) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
