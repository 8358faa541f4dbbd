//! Odds-ratio preference optimisation (Hong, Lee and Thorne 2024, arXiv 2403.07691), as TRL's `ORPOTrainer` computes it.
//!
//! With `c` and `r` the mean log-probabilities of the tokens of the preferred and the rejected answer,
//! `log_odds = (c - r) - (log(1 - e^c) - log(1 - e^r))` (equations 3 and 4), and the loss of a micro-batch is
//! `nll - beta * mean(log sigmoid(log_odds))` (equations 6 and 7). `nll` is the mean negative log-likelihood of all tokens of the
//! preferred sequences, *the prompts included*; the odds depend on the answers only.
//!
//! The gradient is computed in closed form, `d log_odds / dc = 1 / (1 - e^c)`, which is finite where automatic differentiation through
//! a masked expression could produce a NaN.

use super::pairs::{in_answer, mean, share_preferred};
use super::{Loss, Metrics, Needs, Outcome, Preferences, Scored, log_sigmoid, sigmoid};
use crate::ml::model::batch::{Batch, Row, Target};
use crate::ml::model::head::Positions;

/// The loss of odds-ratio preference optimisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Orpo {
    /// The weight of the odds ratio's term relative to the likelihood's (lambda in the paper).
    pub beta: f64,
}

/// Log-probabilities closer to 0 than this are below the resolution of f32. They are replaced by this distance, and treated as constants.
const NEAR_ZERO: f64 = 1e-9;

/// The odds ratio of one pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Odds {
    /// The logarithm of the ratio of the two odds.
    pub log_odds: f64,
    /// `log sigmoid(log_odds)`, the term of the loss before its factor `-beta`.
    pub ratio: f64,
    /// The derivative of `ratio` with respect to the preferred answer's mean log-probability.
    pub grad_chosen: f64,
    /// The derivative of `ratio` with respect to the rejected answer's mean log-probability.
    pub grad_rejected: f64,
}

/// `log(1 - e^x)` for `x < 0` (Mächler 2012, "Accurately computing log(1 - exp(-|a|))", equation 7).
fn log1mexp(x: f64) -> f64 {
    if x < -std::f64::consts::LN_2 {
        (-x.exp()).ln_1p()
    } else {
        (-x.exp_m1()).ln()
    }
}

/// The odds ratio of a pair with the mean log-probabilities `chosen` and `rejected` in nats; finite for all inputs up to 0, and NaN for
/// a NaN (module docs, equations 3, 4 and 6 of the paper).
pub fn odds(chosen: f64, rejected: f64) -> Odds {
    // `min` would discard a NaN.
    let clamp = |x: f64| if x > -NEAR_ZERO { -NEAR_ZERO } else { x };
    let (c, r) = (clamp(chosen), clamp(rejected));
    let log_odds = (c - r) - (log1mexp(c) - log1mexp(r));
    let slope = |x: f64| if x > -NEAR_ZERO { 0. } else { -1. / x.exp_m1() };
    let grad_log_odds = sigmoid(-log_odds);
    Odds {
        log_odds,
        ratio: log_sigmoid(log_odds),
        grad_chosen: grad_log_odds * slope(chosen),
        grad_rejected: -grad_log_odds * slope(rejected),
    }
}

impl Loss for Orpo {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::pairs(rows, pad)?)
    }

    /// All tokens of the preferred sequences, and the answers of the rejected ones.
    fn targets(&self, batch: &Batch) -> Vec<Target> {
        let count = batch.sequences.len();
        (0..count)
            .flat_map(|row| batch.targets(row, row >= count / 2))
            .collect()
    }

    fn needs(&self) -> Needs {
        Needs {
            sequence_logits: Some(Positions::ButLast),
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
            "log_odds_ratio",
            "log_odds_chosen",
        ]
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let &Scored { batch, targets, .. } = scored;
        let beta = self.beta;
        let preferences = Preferences::new(batch, targets, scored.logps)?;
        let pairs = preferences.pairs();
        let (mut nll, mut nll_count) = (0f64, 0usize);
        for (target, logp) in targets.iter().zip(scored.logps) {
            if target.row < pairs {
                nll -= logp;
                nll_count += 1;
            }
        }
        let nll = nll / nll_count as f64;
        let averages = preferences.means();
        let (chosen, rejected) = averages.split_at(pairs);
        let odds: Vec<Odds> = chosen
            .iter()
            .zip(rejected)
            .map(|(&c, &r)| odds(c, r))
            .collect();
        let ratio = mean(odds.iter().map(|odds| odds.ratio));

        let gradient = targets.iter().map(|target| {
            let mut gradient = 0.;
            if target.row < pairs {
                gradient -= 1. / nll_count as f64;
            }
            if in_answer(batch, target) {
                let count = preferences.answers[target.row].1 as f64;
                let slope = if target.row < pairs {
                    odds[target.row].grad_chosen
                } else {
                    odds[target.row - pairs].grad_rejected
                };
                gradient -= beta * slope / (pairs as f64 * count);
            }
            gradient as f32
        });

        let logps_chosen = mean(chosen.iter().copied());
        let logps_rejected = mean(rejected.iter().copied());
        let mut metrics = Metrics::from([
            ("rewards/chosen", beta * logps_chosen),
            ("rewards/rejected", beta * logps_rejected),
            ("rewards/accuracies", share_preferred(chosen, rejected)),
            ("rewards/margins", beta * preferences.margin()),
            ("logps/chosen", logps_chosen),
            ("logps/rejected", logps_rejected),
            ("nll_loss", nll),
            ("log_odds_ratio", ratio),
            (
                "log_odds_chosen",
                mean(odds.iter().map(|odds| odds.log_odds)),
            ),
        ]);
        if let Some([chosen, rejected]) = scored.sequence_logits {
            metrics.insert("logits/chosen", chosen);
            metrics.insert("logits/rejected", rejected);
        }
        Ok(Outcome {
            loss: nll - beta * ratio,
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

    fn scored<'a>(batch: &'a Batch, targets: &'a [Target], logps: &'a [f64]) -> Scored<'a> {
        Scored {
            batch,
            targets,
            logps,
            reference_logps: None,
            token_stats: None,
            target_logits: None,
            sequence_logits: Some([0., 0.]),
            mismatched: None,
        }
    }

    #[test]
    fn odds_ratio_equals_trl() {
        let text = include_str!("../../../tests/golden/odds_ratio_cases.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert_eq!(cases.len(), 9);
        for case in cases {
            let number = |name: &str| case[name].as_f64().unwrap();
            let odds = odds(number("chosen_logp"), number("rejected_logp"));
            let near = |a: f64, b: f64| (a - b).abs() <= (2e-5 * b.abs()).max(1e-6);
            let far = (odds.log_odds - number("log_odds_chosen")).abs();
            let far = far.max((odds.ratio - number("log_odds_ratio")).abs());
            println!(
                "| odds ratio | {:?} | {far:.1e} | | 2e-5 relative or 1e-6 |",
                (number("chosen_logp"), number("rejected_logp"))
            );
            assert!(
                near(odds.log_odds, number("log_odds_chosen")),
                "{case} {odds:?}"
            );
            assert!(
                near(odds.ratio, number("log_odds_ratio")),
                "{case} {odds:?}"
            );
            assert!(near(number("beta") * odds.ratio, number("losses")));
        }
    }

    proptest! {
        /// In f64, without the rounding of means.
        #[test]
        fn derivatives_of_the_odds_ratio_are_difference_quotients(chosen in -30f64..-0.01, rejected in -30f64..-0.01) {
            let step = 1e-6;
            let of_chosen = odds(chosen + step, rejected).ratio - odds(chosen - step, rejected).ratio;
            let of_rejected = odds(chosen, rejected + step).ratio - odds(chosen, rejected - step).ratio;
            let found = odds(chosen, rejected);
            for (difference, slope) in [(of_chosen, found.grad_chosen), (of_rejected, found.grad_rejected)] {
                let quotient = difference / (2. * step);
                prop_assert!((quotient - slope).abs() < 1e-5 * (1. + slope.abs()), "{} {}", quotient, slope);
            }
        }

        /// With the answers the other way round the odds ratio is its inverse, so that the two shares of the loss make up the whole.
        #[test]
        fn answers_the_other_way_round_have_the_inverse_odds_ratio(chosen in -30f64..-0.01, rejected in -30f64..-0.01) {
            let (one, other) = (odds(chosen, rejected), odds(rejected, chosen));
            prop_assert!((one.log_odds + other.log_odds).abs() < 1e-12 * (1. + one.log_odds.abs()));
            prop_assert!((one.ratio.exp() + other.ratio.exp() - 1.).abs() < 1e-12);
        }
    }

    #[test]
    fn odds_are_finite_up_to_certainty() {
        for c in [0., -1e-300, -1e-12, -1e-8, -1., -800.] {
            for r in [0., -1e-300, -1e-12, -1e-8, -1., -800.] {
                let odds = odds(c, r);
                let all = [
                    odds.log_odds,
                    odds.ratio,
                    odds.grad_chosen,
                    odds.grad_rejected,
                ];
                assert!(all.iter().all(|x| x.is_finite()), "{c} {r} {odds:?}");
            }
        }
    }

    #[test]
    fn an_empty_answer_is_an_error_and_equal_ones_a_tie() {
        let loss = Orpo { beta: 0.1 };
        let outcome = |chosen: &[u32], rejected: &[u32]| {
            let sequences = [chosen, rejected].map(|ids| Sequence::new(ids.to_vec(), 2));
            let batch = Batch::new(sequences.to_vec(), 0).unwrap();
            let targets = loss.targets(&batch);
            loss.loss(&scored(&batch, &targets, &vec![-1.5; targets.len()]))
        };
        let error = outcome(&[1, 2], &[1, 2, 3]).unwrap_err().to_string();
        assert!(error.contains("an answer has no token"), "{error}");
        assert!(outcome(&[1, 2, 3], &[1, 2]).is_err());
        // One token each, the same: neither is preferred, and the slopes cancel out.
        let tie = outcome(&[1, 2, 3], &[1, 2, 3]).unwrap();
        let ratio = tie.metrics["log_odds_ratio"];
        assert!((ratio + std::f64::consts::LN_2).abs() < 1e-12, "{ratio}");
        assert!(tie.metrics["rewards/accuracies"].abs() < 1e-12);
        assert!(tie.gradient.iter().all(|g| g.is_finite()));
        let slope = tie.gradient.iter().sum::<f32>();
        assert!(
            (slope + 1.).abs() < 1e-6,
            "of the likelihood alone: {slope}"
        );
    }

    #[test]
    fn gradient_is_the_difference_quotient() {
        let sequence = |ids: &[u32], prompt| Sequence::new(ids.to_vec(), prompt);
        let batch = Batch::new(
            vec![
                sequence(&[1, 2, 3, 4, 5], 2),
                sequence(&[1, 2, 3], 1),
                sequence(&[1, 2, 7, 4], 2),
                sequence(&[1, 9, 9, 9], 1),
            ],
            0,
        )
        .unwrap();
        let loss = Orpo { beta: 0.5 };
        let targets = loss.targets(&batch);
        assert_eq!(targets.len(), 4 + 2 + 2 + 3);
        let logps: Vec<f64> = (0..targets.len())
            .map(|i| -0.05 - 0.3 * ((i * 7) % 5) as f64)
            .collect();
        let at = |logps: &[f64]| loss.loss(&scored(&batch, &targets, logps)).unwrap();
        let gradient = at(&logps).gradient;
        for (index, g) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut logps = logps.clone();
                logps[index] += by;
                at(&logps).loss
            };
            let quotient = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!(
                (quotient - f64::from(*g)).abs() < 2e-3,
                "{index}: {quotient} {g}"
            );
        }
    }
}
