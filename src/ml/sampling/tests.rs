//! Tests of sampling: every processor beside transformers' scores, and the distribution that is drawn from.

use serde_json::Value;

use super::*;
use crate::ml::testing::golden::{folder, tensors};

fn sampling(case: &Value) -> Sampling {
    let number = |name: &str| case.get(name).and_then(Value::as_f64);
    let default = Sampling::default();
    Sampling {
        do_sample: case["do_sample"].as_bool().unwrap_or(false),
        temperature: number("temperature").unwrap_or(1.),
        top_k: case["top_k"].as_u64().map_or(default.top_k, |k| k as usize),
        top_p: number("top_p").unwrap_or(1.),
        min_p: number("min_p"),
        repetition_penalty: number("repetition_penalty").unwrap_or(1.),
    }
}

#[test]
fn scores_are_those_of_transformers() {
    let golden = tensors("sampling/scores.safetensors");
    let logits: Vec<Vec<f32>> = golden["logits"].to_vec2().unwrap();
    let ids: Vec<Vec<i64>> = golden["ids"].to_vec2().unwrap();
    let text = std::fs::read_to_string(folder("sampling/cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 18);
    for (number, case) in cases.iter().enumerate() {
        let expected: Vec<Vec<f32>> = golden[&format!("scores.{number:02}")].to_vec2().unwrap();
        let sampling = sampling(case);
        sampling.check().unwrap();
        for (row, expected) in expected.iter().enumerate() {
            let ids: Vec<u32> = ids[row].iter().map(|id| *id as u32).collect();
            let mut scores = logits[row].clone();
            sampling.process(&ids, &mut scores);
            // To the bit: which ids are left, and their scores.
            assert_eq!(&scores, expected, "{case}, row {row}");
        }
    }
}

/// Scores of 12 ids, their exact probabilities after the warpers, and the settings.
fn warped(sampling: &Sampling) -> (Vec<f32>, Vec<f64>) {
    let logits: Vec<f32> = (0..12).map(|id| ((id * 7) % 12) as f32 * 0.37).collect();
    let mut scores = logits.clone();
    sampling.process(&[1, 1, 4], &mut scores);
    let weights: Vec<f64> = scores.iter().map(|x| f64::from(*x).exp()).collect();
    let total: f64 = weights.iter().sum();
    let probabilities = weights.iter().map(|weight| weight / total).collect();
    (logits, probabilities)
}

#[test]
fn draws_have_the_warped_distribution() {
    let drawn = Sampling {
        do_sample: true,
        top_k: 0,
        ..Sampling::default()
    };
    for sampling in [
        drawn,
        Sampling {
            temperature: 0.7,
            repetition_penalty: 1.3,
            ..drawn
        },
        Sampling { top_k: 5, ..drawn },
        Sampling {
            temperature: 1.6,
            top_p: 0.8,
            ..drawn
        },
        Sampling {
            min_p: Some(0.2),
            ..drawn
        },
    ] {
        let (logits, probabilities) = warped(&sampling);
        let mut sampler = Sampler::new(sampling, 17, 0);
        let draws = 200_000;
        let mut counts = [0u32; 12];
        for _ in 0..draws {
            counts[sampler.next(&[1, 1], &[4], &logits).unwrap() as usize] += 1;
        }
        let mut statistic = 0.;
        let mut freedom = -1.;
        for (count, probability) in counts.iter().zip(&probabilities) {
            if *probability == 0. {
                assert_eq!(*count, 0, "{sampling:?}");
                continue;
            }
            let expected = probability * f64::from(draws);
            assert!(expected > 5., "too few draws for the test");
            statistic += (f64::from(*count) - expected).powi(2) / expected;
            freedom += 1.;
        }
        // The 0.1 % quantile of chi-square by Wilson and Hilferty's cube.
        let ninth = 2. / (9. * freedom);
        let bound = freedom * (1. - ninth + 3.09 * f64::sqrt(ninth)).powi(3);
        assert!(
            freedom > 1. && statistic < bound,
            "{sampling:?}: {statistic} of {bound}"
        );
    }
}

#[test]
fn each_text_has_draws_of_its_own_and_a_seed_gives_them_again() {
    let sampling = Sampling {
        do_sample: true,
        ..Sampling::default()
    };
    let logits = vec![0.; 40];
    let draw = |seed, text| {
        let mut sampler = Sampler::new(sampling, seed, text);
        let mut ids = Vec::new();
        for _ in 0..20 {
            ids.push(sampler.next(&[0], &[], &logits).unwrap());
        }
        ids
    };
    assert_eq!(draw(1, 0), draw(1, 0));
    assert_ne!(draw(1, 0), draw(1, 1));
    assert_ne!(draw(1, 0), draw(2, 0));
    // Two seeds that differ above 32 bits, of which torch's generator takes 32.
    assert_ne!(draw(1, 0), draw(1 | 1 << 40, 0));
}

#[test]
fn what_is_not_finite_is_an_error() {
    for value in [f32::NAN, f32::INFINITY] {
        for do_sample in [false, true] {
            let sampling = Sampling {
                do_sample,
                ..Sampling::default()
            };
            let error = Sampler::new(sampling, 0, 0).next(&[0], &[], &[0., value, 1.]);
            assert!(error.unwrap_err().is::<NotFinite>());
        }
    }
}
