//! Products of weights in all forms against the CPU.

use half::{bf16, f16};
use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::{self, Nf4, Values};
use pipeline_kernels::nf4;
use pipeline_kernels::panels::size;
use pipeline_kernels::product as cpu;

use super::{device, near, numbers, panels};
use crate::{Onto, Product, Term};

/// A weight in some form.
pub(super) enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Nf4(Vec<u8>, Vec<f32>, FloatType),
}

impl Stored {
    pub(super) fn all(values: &[f32]) -> Vec<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut packed = vec![0; values.len().div_ceil(2)];
        let mut absmax = vec![0.; values.len().div_ceil(nf4::BLOCK)];
        nf4::pack(FloatType::F32, &bytes, &mut packed);
        nf4::absmax(FloatType::F32, &bytes, &mut absmax);
        let quantised = |rounding| Self::Nf4(packed.clone(), absmax.clone(), rounding);
        vec![
            Self::F32(values.to_vec()),
            Self::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect()),
            // Some of them are subnormal.
            Self::F16(values.iter().map(|x| f16::from_f32(x * 1e-3)).collect()),
            quantised(FloatType::F32),
            quantised(FloatType::Bf16),
            quantised(FloatType::F16),
        ]
    }

    pub(super) fn values(&self) -> Values<'_> {
        match self {
            Self::F32(values) => Values::F32(values),
            Self::Bf16(values) => Values::Bf16(values),
            Self::F16(values) => Values::F16(values),
            Self::Nf4(packed, absmax, rounding) => Values::Nf4(Nf4 {
                packed,
                absmax,
                code: &nf4::CODE,
                rounding: *rounding,
            }),
        }
    }
}

#[test]
fn products_of_weights_in_all_forms() {
    let Some(device) = device() else { return };
    for (rows, columns, tokens) in [
        (1, 1, 1),
        (8, 40, 33),
        (33, 17, 70),
        (130, 100, 64),
        (257, 51, 5),
    ] {
        let x = panels(columns, tokens, 2);
        let y = panels(rows, tokens, 3);
        let (dx, dy) = (device.upload(&x).unwrap(), device.upload(&y).unwrap());
        for stored in Stored::all(&numbers(rows * columns, 1)) {
            let values = stored.values();
            let weight = device.upload_weight(values, rows, columns).unwrap();
            let own = matrix::Matrix::new(values, rows, columns).unwrap();
            for (transposed, x, dx) in [(false, &x, &dx), (true, &y, &dy)] {
                let (mut own, mut ours) = (own, weight.matrix());
                if transposed {
                    (own, ours) = (own.transposed(), ours.transposed());
                }
                let mut expected = vec![0.; size(own.height(), tokens)];
                let factor = cpu::Factor::F32(x);
                let term = cpu::Term {
                    weight: own,
                    x: &factor,
                };
                cpu::product(&mut expected, vec![term], cpu::Onto::Zero);
                let mut out = device.allocate(expected.len()).unwrap();
                device.product(Product {
                    out: &mut out,
                    terms: vec![Term {
                        weight: ours,
                        x: dx,
                    }],
                    onto: Onto::Zero,
                    bias: None,
                    rounding: FloatType::F32,
                });
                near(&device.read(&out).unwrap(), &expected, 1e-6);
            }
        }
    }
}

/// What a product adds to, its bias, a pair of low rank, weights in several buffers, some rows alone, and rounding to bf16.
#[test]
fn products_with_all_that_is_added() {
    let Some(whole) = device() else { return };
    let limited = crate::Device::of(whole.adapter().clone()).unwrap();
    let limited = limited.with_weight_parts(4 * 64 * 48);
    let (rows, columns, rank, tokens) = (200, 48, 7, 40);
    let values: Vec<bf16> = numbers(rows * columns, 1)
        .iter()
        .map(|x| bf16::from_f32(*x))
        .collect();
    let floats: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
    let factors = [numbers(rank * columns, 2), numbers(rows * rank, 3)];
    for (device, buffers) in [(whole, [1, 1]), (&limited, [2, 4])] {
        for (form, count) in [Values::Bf16(&values), Values::F32(&floats)]
            .into_iter()
            .zip(buffers)
        {
            let weight = device.upload_weight(form, rows, columns).unwrap();
            assert_eq!(weight.buffers(), count);
            let own = matrix::Matrix::new(form, rows, columns).unwrap();
            let a = device
                .upload_weight(Values::F32(&factors[0]), rank, columns)
                .unwrap();
            let b = device
                .upload_weight(Values::F32(&factors[1]), rows, rank)
                .unwrap();
            let a_own = matrix::Matrix::f32(&factors[0], rank, columns).unwrap();
            let b_own = matrix::Matrix::f32(&factors[1], rows, rank).unwrap();
            for (transposed, half, mode) in [
                (false, false, 0),
                (false, true, 1),
                (false, false, 2),
                (true, false, 0),
                (true, false, 1),
                (true, true, 2),
            ] {
                let (main, pair) = if transposed {
                    (
                        [own.transposed(), a_own.transposed()],
                        [weight.matrix().transposed(), a.matrix().transposed()],
                    )
                } else {
                    ([own, b_own], [weight.matrix(), b.matrix()])
                };
                let (main, [big, small]) = (main, pair);
                let (height, depth) = (main[0].height(), main[0].depth());
                let (x, low) = (panels(depth, tokens, 4), panels(rank, tokens, 5));
                let residual = panels(height, tokens, 6);
                let bias = numbers(height, 7);
                let mut expected = residual.clone();
                let factor = |values: &'_ [f32], features: usize| {
                    if half {
                        cpu::Factor::Pairs(cpu::Pairs::round(values, features, |n| vec![0; n]))
                    } else {
                        cpu::Factor::F32(Box::leak(values.to_vec().into_boxed_slice()))
                    }
                };
                let (fx, flow) = (factor(&x, depth), factor(&low, rank));
                cpu::products(vec![cpu::Product {
                    out: &mut expected,
                    terms: vec![
                        cpu::Term {
                            weight: main[0],
                            x: &fx,
                        },
                        cpu::Term {
                            weight: main[1],
                            x: &flow,
                        },
                    ],
                    onto: match mode {
                        0 => cpu::Onto::Zero,
                        1 => cpu::Onto::Out,
                        _ => cpu::Onto::Values(&residual),
                    },
                    bias: Some(&bias),
                }]);
                let [dx, dlow, dres, dbias] =
                    [&x, &low, &residual, &bias].map(|values| device.upload(values).unwrap());
                let mut out = device.upload(&residual).unwrap();
                device.products(vec![Product {
                    out: &mut out,
                    terms: vec![
                        Term {
                            weight: big,
                            x: &dx,
                        },
                        Term {
                            weight: small,
                            x: &dlow,
                        },
                    ],
                    onto: match mode {
                        0 => Onto::Zero,
                        1 => Onto::Out,
                        _ => Onto::Values(&dres),
                    },
                    bias: Some(&dbias),
                    rounding: if half {
                        FloatType::Bf16
                    } else {
                        FloatType::F32
                    },
                }]);
                near(&device.read(&out).unwrap(), &expected, 2e-6);
            }
            // Some rows alone, across the buffers.
            for (range, transposed) in [(37..150, false), (37..150, true), (5..5, true)] {
                let own = matrix::Matrix::f32(
                    &floats[range.start * columns..range.end * columns],
                    range.len(),
                    columns,
                )
                .unwrap();
                let (mut own, mut ours) = (own, weight.rows(range));
                if transposed {
                    (own, ours) = (own.transposed(), ours.transposed());
                }
                let x = panels(own.depth().max(1), tokens, 8);
                let x = &x[..size(own.depth(), tokens)];
                let mut expected = panels(own.height(), tokens, 9);
                let mut out = device.upload(&expected).unwrap();
                let factor = cpu::Factor::F32(x);
                cpu::product(
                    &mut expected,
                    vec![cpu::Term {
                        weight: own,
                        x: &factor,
                    }],
                    cpu::Onto::Zero,
                );
                device.product(Product {
                    out: &mut out,
                    terms: vec![Term {
                        weight: ours,
                        x: &device.upload(x).unwrap(),
                    }],
                    onto: Onto::Zero,
                    bias: None,
                    rounding: FloatType::F32,
                });
                near(&device.read(&out).unwrap(), &expected, 2e-6);
            }
        }
    }
}

/// Factors in half precision against sums in f64 of values that are rounded on the host; beyond its range they are infinite.
#[test]
fn products_of_factors_in_half_precision() {
    let Some(device) = device() else { return };
    let (rows, columns, tokens) = (37, 50, 40);
    let weight = numbers(rows * columns, 1);
    let round = |x: f32| f64::from(f16::from_f32(x).to_f32());
    for (scale, beyond) in [(1., false), (1e-6, false), (70_000., true)] {
        let x: Vec<f32> = panels(columns, tokens, 2)
            .iter()
            .map(|x| x * scale)
            .collect();
        let dx = device.upload(&x).unwrap();
        for stored in Stored::all(&weight) {
            let values = stored.values();
            let own = device.upload_weight(values, rows, columns).unwrap();
            let plain = match values {
                Values::F32(values) => values.to_vec(),
                Values::Bf16(values) => values.iter().map(|x| x.to_f32()).collect(),
                Values::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
                Values::Nf4(nf4) => {
                    let mut out = vec![0.; rows * columns];
                    nf4.dequantise(0, &mut out);
                    out
                }
            };
            let mut out = device.take(size(rows, tokens));
            device.product(Product {
                out: &mut out,
                terms: vec![Term {
                    weight: own.matrix(),
                    x: &dx,
                }],
                onto: Onto::Zero,
                bias: None,
                rounding: FloatType::F16,
            });
            let ours = device.read(&out).unwrap();
            if beyond {
                assert!(ours.iter().any(|x| !x.is_finite()));
                continue;
            }
            let mut expected = vec![0f32; ours.len()];
            for token in 0..tokens {
                for row in 0..rows {
                    let place = |features: usize, feature: usize| {
                        (token / 32 * features + feature) * 32 + token % 32
                    };
                    let sum = (0..columns).map(|column| {
                        round(plain[row * columns + column]) * round(x[place(columns, column)])
                    });
                    expected[place(rows, row)] = sum.sum::<f64>() as f32;
                }
            }
            let largest = expected.iter().fold(1e-30f32, |a, b| a.max(b.abs()));
            for (ours, exact) in ours.iter().zip(&expected) {
                assert!((ours - exact).abs() <= 2e-6 * largest, "{ours} {exact}");
            }
        }
    }
}
