//! Odd shapes against plain loops in f64, with each instruction set, in memory whose neighbours nobody may touch.

use half::{bf16, f16};

use super::guard::{Guarded, Side};
use crate::FloatType;
use crate::dispatch::tests::with_each;
use crate::dropout::Dropout;
use crate::elementwise as each;
use crate::gated::{Activation, gated_unit, gated_unit_backward};
use crate::matrix::{Matrix, Nf4, Values};
use crate::merge::{self, Update};
use crate::nf4;
use crate::panels::{LANES, column, fill, size};
use crate::product::tests::numbers;
use crate::product::{Factor, Onto, Pairs, Product, Term, products};
use crate::reduce::{Order, outer};
use crate::team::Team;
use crate::vectors::{Attention, Cached, VectorProduct, vector_products};
use crate::vocabulary::tests::exponentials;

/// Whole numbers that look random, the same in each run.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// One below `limit`.
    pub(super) fn throw(&mut self, limit: usize) -> usize {
        (crate::random::splitmix64(&mut self.0) % limit as u64) as usize
    }

    /// One of a few small numbers, or one below `limit`.
    pub(super) fn size(&mut self, limit: usize) -> usize {
        match self.throw(3) {
            0 => self.throw(4),
            1 => [11, 12, 13, 15, 16, 17, 31, 32, 33, 48][self.throw(10)].min(limit),
            _ => self.throw(limit),
        }
    }

    pub(super) fn side(&mut self) -> Side {
        Side::BOTH[self.throw(2)]
    }
}

/// Panels of rows, one a token, in guarded memory; lanes behind the last token are zero.
pub(super) fn guarded_panels(
    side: Side,
    rows: &[f32],
    features: usize,
    tokens: usize,
) -> Guarded<f32> {
    let mut out = vec![f32::NAN; size(features, tokens)];
    fill(&mut out, features, tokens, |t| {
        &rows[t * features..][..features]
    });
    side.copy(&out)
}

pub(super) fn near(what: &str, ours: impl IntoIterator<Item = f32>, exact: &[f64], bound: f64) {
    let mut count = 0;
    for (index, ours) in ours.into_iter().enumerate() {
        let far = (f64::from(ours) - exact[index]).abs();
        assert!(far <= bound, "{what}, {index}: {ours} {}", exact[index]);
        count += 1;
    }
    assert_eq!(count, exact.len(), "{what}");
}

#[test]
fn products_of_any_shape() {
    let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.);
    with_each(|isa| {
        let mut dice = Dice(1);
        for case in 0..120u64 {
            let (height, depth) = (dice.size(130), dice.size(700));
            let tokens = dice.size(100);
            let (side, count) = (dice.side(), height * depth);
            let floats = numbers(count, case);
            let halves: Vec<bf16> = floats.iter().map(|x| bf16::from_f32(*x)).collect();
            let packed: Vec<u8> = (0..count.div_ceil(2)).map(|i| (i * 37) as u8).collect();
            let absmax = numbers(count.div_ceil(64), case + 1);
            let (w32, w16) = (side.copy(&floats), side.copy(&halves));
            let (packed, absmax) = (side.copy(&packed), side.copy(&absmax));
            let nf4 = Nf4 {
                packed: &packed,
                absmax: &absmax,
                code: &code,
                rounding: FloatType::Bf16,
            };
            let codes = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
            let four: Vec<f32> = codes
                .take(count)
                .enumerate()
                .map(|(i, c)| bf16::from_f32(code[usize::from(c)] * absmax[i / 64]).to_f32())
                .collect();
            let (stored, dense): (Values<'_>, Vec<f32>) = match dice.throw(3) {
                0 => (Values::F32(&w32), floats.clone()),
                1 => (
                    Values::Bf16(&w16),
                    halves.iter().map(|x| x.to_f32()).collect(),
                ),
                _ => (Values::Nf4(nf4), four),
            };
            let (transposed, half) = (dice.throw(2) == 1, dice.throw(2) == 1);
            let round = |x: &f32| {
                f64::from(if half {
                    bf16::from_f32(*x).to_f32()
                } else {
                    *x
                })
            };
            // The weight is (height, depth), or is stored transposed.
            let weight = if transposed {
                Matrix::new(stored, depth, height).unwrap().transposed()
            } else {
                Matrix::new(stored, height, depth).unwrap()
            };
            let rows = numbers(tokens * depth, case + 2);
            let x = guarded_panels(side, &rows, depth, tokens);
            let factor = if half {
                Factor::Pairs(Pairs::round(&x, depth, |length| vec![9; length]))
            } else {
                Factor::F32(&x)
            };
            let start = numbers(size(height, tokens), case + 3);
            let mut out = side.copy(&start);
            let other = numbers(start.len(), case + 4);
            let onto = [Onto::Zero, Onto::Out, Onto::Values(&other)][dice.throw(3)];
            let bias = side.copy(&numbers(height, case + 5));
            let bias = (dice.throw(2) == 1).then_some(&bias[..]);
            products(vec![Product {
                out: &mut out,
                terms: vec![Term { weight, x: &factor }],
                onto,
                bias,
            }]);
            for token in 0..tokens {
                let before: Vec<f32> = match onto {
                    Onto::Zero => vec![0.; height],
                    Onto::Out => column(&start, height, token).collect(),
                    Onto::Values(values) => column(values, height, token).collect(),
                };
                let exact: Vec<f64> = before
                    .iter()
                    .enumerate()
                    .map(|(i, before)| {
                        let terms = (0..depth).map(|k| {
                            let w = if transposed {
                                dense[k * height + i]
                            } else {
                                dense[i * depth + k]
                            };
                            round(&w) * round(&rows[token * depth + k])
                        });
                        let sum: f64 = terms.sum();
                        let bias = bias.map_or(0., |bias| f64::from(bias[i]));
                        sum + f64::from(*before) + bias
                    })
                    .collect();
                let what = format!("{isa:?} {height} x {depth}, {tokens}, {transposed} {half}");
                let bound = 1e-6 * (4. + 4. * (depth as f64).sqrt());
                near(&what, column(&out, height, token), &exact, bound);
            }
        }
    });
}

#[test]
fn sums_over_tokens_of_any_shape() {
    with_each(|isa| {
        let mut dice = Dice(2);
        for case in 0..80u64 {
            let (rows, columns, tokens) = (dice.size(100), dice.size(70), dice.size(100));
            let side = dice.side();
            let (left, right) = (
                numbers(tokens * rows, case),
                numbers(tokens * columns, case + 1),
            );
            let a = guarded_panels(side, &left, rows, tokens);
            let b = guarded_panels(side, &right, columns, tokens);
            let order = [Order::Straight, Order::Transposed][dice.throw(2)];
            let mut out = side.copy(&vec![1.; rows * columns]);
            outer((&a, rows), (&b, columns), &mut out, order);
            let at = |i: usize, j: usize| {
                let terms = (0..tokens)
                    .map(|t| f64::from(left[t * rows + i]) * f64::from(right[t * columns + j]));
                1. + terms.sum::<f64>()
            };
            let exact: Vec<f64> = match order {
                Order::Straight => (0..rows * columns)
                    .map(|index| at(index / columns, index % columns))
                    .collect(),
                Order::Transposed => (0..rows * columns)
                    .map(|index| at(index % rows, index / rows))
                    .collect(),
            };
            let what = format!("{isa:?} {rows} x {columns}, {tokens}, {order:?}");
            near(&what, out.iter().copied(), &exact, 2e-5);
        }
    });
}

#[test]
fn loops_over_features_of_any_shape() {
    with_each(|isa| {
        let mut dice = Dice(3);
        for case in 0..60u64 {
            let (features, tokens) = (dice.size(150) + 1, dice.size(100));
            let side = dice.side();
            let what = format!("{isa:?} {features}, {tokens}");
            let rows = numbers(tokens * features, case);
            let wide: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
            let x = guarded_panels(side, &rows, features, tokens);
            let weight = side.copy(&numbers(features, case + 1));

            let mut out = side.copy(&vec![f32::NAN; x.len()]);
            let mut again = side.copy(&vec![f32::NAN; x.len()]);
            let mut inverse = side.copy(&vec![f32::NAN; size(1, tokens)]);
            each::rms_norm(&x, &weight, 1e-5, &mut out, &mut inverse);
            each::rms_norm_recompute(&x, &weight, &inverse, &mut again);
            assert!(out[..] == again[..], "{what}");
            let residual = numbers(tokens * features, case + 5);
            let onto = guarded_panels(side, &residual, features, tokens);
            let mut sum = side.copy(&vec![f32::NAN; x.len()]);
            again[..inverse.len()].copy_from_slice(&inverse);
            each::rms_norm_onto(&x, &weight, 1e-5, (&onto, -0.7), &mut sum, &mut inverse);
            assert!(again[..inverse.len()] == inverse[..], "{what}");
            for token in 0..tokens {
                let normed = column(&out, features, token);
                let exact: Vec<f64> = normed
                    .zip(&residual[token * features..])
                    .map(|(y, r)| f64::from(*r) - 0.7 * f64::from(y))
                    .collect();
                near(&what, column(&sum, features, token), &exact, 1e-5);
            }
            let gradient = numbers(tokens * features, case + 2);
            let g = guarded_panels(side, &gradient, features, tokens);
            let mut grad_x = side.copy(&vec![0.; x.len()]);
            each::rms_norm_backward(&x, &weight, &inverse, &g, &mut grad_x);
            let mut grad_weight = side.copy(&vec![0.; features]);
            each::rms_norm_grad_weight(&x, &inverse, &g, &mut grad_weight);
            let mut exact_of_weight = vec![0.; features];
            for token in 0..tokens {
                let row = &wide[token * features..][..features];
                let squares: f64 = row.iter().map(|x| x * x).sum();
                let i = (squares / features as f64 + 1e-5).sqrt().recip();
                let weighted = |f: usize| f64::from(weight[f]);
                let g = |f: usize| f64::from(gradient[token * features + f]);
                let exact: Vec<f64> = (0..features).map(|f| row[f] * i * weighted(f)).collect();
                near(&what, column(&out, features, token), &exact, 1e-5);
                let along: f64 = (0..features).map(|f| row[f] * g(f) * weighted(f)).sum();
                let exact: Vec<f64> = (0..features)
                    .map(|f| g(f) * weighted(f) * i - row[f] * along * i.powi(3) / features as f64)
                    .collect();
                // A token of few features may be near 0, and its norm's slope then is steep.
                let bound = 1e-5 * (1. + i * i);
                near(&what, column(&grad_x, features, token), &exact, bound);
                for (f, sum) in exact_of_weight.iter_mut().enumerate() {
                    *sum += g(f) * row[f] * i;
                }
            }
            let few = grad_weight.iter().copied();
            near(&what, few, &exact_of_weight, 1e-4);

            let length = x.len() - x.len().min(dice.throw(40));
            let (gate, up) = (side.copy(&x[..length]), side.copy(&g[..length]));
            let mut gated = side.copy(&vec![f32::NAN; length]);
            let activation = Activation::ALL[dice.throw(2)];
            gated_unit(activation, &gate, &up, &mut gated);
            let both = gate.iter().zip(&up[..]);
            let exact: Vec<f64> = both
                .map(|(g, u)| activation.exact(f64::from(*g)).0 * f64::from(*u))
                .collect();
            near(&what, gated.iter().copied(), &exact, 1e-6);
            let incoming = numbers(length, case + 3);
            let mut grad_gate = side.copy(&gate);
            let (mut grad_up, mut back) = (side.copy(&up), side.copy(&incoming));
            gated_unit_backward(activation, &mut grad_gate, &mut grad_up, &mut back);
            near(&what, back.iter().copied(), &exact, 1e-6);
            let exact: Vec<[f64; 2]> = (0..length)
                .map(|at| {
                    let (g, u) = (f64::from(gate[at]), f64::from(up[at]));
                    let ((value, slope), d) = (activation.exact(g), f64::from(incoming[at]));
                    [d * u * slope, d * value]
                })
                .collect();
            let part = |part: usize| exact.iter().map(|x| x[part]).collect::<Vec<f64>>();
            near(&what, grad_gate.iter().copied(), &part(0), 1e-6);
            near(&what, grad_up.iter().copied(), &part(1), 1e-6);
            each::add(&mut gated, &up, -2.);
            each::scale(&mut gated, 3.);
            each::scale_and_add(&mut gated, 0.5, &up);
            assert!(gated.iter().all(|x| x.is_finite()), "{what}");

            let dropout = Dropout { start: 5, p: 0.4 };
            let indices: Vec<u64> = (0..tokens as u64).rev().collect();
            let mut dropped = side.copy(&x);
            dropout.apply(&mut dropped, features, &side.copy(&indices));
            for (token, index) in indices.iter().enumerate() {
                let factors = dropout.factors(index * features as u64);
                let row = &rows[token * features..][..features];
                let exact = row.iter().zip(factors).map(|(x, factor)| x * factor);
                assert!(column(&dropped, features, token).eq(exact), "{what}");
            }
        }
    });
}

#[test]
fn rotations_of_any_shape() {
    with_each(|isa| {
        let mut dice = Dice(4);
        for case in 0..40u64 {
            let (half, heads, tokens) = (dice.size(70) + 1, dice.throw(4) + 1, dice.size(80));
            let width = 2 * half + [0, 0, dice.throw(20)][dice.throw(3)];
            let (side, features) = (dice.side(), width * heads);
            let rows = numbers(tokens * features, case);
            let angles = numbers(tokens * half, case + 1);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let mut x = guarded_panels(side, &rows, features, tokens);
            let cos_panels = guarded_panels(side, &cos, half, tokens);
            let sin_panels = guarded_panels(side, &sin, half, tokens);
            let rotary = each::Rotary {
                cos: &cos_panels,
                sin: &sin_panels,
                pairs: half,
                width,
            };
            each::rope(&mut x, features, rotary, false);
            let what = format!("{isa:?} {heads} heads of {half}, {width}, {tokens}");
            for token in 0..tokens {
                let exact: Vec<f64> = (0..features)
                    .map(|f| {
                        let (index, upper) = (f % width % half, f % width >= half);
                        let at = |f: usize| f64::from(rows[token * features + f]);
                        if f % width >= 2 * half {
                            return at(f);
                        }
                        let c = f64::from(cos[token * half + index]);
                        let s = f64::from(sin[token * half + index]);
                        if upper {
                            at(f) * c + at(f - half) * s
                        } else {
                            at(f) * c - at(f + half) * s
                        }
                    })
                    .collect();
                near(&what, column(&x, features, token), &exact, 1e-6);
            }
        }
    });
}

#[test]
fn vocabularies_and_four_bits_of_any_length() {
    with_each(|isa| {
        let mut dice = Dice(5);
        for case in 0..60u64 {
            let (vocabulary, tokens) = (dice.size(600) + 1, dice.size(70));
            let side = dice.side();
            let rows: Vec<f32> = numbers(tokens * vocabulary, case)
                .iter()
                .map(|x| x * 20.)
                .collect();
            let mut logits = guarded_panels(side, &rows, vocabulary, tokens);
            let summaries = exponentials(&mut logits, vocabulary);
            assert_eq!(summaries.len(), tokens.div_ceil(LANES));
            for (token, row) in rows.chunks_exact(vocabulary).enumerate() {
                let (summary, lane) = (&summaries[token / LANES], token % LANES);
                let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                let far = (summary.log_sum(lane) - sum.ln()).abs();
                assert!(far < 1e-5, "{isa:?} {vocabulary} {token}");
                let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!((row[summary.argmax[lane] as usize] - most).abs() < 1e-30);
            }

            let count = dice.size(400);
            let values = numbers(count, case + 1);
            for stored in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
                let bytes: Vec<u8> = values
                    .iter()
                    .flat_map(|x| match stored {
                        FloatType::F32 => x.to_le_bytes().to_vec(),
                        FloatType::Bf16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
                        FloatType::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
                    })
                    .collect();
                let bytes = side.copy(&bytes);
                let mut most = side.copy(&vec![f32::NAN; count.div_ceil(64)]);
                let mut packed = side.copy(&vec![0xaa; count.div_ceil(2)]);
                nf4::absmax(stored, &bytes, &mut most);
                nf4::pack(stored, &bytes, &mut packed);
                for (i, x) in values.iter().enumerate() {
                    let byte = packed[i / 2];
                    let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                    let far = (nf4::CODE[usize::from(code)] * most[i / 64] - x).abs();
                    // Half of the widest gap between two codes.
                    assert!(far <= 0.16 * most[i / 64] + 0.01, "{isa:?} {count} {i}");
                }
            }
        }
    });
}

#[test]
fn merges_and_vectors_of_any_shape() {
    with_each(|isa| {
        let mut dice = Dice(6);
        for case in 0..60u64 {
            let (rows, columns, rank) = (dice.size(40) + 1, dice.size(700) + 1, dice.size(20));
            let side = dice.side();
            let (a, b) = (
                numbers(rank * columns, case),
                numbers(rows * rank, case + 1),
            );
            let (a, b) = (side.copy(&a), side.copy(&b));
            let first = dice.throw(rows * columns);
            let count = dice.throw(rows * columns - first + 1);
            let mut values = side.copy(&vec![1f32; count]);
            let update = Update {
                a: &a,
                b: &b,
                columns,
                scaling: 0.5,
            };
            merge::add(update, first, &mut values);
            let exact: Vec<f64> = (first..first + count)
                .map(|index| {
                    let (row, column) = (index / columns, index % columns);
                    let terms = (0..rank)
                        .map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]));
                    1. + 0.5 * terms.sum::<f64>()
                })
                .collect();
            let what = format!("{isa:?} {rows} x {columns}, {rank}");
            near(&what, values.iter().copied(), &exact, 1e-5);

            let vectors = dice.size(20);
            let x: Vec<f32> = numbers(vectors * columns, case + 3);
            let halves: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
            let weight = side.copy(&numbers(rows * columns, case + 2));
            let upper: Vec<bf16> = weight.iter().map(|x| bf16::from_f32(*x)).collect();
            let upper = side.copy(&upper);
            let rounded: Vec<f32> = upper.iter().map(|x| x.to_f32()).collect();
            // Whole blocks of codes a row in every other case.
            let deep = if case % 2 == 0 {
                columns.next_multiple_of(64)
            } else {
                columns
            };
            let packed: Vec<u8> = (0..(rows * deep).div_ceil(2))
                .map(|i| (i * 37 + 11) as u8)
                .collect();
            let packed = side.copy(&packed);
            let absmax = side.copy(&numbers((rows * deep).div_ceil(64), case + 4));
            for rounding in [FloatType::F32, FloatType::Bf16, FloatType::F16] {
                let nf4 = Nf4 {
                    packed: &packed,
                    absmax: &absmax,
                    code: &nf4::CODE,
                    rounding,
                };
                let dense: Vec<f32> = (0..rows * deep)
                    .map(|index| {
                        let code = packed[index / 2] >> (4 - 4 * (index % 2)) & 15;
                        let value = nf4::CODE[usize::from(code)] * absmax[index / 64];
                        match rounding {
                            FloatType::F32 => value,
                            FloatType::Bf16 => bf16::from_f32(value).to_f32(),
                            FloatType::F16 => f16::from_f32(value).to_f32(),
                        }
                    })
                    .collect();
                for exact in [false, true] {
                    let mut x = numbers(vectors * deep, case + 3);
                    if !exact {
                        for x in &mut x {
                            *x = bf16::from_f32(*x).to_f32();
                        }
                    }
                    let matrix = Matrix::new(Values::Nf4(nf4), rows, deep).unwrap();
                    check_vectors(&what, side, matrix, &dense, &x, !exact);
                }
            }
            for (x, exact) in [(&x, true), (&halves, false)] {
                let matrix = Matrix::f32(&weight, rows, columns).unwrap();
                check_vectors(&what, side, matrix, &weight, x, !exact);
                let matrix = Matrix::new(Values::Bf16(&upper), rows, columns).unwrap();
                check_vectors(&what, side, matrix, &rounded, x, !exact);
            }

            let (group, width, length) = (dice.throw(9) + 1, dice.size(130) + 1, dice.size(60) + 1);
            let keys = side.copy(&numbers(length * width, case + 4));
            let values = side.copy(&numbers(length * width, case + 5));
            let query = side.copy(&numbers(group * width, case + 6));
            let mut out = side.copy(&vec![f32::NAN; group * width]);
            let softcap = [None, Some(0.5), Some(20.)][dice.throw(3)];
            let attention = Attention {
                query: &query,
                keys: Cached::F32(&keys),
                values: Cached::F32(&values),
                out: &mut out,
                softcap,
                rounded: false,
            };
            attention.compute(width);
            let mut exact = Vec::new();
            for query in query.chunks_exact(width) {
                let at = |data: &[f32], token: usize, f: usize| f64::from(data[token * width + f]);
                let p: Vec<f64> = (0..length)
                    .map(|t| {
                        let dot = (0..width).map(|f| f64::from(query[f]) * at(&keys, t, f));
                        let score = dot.sum::<f64>();
                        let capped = |cap: f32| f64::from(cap) * (score / f64::from(cap)).tanh();
                        softcap.map_or(score, capped).exp()
                    })
                    .collect();
                let sum: f64 = p.iter().sum();
                exact.extend((0..width).map(|f| {
                    let values = p.iter().enumerate().map(|(t, p)| p * at(&values, t, f));
                    values.sum::<f64>() / sum
                }));
            }
            near(&what, out.iter().copied(), &exact, 2e-5);
        }
    });
}

/// Products of a weight with some vectors against plain sums of its `dense` values.
fn check_vectors(
    what: &str,
    side: Side,
    weight: Matrix<'_>,
    dense: &[f32],
    x: &[f32],
    rounded: bool,
) {
    let (rows, columns) = (weight.height(), weight.depth());
    let vectors = x.len() / columns;
    let x = side.copy(x);
    let mut out = side.copy(&vec![f32::NAN; vectors * rows]);
    let all = vec![VectorProduct {
        weight,
        x: &x,
        rounded,
        out: &mut out,
    }];
    Team::gather(|team| vector_products(team, all));
    let exact: Vec<f64> = (0..vectors * rows)
        .map(|index| {
            let (vector, row) = (index / rows, index % rows);
            let x = &x[vector * columns..][..columns];
            let w = &dense[row * columns..][..columns];
            x.iter()
                .zip(w)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum()
        })
        .collect();
    near(what, out.iter().copied(), &exact, 5e-5);
}
