//! Parts of a buffer as weights and gradients, and the sums of a weight's rows.

use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::Values;
use pipeline_kernels::reduce::Order;

use super::{device, near, numbers, panels};
use crate::{AdamW, Device, Onto, PART_ALIGNMENT, Product, Term};

/// Two weights in one buffer: products read them where they are, gradients are added beside each other, and one step of `AdamW` changes both.
#[test]
fn weights_in_one_buffer() {
    let Some(device) = device() else { return };
    let (rows, columns, tokens) = (7usize, 11usize, 40usize);
    let second = (rows * columns).next_multiple_of(PART_ALIGNMENT);
    let all = numbers(second + rows * columns, 1);
    let mut buffer = device.upload(&all).unwrap();
    let zeros = vec![0.; all.len()];
    let [mut gradients, mut first, mut moments] = [(); 3].map(|()| device.upload(&zeros).unwrap());
    let x = panels(columns, tokens, 2);
    let dx = device.upload(&x).unwrap();
    let product = |weight: &crate::Weight| {
        let mut out = device.take(64 * rows);
        device.product(Product {
            out: &mut out,
            terms: vec![Term {
                weight: weight.matrix(),
                x: &dx,
            }],
            onto: Onto::Zero,
            bias: None,
            rounding: FloatType::F32,
        });
        device.read(&out).unwrap()
    };
    let in_place = [0, second].map(|start| {
        let part = buffer.part(start, rows * columns);
        Device::weight_in(part, rows, columns)
    });
    let apart = |values: &[f32], start: usize| {
        let values = Values::F32(&values[start..][..rows * columns]);
        device.upload_weight(values, rows, columns).unwrap()
    };
    for (weight, start) in in_place.iter().zip([0, second]) {
        assert_eq!(product(weight), product(&apart(&all, start)));
    }
    let g = panels(rows, tokens, 3);
    let dg = device.upload(&g).unwrap();
    let mut own = gradients.part(second, rows * columns);
    device.outer((&dg, rows), (&dx, columns), &mut own, 0, Order::Straight);
    device.outer((&dg, rows), (&dx, columns), &mut own, 0, Order::Straight);
    let summed = device.read(&gradients).unwrap();
    assert!(summed[..second].iter().all(|x| *x == 0.));
    let mut alone = device.upload(&vec![0.; rows * columns]).unwrap();
    device.outer((&dg, rows), (&dx, columns), &mut alone, 0, Order::Straight);
    let alone = device.read(&alone).unwrap();
    let twice: Vec<f32> = alone.iter().map(|x| 2. * x).collect();
    near(&summed[second..], &twice, 1e-6);
    let step = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        keep: 1.,
        step_size: 0.1,
        root: 1.,
        epsilon: 1e-8,
        grad_factor: 1.,
    };
    device.adamw(step, &mut buffer, &gradients, &mut first, &mut moments);
    let changed = device.read(&buffer).unwrap();
    assert_eq!(changed[..second], all[..second]);
    assert_ne!(changed[second..], all[second..]);
    // The weight is what its buffer became.
    assert_eq!(product(&in_place[1]), product(&apart(&changed, second)));
    device.clear(&mut gradients);
    assert_eq!(device.read(&gradients).unwrap(), zeros);
}

#[test]
fn sums_of_rows() {
    let Some(device) = device() else { return };
    for (rows, columns) in [(1, 5), (256, 3), (257, 64), (70_000, 2)] {
        let values = numbers(rows * columns, 1);
        let buffer = device.upload(&values).unwrap();
        let weight = Device::weight_in(buffer, rows, columns);
        let mut exact = vec![[0f64; 3]; columns];
        for (index, value) in values.iter().enumerate() {
            let sums = &mut exact[index % columns];
            sums[0] += f64::from(*value);
            sums[1] += half::bf16::from_f32(*value).to_f64();
            sums[2] += half::f16::from_f32(*value).to_f64();
        }
        let all = [FloatType::F32, FloatType::Bf16, FloatType::F16];
        for (number, rounding) in all.into_iter().enumerate() {
            let ours = device.read(&device.column_sums(&weight, rounding)).unwrap();
            let exact = exact.iter().map(|sums| sums[number] as f32);
            near(&ours, &exact.collect::<Vec<_>>(), 5e-6);
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_told() {
    let Some(device) = device() else { return };
    let buffer = device.upload(&[0.; 100]).unwrap();
    for (first, length) in [(64, 37), (1, 2), (usize::MAX - 63, 64)] {
        let part = || buffer.part(first, length);
        let part = std::panic::catch_unwind(std::panic::AssertUnwindSafe(part));
        let why = part.unwrap_err().downcast_ref::<String>().unwrap().clone();
        assert!(why.contains("of a buffer of 100"), "{why}");
    }
}
