//! Blocks on every instruction set, and with values at the edges.

use super::*;
use crate::dispatch::tests::{with_each, with_threads};

/// Values that look like weights: most are small, a few large, some parts are constant, and one block is zeros.
fn weights(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.
    };
    let mut values: Vec<f32> = (0..count)
        .map(|_| 0.05 * (next() + next() + next()))
        .collect();
    for index in (0..count).step_by(97) {
        values[index] *= 9.;
    }
    values[512..544].fill(0.25);
    values[544..576].fill(-0.25);
    values[768..1024].fill(0.);
    values
}

fn quantized(kind: BlockType, values: &[f32]) -> Vec<u8> {
    let mut out = vec![1; values.len() / kind.values() * kind.bytes()];
    quantize(kind, values, &mut out);
    out
}

#[test]
fn every_instruction_set_and_any_number_of_threads_make_the_same_bytes() {
    // An odd number of blocks of 256, more than one task.
    let values = weights(3 * TASK + 5 * 256);
    for kind in BlockType::ALL {
        let expected = quantized(kind, &values);
        with_each(|isa| assert!(quantized(kind, &values) == expected, "{kind:?} {isa:?}"));
        let alone = with_threads(1, || quantized(kind, &values));
        assert!(alone == expected, "{kind:?}");
        // A block depends on its own values only.
        let (from, bytes) = (kind.values(), kind.bytes());
        assert!(
            quantized(kind, &values[from..2 * from]) == expected[bytes..2 * bytes],
            "{kind:?}"
        );
    }
}

#[test]
fn blocks_of_zeros_are_zeros() {
    for kind in BlockType::ALL {
        let bytes = quantized(kind, &vec![0.; kind.values()]);
        // The scale comes first, at the end in `Q6K`; the middle level of the symmetric types stands for 0.
        let scale = if kind == BlockType::Q6K { 208 } else { 0 };
        // Of the symmetric types it is -0, as the reference's.
        assert_eq!((bytes[scale], bytes[scale + 1] & 0x7f), (0, 0), "{kind:?}");
    }
}

#[test]
fn values_that_are_not_finite_do_no_harm() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        for kind in BlockType::ALL {
            let mut values = weights(2048);
            values[0] = bad;
            values[300] = -bad;
            let good = quantized(kind, &weights(2048));
            // Only the blocks that hold them are unspecified.
            let last = kind.bytes();
            let bytes = quantized(kind, &values);
            assert_eq!(bytes[bytes.len() - last..], good[good.len() - last..]);
        }
    }
}
