//! DPO's loss: its derivative, its limits, its symmetries.

use proptest::prelude::*;

use super::*;
use crate::ml::model::batch::Sequence;

fn loss(beta: f64, label_smoothing: f64) -> Dpo {
    Dpo {
        beta,
        label_smoothing,
    }
}

/// Two pairs, with answers of 3, 1, 2 and 4 tokens.
fn batch() -> Batch {
    let sequence = |ids: &[u32], prompt| Sequence::new(ids.to_vec(), prompt);
    let sequences = vec![
        sequence(&[1, 2, 3, 4, 5], 2),
        sequence(&[1, 2], 1),
        sequence(&[1, 2, 7, 4], 2),
        sequence(&[1, 9, 9, 9, 9], 1),
    ];
    Batch::new(sequences, 0).unwrap()
}

fn outcome(loss: &Dpo, logps: &[f64], reference: &[f64]) -> Outcome {
    let batch = batch();
    let targets = loss.targets(&batch);
    assert_eq!(targets.len(), 3 + 1 + 2 + 4);
    let scored = Scored {
        batch: &batch,
        targets: &targets,
        logps,
        reference_logps: Some(reference),
        token_stats: None,
        target_logits: None,
        sequence_logits: None,
    };
    loss.loss(&scored).unwrap()
}

/// Ten negative log-probabilities.
fn logps() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(-9f64..-0.01, 10)
}

proptest! {
    #[test]
    fn the_derivative_is_the_difference_quotient(
        margin in -60f64..60., beta in 0.01f64..2., smoothing in 0f64..0.5,
    ) {
        let loss = loss(beta, smoothing);
        let h = 1e-5;
        let quotient = (loss.pair(margin + h).0 - loss.pair(margin - h).0) / (2. * h);
        let derivative = loss.pair(margin).1;
        prop_assert!((quotient - derivative).abs() < 1e-8, "{} {}", quotient, derivative);
    }

    #[test]
    fn the_gradient_is_the_difference_quotient(
        policy in logps(), reference in logps(), beta in 0.01f64..1., smoothing in 0f64..0.5,
    ) {
        let loss = loss(beta, smoothing);
        let gradient = outcome(&loss, &policy, &reference).gradient;
        for (index, g) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut policy = policy.clone();
                policy[index] += by;
                outcome(&loss, &policy, &reference).loss
            };
            let quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            prop_assert!((quotient - f64::from(*g)).abs() < 1e-7, "{} {} {}", index, quotient, g);
        }
    }

    /// Only the difference to the reference counts, and what both answers of a pair have in common does not.
    #[test]
    fn a_shift_of_policy_and_reference_changes_nothing(
        policy in logps(), reference in logps(), by in -5f64..5.,
    ) {
        let loss = loss(0.3, 0.1);
        let shifted = |logps: &[f64]| logps.iter().map(|x| x + by).collect::<Vec<_>>();
        let before = outcome(&loss, &policy, &reference);
        let after = outcome(&loss, &shifted(&policy), &shifted(&reference));
        prop_assert!((before.loss - after.loss).abs() < 1e-12);
        for name in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
            prop_assert!((before.metrics[name] - after.metrics[name]).abs() < 1e-12);
        }
    }

    /// With a smoothing of 1 minus its own the preferences are the other way round.
    #[test]
    fn smoothing_mirrors_the_margin(margin in -60f64..60., smoothing in 0f64..1.) {
        let (a, b) = (loss(0.2, smoothing).pair(margin), loss(0.2, 1. - smoothing).pair(-margin));
        prop_assert!((a.0 - b.0).abs() < 1e-12 && (a.1 + b.1).abs() < 1e-12);
    }
}

#[test]
fn a_model_that_is_its_reference_has_a_loss_of_log_2_and_prefers_nothing() {
    let logps = [-1.5; 10];
    for smoothing in [0., 0.3] {
        let outcome = outcome(&loss(0.1, smoothing), &logps, &logps);
        assert!((outcome.loss - std::f64::consts::LN_2).abs() < 1e-15);
        assert!(outcome.metrics["rewards/accuracies"].abs() < 1e-15);
        // Each token of a preferred answer is pushed up as much as each of the other answers is pushed down.
        let push = 0.1 * (0.5 - smoothing) / 2.;
        for (index, g) in outcome.gradient.iter().enumerate() {
            let expected = if index < 4 { -push } else { push };
            assert!((f64::from(*g) - expected).abs() < 1e-9);
        }
    }
}

#[test]
fn the_limits_are_finite() {
    for (beta, smoothing) in [(0.1, 0.), (0.1, 0.2), (50., 0.)] {
        for margin in [-1e300, -1e6, 0., 1e6, 1e300] {
            let (loss, derivative) = loss(beta, smoothing).pair(margin);
            assert!(loss >= 0. && !loss.is_nan(), "{loss}");
            assert!(derivative.abs() <= beta, "{derivative}");
        }
    }
    // A wrong pair far off is pushed with beta, a right one no more.
    assert!((loss(0.1, 0.).pair(-1e6).1 + 0.1).abs() < 1e-15);
    assert!(loss(0.1, 0.).pair(1e6).1.abs() < 1e-15);
}

#[test]
fn without_a_reference_there_is_no_loss() {
    let loss = loss(0.1, 0.);
    let batch = batch();
    let targets = loss.targets(&batch);
    let scored = Scored {
        batch: &batch,
        targets: &targets,
        logps: &[-1.; 10],
        reference_logps: None,
        token_stats: None,
        target_logits: None,
        sequence_logits: None,
    };
    let error = loss.loss(&scored).unwrap_err().to_string();
    assert!(error.contains("reference"), "{error}");
}
