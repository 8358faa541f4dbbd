//! Adapters, counts, and what happens where memory or sizes do not suffice.

use std::time::Duration;

use cubecl::wgpu::wgpu;

use pipeline_kernels::FloatType;
use pipeline_kernels::attention::{Heads, Scores, Span, Visible};
use pipeline_kernels::reduce::Order;

use super::{device, numbers};
use crate::{AdamW, Attention, Device, Error, Matrix, Onto, Product, Rotary, Term, Weight};

/// A device of its own, because one that failed does nothing any more.
fn own() -> Option<Device> {
    device().map(Device::again)
}

#[test]
fn adapters_have_names_drivers_and_limits() {
    let Some(device) = device() else { return };
    let adapter = device.adapter();
    assert!(!adapter.name.is_empty() && !adapter.driver.is_empty());
    assert!(["vulkan", "metal", "dx12"].contains(&adapter.interface.as_str()));
    assert!(adapter.largest_binding >= 1 << 27 && adapter.units >= 256);
    let count = crate::adapters().len();
    let error = Device::open(count).unwrap_err();
    assert!(matches!(error, Error::NoAdapter { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("no GPU number {count}"))
    );
}

#[test]
fn what_a_device_did_is_counted() {
    let Some(device) = own() else { return };
    let before = device.counts();
    let mut x = device.upload(&[1., 2., 3.]).unwrap();
    let y = device.allocate(100).unwrap();
    device.scale(&mut x, 2.);
    assert_eq!(device.read(&x).unwrap(), [2., 4., 6.]);
    let counts = device.counts();
    assert_eq!(counts.launches - before.launches, 1);
    assert_eq!((counts.uploads, counts.uploaded_bytes), (1, 12));
    assert_eq!((counts.downloads, counts.downloaded_bytes), (1, 12));
    assert_eq!(counts.allocations - before.allocations, 2);
    assert_eq!(counts.held_bytes - before.held_bytes, 412);
    drop((x, y));
    assert_eq!(device.counts().held_bytes, before.held_bytes);
    assert_eq!(device.counts().peak_bytes, before.held_bytes + 412);
}

#[test]
fn too_large_a_buffer_is_an_error() {
    let Some(device) = own() else { return };
    let limit = device.adapter().largest_binding;
    let words = (limit / 4 + 1) as usize;
    let error = device.allocate(words).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains(&limit.to_string()));
    // A device goes on after an error that it returned.
    assert_eq!(device.read(&device.upload(&[1.]).unwrap()).unwrap(), [1.]);
}

/// With less and less memory, some allocation of a small pass fails first; reading its result tells that.
#[test]
fn memory_that_runs_out_is_an_error_wherever_it_does() {
    let Some(probe) = own() else { return };
    let pass = |device: &Device| {
        let mut x = device.take_with(&numbers(320, 1));
        let weight = device.take_with(&numbers(10, 2));
        let (mut out, mut inverse) = (device.take(320), device.take(32));
        device.rms_norm(&x, &weight, 1e-5, &mut out, &mut inverse);
        device.add(&mut x, &out, 1.);
        let mut some = device.take(320);
        device.gather(&x, 10, &[3, 1], 1., &mut some);
        device.read(&some)
    };
    let expected = pass(&probe).unwrap();
    let all = probe.counts().peak_bytes;
    let mut failed = 0;
    for bytes in (0..=all).step_by(200).chain([all]) {
        let Some(device) = own() else { return };
        device.limit_memory(bytes);
        match pass(&device) {
            Ok(values) => assert_eq!(values, expected),
            Err(error) => {
                failed += 1;
                assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
                assert!(device.failure().is_some() && device.wait().is_err());
                assert!(device.allocate(1).is_err());
            }
        }
    }
    assert!(failed > 10 && all % 200 != 0);
}

#[test]
fn sizes_that_do_not_fit_are_told() {
    let Some(device) = own() else { return };
    let message = |run: &dyn Fn()| {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_err();
        let text = caught.downcast_ref::<String>().cloned();
        text.unwrap_or_else(|| (*caught.downcast_ref::<&str>().unwrap()).to_owned())
    };
    let buffer = |length: usize| device.upload(&vec![0.; length]).unwrap();
    let weight: Weight = device
        .upload_weight(pipeline_kernels::matrix::Values::F32(&[0.; 6]), 2, 3)
        .unwrap();
    let matrix: Matrix<'_> = weight.matrix();
    let text = message(&|| {
        device.product(Product {
            out: &mut buffer(64),
            terms: vec![Term {
                weight: matrix.clone(),
                x: &buffer(64),
            }],
            onto: Onto::Zero,
            bias: None,
            rounding: FloatType::F32,
        });
    });
    assert!(
        text.contains("the size of 1 panels of 3 features"),
        "{text}"
    );
    let spans = device.spans(&[Span {
        start: 60,
        visible: vec![Visible::causal(0); 10],
        context: Vec::new(),
    }]);
    let attention = |heads: [usize; 3], tokens: usize| {
        let [queries, keys, width] = heads;
        let [q, k] = [queries, keys].map(|heads| buffer(heads * width * tokens));
        let (mut out, mut sums) = (buffer(q.len()), buffer(queries * tokens));
        let inputs = Attention {
            q: &q,
            k: &k,
            v: &k,
            heads: Heads {
                queries,
                keys,
                width,
            },
            scores: Scores::of_width(width),
            spans: &spans,
        };
        device.attention(inputs, &mut out, &mut sums);
    };
    let angles = buffer(64);
    let rope = |pairs: usize, width: usize, features: usize| {
        let rotary = Rotary {
            cos: &angles,
            sin: &angles,
            pairs,
            width,
        };
        device.rope(&mut buffer(features * 32), features, rotary, false);
    };
    let step = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        keep: 1.,
        step_size: 0.1,
        root: 1.,
        epsilon: 1e-8,
        grad_factor: 1.,
    };
    let (a, b) = (buffer(64), buffer(96));
    let all: [(&dyn Fn(), &str); 14] = [
        (&|| attention([3, 2, 4], 96), "3 query heads can't share 2"),
        (
            &|| attention([2, 2, 4], 64),
            "spans up to token 70 in 2 panels",
        ),
        (
            &|| rope(2, 3, 6),
            "heads of 3 features with 2 rotated pairs",
        ),
        (&|| rope(1, 4, 4), "the size of 1 panels of 1 features"),
        (
            &|| device.add(&mut buffer(3), &buffer(4), 1.),
            "lengths of the terms",
        ),
        (&|| device.copy(&a, &mut buffer(65)), "lengths of a copy"),
        (
            &|| device.gather(&a, 2, &[32], 1., &mut buffer(64)),
            "token Some(32)",
        ),
        (
            &|| device.scatter(&a, 2, &[1.], &[40], &mut buffer(64)),
            "token Some(40)",
        ),
        (
            &|| device.add_to_rows(&a, 2, &[(0, 1., 7)], &mut buffer(14)),
            "row 7 of 7",
        ),
        (
            &|| device.pick(&a, &[(64, 0)], &mut buffer(1)),
            "value 64 of 64",
        ),
        (
            &|| device.lookup(&weight, &[2], 1., &mut buffer(96)),
            "row Some(2) of a weight of 2",
        ),
        (
            &|| device.outer((&a, 2), (&b, 2), &mut buffer(4), 0, Order::Straight),
            "the size of 1 panels of 2 features",
        ),
        (
            &|| device.outer((&a, 2), (&a, 2), &mut buffer(5), 2, Order::Straight),
            "2 * 2 from 2 on in 5 floats",
        ),
        (
            &|| {
                device.adamw(
                    step,
                    &mut buffer(4),
                    &buffer(4),
                    &mut buffer(4),
                    &mut buffer(3),
                );
            },
            "lengths of AdamW's buffers",
        ),
    ];
    for (run, expected) in all {
        let text = message(run);
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let text = message(&|| {
        let _ = device.online_softmax(&mut buffer(64), 0..3, None, &mut device.summaries(1));
    });
    assert!(
        text.contains("the size of 1 panels of 3 features"),
        "{text}"
    );
    let text = message(&|| {
        let (mut out, mut inverse) = (buffer(100), buffer(32));
        device.rms_norm(&buffer(100), &buffer(3), 1e-5, &mut out, &mut inverse);
    });
    assert!(
        text.contains("100 floats are no panels of 3 features"),
        "{text}"
    );
}

/// A driver that resets, or a card that is pulled out: what was queued and what comes after is an error, and never a panic.
#[test]
fn a_lost_device_is_an_error() {
    let Some(device) = device() else { return };
    let device = Device::of(device.adapter().clone()).unwrap();
    let mut x = device.upload(&[1., 2., 3.]).unwrap();
    device.scale(&mut x, 2.);
    assert_eq!(device.read(&x).unwrap(), [2., 4., 6.]);
    device.raw.destroy();
    // The notice of the loss comes with the device's next poll.
    let _ = device.raw.poll(wgpu::PollType::Wait {
        submission_index: None,
        timeout: Some(Duration::from_mins(1)),
    });
    assert!(device.wait().is_err());
    device.scale(&mut x, 2.);
    let read = device.read(&x);
    assert!(matches!(read, Err(Error::Failed(_))), "{read:?}");
    let y = device.take(3);
    device.copy(&y, &mut x);
    assert!(device.read(&x).is_err());
}
