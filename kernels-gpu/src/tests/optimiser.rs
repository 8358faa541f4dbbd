//! AdamW against its formulas in f64.

use super::{device, near, numbers};
use crate::AdamW;

const STEP: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.99,
    keep: 0.999,
    step_size: 0.02,
    root: 0.3,
    epsilon: 1e-8,
    grad_factor: 0.5,
};

/// The step for one value, in f64.
fn exact(p: f32, g: f32, m: f32, v: f32) -> [f32; 3] {
    let [p, g, m, v] = [p, g * STEP.grad_factor, m, v].map(f64::from);
    let of = |x: f32| f64::from(x);
    let m = m + (g - m) * (1. - of(STEP.beta1));
    let v = v * of(STEP.beta2) + g * g * (1. - of(STEP.beta2));
    let divisor = v.sqrt() / of(STEP.root) + of(STEP.epsilon);
    let p = p * of(STEP.keep) - of(STEP.step_size) * m / divisor;
    [p, m, v].map(|x| x as f32)
}

#[test]
fn adamw_over_a_buffer() {
    let Some(device) = device() else { return };
    let [p, g, m] = [1, 2, 3].map(|seed| numbers(1001, seed));
    let v: Vec<f32> = numbers(1001, 4).iter().map(|x| x * x).collect();
    let mut buffers = [&p, &g, &m, &v].map(|values| device.upload(values).unwrap());
    let [dp, dg, dm, dv] = &mut buffers;
    device.adamw(STEP, dp, dg, dm, dv);
    let all: Vec<[f32; 3]> = (0..1001).map(|i| exact(p[i], g[i], m[i], v[i])).collect();
    for (number, buffer) in [dp, dm, dv].into_iter().enumerate() {
        let expected: Vec<f32> = all.iter().map(|each| each[number]).collect();
        near(&device.read(buffer).unwrap(), &expected, 1e-6);
    }
}

#[test]
fn adamw_with_moments_in_8_bits() {
    let Some(device) = device() else { return };
    let table = |signed: bool| -> [f32; 256] {
        let mut values = [0f32; 256];
        for (code, value) in values.iter_mut().enumerate() {
            let x = if signed {
                code as f32 - 127.
            } else {
                code as f32
            };
            *value = (x / if signed { 128. } else { 255. }).powi(3);
        }
        values
    };
    let tables = [table(true), table(false)];
    let count = 700;
    let (mut p, mut dp) = (
        numbers(count, 1),
        device.upload(&numbers(count, 1)).unwrap(),
    );
    let mut ours = tables.map(|table| device.moment_8bit(count, &table).unwrap());
    let mut moments = [vec![0f32; count], vec![0f32; count]];
    for step in 0..3 {
        let g = numbers(count, 10 + step);
        let [first, second] = &mut ours;
        device.adamw_8bit(STEP, &mut dp, &device.upload(&g).unwrap(), first, second);
        for i in 0..count {
            let [new, m, v] = exact(p[i], g[i], moments[0][i], moments[1][i]);
            (p[i], moments[0][i], moments[1][i]) = (new, m, v);
        }
        for (number, (values, table)) in moments.iter_mut().zip(&tables).enumerate() {
            let (codes, magnitudes) = device.read_moment_8bit(&ours[number]).unwrap();
            for (block, values) in values.chunks_mut(256).enumerate() {
                let largest = values.iter().fold(0f32, |a, b| a.max(b.abs()));
                assert!((magnitudes[block] / largest - 1.).abs() < 1e-6);
                for (i, value) in values.iter_mut().enumerate() {
                    let code = codes[block * 256 + i];
                    let found = table[usize::from(code)];
                    let share = *value / largest;
                    let best = table.iter().map(|x| (x - share).abs()).fold(2., f32::min);
                    assert!((found - share).abs() <= best + 1e-6, "{number} {block} {i}");
                    // The next step begins with what was kept.
                    *value = found * magnitudes[block];
                }
            }
        }
        near(&device.read(&dp).unwrap(), &p, 2e-6);
    }
}
