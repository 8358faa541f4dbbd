use half::{bf16, f16};
use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::{self, Nf4, Values};
use pipeline_kernels::nf4;
use pipeline_kernels::panels::size;
use pipeline_kernels::product as cpu;

use super::{device, near, numbers, panels};
use crate::{Onto, Product, Term};

/// A weight in some form.
enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Nf4(Vec<u8>, Vec<f32>, FloatType),
}

impl Stored {
    fn all(values: &[f32]) -> Vec<Self> {
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

    fn values(&self) -> Values<'_> {
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
                    half: false,
                });
                near(&device.read(&out).unwrap(), &expected, 1e-6);
            }
        }
    }
}
