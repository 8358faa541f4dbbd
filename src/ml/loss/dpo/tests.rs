//! DPO's loss: its derivative, its limits, its symmetries.

use proptest::prelude::*;

use super::*;
use crate::ml::model::batch::Sequence;

fn loss(beta: f64, label_smoothing: f64) -> Dpo {
    Dpo::sigmoid(beta, label_smoothing)
}

/// A loss of one kind.
fn one(kind: LossType, beta: f64, label_smoothing: f64) -> Dpo {
    Dpo {
        terms: vec![(kind, 1.)],
        ..Dpo::sigmoid(beta, label_smoothing)
    }
}

const KINDS: [LossType; 15] = [
    LossType::Sigmoid,
    LossType::Hinge,
    LossType::Ipo,
    LossType::ExoPair,
    LossType::NcaPair,
    LossType::Robust,
    LossType::BcoPair,
    LossType::SppoHard,
    LossType::Aot,
    LossType::AotUnpaired,
    LossType::ApoZero,
    LossType::ApoDown,
    LossType::Discopop,
    LossType::Sft,
    LossType::SigmoidNorm,
];

fn divergence() -> impl Strategy<Value = Divergence> {
    prop_oneof![
        Just(Divergence::ReverseKl),
        Just(Divergence::ForwardKl),
        Just(Divergence::JsDivergence),
        (0.2f64..1.8).prop_map(Divergence::AlphaDivergence),
    ]
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
        mismatched: None,
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
        let quotient = (loss.smoothed_sigmoid(margin + h).0 - loss.smoothed_sigmoid(margin - h).0) / (2. * h);
        let derivative = loss.smoothed_sigmoid(margin).1;
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

    /// Every kind of loss and any two of them, with tokens beyond the shorter answer that weigh less, and every divergence.
    #[test]
    fn the_gradient_of_each_kind_is_the_difference_quotient(
        policy in logps(), reference in logps(), beta in 0.05f64..0.5, smoothing in 0.01f64..0.45,
        kind in 0usize..15, other in 0usize..15, weight in -1f64..2., ld_alpha in prop::option::of(0f64..1.), divergence in divergence(),
    ) {
        let loss = Dpo {
            terms: vec![(KINDS[kind], 1.), (KINDS[other], weight)],
            ld_alpha,
            divergence,
            discopop_tau: 0.5,
            ..loss(beta, smoothing)
        };
        let at = outcome(&loss, &policy, &reference);
        let scale = 1. + at.loss.abs();
        for (index, g) in at.gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut policy = policy.clone();
                policy[index] += by;
                outcome(&loss, &policy, &reference).loss
            };
            let (up, here, down) = (moved(1e-5), at.loss, moved(-1e-5));
            // At the hinge's corner and where an order changes there is no derivative.
            prop_assume!(((up - here) - (here - down)).abs() < 1e-6 * scale);
            let quotient = (up - down) / 2e-5;
            prop_assert!((quotient - f64::from(*g)).abs() < 1e-5 * (scale + quotient.abs()), "{} {} {}", index, quotient, g);
        }
    }

    /// Where it has no reference to go by, no loss but those of likelihoods depends on what both answers of a pair have in common.
    #[test]
    fn a_single_pair_is_paired_with_itself(policy in logps(), reference in logps(), beta in 0.05f64..0.5, smoothing in 0f64..0.45) {
        let single = |kind| {
            let batch = Batch::new(
                vec![Sequence::new(vec![1, 2, 3, 4], 1), Sequence::new(vec![1, 9, 8], 1)], 0,
            ).unwrap();
            let loss = one(kind, beta, smoothing);
            let targets = loss.targets(&batch);
            let scored = Scored {
                batch: &batch,
                targets: &targets,
                logps: &policy[..5],
                reference_logps: Some(&reference[..5]),
                token_stats: None,
                target_logits: None,
                sequence_logits: None,
                mismatched: None,
            };
            loss.loss(&scored).unwrap().loss
        };
        // With one pair there is nothing to sort.
        let sigmoid = single(LossType::Sigmoid);
        prop_assert!((single(LossType::Aot) - sigmoid).abs() < 1e-12);
        prop_assert!((single(LossType::AotUnpaired) - sigmoid).abs() < 1e-12);
    }

    /// Smoothing by nothing leaves the plain loss, and an alpha of 1 the reverse divergence.
    #[test]
    fn limits_lead_to_the_sigmoid_loss(policy in logps(), reference in logps(), beta in 0.05f64..0.5) {
        let plain = outcome(&loss(beta, 0.), &policy, &reference).loss;
        let robust = outcome(&one(LossType::Robust, beta, 0.), &policy, &reference).loss;
        let near_one = Dpo { divergence: Divergence::AlphaDivergence(1. + 1e-5), ..loss(beta, 0.) };
        prop_assert!((plain - robust).abs() < 1e-12);
        let close = outcome(&near_one, &policy, &reference).loss;
        prop_assert!((plain - close).abs() < 1e-2 * (1. + plain), "{} {}", plain, close);
    }

    /// With weights the loss of a single pair is that without, times a constant.
    #[test]
    fn weights_are_the_answers_probability(
        policy in prop::collection::vec(-9f64..-0.01, 5), reference in prop::collection::vec(-9f64..-0.01, 5),
        squares in prop::collection::vec(-9f64..-0.01, 5), kind in 0usize..15,
    ) {
        prop_assume!(KINDS[kind].is_weighted());
        let stats: Vec<TokenStats> = squares
            .iter()
            .map(|squares| TokenStats { log_sum_sq_probs: *squares, ..TokenStats::default() })
            .collect();
        let of = |use_weighting| {
            let sequences = vec![Sequence::new(vec![1, 2, 3, 4], 1), Sequence::new(vec![1, 9, 8], 1)];
            let batch = Batch::new(sequences, 0).unwrap();
            let loss = Dpo { use_weighting, ..one(KINDS[kind], 0.2, 0.1) };
            let targets = loss.targets(&batch);
            let scored = Scored {
                batch: &batch,
                targets: &targets,
                logps: &policy,
                reference_logps: Some(&reference),
                token_stats: Some(&stats),
                target_logits: None,
                sequence_logits: None,
                mismatched: None,
            };
            loss.loss(&scored).unwrap()
        };
        let (plain, weighted) = (of(false), of(true));
        let mean = |range: std::ops::Range<usize>| {
            let count = range.len() as f64;
            range.map(|at| policy[at] - squares[at]).sum::<f64>() / count
        };
        let weight = (mean(0..3) + mean(3..5)).exp();
        prop_assert!((weighted.loss - weight * plain.loss).abs() <= 1e-9 * (1. + weighted.loss.abs()));
        for (weighted, plain) in weighted.gradient.iter().zip(&plain.gradient) {
            let expected = weight * f64::from(*plain);
            prop_assert!((f64::from(*weighted) - expected).abs() <= 1e-6 * (1e-6 + expected.abs()));
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

    /// Losses that look at how far an answer goes up and the other one goes down take both alike: what the preferred answer gains is worth
    /// what the rejected one loses.
    #[test]
    fn a_gain_of_one_answer_is_worth_the_same_loss_of_the_other(
        chosen in -30f64..30., rejected in -30f64..30., beta in 0.01f64..1., smoothing in 0.01f64..0.45, kind in 0usize..10,
    ) {
        let kinds = [
            LossType::Sigmoid,
            LossType::Hinge,
            LossType::Ipo,
            LossType::ExoPair,
            LossType::Robust,
            LossType::BcoPair,
            LossType::SppoHard,
            LossType::ApoZero,
            LossType::Discopop,
            LossType::SigmoidNorm,
        ];
        let loss = loss(beta, smoothing);
        let of = |chosen, rejected, chosen_tokens, rejected_tokens| {
            loss.pair(kinds[kind], Pair { chosen, rejected, chosen_tokens, rejected_tokens }).unwrap()
        };
        let (own, mirrored) = (of(chosen, rejected, 3., 5.), of(-rejected, -chosen, 5., 3.));
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * (1. + a.abs());
        prop_assert!(near(own.loss, mirrored.loss), "{:?} {:?}", own, mirrored);
        prop_assert!(near(own.grad_chosen, -mirrored.grad_rejected), "{:?} {:?}", own, mirrored);
        prop_assert!(near(own.grad_rejected, -mirrored.grad_chosen), "{:?} {:?}", own, mirrored);
    }

    /// A preferred answer that gains never costs more, but for those losses that hold it near the reference or aim at a distance.
    #[test]
    fn more_of_the_preferred_answer_never_costs_more(
        chosen in -30f64..30., rejected in -30f64..30., by in 0f64..10., beta in 0.01f64..1., kind in 0usize..6,
    ) {
        let kinds = [
            LossType::Sigmoid,
            LossType::Hinge,
            LossType::Robust,
            LossType::BcoPair,
            LossType::ApoZero,
            LossType::SigmoidNorm,
        ];
        let of = |chosen, rejected| {
            let pair = Pair { chosen, rejected, chosen_tokens: 3., rejected_tokens: 5. };
            loss(beta, 0.).pair(kinds[kind], pair).unwrap().loss
        };
        prop_assert!(of(chosen + by, rejected) <= of(chosen, rejected));
        prop_assert!(of(chosen, rejected - by) <= of(chosen, rejected));
    }

    /// With a smoothing of 1 minus its own the preferences are the other way round.
    #[test]
    fn smoothing_mirrors_the_margin(margin in -60f64..60., smoothing in 0f64..1.) {
        let (a, b) = (loss(0.2, smoothing).smoothed_sigmoid(margin), loss(0.2, 1. - smoothing).smoothed_sigmoid(-margin));
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
            let (loss, derivative) = loss(beta, smoothing).smoothed_sigmoid(margin);
            assert!(loss >= 0. && !loss.is_nan(), "{loss}");
            assert!(derivative.abs() <= beta, "{derivative}");
        }
    }
    // A wrong pair far off is pushed with beta, a right one no more.
    assert!((loss(0.1, 0.).smoothed_sigmoid(-1e6).1 + 0.1).abs() < 1e-15);
    assert!(loss(0.1, 0.).smoothed_sigmoid(1e6).1.abs() < 1e-15);
}

/// However far an answer is from the reference, no loss becomes a NaN, nor does what is pushed.
#[test]
fn no_kind_has_a_nan_at_its_limits() {
    for kind in KINDS {
        for (chosen, rejected) in [(1e5, -1e5), (-1e5, 1e5), (1e5, 1e5), (-1e5, -1e5), (0., 0.)] {
            let pair = Pair {
                chosen,
                rejected,
                chosen_tokens: 3.,
                rejected_tokens: 5.,
            };
            let found = loss(0.1, 0.1).pair(kind, pair).unwrap_or_default();
            let all = [found.loss, found.grad_chosen, found.grad_rejected];
            assert!(
                all.iter().all(|x| x.is_finite()),
                "{kind:?} {pair:?}: {found:?}"
            );
        }
    }
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
        mismatched: None,
    };
    let error = loss.loss(&scored).unwrap_err().to_string();
    assert!(error.contains("reference"), "{error}");
}
