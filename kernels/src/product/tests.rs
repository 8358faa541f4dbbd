//! Products against a plain loop in f64, for each instruction set, kind of weight and ragged shape.

use half::{bf16, f16};

use super::*;
use crate::FloatType;
use crate::dispatch::tests::with_each;
use crate::matrix::{Nf4, Values};
use crate::panels::{column, fill, size};

/// Numbers between -1 and 1.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
    };
    (0..count).map(|_| next()).collect()
}

const CODE: [f32; 16] = [
    -1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72,
    1.0,
];

struct Weights {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
    packed: Vec<u8>,
    absmax: Vec<f32>,
}

fn nf4(weights: &Weights, rounding: FloatType) -> Values<'_> {
    Values::Nf4(Nf4 {
        packed: &weights.packed,
        absmax: &weights.absmax,
        code: &CODE,
        rounding,
    })
}

fn weights(count: usize) -> Weights {
    let f32 = numbers(count, 1);
    let bytes = numbers(count.div_ceil(2), 2);
    let absmax = numbers(count.div_ceil(64), 3);
    Weights {
        bf16: f32.iter().map(|x| bf16::from_f32(*x)).collect(),
        f16: f32.iter().map(|x| f16::from_f32(*x)).collect(),
        f32,
        packed: bytes.iter().map(|x| ((x + 1.) * 127.) as u8).collect(),
        absmax: absmax.iter().map(|x| x.abs()).collect(),
    }
}

fn dense(matrix: Matrix<'_>, rows: usize, columns: usize, round: bool) -> Vec<f64> {
    let mut buffer = Vec::new();
    let mut all = Vec::new();
    for row in 0..rows {
        let values = matrix.row(row, 0..columns, &mut buffer);
        all.extend(values.iter().map(|x| {
            let x = if round {
                bf16::from_f32(*x).to_f32()
            } else {
                *x
            };
            f64::from(x)
        }));
    }
    all
}

#[test]
fn every_kind_of_weight_is_multiplied() {
    with_each(|isa| {
        for (rows, columns, tokens) in [(1, 1, 1), (13, 7, 33), (40, 66, 64), (100, 1300, 70)] {
            let weights = weights(rows * columns);
            for values in [
                Values::F32(&weights.f32),
                Values::Bf16(&weights.bf16),
                Values::F16(&weights.f16),
                nf4(&weights, FloatType::F32),
                nf4(&weights, FloatType::F16),
            ] {
                for transposed in [false, true] {
                    for half in [false, true] {
                        let matrix = Matrix::new(values, rows, columns).unwrap();
                        let w = dense(matrix, rows, columns, half);
                        let matrix = if transposed {
                            matrix.transposed()
                        } else {
                            matrix
                        };
                        let (height, depth) = (matrix.height(), matrix.depth());
                        let x: Vec<Vec<f32>> =
                            (0..tokens).map(|t| numbers(depth, 10 + t as u64)).collect();
                        let mut panels = vec![0.; size(depth, tokens)];
                        fill(&mut panels, depth, tokens, |t| &x[t]);
                        let factor = if half {
                            Factor::Pairs(Pairs::round(&panels, depth, |length| vec![9; length]))
                        } else {
                            Factor::F32(&panels)
                        };
                        let mut out = vec![1.; size(height, tokens)];
                        let term = Term {
                            weight: matrix,
                            x: &factor,
                        };
                        product(&mut out, vec![term.clone()], Onto::Zero);
                        product(&mut out, vec![term], Onto::Out);
                        for (t, x) in x.iter().enumerate() {
                            let ours = column(&out, height, t);
                            for (i, ours) in ours.enumerate() {
                                let sum: f64 = (0..depth)
                                    .map(|k| {
                                        let w = if transposed {
                                            w[k * columns + i]
                                        } else {
                                            w[i * columns + k]
                                        };
                                        let x = if half {
                                            bf16::from_f32(x[k]).to_f32()
                                        } else {
                                            x[k]
                                        };
                                        w * f64::from(x)
                                    })
                                    .sum();
                                let far = (f64::from(ours) - 2. * sum).abs();
                                let near = 1e-6 * (depth as f64).sqrt() * 4.;
                                assert!(
                                    far < near,
                                    "{isa:?} {values:?} {transposed} {half}: {far} at {i}, {t}"
                                );
                            }
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn terms_add_up_and_threads_change_nothing() {
    let (w, v) = (numbers(50 * 40, 1), numbers(50 * 16, 2));
    let (x, y) = (numbers(size(40, 90), 3), numbers(size(16, 90), 4));
    let (x, y) = (Factor::F32(&x), Factor::F32(&y));
    let (w, v) = (
        Matrix::f32(&w, 50, 40).unwrap(),
        Matrix::f32(&v, 50, 16).unwrap(),
    );
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let mut both = vec![0.; size(50, 90)];
            let terms = vec![Term { weight: w, x: &x }, Term { weight: v, x: &y }];
            product(&mut both, terms, Onto::Zero);
            let (mut one, mut other) = (vec![0.; size(50, 90)], vec![0.; size(50, 90)]);
            products(vec![
                Product {
                    out: &mut one,
                    terms: vec![Term { weight: w, x: &x }],
                    onto: Onto::Zero,
                    bias: None,
                },
                Product {
                    out: &mut other,
                    terms: vec![Term { weight: v, x: &y }],
                    onto: Onto::Zero,
                    bias: None,
                },
            ]);
            for ((both, one), other) in both.iter().zip(&one).zip(&other) {
                assert!((both - (one + other)).abs() < 1e-4);
            }
            both
        })
    };
    // Nobody changes the instruction set meanwhile.
    with_each(|isa| assert_eq!(run(1), run(3), "{isa:?}"));
}
