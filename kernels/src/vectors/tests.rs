//! Products, attention and rows against plain sums in f64, with each instruction set.

use half::{bf16, f16};

use super::*;
use crate::FloatType;
use crate::dispatch::tests::{with_each, with_threads};
use crate::gated::Activation;
use crate::matrix::{NF4_BLOCK, Nf4, Values};
use crate::nf4::CODE;

/// Numbers between -1 and 1 that look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608. - 1.
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn plain(weight: &[f32], x: &[f32], height: usize, depth: usize) -> Vec<f64> {
    let row = |x: &[f32], row: usize| {
        let pairs = weight[row * depth..][..depth].iter().zip(x);
        pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
    };
    let vectors = x.chunks_exact(depth);
    vectors
        .flat_map(|x| (0..height).map(move |r| row(x, r)))
        .collect()
}

fn close(what: &str, ours: &[f32], plain: &[f64], within: f64) {
    assert_eq!(ours.len(), plain.len());
    for (index, (a, b)) in ours.iter().zip(plain).enumerate() {
        assert!(
            (f64::from(*a) - b).abs() < within,
            "{what}, {index}: {a}, {b}"
        );
    }
}

/// A weight's values in each way to store them, with the floats they stand for.
struct Weights {
    floats: Vec<f32>,
    halves: Vec<bf16>,
    f16: Vec<f16>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

const ROUNDINGS: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];

impl Weights {
    fn new(count: usize) -> Self {
        let floats = numbers(count, 1);
        Self {
            halves: floats.iter().map(|x| bf16::from_f32(*x)).collect(),
            f16: floats.iter().map(|x| f16::from_f32(*x)).collect(),
            floats,
            packed: (0..count.div_ceil(2)).map(|i| (i * 37) as u8).collect(),
            absmax: numbers(count.div_ceil(NF4_BLOCK), 9),
        }
    }

    fn all(&self) -> Vec<(Values<'_>, Vec<f32>)> {
        let halves = self.halves.iter().map(|x| x.to_f32()).collect();
        let f16 = self.f16.iter().map(|x| x.to_f32()).collect();
        let mut all = vec![
            (Values::F32(&self.floats), self.floats.clone()),
            (Values::Bf16(&self.halves), halves),
            (Values::F16(&self.f16), f16),
        ];
        for rounding in ROUNDINGS {
            let nf4 = Nf4 {
                packed: &self.packed,
                absmax: &self.absmax,
                code: &CODE,
                rounding,
            };
            let codes = self.packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
            let values = codes.enumerate().map(|(index, code)| {
                let value = CODE[usize::from(code)] * self.absmax[index / NF4_BLOCK];
                match rounding {
                    FloatType::F32 => value,
                    FloatType::Bf16 => bf16::from_f32(value).to_f32(),
                    FloatType::F16 => f16::from_f32(value).to_f32(),
                }
            });
            let values = values.take(self.floats.len()).collect();
            all.push((Values::Nf4(nf4), values));
        }
        all
    }
}

fn product(weight: Matrix<'_>, x: &[f32], rounded: bool) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / weight.depth() * weight.height()];
    let all = vec![VectorProduct {
        weight,
        x,
        rounded,
        out: &mut out,
    }];
    Team::gather(|team| vector_products(team, all));
    out
}

fn rounded(x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    round_to_bf16(&mut x);
    x
}

#[test]
fn products_are_those_of_a_plain_loop() {
    for (height, depth) in [(1, 1), (5, 64), (9, 100), (7, 128), (200, 576)] {
        let weights = Weights::new(height * depth);
        for vectors in [1, 2, 3, 4, 7, 8, 15, 16, 26] {
            let x = numbers(vectors * depth, 2);
            let halves = rounded(&x);
            with_each(|isa| {
                for (stored, same) in weights.all() {
                    let weight = Matrix::new(stored, height, depth).unwrap();
                    for (x, rounded) in [(&x, false), (&halves, true)] {
                        let out = product(weight, x, rounded);
                        let exact = plain(&same, x, height, depth);
                        let what = format!("{isa:?} {height} x {depth}, {vectors}, {rounded}");
                        close(&what, &out, &exact, 1e-4);
                    }
                }
            });
        }
    }
}

#[test]
fn a_vector_does_not_depend_on_those_beside_it_nor_on_threads() {
    for (height, depth) in [(300, 250), (201, 320)] {
        let weights = Weights::new(height * depth);
        let x = rounded(&numbers(31 * depth, 4));
        with_each(|isa| {
            for (stored, _) in weights.all() {
                let weight = Matrix::new(stored, height, depth).unwrap();
                for rounded in [false, true] {
                    let together = product(weight, &x, rounded);
                    let single = |x| product(weight, x, rounded);
                    let alone: Vec<f32> = x.chunks_exact(depth).flat_map(single).collect();
                    assert!(together == alone, "{isa:?} {rounded}");
                    for threads in [1, 5] {
                        let again = with_threads(threads, || product(weight, &x, rounded));
                        assert!(together == again, "{isa:?} {rounded} {threads}");
                    }
                }
            }
        });
    }
}

#[test]
fn several_products_share_vectors_or_not() {
    let (first, second) = (Weights::new(6 * 64), Weights::new(3 * 32));
    let (a, b) = (numbers(2 * 64, 5), numbers(4 * 32, 6));
    with_each(|isa| {
        let mut outs = [vec![0.; 12], vec![0.; 12], vec![0.; 12]];
        let [one, two, three] = &mut outs;
        let narrow = Matrix::f32(&second.floats, 3, 32).unwrap();
        let same = Matrix::new(Values::Bf16(&first.halves), 6, 64).unwrap();
        let wide = Matrix::f32(&first.floats, 6, 64).unwrap();
        let all = [(wide, &a, one), (same, &a, two), (narrow, &b, three)];
        let all = all.map(|(weight, x, out)| VectorProduct {
            weight,
            x,
            rounded: false,
            out,
        });
        Team::gather(|team| vector_products(team, all.into()));
        let halves: Vec<f32> = first.halves.iter().map(|x| x.to_f32()).collect();
        let what = format!("{isa:?}");
        close(&what, &outs[0], &plain(&first.floats, &a, 6, 64), 1e-4);
        close(&what, &outs[1], &plain(&halves, &a, 6, 64), 1e-4);
        close(&what, &outs[2], &plain(&second.floats, &b, 3, 32), 1e-4);
    });
}

#[test]
fn attention_is_that_of_a_plain_loop() {
    for (group, width, length) in [
        (3, 20, 1),
        (3, 20, 130),
        (1, 64, 5),
        (4, 128, 33),
        (2, 80, 7),
    ] {
        let query = numbers(group * width, 5);
        let keys = rounded(&numbers(length * width, 6));
        let values = rounded(&numbers(length * width, 7));
        let halves = |x: &[f32]| -> Vec<bf16> { x.iter().map(|x| bf16::from_f32(*x)).collect() };
        let (half_keys, half_values) = (halves(&keys), halves(&values));
        let wide = |x: &[f32], token: usize, i: usize| f64::from(x[token * width + i]);
        let (mut expected, mut capped) = (Vec::new(), Vec::new());
        for query in query.chunks_exact(width) {
            let score = |token| {
                let terms = (0..width).map(|i| f64::from(query[i]) * wide(&keys, token, i));
                terms.sum::<f64>()
            };
            let attend = |score: &dyn Fn(usize) -> f64, expected: &mut Vec<f64>| {
                let p: Vec<f64> = (0..length).map(|token| score(token).exp()).collect();
                let total: f64 = p.iter().sum();
                expected.extend((0..width).map(|i| {
                    let terms = p.iter().enumerate();
                    let sum = terms.map(|(token, p)| p * wide(&values, token, i));
                    sum.sum::<f64>() / total
                }));
            };
            attend(&score, &mut expected);
            attend(&|token| 0.4 * (score(token) / 0.4).tanh(), &mut capped);
        }
        with_each(|isa| {
            for (stored, rounded, within) in [
                ((Cached::F32(&keys), Cached::F32(&values)), false, 1e-5),
                (
                    (Cached::Bf16(&half_keys), Cached::Bf16(&half_values)),
                    false,
                    1e-5,
                ),
                (
                    (Cached::Bf16(&half_keys), Cached::Bf16(&half_values)),
                    true,
                    3e-2,
                ),
            ] {
                for (softcap, expected) in [(None, &expected), (Some(0.4), &capped)] {
                    let mut out = vec![f32::NAN; group * width];
                    let attention = Attention {
                        query: &query,
                        keys: stored.0,
                        values: stored.1,
                        out: &mut out,
                        softcap,
                        rounded,
                    };
                    attention.compute(width);
                    close(&format!("{isa:?} {width}"), &out, expected, within);
                }
            }
        });
    }
}

#[test]
fn rows_are_those_of_plain_formulas() {
    for length in [1, 7, 16, 64, 100] {
        let (x, weight) = (numbers(3 * length, 1), numbers(length, 2));
        let mut normed = Vec::new();
        for x in x.chunks(length) {
            let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            let size = (squares / length as f64 + 1e-5).sqrt();
            let pairs = x.iter().zip(&weight);
            normed.extend(pairs.map(|(x, w)| f64::from(*x) / size * f64::from(*w)));
        }
        let up = numbers(3 * length, 3);
        let pairs = x.iter().zip(&up).map(|(x, up)| {
            let x = 8. * f64::from(*x);
            x / (1. + (-x).exp()) * f64::from(*up)
        });
        let gated: Vec<f64> = pairs.collect();
        let angles = numbers(length, 4);
        let cos: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
        let heads = numbers(4 * length, 5);
        let mut transposed = Vec::new();
        for head in heads.chunks(2 * length) {
            let at = |i: usize| f64::from(head[i]);
            let (cos, sin) = (|i: usize| f64::from(cos[i]), |i: usize| f64::from(sin[i]));
            transposed
                .extend((0..length).map(|i| (at(i) * cos(i) - at(i + length) * sin(i)) * 0.5));
            transposed
                .extend((0..length).map(|i| (at(i + length) * cos(i) + at(i) * sin(i)) * 0.5));
        }
        with_each(|isa| {
            let what = format!("{isa:?} {length}");
            let mut out = vec![f32::NAN; 3 * length];
            rms_norm(&x, &weight, 1e-5, &mut out);
            close(&what, &out, &normed, 1e-5);
            let mut gates: Vec<f32> = x.iter().map(|x| 8. * x).collect();
            gated_unit(Activation::Silu, &mut gates, &up);
            close(&what, &gates, &gated, 1e-5);
            let mut row = heads.clone();
            rope(&mut row, 2 * length, &cos, &sin);
            scale(&mut row, 0.5);
            close(&what, &row, &transposed, 1e-6);
            // Behind what is rotated, a wider head stays as it is.
            let wide = |row: &[f32]| -> Vec<f32> {
                let heads = row.chunks(2 * length).map(|head| [head, &[7.; 3]].concat());
                heads.flatten().collect()
            };
            let mut wider = wide(&heads);
            rope(&mut wider, 2 * length + 3, &cos, &sin);
            let mut narrow = heads.clone();
            rope(&mut narrow, 2 * length, &cos, &sin);
            assert_eq!(wider, wide(&narrow));
            let mut gates: Vec<f32> = x.iter().map(|x| 8. * x).collect();
            let both = gates.iter().zip(&up);
            let exact = |(x, up): (&f32, &f32)| {
                Activation::GeluTanh.exact(f64::from(*x)).0 * f64::from(*up)
            };
            let exact: Vec<f64> = both.map(exact).collect();
            gated_unit(Activation::GeluTanh, &mut gates, &up);
            close(&what, &gates, &exact, 1e-5);
            let mut capped = heads.clone();
            soft_cap(&mut capped, 0.7);
            let exact: Vec<f64> = heads
                .iter()
                .map(|x| 0.7 * (f64::from(*x) / 0.7).tanh())
                .collect();
            close(&what, &capped, &exact, 1e-6);
            let mut some = x.clone();
            round_to_bf16(&mut some);
            let same = some.iter().zip(&x);
            assert!({ same }.all(|(a, b)| a.to_bits() == bf16::from_f32(*b).to_f32().to_bits()));
        });
    }
}

#[test]
fn the_largest_is_the_first_of_equals_and_everything_finite() {
    with_each(|_| {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[-3.]), Some(0));
        let mut values = numbers(100, 8);
        for index in [0, 3, 16, 95, 96, 99] {
            let mut values = values.clone();
            values[index] = 7.;
            assert_eq!(argmax(&values), Some(index));
            values[99] = 7.;
            assert_eq!(argmax(&values), Some(index));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = values.clone();
                values[index] = bad;
                assert_eq!(argmax(&values), None, "{index} {bad}");
            }
        }
        values.fill(-0.);
        values[40] = 0.;
        assert_eq!(argmax(&values), Some(0));
    });
}
