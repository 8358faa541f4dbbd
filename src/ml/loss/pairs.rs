//! What the losses of preference pairs have in common. A batch of n pairs has the n preferred sequences first, then the n rejected
//! ones.

use anyhow::ensure;

use super::{log_sigmoid, sigmoid};
use crate::ml::model::batch::{Batch, Target};

/// The logistic loss of `x` with the label smoothing `e`, `-(1 - e) log sigmoid(x) - e log sigmoid(-x)` (Mitchell 2023, "A note on DPO
/// with noisy preferences", equation 3), and its derivative.
pub(super) fn smoothed_logistic(x: f64, e: f64) -> (f64, f64) {
    let loss = -(1. - e) * log_sigmoid(x) - e * log_sigmoid(-x);
    (loss, e * sigmoid(x) - (1. - e) * sigmoid(-x))
}

/// `max(0, 1 - x)`, and its derivative, which is 0 at the corner.
pub(super) fn hinge(x: f64) -> (f64, f64) {
    ((1. - x).max(0.), if x < 1. { -1. } else { 0. })
}

/// The log-probabilities of the answers of n pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Preferences {
    /// For each answer, the sum of its tokens' log-probabilities in nats, and the number of its tokens: n preferred answers, then n
    /// rejected ones.
    pub answers: Vec<(f64, usize)>,
}

/// Whether a target is a token of its sequence's answer.
pub(super) fn in_answer(batch: &Batch, target: &Target) -> bool {
    let sequence = batch.sequences.get(target.row);
    sequence.is_some_and(|sequence| target.position >= sequence.prompt)
}

impl Preferences {
    /// Sums `logps`, the log-probabilities of `targets` in nats, over the answers of `batch`. Targets outside the answers are ignored.
    ///
    /// # Errors
    /// An answer has no target.
    pub fn new(batch: &Batch, targets: &[Target], logps: &[f64]) -> anyhow::Result<Self> {
        let mut answers = vec![(0f64, 0usize); batch.sequences.len()];
        for (target, logp) in targets.iter().zip(logps) {
            if in_answer(batch, target)
                && let Some(sum) = answers.get_mut(target.row)
            {
                *sum = (sum.0 + logp, sum.1 + 1);
            }
        }
        ensure!(
            answers.iter().all(|(_, count)| *count > 0),
            "an answer has no token, so its log-probability is undefined"
        );
        Ok(Self { answers })
    }

    /// The number of pairs.
    pub fn pairs(&self) -> usize {
        self.answers.len() / 2
    }

    /// The mean log-probability of each answer's tokens (2n), rounded to f32, because TRL compares these in f32 and what ties there must
    /// tie here.
    pub fn means(&self) -> Vec<f64> {
        let answers = self.answers.iter();
        answers
            .map(|(sum, count)| f64::from((sum / *count as f64) as f32))
            .collect()
    }

    /// The mean over the pairs of the difference between the mean log-probabilities of the preferred and the rejected answer, in nats.
    pub fn margin(&self) -> f64 {
        let means = self.means();
        let (chosen, rejected) = means.split_at(self.pairs());
        mean(chosen.iter().zip(rejected).map(|(c, r)| c - r))
    }
}

/// The mean of the values, of which there is one for each pair.
pub(super) fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// The share of pairs in which `chosen` is larger than `rejected`; equal values count as not preferred.
pub(super) fn share_preferred(chosen: &[f64], rejected: &[f64]) -> f64 {
    let preferred = chosen.iter().zip(rejected).filter(|(c, r)| c > r).count();
    preferred as f64 / chosen.len() as f64
}
