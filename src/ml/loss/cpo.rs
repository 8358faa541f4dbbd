//! Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417) and its relatives without a reference model, as TRL's
//! `CPOTrainer` computes them.
//!
//! With `c` and `r` the rewards of the preferred and the rejected answer, and `d = c - r`, the loss of a pair is
//! `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)` (equation 3, with label smoothing e), or what [`LossType`] says. A reward is the
//! log-probability of the answer, a sum over its tokens, or their mean for `ipo` and `simpo`; with `alpha` other than 0 it is
//! `(1 - p^(-alpha)) / alpha` of its exponential p (Gupta et al. 2025, arXiv 2501.03884). The loss of a micro-batch is the mean over
//! its pairs plus `cpo_alpha` times the mean negative log-likelihood of the tokens of its preferred answers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pairs::{hinge, mean, share_preferred, smoothed_logistic};
use super::{Loss, Metrics, Needs, Outcome, Preferences, Scored};
use crate::ml::model::batch::{Batch, Row};
use crate::ml::model::head::Positions;

/// A loss of pairs, by TRL's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// CPO's own: `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)` of the difference d of the two rewards, with the label smoothing e.
    #[default]
    Sigmoid,
    /// `max(0, 1 - beta d)` (Zhao et al. 2023, SLiC-HF, arXiv 2305.10425, equation 4).
    Hinge,
    /// `(d - 1 / (2 beta))^2` of means over tokens (Azar et al. 2023, arXiv 2310.12036, equation 17).
    Ipo,
    /// The sigmoid loss of means over tokens, with `d - simpo_gamma / beta` in the place of d (Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6).
    Simpo,
    /// `simpo` without the likelihood, whatever `cpo_alpha` is.
    Alphapo,
}

/// The loss of contrastive preference optimisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cpo {
    /// The kind of loss.
    pub loss_type: LossType,
    /// The scale of the rewards.
    pub beta: f64,
    /// The probability that the labels of a pair are swapped, in [0, 0.5).
    pub label_smoothing: f64,
    /// The weight of the preferred answers' negative log-likelihood.
    pub cpo_alpha: f64,
    /// The margin that [`LossType::Simpo`] aims at.
    pub simpo_gamma: f64,
    /// The shape of the rewards; 0 for log-probabilities.
    pub alpha: f64,
}

impl Cpo {
    /// The reward of a log-probability, and its derivative.
    fn reward(&self, logp: f64) -> (f64, f64) {
        if self.alpha == 0. {
            return (logp, 1.);
        }
        let power = (-self.alpha * logp).exp();
        ((1. - power) / self.alpha, power)
    }

    /// The loss of a pair whose rewards differ by `d`, and its derivative.
    fn pair(&self, d: f64) -> (f64, f64) {
        let beta = self.beta;
        let (loss, slope) = match self.loss_type {
            LossType::Sigmoid => smoothed_logistic(beta * d, self.label_smoothing),
            LossType::Simpo | LossType::Alphapo => {
                smoothed_logistic(beta * d - self.simpo_gamma, self.label_smoothing)
            }
            LossType::Hinge => hinge(beta * d),
            LossType::Ipo => {
                let far = d - 0.5 / beta;
                return (far * far, 2. * far);
            }
        };
        (loss, beta * slope)
    }

    /// The weight of the likelihood.
    fn likelihood(&self) -> f64 {
        match self.loss_type {
            LossType::Alphapo => 0.,
            _ => self.cpo_alpha,
        }
    }

    /// Whether log-probabilities are means over an answer's tokens.
    fn averages(&self) -> bool {
        self.loss_type != LossType::Sigmoid && self.loss_type != LossType::Hinge
    }
}

impl Loss for Cpo {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::pairs(rows, pad)?)
    }

    fn needs(&self) -> Needs {
        Needs {
            sequence_logits: Some(Positions::All),
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
            "nll_loss",
        ]
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let &Scored { batch, targets, .. } = scored;
        let preferences = Preferences::new(batch, targets, scored.logps)?;
        let pairs = preferences.pairs();
        let tokens = |answer: usize| {
            if self.averages() {
                preferences.answers[answer].1 as f64
            } else {
                1.
            }
        };
        let logps: Vec<f64> = if self.averages() {
            preferences.means()
        } else {
            preferences.answers.iter().map(|(sum, _)| *sum).collect()
        };
        let rewards: Vec<(f64, f64)> = logps.iter().map(|logp| self.reward(*logp)).collect();
        let losses: Vec<(f64, f64)> = (0..pairs)
            .map(|pair| self.pair(rewards[pair].0 - rewards[pairs + pair].0))
            .collect();
        // The targets of the preferred answers come first.
        let border = targets.partition_point(|target| target.row < pairs);
        let alpha = self.likelihood();
        let nll = if alpha == 0. {
            0.
        } else {
            -mean(scored.logps[..border].iter().copied())
        };

        let gradient = targets.iter().map(|target| {
            let (pair, sign, likelihood) = if target.row < pairs {
                (target.row, 1., alpha / border as f64)
            } else {
                (target.row - pairs, -1., 0.)
            };
            let slope = sign * losses[pair].1 * rewards[target.row].1;
            (slope / (pairs as f64 * tokens(target.row)) - likelihood) as f32
        });

        let (chosen, rejected) = logps.split_at(pairs);
        let scaled: Vec<f64> = rewards.iter().map(|(r, _)| self.beta * r).collect();
        let (better, worse) = scaled.split_at(pairs);
        let side = |values: &[f64]| mean(values.iter().copied());
        let mut metrics = Metrics::from([
            ("rewards/chosen", side(better)),
            ("rewards/rejected", side(worse)),
            ("rewards/accuracies", share_preferred(better, worse)),
            (
                "rewards/margins",
                mean(better.iter().zip(worse).map(|(c, r)| c - r)),
            ),
            ("logps/chosen", side(chosen)),
            ("logps/rejected", side(rejected)),
            ("nll_loss", nll),
        ]);
        if let Some([chosen, rejected]) = scored.sequence_logits {
            metrics.insert("logits/chosen", chosen);
            metrics.insert("logits/rejected", rejected);
        }
        Ok(Outcome {
            loss: mean(losses.iter().map(|(loss, _)| *loss)) + alpha * nll,
            gradient: gradient.collect(),
            metrics,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ml::model::batch::Sequence;

    const KINDS: [LossType; 5] = [
        LossType::Sigmoid,
        LossType::Hinge,
        LossType::Ipo,
        LossType::Simpo,
        LossType::Alphapo,
    ];

    fn cpo(loss_type: LossType, beta: f64) -> Cpo {
        Cpo {
            loss_type,
            beta,
            label_smoothing: 0.,
            cpo_alpha: 1.,
            simpo_gamma: 0.5,
            alpha: 0.,
        }
    }

    /// Two pairs, with answers of 3, 1, 2 and 4 tokens.
    fn outcome(loss: &Cpo, logps: &[f64]) -> Outcome {
        let sequence = |ids: &[u32], prompt| Sequence::new(ids.to_vec(), prompt);
        let sequences = vec![
            sequence(&[1, 2, 3, 4, 5], 2),
            sequence(&[1, 2], 1),
            sequence(&[1, 2, 7, 4], 2),
            sequence(&[1, 9, 9, 9, 9], 1),
        ];
        let batch = Batch::new(sequences, 0).unwrap();
        let targets = loss.targets(&batch);
        let scored = Scored {
            batch: &batch,
            targets: &targets,
            logps,
            reference_logps: None,
            token_stats: None,
            target_logits: None,
            sequence_logits: None,
            mismatched: None,
        };
        loss.loss(&scored).unwrap()
    }

    proptest! {
        #[test]
        fn the_gradient_is_the_difference_quotient(
            logps in prop::collection::vec(-2f64..-0.01, 10), kind in 0usize..5, beta in 0.05f64..2.,
            label_smoothing in 0f64..0.5, cpo_alpha in 0f64..2., alpha in prop_oneof![Just(0.), -0.5f64..0.5],
        ) {
            let loss = Cpo { label_smoothing, cpo_alpha, alpha, ..cpo(KINDS[kind], beta) };
            let at = outcome(&loss, &logps);
            let scale = 1. + at.loss.abs();
            for (index, g) in at.gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut logps = logps.clone();
                    logps[index] += by;
                    outcome(&loss, &logps).loss
                };
                // Means are rounded to f32, so steps are not too small.
                let (up, down) = (moved(1e-2), moved(-1e-2));
                let corner = ((up - at.loss) - (at.loss - down)).abs();
                prop_assume!(corner < 1e-4 * scale);
                let quotient = (up - down) / 2e-2;
                prop_assert!((quotient - f64::from(*g)).abs() < 2e-3 * (scale + quotient.abs()), "{} {} {}", index, quotient, g);
            }
        }

        /// The same of a pair and of a reward alone, in f64, where means are not rounded.
        #[test]
        fn derivatives_are_difference_quotients(
            d in -20f64..20., logp in -9f64..-0.01, kind in 0usize..5, beta in 0.05f64..2., label_smoothing in 0f64..0.5,
            alpha in prop_oneof![Just(0.), -0.5f64..0.5],
        ) {
            let loss = Cpo { label_smoothing, alpha, ..cpo(KINDS[kind], beta) };
            prop_assume!((beta * d - 1.).abs() > 1e-4, "the hinge's corner");
            let quotient = |of: &dyn Fn(f64) -> f64, at: f64| (of(at + 1e-5) - of(at - 1e-5)) / 2e-5;
            let (found, slope) = (quotient(&|d| loss.pair(d).0, d), loss.pair(d).1);
            prop_assert!((found - slope).abs() < 1e-7 * (1. + slope.abs()), "{} {}", found, slope);
            let (found, slope) = (quotient(&|logp| loss.reward(logp).0, logp), loss.reward(logp).1);
            prop_assert!((found - slope).abs() < 1e-6 * (1. + slope.abs()), "{} {}", found, slope);
        }

        /// A target margin of 0 leaves the sigmoid loss of means, and without the likelihood only differences count.
        #[test]
        fn simpo_without_a_margin_and_the_likelihood(logps in prop::collection::vec(-2f64..-0.01, 10), by in -1f64..0.) {
            let plain = Cpo { cpo_alpha: 0., simpo_gamma: 0., ..cpo(LossType::Simpo, 2.) };
            let shifted: Vec<f64> = logps.iter().map(|logp| logp + by).collect();
            let (before, after) = (outcome(&plain, &logps), outcome(&plain, &shifted));
            prop_assert!((before.loss - after.loss).abs() < 1e-6);
            let wider = Cpo { simpo_gamma: 0.7, ..plain };
            prop_assert!(outcome(&wider, &logps).loss > before.loss);
        }
    }

    #[test]
    fn equal_answers_cost_log_2() {
        let loss = Cpo {
            cpo_alpha: 0.,
            simpo_gamma: 0.,
            ..cpo(LossType::Simpo, 2.)
        };
        let outcome = outcome(&loss, &[-1.5; 10]);
        assert!((outcome.loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!(outcome.metrics["rewards/accuracies"].to_bits(), 0);
        assert_eq!(outcome.metrics["nll_loss"].to_bits(), 0);
    }
}
