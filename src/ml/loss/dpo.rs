//! Direct preference optimisation (Rafailov, Sharma, Mitchell, Ermon, Manning and Finn 2023, arXiv 2305.18290), as TRL's `DPOTrainer`
//! computes it with `loss_type: sigmoid`.
//!
//! With `c` and `r` the log-probabilities of the preferred and the rejected answer (sums over their tokens) minus those under the
//! reference model, and `d = c - r`, the loss of a pair is `-log sigmoid(beta d)` (equation 7). With label smoothing e, the probability
//! that the labels of a pair are swapped, it is `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)` (Mitchell 2023, "A note on DPO
//! with noisy preferences", equation 3). The loss of a micro-batch is the mean over its pairs.

use anyhow::Context as _;

use super::pairs::{mean, share_preferred};
use super::{Loss, Metrics, Needs, Outcome, Preferences, Scored, log_sigmoid, sigmoid};
use crate::ml::model::batch::{Batch, Row, Target};
use crate::ml::model::head::TokenStats;

/// The loss of direct preference optimisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dpo {
    /// The strength of the constraint to stay close to the reference model (beta in the paper).
    pub beta: f64,
    /// The probability that the labels of a pair are swapped, in [0, 0.5).
    pub label_smoothing: f64,
}

impl Dpo {
    /// The loss of a pair and its derivative with respect to `margin`, the difference `d` between the two answers' log-ratios.
    fn pair(&self, margin: f64) -> (f64, f64) {
        let (x, e) = (self.beta * margin, self.label_smoothing);
        let loss = -(1. - e) * log_sigmoid(x) - e * log_sigmoid(-x);
        let derivative = self.beta * (e * sigmoid(x) - (1. - e) * sigmoid(-x));
        (loss, derivative)
    }
}

impl Loss for Dpo {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::pairs(rows, pad)?)
    }

    /// The tokens of all answers.
    fn targets(&self, batch: &Batch) -> Vec<Target> {
        (0..batch.sequences.len())
            .flat_map(|row| batch.targets(row, true))
            .collect()
    }

    fn needs(&self) -> Needs {
        Needs {
            reference: true,
            token_stats: true,
            target_logits: true,
            ..Needs::default()
        }
    }

    fn metrics(&self) -> &'static [&'static str] {
        &[
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "logits/chosen",
            "logits/rejected",
            "entropy",
            "mean_token_accuracy",
        ]
    }

    fn logs_num_tokens(&self) -> bool {
        true
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let &Scored { batch, targets, .. } = scored;
        let reference = scored
            .reference_logps
            .context("there are no log-probabilities by a reference model")?;
        let policy = Preferences::new(batch, targets, scored.logps)?;
        let reference = Preferences::new(batch, targets, reference)?;
        let pairs = policy.pairs();
        let ratios = policy.answers.iter().zip(&reference.answers);
        let ratios: Vec<f64> = ratios.map(|((p, _), (r, _))| p - r).collect();
        let (chosen, rejected) = ratios.split_at(pairs);
        let outcomes: Vec<(f64, f64)> = chosen
            .iter()
            .zip(rejected)
            .map(|(c, r)| self.pair(c - r))
            .collect();

        let gradient = targets.iter().map(|target| {
            let (pair, sign) = if target.row < pairs {
                (target.row, 1.)
            } else {
                (target.row - pairs, -1.)
            };
            (sign * outcomes[pair].1 / pairs as f64) as f32
        });

        let side = |values: &[f64]| mean(values.iter().copied());
        let (logps_chosen, logps_rejected) = policy.answers.split_at(pairs);
        let margins = chosen.iter().zip(rejected).map(|(c, r)| c - r);
        let mut metrics = Metrics::from([
            ("rewards/chosen", self.beta * side(chosen)),
            ("rewards/rejected", self.beta * side(rejected)),
            ("rewards/accuracies", share_preferred(chosen, rejected)),
            ("rewards/margins", self.beta * mean(margins)),
            (
                "logps/chosen",
                mean(logps_chosen.iter().map(|(sum, _)| *sum)),
            ),
            (
                "logps/rejected",
                mean(logps_rejected.iter().map(|(sum, _)| *sum)),
            ),
        ]);
        // The targets of the preferred answers come first.
        let border = targets.partition_point(|target| target.row < pairs);
        if let Some(logits) = scored.target_logits {
            let (chosen, rejected) = logits.split_at(border);
            metrics.insert("logits/chosen", side(chosen));
            metrics.insert("logits/rejected", side(rejected));
        }
        if let Some(stats) = scored.token_stats {
            metrics.insert("entropy", TokenStats::mean_entropy(stats));
            metrics.insert(
                "mean_token_accuracy",
                TokenStats::accuracy(&stats[..border]),
            );
        }
        Ok(Outcome {
            loss: mean(outcomes.iter().map(|(loss, _)| *loss)),
            gradient: gradient.collect(),
            metrics,
        })
    }
}

#[cfg(test)]
mod tests;
