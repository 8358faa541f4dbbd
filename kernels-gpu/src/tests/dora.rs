//! The parts of `DoRA` against the CPU.

use pipeline_kernels::dora as cpu;
use pipeline_kernels::matrix::{Matrix, Values};

use super::product::Stored;
use super::{device, near, numbers, panels};
use crate::{Device, Onto};

/// Weights in all forms, in one buffer and in several.
#[test]
fn factors_are_those_of_the_sum_s_rows() {
    let Some(whole) = device() else { return };
    let limited = Device::of(whole.adapter().clone()).unwrap();
    let limited = limited.with_weight_parts(4 * 64 * 48);
    for (rows, columns, rank) in [(1, 1, 1), (33, 50, 3), (200, 48, 8), (5, 300, 2)] {
        let (a, b) = (numbers(rank * columns, 2), numbers(rows * rank, 3));
        let magnitude = numbers(rows, 4);
        for device in [whole, &limited] {
            let [low, high] = [(&a, rank, columns), (&b, rows, rank)].map(|(x, rows, columns)| {
                let values = Values::F32(x);
                device.upload_weight(values, rows, columns).unwrap()
            });
            let own = device.upload(&magnitude).unwrap();
            for stored in Stored::all(&numbers(rows * columns, 1)) {
                let values = stored.values();
                let matrix = |values, rows, columns| Matrix::new(values, rows, columns).unwrap();
                let pair = (
                    matrix(Values::F32(&a), rank, columns),
                    matrix(Values::F32(&b), rows, rank),
                );
                let mut norms = vec![0.; rows];
                cpu::row_norms(matrix(values, rows, columns), pair, 0.5, &mut norms);
                let weight = device.upload_weight(values, rows, columns).unwrap();
                let pair = (&low.matrix(), &high.matrix());
                let ours = device.row_factors(&weight.matrix(), pair, 0.5, &own);
                let [factors, inverse] = ours.map(|values| device.read(&values).unwrap());
                let reciprocals: Vec<f32> = norms.iter().map(|norm| 1. / norm).collect();
                near(&inverse, &reciprocals, 2e-6);
                let expected = magnitude.iter().zip(&reciprocals).map(|(m, x)| m * x);
                near(&factors, &expected.collect::<Vec<_>>(), 2e-6);
            }
        }
    }
}

#[test]
fn features_are_scaled_and_summed() {
    let Some(device) = device() else { return };
    for (features, tokens) in [(1, 1), (7, 70), (33, 32)] {
        let x = panels(features, tokens, 1);
        let y = panels(features, tokens, 2);
        let (factors, bias) = (numbers(features, 3), numbers(features, 4));
        let [dx, dy, dfactors, dbias] =
            [&x, &y, &factors, &bias].map(|values| device.upload(values).unwrap());
        for (own, ours, bias, dbias) in [
            (cpu::Onto::Zero, Onto::Zero, Some(&bias[..]), Some(&dbias)),
            (cpu::Onto::Out, Onto::Out, None, None),
            (
                cpu::Onto::Values(&x),
                Onto::Values(&dx),
                Some(&bias),
                Some(&dbias),
            ),
        ] {
            let mut expected = y.clone();
            cpu::scale_features(&x, &factors, bias, own, &mut expected);
            let mut out = device.upload(&y).unwrap();
            device.scale_features(&dx, &dfactors, dbias, ours, &mut out);
            near(&device.read(&out).unwrap(), &expected, 1e-6);
        }
        let mut expected = bias.clone();
        cpu::feature_dots(&x, &y, &factors, &mut expected);
        let mut out = device.upload(&bias).unwrap();
        device.feature_dots(&dx, &dy, &dfactors, &mut out);
        near(&device.read(&out).unwrap(), &expected, 1e-6);
    }
}
