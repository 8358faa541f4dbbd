//! The tiles against sums in the order and rounding of the processor's manual, bit by bit.

use std::arch::is_aarch64_feature_detected;

use super::*;
use crate::product::tests::numbers;

/// A tile's operands, and what is behind them.
struct Operands<T> {
    a: Vec<T>,
    b: Vec<T>,
    from: Vec<f32>,
}

/// `from`, changed by a tile; rows that are not wanted keep what is there.
fn apply<T>(
    operands: &Operands<T>,
    depth: usize,
    rows: usize,
    add: bool,
    tile: impl Fn(Tile<T, T>),
) -> Vec<f32> {
    let mut c = operands.from.clone();
    let from = if add {
        operands.from.as_ptr()
    } else {
        c.as_ptr()
    };
    tile(Tile {
        a: operands.a.as_ptr(),
        b: operands.b.as_ptr(),
        depth,
        c: c.as_mut_ptr(),
        rows,
        from: add.then_some(from),
    });
    c
}

fn same(ours: &[f32], theirs: &[f32], what: &str) {
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a}, {b} at {index}");
    }
}

/// The tile of one shape against fused multiply-adds one after the other.
fn check<const M: usize, const V: usize, const RS: usize, const KS: usize>() {
    for depth in [0usize, 1, 2, 7, 32] {
        for rows in 1..=M {
            // To the last number that may be read, and no further.
            let last = if RS == 1 { M } else { rows } - 1;
            let operands = Operands {
                a: numbers(last * RS + depth.saturating_sub(1) * KS + 1, 1),
                b: numbers(depth * V * 16, 2),
                from: numbers(M * V * 16, 3),
            };
            for add in [false, true] {
                // SAFETY: operands as long as a tile of so many rows reads.
                let ours = apply(&operands, depth, rows, add, |tile| unsafe {
                    multiply::<M, V, RS, KS>(tile);
                });
                let mut expected = operands.from.clone();
                for (index, out) in expected.iter_mut().take(rows * V * 16).enumerate() {
                    let (i, lane) = (index / (V * 16), index % (V * 16));
                    let sum = (0..depth).fold(0f32, |sum, k| {
                        let a = operands.a[i * RS + k * KS];
                        a.mul_add(operands.b[k * V * 16 + lane], sum)
                    });
                    *out = if add { *out + sum } else { sum };
                }
                same(
                    &ours,
                    &expected,
                    &format!("{M} {V} {RS} {KS} {depth} {rows}"),
                );
            }
        }
    }
}

#[test]
fn floats_are_added_in_order() {
    check::<4, 2, 1, TILE>();
    check::<8, 2, 1, TILE>();
    check::<12, 2, 1, TILE>();
    check::<8, 2, 1, 32>();
    check::<8, 2, 32, 1>();
    check::<12, 1, 32, 1>();
    check::<5, 1, 1, 7>();
    check::<11, 2, 1, 11>();
}

/// A sum or product exact but for a remainder too small to matter otherwise, as a single: towards zero, and then to odd where that
/// lost something; what is denormal is 0, what is too large infinite.
fn to_odd(exact: f64, remainder: f64) -> f32 {
    let mut bits = exact.to_bits();
    if remainder != 0. {
        // Towards zero, with a trace of what is lost.
        bits = (bits - u64::from(remainder.is_sign_negative() != exact.is_sign_negative())) | 1;
    }
    let sign = (bits >> 63) as u32;
    let exponent = (bits >> 52 & 0x7ff) as i64 - 1023 + 127;
    let lost = u32::from(bits & ((1 << 29) - 1) != 0);
    let rest = ((bits >> 29) as u32 & 0x7f_ffff) | lost;
    f32::from_bits(match exponent {
        ..=0 => sign << 31,
        255.. => sign << 31 | 0x7f80_0000,
        _ => sign << 31 | (exponent as u32) << 23 | rest,
    })
}

/// `BFAdd` of the manual.
fn add(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(flushed(a)), f64::from(flushed(b)));
    // The remainder of a sum (Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B).
    let sum = a + b;
    let part = sum - a;
    to_odd(sum, (a - (sum - part)) + (b - part))
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// `BFDotAdd` of the manual.
fn dot(sum: f32, a: u32, b: u32) -> f32 {
    let number = |bits: u32| f64::from(flushed(f32::from_bits(bits << 16)));
    let product = |a, b| to_odd(number(a) * number(b), 0.);
    add(sum, add(product(a, b), product(a >> 16, b >> 16)))
}

/// Pairs of bf16 of very different sizes; some are denormal or have denormal products.
fn pairs(count: usize, seed: u64) -> Vec<u32> {
    let scales = [1., 1., 1e-3, 1e3, 1e-10, 1e-25, 1e-39, 1e10];
    let bits = numbers(2 * count, seed);
    let scaled = bits.iter().enumerate().map(|(index, x)| {
        let scale = scales[(index * 7 + index / 64) % scales.len()];
        half::bf16::from_f32(x * scale).to_bits()
    });
    let bits: Vec<u16> = scaled.collect();
    let (pairs, _) = bits.as_chunks::<2>();
    let pairs = pairs.iter();
    pairs
        .map(|[a, b]| u32::from(*a) | u32::from(*b) << 16)
        .collect()
}

#[test]
fn pairs_are_added_as_the_manual_says() {
    if !is_aarch64_feature_detected!("bf16") {
        return;
    }
    for depth in [0, 1, 2, 3, 8, 31] {
        let packed = pairs(depth * TILE, 1);
        let mut arranged = packed.clone();
        arrange(&mut arranged, depth);
        let operands = Operands {
            a: arranged,
            b: pairs(depth * LANES, 2),
            from: numbers(TILE * LANES, 3),
        };
        for rows in 1..=TILE {
            for onto in [false, true] {
                // SAFETY: operands as long as a tile reads; the processor has bf16.
                let ours = apply(&operands, depth, rows, onto, |tile| unsafe {
                    multiply_pairs(tile);
                });
                let mut expected = operands.from.clone();
                for (index, out) in expected.iter_mut().take(rows * LANES).enumerate() {
                    let (i, lane) = (index / LANES, index % LANES);
                    let sum = (0..depth).fold(0f32, |sum, k| {
                        dot(sum, packed[k * TILE + i], operands.b[k * LANES + lane])
                    });
                    *out = if onto { *out + sum } else { sum };
                }
                same(&ours, &expected, &format!("{depth} {rows}"));
            }
        }
    }
}

#[test]
fn rounding_to_odd_is_right() {
    let one = 1f32.to_bits();
    for (ours, expected) in [
        (to_odd(1. + 1e-9, 0.), one + 1),
        (
            to_odd(f64::from(f32::from_bits(one + 1)) + 1e-9, 0.),
            one + 1,
        ),
        (to_odd(1., -1e-30), one - 1),
        (to_odd(-1., -1e-30), (one + 1) | 1 << 31),
        (add(1., 1e-30), one + 1),
        (add(1., 1.), 2f32.to_bits()),
        (to_odd(1e-39, 0.), 0),
        (to_odd(-1e39, 0.), f32::NEG_INFINITY.to_bits()),
    ] {
        assert_eq!(ours.to_bits(), expected, "{ours}");
    }
}
