//! Sums, copies, rotations, dropout and gated units against the CPU.

use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::elementwise;
use pipeline_kernels::gated::{self, Activation};
use pipeline_kernels::panels::size;

use super::{device, near, numbers, panels};
use crate::{Features, Rotary};

#[test]
fn sums_and_copies() {
    let Some(device) = device() else { return };
    let (x, y) = (numbers(1000, 1), numbers(1000, 2));
    let mut expected = x.clone();
    let (mut dx, dy) = (device.upload(&x).unwrap(), device.upload(&y).unwrap());
    elementwise::add(&mut expected, &y, 0.3);
    elementwise::scale(&mut expected, -1.7);
    elementwise::scale_and_add(&mut expected, 0.9, &y);
    device.add(&mut dx, &dy, 0.3);
    device.scale(&mut dx, -1.7);
    device.scale_and_add(&mut dx, 0.9, &dy);
    near(&device.read(&dx).unwrap(), &expected, 1e-6);
    device.copy(&dy, &mut dx);
    assert_eq!(device.read(&dx).unwrap(), y);
    device.fill_from(&mut dx, 990, 2.5);
    assert_eq!(device.read(&dx).unwrap()[..990], y[..990]);
    assert_eq!(device.read(&dx).unwrap()[990..], [2.5; 10]);
    device.clear(&mut dx);
    assert_eq!(device.read(&dx).unwrap(), [0.; 1000]);
}

#[test]
fn features_and_tokens_of_panels() {
    let Some(device) = device() else { return };
    let (x, y) = (panels(7, 70, 1), panels(5, 70, 2));
    let (dx, mut dy) = (device.upload(&x).unwrap(), device.upload(&y).unwrap());
    device.copy_features(
        (&dx, Features { all: 7, first: 3 }),
        (&mut dy, Features { all: 5, first: 1 }),
        4,
    );
    device.clear_tokens(&mut dy, 5, &[0, 33, 69]);
    let factors: Vec<f32> = numbers(96, 3);
    device.multiply(&mut dy, 5, &device.upload(&factors).unwrap());
    let ours = device.read(&dy).unwrap();
    for (token, factor) in factors.iter().enumerate().take(70) {
        for feature in 0..5 {
            let index = |features: usize, feature: usize| {
                (token / 32 * features + feature) * 32 + token % 32
            };
            let mut value = y[index(5, feature)];
            if feature >= 1 {
                value = x[index(7, feature + 2)];
            }
            if [0, 33, 69].contains(&token) {
                value = 0.;
            }
            let exact = value * factor;
            let found = ours[index(5, feature)];
            assert_eq!(found.to_bits(), exact.to_bits(), "{token} {feature}");
        }
    }
    device.clear_last_panel(&mut dy, 5);
    assert!(
        device.read(&dy).unwrap()[2 * 5 * 32..]
            .iter()
            .all(|x| *x == 0.)
    );
}

#[test]
fn rotations_and_their_backward_pass() {
    let Some(device) = device() else { return };
    for (heads, width, pairs, tokens) in [(1, 2, 1, 1), (3, 10, 4, 70), (2, 64, 32, 33)] {
        let features = heads * width;
        let x = panels(features, tokens, 1);
        let angles = numbers(size(pairs, tokens), 2);
        let cos: Vec<f32> = angles.iter().map(|angle| (3. * angle).cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|angle| (3. * angle).sin()).collect();
        let (dcos, dsin) = (device.upload(&cos).unwrap(), device.upload(&sin).unwrap());
        for back in [false, true] {
            let mut expected = x.clone();
            let rotary = elementwise::Rotary {
                cos: &cos,
                sin: &sin,
                pairs,
                width,
            };
            elementwise::rope(&mut expected, features, rotary, back);
            let mut ours = device.upload(&x).unwrap();
            let rotary = Rotary {
                cos: &dcos,
                sin: &dsin,
                pairs,
                width,
            };
            device.rope(&mut ours, features, rotary, back);
            near(&device.read(&ours).unwrap(), &expected, 1e-6);
        }
    }
}

#[test]
fn dropout_masks_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let numbers: Vec<u64> = (0..70)
        .map(|token| (token * 7919) % 71 + if token % 3 == 0 { 1 << 40 } else { 0 })
        .collect();
    for (start, p, features) in [(7, 0.3, 5), (u64::MAX - 3, 0.05, 64), (1 << 33, 0., 3)] {
        let dropout = Dropout { start, p };
        let x = panels(features, 70, 1);
        let mut expected = x.clone();
        dropout.apply(&mut expected, features, &numbers);
        let mut ours = device.upload(&x).unwrap();
        device.dropout(dropout, &mut ours, features, &device.numbers(&numbers));
        assert_eq!(device.read(&ours).unwrap(), expected);
    }
}

#[test]
fn gated_units_and_their_gradients() {
    let Some(device) = device() else { return };
    let mut gate: Vec<f32> = numbers(1003, 1).iter().map(|x| 12. * x).collect();
    gate[..8].copy_from_slice(&[0., 1e13, -1e13, 1e30, -1e30, f32::MAX, -f32::MAX, -90.]);
    let (mut up, grad) = (numbers(1003, 2), numbers(1003, 3));
    up[..8].fill(1e-30);
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let mut out = vec![0.; 1003];
        gated::gated_unit(activation, &gate, &up, &mut out);
        let (mut dg, mut du) = (device.upload(&gate).unwrap(), device.upload(&up).unwrap());
        let mut result = device.allocate(1003).unwrap();
        device.gated_unit(activation, &dg, &du, &mut result);
        near(&device.read(&result).unwrap()[8..], &out[8..], 1e-6);
        let far = device.read(&result).unwrap();
        for (ours, exact) in far.iter().zip(&out).take(8) {
            assert!(
                (ours - exact).abs() <= 1e-6 * exact.abs().max(1.),
                "{ours} {exact}"
            );
        }
        let (mut eg, mut eu, mut eo) = (gate.clone(), up.clone(), grad.clone());
        gated::gated_unit_backward(activation, &mut eg, &mut eu, &mut eo);
        let mut go = device.upload(&grad).unwrap();
        device.gated_unit_backward(activation, &mut dg, &mut du, &mut go);
        for (ours, theirs) in [(&dg, &eg), (&du, &eu), (&go, &eo)] {
            let ours = device.read(ours).unwrap();
            near(&ours[8..], &theirs[8..], 2e-6);
            assert!(ours.iter().all(|x| x.is_finite()));
        }
    }
}
