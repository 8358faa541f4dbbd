//! Direct preference optimisation (Rafailov, Sharma, Mitchell, Ermon, Manning and Finn 2023, arXiv 2305.18290) and its relatives, as
//! TRL's `DPOTrainer` computes them.
//!
//! With `c` and `r` the log-probabilities of the preferred and the rejected answer (sums over their tokens) minus those under the
//! reference model, and `d = c - r`, the loss of a pair is `-log sigmoid(beta d)` (equation 7). With label smoothing e, the probability
//! that the labels of a pair are swapped, it is `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)` (Mitchell 2023, "A note on DPO
//! with noisy preferences", equation 3). [`LossType`] has the other losses. The loss of a micro-batch is the mean over its pairs; several
//! losses are added with their weights.

mod terms;

use anyhow::Context as _;

use self::terms::Pair;
use super::pairs::{mean, share_preferred};
use super::{Loss, Metrics, Needs, Outcome, Preferences, Scored};
use crate::ml::model::batch::{Batch, Row, Target};
use crate::ml::model::head::TokenStats;

pub use terms::{Divergence, LossType};

/// The loss of direct preference optimisation, or a mixture of losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Dpo {
    /// The strength of the constraint to stay close to the reference model (beta in the paper).
    pub beta: f64,
    /// The probability that the labels of a pair are swapped, in [0, 0.5).
    pub label_smoothing: f64,
    /// The losses that are added, each with its weight.
    pub terms: Vec<(LossType, f64)>,
    /// The weight of the tokens by which an answer is longer than the other one of its pair, in [0, 1] (Liu et al. 2024, LD-DPO, arXiv
    /// 2409.06411); without it all tokens weigh 1.
    pub ld_alpha: Option<f64>,
    /// Whether the loss of a pair is multiplied by how probable both of its answers are for the model that is trained, for all losses that
    /// are of pairs (Zhou et al. 2024, WPO, arXiv 2406.11827, equation 2): see [`Dpo::weighting`].
    pub use_weighting: bool,
    /// What the policy is held to the reference by.
    pub divergence: Divergence,
    /// The temperature of [`LossType::Discopop`].
    pub discopop_tau: f64,
}

impl Dpo {
    /// The sigmoid loss.
    pub fn sigmoid(beta: f64, label_smoothing: f64) -> Self {
        Self {
            beta,
            label_smoothing,
            terms: vec![(LossType::Sigmoid, 1.)],
            ld_alpha: None,
            use_weighting: false,
            divergence: Divergence::ReverseKl,
            discopop_tau: 0.05,
        }
    }

    /// The weight of each target in the log-probability of its answer.
    fn weights(&self, targets: &[Target], answers: &[(f64, usize)]) -> Option<Vec<f64>> {
        let alpha = self.ld_alpha?;
        let pairs = answers.len() / 2;
        let mut seen = vec![0usize; answers.len()];
        let weights = targets.iter().map(|target| {
            let other = (target.row + pairs) % answers.len();
            let shared = answers[target.row].1.min(answers[other].1);
            seen[target.row] += 1;
            if seen[target.row] <= shared {
                1.
            } else {
                alpha
            }
        });
        Some(weights.collect())
    }

    /// The weight of each pair, which counts as a constant: the product over both answers of `exp(mean(log p - log sum q^2))` over the
    /// answer's tokens, of which p is the probability and q that of each id in its place. `logps` are those of `targets`, and `answers` has
    /// the number of targets of each.
    ///
    /// # Errors
    /// `stats` is missing.
    fn weighting(
        &self,
        scored: &Scored<'_>,
        answers: &[(f64, usize)],
    ) -> anyhow::Result<Option<Vec<f64>>> {
        if !self.use_weighting {
            return Ok(None);
        }
        let stats = scored
            .token_stats
            .context("there are no sums of squared probabilities")?;
        let mut sums = vec![0f64; answers.len()];
        for ((target, logp), stats) in scored.targets.iter().zip(scored.logps).zip(stats) {
            sums[target.row] += logp - stats.log_sum_sq_probs;
        }
        let means = sums.iter().zip(answers);
        let weights: Vec<f64> = means.map(|(sum, (_, n))| (sum / *n as f64).exp()).collect();
        let (chosen, rejected) = weights.split_at(answers.len() / 2);
        Ok(Some(
            chosen.iter().zip(rejected).map(|(c, r)| c * r).collect(),
        ))
    }
}

/// `logps`, each times its weight.
fn weighted(logps: &[f64], weights: Option<&[f64]>) -> Vec<f64> {
    match weights {
        None => logps.to_vec(),
        Some(weights) => logps.iter().zip(weights).map(|(l, w)| l * w).collect(),
    }
}

impl Loss for Dpo {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::pairs(rows, pad)?)
    }

    fn needs(&self) -> Needs {
        Needs::beside_reference()
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
        let counted = Preferences::new(batch, targets, scored.logps)?;
        let weights = self.weights(targets, &counted.answers);
        let weights = weights.as_deref();
        let sums = |logps: &[f64]| Preferences::new(batch, targets, &weighted(logps, weights));
        let (policy, reference) = (sums(scored.logps)?, sums(reference)?);
        let pairs = policy.pairs();
        let ratios = policy.answers.iter().zip(&reference.answers);
        let ratios: Vec<f64> = ratios.map(|((p, _), (r, _))| p - r).collect();
        let (chosen, rejected) = ratios.split_at(pairs);
        let tokens = |answer: usize| policy.answers[answer].1 as f64;
        let all: Vec<Pair> = (0..pairs)
            .map(|pair| Pair {
                chosen: chosen[pair],
                rejected: rejected[pair],
                chosen_tokens: tokens(pair),
                rejected_tokens: tokens(pairs + pair),
            })
            .collect();
        let differences = |of: &Preferences| -> Vec<f64> {
            let (chosen, rejected) = of.answers.split_at(pairs);
            let both = chosen.iter().zip(rejected);
            both.map(|((c, _), (r, _))| c - r).collect()
        };
        let (policy_margins, reference_margins) = (differences(&policy), differences(&reference));

        let weighting = self.weighting(scored, &counted.answers)?;
        // The targets of the preferred answers come first.
        let border = targets.partition_point(|target| target.row < pairs);
        let mut loss = 0.;
        // With respect to the log-probability of each answer, and to that of each token of the preferred answers.
        let (mut grad_answers, mut grad_token) = (vec![0f64; 2 * pairs], 0f64);
        for &(kind, weight) in &self.terms {
            if kind == LossType::Sft {
                let likelihood = mean(scored.logps[..border].iter().copied());
                loss -= weight * likelihood;
                grad_token -= weight / border as f64;
                continue;
            }
            let mut losses = self.pairs(kind, &all, &policy_margins, &reference_margins);
            for (own, weight) in losses.iter_mut().zip(weighting.iter().flatten()) {
                *own = own.times(*weight);
            }
            loss += weight * mean(losses.iter().map(|own| own.loss));
            for (pair, own) in losses.iter().enumerate() {
                grad_answers[pair] += weight * own.grad_chosen / pairs as f64;
                grad_answers[pairs + pair] += weight * own.grad_rejected / pairs as f64;
            }
        }
        let gradient = targets.iter().enumerate().map(|(index, target)| {
            let weight = weights.map_or(1., |weights| weights[index]);
            let own = if index < border { grad_token } else { 0. };
            (grad_answers[target.row] * weight + own) as f32
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
            loss,
            gradient: gradient.collect(),
            metrics,
        })
    }
}

#[cfg(test)]
mod tests;
