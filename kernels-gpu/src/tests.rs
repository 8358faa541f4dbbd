//! Each operation against crate `pipeline-kernels`, on whatever adapter there is.

use std::sync::OnceLock;

use pipeline_kernels::panels::size;

use crate::{Device, adapters};

mod attention;
mod cached;
mod dora;
mod elementwise;
mod failures;
mod held;
mod norm;
mod optimiser;
mod product;
mod reduce;
mod tokens;
mod vocabulary;

/// The device of all tests; `None` where there is no adapter, which is a failure where `PIPELINE_NEEDS_GPU` is set.
#[expect(
    clippy::disallowed_methods,
    reason = "the variable is of these tests, not of the program"
)]
fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let adapter = adapters().into_iter().next();
        adapter.map(|adapter| Device::of(adapter).expect("the adapter opens"))
    });
    if device.is_none() {
        let needed = std::env::var_os("PIPELINE_NEEDS_GPU").is_some();
        assert!(
            !needed,
            "PIPELINE_NEEDS_GPU is set, and there is no adapter"
        );
        eprintln!("skipped: this machine has no adapter for Vulkan, Metal or DirectX 12");
    }
    device.as_ref()
}

/// Numbers between -1 and 1, the same ones for each seed.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x1234_5678_9abc_def1);
    let number = || {
        let bits = pipeline_kernels::random::splitmix64(&mut state) >> 40;
        bits as f32 / (1u32 << 23) as f32 - 1.
    };
    std::iter::repeat_with(number).take(count).collect()
}

/// Panels of numbers with zeros after the last token.
fn panels(features: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let mut all = numbers(size(features, tokens), seed);
    for (index, x) in all.iter_mut().enumerate() {
        if index / (features * 32) * 32 + index % 32 >= tokens {
            *x = 0.;
        }
    }
    all
}

/// Whether all values are within `tolerance`, relative to the largest one where that is above 1.
#[track_caller]
fn near(ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(1f32, |a, b| a.max(b.abs()));
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let far = (a - b).abs();
        assert!(far <= tolerance * largest, "{index}: {a} {b}");
    }
}
