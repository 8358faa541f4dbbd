//! What losses of preference pairs share. A batch of n pairs has the n preferred sequences first, then the n others.

use anyhow::ensure;

use crate::ml::model::batch::{Batch, Target};

/// The log-probabilities of the answers of n pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Preferences {
    /// The sum over the tokens of each answer, and how many these are: n preferred ones, then n others.
    pub answers: Vec<(f64, usize)>,
}

/// Whether a target is a token of its sequence's answer.
pub(super) fn in_answer(batch: &Batch, target: &Target) -> bool {
    let sequence = batch.sequences.get(target.row);
    sequence.is_some_and(|sequence| target.position >= sequence.prompt)
}

impl Preferences {
    /// Sums `logps`, the log-probability of each of the targets, over the answers.
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

    /// The mean log-probability of each answer's tokens, rounded to f32: TRL compares these in f32, and ties must tie here too.
    pub fn means(&self) -> Vec<f64> {
        let answers = self.answers.iter();
        answers
            .map(|(sum, count)| f64::from((sum / *count as f64) as f32))
            .collect()
    }

    /// The mean over the pairs of the difference of the two answers' mean log-probabilities.
    pub fn margin(&self) -> f64 {
        let means = self.means();
        let (chosen, rejected) = means.split_at(self.pairs());
        mean(chosen.iter().zip(rejected).map(|(c, r)| c - r))
    }
}

/// The mean of some numbers, one for each pair.
pub(super) fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// The share of pairs whose first number is the larger one. A tie counts as a loss.
pub(super) fn share_preferred(chosen: &[f64], rejected: &[f64]) -> f64 {
    let preferred = chosen.iter().zip(rejected).filter(|(c, r)| c > r).count();
    preferred as f64 / chosen.len() as f64
}
