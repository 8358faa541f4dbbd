//! The loss of reward models: the negative log-likelihood of preferences under the model of Bradley and Terry (Ouyang et al. 2022, arXiv
//! 2203.02155, equation 1), as TRL's `RewardTrainer` computes it.
//!
//! With `c` and `r` the scores of the preferred and the rejected sequence and `m` the pair's margin, if it has one, the loss of a pair is
//! `-log sigmoid(c - r - m)` (Touvron et al. 2023, arXiv 2307.09288, equation 2), plus `center_rewards_coefficient` times `(c + r)^2`
//! (Eisenstein et al. 2023, arXiv 2312.09244, equation 2), which holds scores near 0. The loss of a micro-batch is the mean over its pairs.

use super::pairs::{mean, share_preferred};
use super::{Loss, Metrics, Needs, Outcome, Scored, log_sigmoid, sigmoid};
use crate::ml::model::batch::{Batch, Row, Target};

/// The loss of a reward model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reward {
    /// The weight of the squared sum of a pair's scores; 0 for none.
    pub center_rewards_coefficient: f64,
}

/// The place at which a sequence of a batch is scored: behind its last token that is not the padding's (transformers'
/// `GenericForSequenceClassification`), or behind its first one if there is none.
pub fn end(batch: &Batch, row: usize) -> Option<Target> {
    let ids = &batch.sequences.get(row)?.ids;
    let last = ids.iter().rposition(|id| *id != batch.pad()).unwrap_or(0);
    Some(Target {
        row,
        position: last + 1,
        id: 0,
    })
}

impl Loss for Reward {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::pairs(rows, pad)?)
    }

    /// The ends of all sequences.
    fn targets(&self, batch: &Batch) -> Vec<Target> {
        (0..batch.sequences.len())
            .filter_map(|row| end(batch, row))
            .collect()
    }

    fn needs(&self) -> Needs {
        Needs {
            scores: true,
            ..Needs::default()
        }
    }

    fn metrics(&self) -> &'static [&'static str] {
        &[
            "min_reward",
            "mean_reward",
            "max_reward",
            "accuracy",
            "margin",
        ]
    }

    fn logs_num_tokens(&self) -> bool {
        true
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        // As many as there are sequences, in their order.
        let scores = scored.logps;
        let (chosen, rejected) = scores.split_at(scores.len() / 2);
        let pairs = chosen.len();
        let margins = scored.batch.margins();
        let (coefficient, mut loss) = (self.center_rewards_coefficient, 0.);
        let mut gradient = vec![0f32; scores.len()];
        for (pair, (c, r)) in chosen.iter().zip(rejected).enumerate() {
            let x = c - r - margins.get(pair).copied().unwrap_or(0.);
            loss += -log_sigmoid(x) + coefficient * (c + r).powi(2);
            let center = 2. * coefficient * (c + r);
            gradient[pair] = ((center - sigmoid(-x)) / pairs as f64) as f32;
            gradient[pairs + pair] = ((center + sigmoid(-x)) / pairs as f64) as f32;
        }
        let differences = chosen.iter().zip(rejected).map(|(c, r)| c - r);
        let metrics = Metrics::from([
            (
                "min_reward",
                scores.iter().copied().fold(f64::INFINITY, f64::min),
            ),
            ("mean_reward", mean(scores.iter().copied())),
            (
                "max_reward",
                scores.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            ),
            ("accuracy", share_preferred(chosen, rejected)),
            ("margin", mean(differences)),
        ]);
        Ok(Outcome {
            loss: loss / pairs as f64,
            gradient,
            metrics,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(margins: [Option<f64>; 2]) -> Vec<Row> {
        let row = |prompt: &[u32], chosen: &[u32], rejected: &[u32], margin| Row {
            prompt: prompt.to_vec(),
            chosen: chosen.to_vec(),
            rejected: Some(rejected.to_vec()),
            margin,
            ..Row::default()
        };
        vec![
            row(&[1, 2], &[3, 4, 5], &[6], margins[0]),
            row(&[1], &[2, 9, 9], &[7, 9, 8], margins[1]),
        ]
    }

    fn outcome(loss: Reward, margins: [Option<f64>; 2], scores: &[f64]) -> Outcome {
        let rows = rows(margins);
        let references: Vec<&Row> = rows.iter().collect();
        let batch = loss.batch(&references, 9).unwrap();
        let targets = loss.targets(&batch);
        let ends: Vec<(usize, usize)> = targets.iter().map(|t| (t.row, t.position)).collect();
        // Padding at an end does not count, wherever else it stands.
        assert_eq!(ends, [(0, 5), (1, 2), (2, 3), (3, 4)]);
        let scored = Scored {
            batch: &batch,
            targets: &targets,
            logps: scores,
            reference_logps: None,
            token_stats: None,
            target_logits: None,
            sequence_logits: None,
            mismatched: None,
        };
        loss.loss(&scored).unwrap()
    }

    fn scores() -> impl Strategy<Value = Vec<f64>> {
        prop::collection::vec(-5f64..5., 4)
    }

    proptest! {
        #[test]
        fn the_gradient_is_the_difference_quotient(
            scores in scores(), center_rewards_coefficient in 0f64..1., margins in prop::option::of((-2f64..2., -2f64..2.)),
        ) {
            let loss = Reward { center_rewards_coefficient };
            let margins = margins.map_or([None, None], |(a, b)| [Some(a), Some(b)]);
            for (index, g) in outcome(loss, margins, &scores).gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut scores = scores.clone();
                    scores[index] += by;
                    outcome(loss, margins, &scores).loss
                };
                let quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                prop_assert!((quotient - f64::from(*g)).abs() < 1e-6, "{} {} {}", index, quotient, g);
            }
        }

        /// Only differences count, unless scores are held near 0; a margin is a difference that does not count.
        #[test]
        fn a_shift_changes_nothing_without_centering(scores in scores(), by in -5f64..5.) {
            let plain = Reward::default();
            let shifted: Vec<f64> = scores.iter().map(|score| score + by).collect();
            let before = outcome(plain, [None, None], &scores);
            prop_assert!((before.loss - outcome(plain, [None, None], &shifted).loss).abs() < 1e-9);
            let raised: Vec<f64> = scores.iter().enumerate().map(|(n, score)| if n < 2 { score + by } else { *score }).collect();
            let margin = outcome(plain, [Some(by), Some(by)], &raised);
            prop_assert!((before.loss - margin.loss).abs() < 1e-9);
            let centered = Reward { center_rewards_coefficient: 0.1 };
            let pull: f64 = (0..2).map(|pair| (scores[pair] + scores[2 + pair]).powi(2)).sum::<f64>() / 2.;
            prop_assert!((outcome(centered, [None, None], &scores).loss - before.loss - 0.1 * pull).abs() < 1e-9);
        }
    }

    #[test]
    fn equal_scores_have_a_loss_of_log_2_and_prefer_nothing() {
        let even = outcome(Reward::default(), [None, None], &[0.5; 4]);
        assert!((even.loss - std::f64::consts::LN_2).abs() < 1e-15);
        assert!(even.metrics["accuracy"].abs() < 1e-15 && even.metrics["margin"].abs() < 1e-15);
        // One margin alone is none, as a mean would mix two losses.
        let half = outcome(Reward::default(), [Some(3.), None], &[0.5; 4]);
        assert_eq!(half.loss.to_bits(), even.loss.to_bits());
        for far in [1e6, -1e6] {
            let outcome = outcome(Reward::default(), [None, None], &[far, far, 0., 0.]);
            assert!(outcome.loss.is_finite() && outcome.gradient.iter().all(|g| g.abs() <= 0.5));
        }
    }
}
