//! Attention to a cache against sums in f64.

use pipeline_kernels::attention::{Heads, Scores};
use pipeline_kernels::panels::size;

use super::{device, near, numbers, panels};
use crate::CachedAttention;

/// Feature `feature` of a token in panels of `features`.
fn at(x: &[f32], features: usize, token: usize, feature: usize) -> f64 {
    f64::from(x[(token / 32 * features + feature) * 32 + token % 32])
}

/// Texts of one token and of many, windows that begin within a panel, groups of heads, odd widths and a soft-cap; what no token attends to is
/// not a number, and may be anything.
#[test]
fn tokens_attend_to_their_own_places() {
    let Some(device) = device() else { return };
    for (queries, keys, width, softcap) in [
        (2, 1, 5, None),
        (4, 2, 32, Some(0.7)),
        (3, 3, 64, None),
        (8, 1, 130, None),
    ] {
        let heads = Heads {
            queries,
            keys,
            width,
        };
        let scores = Scores {
            scale: 0.4,
            softcap,
        };
        let all = 672;
        let seen = [0..1, 32..50, 70..100, 128..672, 389..662, 96..97];
        let q = panels(queries * width, seen.len(), 1);
        let mut k = numbers(size(keys * width, all), 2);
        let mut v = numbers(size(keys * width, all), 3);
        for values in [&mut k, &mut v] {
            for (index, value) in values.iter_mut().enumerate() {
                let place = index / 32 / (keys * width) * 32 + index % 32;
                if !seen.iter().any(|own| own.contains(&place)) {
                    *value = f32::NAN;
                }
            }
        }
        let mut expected = vec![0f32; q.len()];
        for (token, own) in seen.iter().enumerate() {
            for head in 0..queries {
                let first = head / (queries / keys) * width;
                let score = |place: usize| {
                    let dot = (0..width).map(|f| {
                        at(&q, queries * width, token, head * width + f)
                            * at(&k, keys * width, place, first + f)
                    });
                    let product = dot.sum::<f64>() * f64::from(scores.scale);
                    let cap = softcap.map(f64::from);
                    cap.map_or(product, |cap| cap * (product / cap).tanh())
                };
                let p: Vec<f64> = own.clone().map(|place| score(place).exp()).collect();
                let sum: f64 = p.iter().sum();
                for f in 0..width {
                    let values = own
                        .clone()
                        .map(|place| at(&v, keys * width, place, first + f));
                    let total: f64 = p.iter().zip(values).map(|(p, v)| p * v).sum();
                    let feature = head * width + f;
                    expected[feature * 32 + token] = (total / sum) as f32;
                }
            }
        }
        let [q, k, v] = [&q, &k, &v].map(|values| device.upload(values).unwrap());
        let mut out = device.upload(&vec![0.; expected.len()]).unwrap();
        let seen = device.seen(&seen);
        let inputs = CachedAttention {
            q: &q,
            k: &k,
            v: &v,
            heads,
            scores,
            seen: &seen,
        };
        device.cached_attention(inputs, &mut out);
        let once = device.read(&out).unwrap();
        near(&once, &expected, 2e-6);
        device.cached_attention(inputs, &mut out);
        assert_eq!(device.read(&out).unwrap(), once, "the same bits");
    }
}

#[test]
fn tokens_are_kept_and_become_rows() {
    let Some(device) = device() else { return };
    for (features, tokens) in [(1, 1), (7, 33), (64, 40)] {
        let x = panels(features, tokens, 1);
        let own = device.upload(&x).unwrap();
        let rows = device.token_rows(&own, features, tokens);
        let rows = device.read(&rows).unwrap();
        for token in 0..tokens {
            for feature in 0..features {
                let expected = at(&x, features, token, feature);
                let found = f64::from(rows[token * features + feature]);
                assert_eq!(found.to_bits(), expected.to_bits());
            }
        }
        let mut expected = numbers(size(features, 100), 2);
        let mut cache = device.upload(&expected).unwrap();
        let places: Vec<u32> = (0..tokens as u32).map(|token| 99 - 2 * token).collect();
        device.store(&own, features, &places, &mut cache);
        for (token, place) in places.iter().enumerate() {
            let place = *place as usize;
            for feature in 0..features {
                let value = at(&x, features, token, feature) as f32;
                expected[(place / 32 * features + feature) * 32 + place % 32] = value;
            }
        }
        assert_eq!(device.read(&cache).unwrap(), expected);
    }
}
