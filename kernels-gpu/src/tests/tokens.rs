//! Rows of embeddings and single tokens.

use half::bf16;
use pipeline_kernels::matrix::Values;
use pipeline_kernels::panels::column;

use super::{device, numbers, panels};

#[test]
fn rows_of_embeddings_also_in_several_buffers() {
    let Some(device) = device() else { return };
    let (rows, columns) = (400, 6);
    let values = numbers(rows * columns, 1);
    let halves: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
    let ids: Vec<u32> = (0..70).map(|token| token * 31 % 400).collect();
    let limited = crate::Device::of(device.adapter().clone()).unwrap();
    let limited = limited.with_weight_parts(4 * 128 * 6);
    for (device, buffers) in [(device, [1, 1]), (&limited, [4, 2])] {
        let forms = [Values::F32(&values), Values::Bf16(&halves)];
        for (form, count) in forms.into_iter().zip(buffers) {
            let weight = device.upload_weight(form, rows, columns).unwrap();
            assert_eq!(weight.buffers(), count);
            let mut out = device.upload(&vec![9.; 3 * 32 * columns]).unwrap();
            device.lookup(&weight, &ids, 1.5, &mut out);
            let out = device.read(&out).unwrap();
            for token in 0..96 {
                let ours: Vec<f32> = column(&out, columns, token).collect();
                let exact: Vec<f32> = (0..columns)
                    .map(|feature| {
                        let Some(id) = ids.get(token) else { return 0. };
                        let index = *id as usize * columns + feature;
                        1.5 * match form {
                            Values::F32(values) => values[index],
                            _ => halves[index].to_f32(),
                        }
                    })
                    .collect();
                assert_eq!(ours, exact, "{token}");
            }
        }
    }
}

#[test]
fn tokens_that_are_gathered_and_added() {
    let Some(device) = device() else { return };
    let x = panels(5, 70, 1);
    let dx = device.upload(&x).unwrap();
    let tokens: Vec<u32> = (0..40).map(|row| row * 17 % 70).collect();
    let mut out = device.allocate(2 * 5 * 32).unwrap();
    device.gather(&dx, 5, &tokens, 0.5, &mut out);
    let gathered = device.read(&out).unwrap();
    for row in 0..64 {
        let ours: Vec<f32> = column(&gathered, 5, row).collect();
        let exact: Vec<f32> = match tokens.get(row) {
            Some(token) => column(&x, 5, *token as usize).map(|x| 0.5 * x).collect(),
            None => vec![0.; 5],
        };
        assert_eq!(ours, exact, "{row}");
    }
    // Several go to one token.
    let targets: Vec<u32> = (0..40).map(|row| row * row % 13).collect();
    let factors = numbers(40, 2);
    let before = panels(5, 70, 3);
    let mut sums = device.upload(&before).unwrap();
    device.scatter(&out, 5, &factors, &targets, &mut sums);
    let sums = device.read(&sums).unwrap();
    let rows = numbers(13 * 5, 4);
    let mut drows = device.upload(&rows).unwrap();
    let all = (0..40).map(|row| (row as u32, factors[row], targets[row]));
    device.add_to_rows(&out, 5, &all.collect::<Vec<_>>(), &mut drows);
    let drows = device.read(&drows).unwrap();
    for target in 0..70 {
        for feature in 0..5 {
            let own = (0..40).filter(|row| targets[*row] as usize == target);
            let added = own.map(|row| {
                let value = column(&gathered, 5, row).nth(feature).unwrap();
                f64::from(value) * f64::from(factors[row])
            });
            let added: f64 = added.sum();
            let start = column(&before, 5, target).nth(feature).unwrap();
            let ours = column(&sums, 5, target).nth(feature).unwrap();
            assert!((f64::from(ours) - f64::from(start) - added).abs() < 1e-6);
            if target < 13 {
                let (ours, start) = (drows[target * 5 + feature], rows[target * 5 + feature]);
                assert!((f64::from(ours) - f64::from(start) - added).abs() < 1e-6);
            }
        }
    }
    let mut few = device.upload(&[1., 2., 3.]).unwrap();
    device.pick(&dx, &[(7, 2), (40, 0)], &mut few);
    assert_eq!(device.read(&few).unwrap(), [x[40], 2., x[7]]);
}
