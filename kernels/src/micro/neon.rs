//! The tiles of [`super`] in NEON: up to twelve rows by eight lanes at a time, whose 24 sums leave 8 of the 32 registers for the
//! operands.
//!
//! Pairs of bf16 are multiplied by `BFMMLA`, which adds the product of 2 rows by 4 deep and 4 deep by 2 lanes to 2 by 2 sums: two
//! steps of pairs at once. Each sum takes one pair after the other by `BFDotAdd` of the Arm Architecture Reference Manual (DDI
//! 0487, shared/functions/float/bfloat), as Linux starts a program (`FPCR.EBF` 0): the products of a pair are added and then the sum,
//! each addition rounded to odd, not to nearest, and denormal operands and results taken for 0. So an addition is off by less than
//! one unit in the last place, where rounding to nearest is off by no more than half of one. The tests hold these tiles against
//! this arithmetic bit by bit.
//!
//! Rust has no stable functions for the instructions of bf16, so they are written as assembly.

use std::arch::aarch64::{
    float32x4_t, uint16x4_t, uint32x4_t, vaddq_f32, vdupq_n_f32, vdupq_n_u32, vfmaq_laneq_f32,
    vfmaq_n_f32, vld1q_f32, vld1q_u32, vreinterpretq_f32_f64, vreinterpretq_f64_f32, vst1q_f32,
    vst1q_u16, vzip1_u16, vzip1q_f64, vzip1q_u32, vzip2_u16, vzip2q_f64, vzip2q_u32,
};
use std::arch::asm;

use super::{LANES, TILE, Tile};

/// The 32-bit numbers of a vector.
const VECTOR: usize = 4;
/// The lanes of a part of a tile.
const PART: usize = 2 * VECTOR;

/// # Safety
/// See [`Tile`].
#[inline]
pub(super) unsafe fn multiply<const M: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
) {
    let rows = tile.rows.min(M);
    for lane in (0..V * 16).step_by(PART) {
        let mut row = 0;
        // SAFETY: parts of the tile that the caller promised. In the last one of packed rows there may be rows that are not wanted,
        // but none from `M` on; of others, only wanted rows are there.
        unsafe {
            while row < rows {
                let (left, there) = (rows - row, if RS == 1 { M - row } else { rows - row });
                row += match (left, there) {
                    (9.., 12..) => part::<12, V, RS, KS>(tile, row, lane),
                    (5.., 8..) => part::<8, V, RS, KS>(tile, row, lane),
                    (_, 4..) => part::<4, V, RS, KS>(tile, row, lane),
                    (_, 2..) => part::<2, V, RS, KS>(tile, row, lane),
                    _ => part::<1, V, RS, KS>(tile, row, lane),
                };
            }
        }
    }
}

/// Multiplies `R` rows of the tile from `row` on, and 8 of its lanes from `lane` on. Returns `R`.
///
/// # Safety
/// `a` of all these rows may be read; `c` and `from` of those that are wanted. See [`Tile`].
#[inline]
unsafe fn part<const R: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
    row: usize,
    lane: usize,
) -> usize {
    // SAFETY: every 64-bit Arm has NEON, and reads are of what the caller promised.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.); 2]; R];
        let mut a = tile.a.wrapping_add(row * RS);
        let mut b = tile.b.wrapping_add(lane);
        for _ in 0..tile.depth {
            let b_now = [vld1q_f32(b), vld1q_f32(b.add(VECTOR))];
            if RS == 1 {
                let (fours, rest) = sums.as_chunks_mut::<VECTOR>();
                for (at, sums) in fours.iter_mut().enumerate() {
                    let a = vld1q_f32(a.add(at * VECTOR));
                    for half in 0..2 {
                        let b = b_now[half];
                        sums[0][half] = vfmaq_laneq_f32::<0>(sums[0][half], b, a);
                        sums[1][half] = vfmaq_laneq_f32::<1>(sums[1][half], b, a);
                        sums[2][half] = vfmaq_laneq_f32::<2>(sums[2][half], b, a);
                        sums[3][half] = vfmaq_laneq_f32::<3>(sums[3][half], b, a);
                    }
                }
                for (at, sums) in rest.iter_mut().enumerate() {
                    let a = *a.add(R / VECTOR * VECTOR + at);
                    for half in 0..2 {
                        sums[half] = vfmaq_n_f32(sums[half], b_now[half], a);
                    }
                }
            } else {
                for (at, sums) in sums.iter_mut().enumerate() {
                    let a = *a.add(at * RS);
                    for half in 0..2 {
                        sums[half] = vfmaq_n_f32(sums[half], b_now[half], a);
                    }
                }
            }
            // After the last row these may point outside of their allocation; nothing reads them there.
            (a, b) = (a.wrapping_add(KS), b.wrapping_add(V * 16));
        }
        for (at, sums) in sums.iter().enumerate() {
            if row + at < tile.rows {
                store(tile, (row + at) * V * 16 + lane, *sums);
            }
        }
    }
    R
}

/// Reorders tiles of packed rows of pairs, `depth` pairs deep, as [`multiply_pairs`] reads them: two steps of a row side by side, which
/// is a row of `BFMMLA`'s first factor. An odd last step is left unchanged.
pub(super) fn arrange(pairs: &mut [u32], depth: usize) {
    for tile in pairs.chunks_exact_mut((depth * TILE).max(1)) {
        let (steps, _) = tile.as_chunks_mut::<{ 2 * TILE }>();
        for step in steps {
            let from = *step;
            for i in 0..TILE {
                step[2 * i] = from[i];
                step[2 * i + 1] = from[TILE + i];
            }
        }
    }
}

/// Multiplies a tile of [`TILE`] packed rows in the order of [`arrange`].
///
/// # Safety
/// See [`Tile`]; all [`TILE`] rows of `a` may be read, and the processor must have bf16.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn multiply_pairs(tile: Tile<u32, u32>) {
    for lane in (0..LANES).step_by(PART) {
        // SAFETY: the caller's promise.
        unsafe {
            match tile.rows {
                0..=4 => part_of_pairs::<2>(tile, lane),
                5..=8 => part_of_pairs::<4>(tile, lane),
                _ => part_of_pairs::<6>(tile, lane),
            }
        }
    }
}

/// Multiplies the first `2 R` rows and 8 lanes from `lane` on.
///
/// # Safety
/// See [`multiply_pairs`].
#[target_feature(enable = "neon,bf16")]
#[inline]
unsafe fn part_of_pairs<const R: usize>(tile: Tile<u32, u32>, lane: usize) {
    // Each vector holds the sums of two rows by two lanes, row-major.
    let mut sums = [[vdupq_n_f32(0.); PART / 2]; R];
    let (mut a, mut b) = (tile.a, tile.b.wrapping_add(lane));
    // SAFETY: reads are of the rows that the caller promised, all `TILE` of `a`.
    unsafe {
        for _ in 0..tile.depth / 2 {
            let b_now = both_steps([
                (vld1q_u32(b), vld1q_u32(b.add(LANES))),
                (vld1q_u32(b.add(VECTOR)), vld1q_u32(b.add(LANES + VECTOR))),
            ]);
            for (at, sums) in sums.iter_mut().enumerate() {
                let a = vld1q_u32(a.add(at * VECTOR));
                for (sum, b) in sums.iter_mut().zip(b_now) {
                    *sum = matrices(*sum, a, b);
                }
            }
            (a, b) = (a.wrapping_add(2 * TILE), b.wrapping_add(2 * LANES));
        }
        if !tile.depth.is_multiple_of(2) {
            // The second of these steps is all zeros, which changes no sum.
            let zero = vdupq_n_u32(0);
            let b_now = [(vld1q_u32(b), zero), (vld1q_u32(b.add(VECTOR)), zero)];
            let b_now = both_steps(b_now);
            let (fours, _) = sums.as_chunks_mut::<2>();
            for (at, [upper, lower]) in fours.iter_mut().enumerate() {
                let a = vld1q_u32(a.add(at * VECTOR));
                let (first, second) = (vzip1q_u32(a, zero), vzip2q_u32(a, zero));
                for at in 0..PART / 2 {
                    upper[at] = matrices(upper[at], first, b_now[at]);
                    lower[at] = matrices(lower[at], second, b_now[at]);
                }
            }
        }
    }
    for (at, sums) in sums.iter().enumerate() {
        let [first, second] = [[sums[0], sums[1]], [sums[2], sums[3]]].map(|[low, high]| {
            let (low, high) = (vreinterpretq_f64_f32(low), vreinterpretq_f64_f32(high));
            [
                vreinterpretq_f32_f64(vzip1q_f64(low, high)),
                vreinterpretq_f32_f64(vzip2q_f64(low, high)),
            ]
        });
        for i in 0..2 {
            let row = 2 * at + i;
            if row < tile.rows {
                // SAFETY: a wanted row.
                unsafe { store(tile, row * LANES + lane, [first[i], second[i]]) };
            }
        }
    }
}

/// Puts both steps of a lane side by side, given two steps of twice four lanes.
#[target_feature(enable = "neon,bf16")]
#[inline]
fn both_steps([low, high]: [(uint32x4_t, uint32x4_t); 2]) -> [uint32x4_t; PART / 2] {
    [
        vzip1q_u32(low.0, low.1),
        vzip2q_u32(low.0, low.1),
        vzip1q_u32(high.0, high.1),
        vzip2q_u32(high.0, high.1),
    ]
}

/// Adds the product of two rows of `a` and two rows of `b`, each four numbers deep, to `sum`.
#[target_feature(enable = "neon,bf16")]
#[inline]
fn matrices(mut sum: float32x4_t, a: uint32x4_t, b: uint32x4_t) -> float32x4_t {
    // SAFETY: the instruction uses registers alone, and callers of a function with this feature made sure that the processor has it.
    unsafe {
        asm!(
            "bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Stores eight lanes of a row, added to the tile's `from`.
///
/// # Safety
/// `index` and the 7 behind it are in a wanted row. See [`Tile`].
#[inline]
unsafe fn store<A: Copy, B: Copy>(tile: Tile<A, B>, index: usize, sums: [float32x4_t; 2]) {
    for (at, sum) in sums.into_iter().enumerate() {
        let index = index + at * VECTOR;
        // SAFETY: the caller's promise, and every 64-bit Arm has NEON.
        unsafe {
            let sum = match tile.from {
                Some(from) => vaddq_f32(vld1q_f32(from.add(index)), sum),
                None => sum,
            };
            vst1q_f32(tile.c.add(index), sum);
        }
    }
}

/// # Safety
/// The processor must have bf16.
#[target_feature(enable = "neon,bf16")]
pub(super) fn pair_rows(first: &[f32; LANES], second: &[f32; LANES], out: &mut [u32; LANES]) {
    for at in (0..LANES).step_by(VECTOR) {
        // SAFETY: both rows have a whole number of vectors.
        let row = |row: &[f32; LANES]| round(unsafe { vld1q_f32(row.as_ptr().add(at)) });
        let (first, second) = (row(first), row(second));
        let pairs =
            std::arch::aarch64::vcombine_u16(vzip1_u16(first, second), vzip2_u16(first, second));
        // SAFETY: the result has a whole number of vectors too. The first number of a pair is in the low half of its 32 bits.
        unsafe { vst1q_u16(out.as_mut_ptr().add(at).cast(), pairs) };
    }
}

/// Rounds to bf16, ties to even.
#[target_feature(enable = "neon,bf16")]
#[inline]
fn round(values: float32x4_t) -> uint16x4_t {
    let rounded: uint16x4_t;
    // SAFETY: as in `matrices`.
    unsafe {
        asm!(
            "bfcvtn {rounded:v}.4h, {values:v}.4s",
            rounded = lateout(vreg) rounded,
            values = in(vreg) values,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    rounded
}

#[cfg(test)]
mod tests;
