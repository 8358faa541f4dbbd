//! KTO's loss: its derivative, its limits, its symmetries, and the answers of other rows.

use proptest::prelude::*;

use super::*;

fn row(prompt: &[u32], answer: &[u32], label: bool) -> Row {
    Row {
        prompt: prompt.to_vec(),
        chosen: answer.to_vec(),
        label: Some(label),
        ..Row::default()
    }
}

/// Four rows with answers of 3, 1, 2 and 4 tokens.
fn rows(labels: [bool; 4]) -> Vec<Row> {
    let mut rows = vec![
        row(&[1, 2], &[3, 4, 5], labels[0]),
        row(&[1], &[2], labels[1]),
        row(&[1, 2], &[7, 4], labels[2]),
        row(&[1], &[9, 9, 9, 9], labels[3]),
    ];
    pair_with_neighbours(&mut rows, 4, 100);
    rows
}

fn loss(loss_type: LossType, beta: f64, weights: (f64, f64)) -> Kto {
    Kto {
        loss_type,
        beta,
        desirable_weight: weights.0,
        undesirable_weight: weights.1,
    }
}

fn outcome(
    loss: &Kto,
    labels: [bool; 4],
    logps: &[f64],
    reference: &[f64],
    divergence: f64,
) -> Outcome {
    let rows = rows(labels);
    let references: Vec<&Row> = rows.iter().collect();
    let batch = loss.batch(&references, 0).unwrap();
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
        mismatched: batch.mismatched().map(|_| divergence),
    };
    loss.loss(&scored).unwrap()
}

fn logps() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(-9f64..-0.01, 10)
}

fn kind() -> impl Strategy<Value = LossType> {
    prop_oneof![Just(LossType::Kto), Just(LossType::ApoZeroUnpaired)]
}

proptest! {
    #[test]
    fn the_gradient_is_the_difference_quotient(
        policy in logps(), reference in logps(), labels: [bool; 4], divergence in -3f64..3., beta in 0.01f64..1., kind in kind(),
        weights in (0f64..3., 0f64..3.),
    ) {
        let loss = loss(kind, beta, weights);
        let gradient = outcome(&loss, labels, &policy, &reference, divergence).gradient;
        for (index, g) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut policy = policy.clone();
                policy[index] += by;
                outcome(&loss, labels, &policy, &reference, divergence).loss
            };
            let quotient = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            prop_assert!((quotient - f64::from(*g)).abs() < 1e-7, "{} {} {}", index, quotient, g);
        }
    }

    /// What is desirable of a log-ratio is undesirable of its mirror image at the divergence.
    #[test]
    fn both_sides_are_mirror_images(r in -30f64..30., kl in 0f64..5., beta in 0.01f64..2.) {
        let loss = loss(LossType::Kto, beta, (1., 1.));
        let (a, b) = (loss.answer(r, kl, true), loss.answer(2. * kl - r, kl, false));
        prop_assert!((a.0 - b.0).abs() < 1e-12 && (a.1 + b.1).abs() < 1e-12);
        // The two labels of one answer share out a loss of 1.
        prop_assert!((a.0 + loss.answer(r, kl, false).0 - 1.).abs() < 1e-12);
    }

    /// Only the difference to the reference model counts.
    #[test]
    fn a_shift_of_policy_and_reference_changes_nothing(
        policy in logps(), reference in logps(), by in -5f64..5., labels: [bool; 4],
    ) {
        let loss = loss(LossType::Kto, 0.3, (1., 2.));
        let shifted = |logps: &[f64]| logps.iter().map(|x| x + by).collect::<Vec<_>>();
        let before = outcome(&loss, labels, &policy, &reference, 0.7);
        let after = outcome(&loss, labels, &shifted(&policy), &shifted(&reference), 0.7);
        prop_assert!((before.loss - after.loss).abs() < 1e-12);
    }

    /// Without a divergence, KTO is the other loss; a negative estimate is none.
    #[test]
    fn a_divergence_of_nothing_leaves_the_loss_of_apo(policy in logps(), reference in logps(), labels: [bool; 4], estimate in -5f64..=0.) {
        let kto = outcome(&loss(LossType::Kto, 0.2, (1., 1.)), labels, &policy, &reference, estimate);
        let apo = outcome(&loss(LossType::ApoZeroUnpaired, 0.2, (1., 1.)), labels, &policy, &reference, 9.);
        prop_assert_eq!(kto.loss.to_bits(), apo.loss.to_bits());
        prop_assert_eq!(kto.metrics["kl"].to_bits(), 0f64.to_bits());
    }
}

#[test]
fn a_model_that_is_its_reference_has_a_loss_of_one_half() {
    let logps = [-1.5; 10];
    let labels = [true, true, false, true];
    let outcome = outcome(
        &loss(LossType::Kto, 0.1, (1., 1.)),
        labels,
        &logps,
        &logps,
        0.,
    );
    assert!((outcome.loss - 0.5).abs() < 1e-15);
    for (index, g) in outcome.gradient.iter().enumerate() {
        // Those of the third row, whose answer is not desirable, are pushed down.
        let expected = if (4..6).contains(&index) { 1. } else { -1. } * 0.1 / 4. / 4.;
        assert!((f64::from(*g) - expected).abs() < 1e-9);
    }
}

#[test]
fn the_limits_are_finite() {
    let loss = loss(LossType::Kto, 0.5, (1., 1.));
    for r in [-1e300, -1e6, 0., 1e6, 1e300] {
        for desirable in [true, false] {
            let (value, slope) = loss.answer(r, 1., desirable);
            assert!(
                (0. ..=1.).contains(&value) && slope.abs() <= 0.125,
                "{value} {slope}"
            );
        }
    }
}

#[test]
fn metrics_of_a_side_without_answers_are_left_out() {
    let loss = loss(LossType::Kto, 0.1, (1., 1.));
    let (policy, reference) = ([-1.; 10], [-2.; 10]);
    let all = outcome(&loss, [true; 4], &policy, &reference, 0.).metrics;
    let names: Vec<&str> = all.keys().copied().collect();
    assert_eq!(names, ["kl", "logps/chosen", "rewards/chosen"]);
    assert!((all["rewards/chosen"] - 0.1 * 10. / 4.).abs() < 1e-12);
    let some = outcome(&loss, [true, false, true, true], &policy, &reference, 0.).metrics;
    assert!((some["rewards/margins"] - 0.1 * (3. - 1.)).abs() < 1e-12);
}

#[test]
fn answers_go_round_within_a_batch_and_are_cut() {
    let mut rows = vec![
        row(&[1], &[10, 11], true),
        row(&[2, 2], &[20], false),
        row(&[3, 3, 3], &[30, 31, 32], true),
        row(&[4], &[40, 41, 42], true),
    ];
    let others = |rows: &[Row]| -> Vec<Vec<u32>> {
        let others = rows
            .iter()
            .map(|row| row.mismatched.clone().unwrap().answer);
        others.collect()
    };
    pair_with_neighbours(&mut rows, 3, 3);
    // With the prompt, no more than three.
    assert_eq!(
        others(&rows),
        [vec![30, 31], vec![10], vec![], vec![40, 41]]
    );
    pair_with_neighbours(&mut rows, 2, 100);
    let expected = [vec![20], vec![10, 11], vec![40, 41, 42], vec![30, 31, 32]];
    assert_eq!(others(&rows), expected);
}

#[test]
fn rows_without_labels_or_other_answers_are_refused() {
    let loss = loss(LossType::Kto, 0.1, (1., 1.));
    let unlabelled = Row {
        label: None,
        ..row(&[1], &[2], true)
    };
    assert!(loss.batch(&[&unlabelled], 0).is_err());
    assert!(loss.batch(&[&row(&[1], &[2], true)], 0).is_err());
}
