//! The tiles of [`super`] by loops that the compiler vectorises.

use super::{LANES, TILE, Tile};
use crate::dispatch::{Loop, fma};

/// A tile in f32: four rows by eight lanes at a time, so that 16 registers of four floats are enough.
pub(super) struct Plain<const M: usize, const V: usize, const RS: usize, const KS: usize>(
    pub(super) Tile<f32, f32>,
);

/// The lanes of a part of a tile.
const PART: usize = 8;

impl<const M: usize, const V: usize, const RS: usize, const KS: usize> Loop
    for Plain<M, V, RS, KS>
{
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in (0..self.0.rows.min(M)).step_by(4) {
            for lane in (0..V * 16).step_by(PART) {
                // SAFETY: within the tile by the maker's promise; rows from `M` on are neither read nor written.
                unsafe { self.part::<FMA>(row, lane) };
            }
        }
    }
}

impl<const M: usize, const V: usize, const RS: usize, const KS: usize> Plain<M, V, RS, KS> {
    #[inline(always)]
    unsafe fn part<const FMA: bool>(&self, row: usize, lane: usize) {
        let tile = self.0;
        let count = tile.rows.min(M) - row;
        let mut sums = [[0f32; PART]; 4];
        // Rows after the last wanted one repeat it.
        let indices: [usize; 4] = std::array::from_fn(|i| (row + i.min(count - 1)) * RS);
        for k in 0..tile.depth {
            // SAFETY: inside row `k` of `b`.
            let b = unsafe {
                tile.b
                    .add(k * V * 16 + lane)
                    .cast::<[f32; PART]>()
                    .read_unaligned()
            };
            for (sums, index) in sums.iter_mut().zip(indices) {
                // SAFETY: one of the `a(i, k)`.
                let a = unsafe { *tile.a.add(index + k * KS) };
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<FMA>(a, b, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate().take(count) {
            for (at, sum) in sums.iter().enumerate() {
                // SAFETY: a wanted row of `c`.
                unsafe {
                    let index = (row + i) * V * 16 + lane + at;
                    let sum = tile.from.map_or(*sum, |from| *from.add(index) + sum);
                    *tile.c.add(index) = sum;
                }
            }
        }
    }
}

/// A tile of pairs of bf16, for processors without an instruction for them.
pub(super) struct PlainPairs<const M: usize>(pub(super) Tile<u32, u32>);

impl<const M: usize> Loop for PlainPairs<M> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let tile = self.0;
        for row in 0..tile.rows.min(M) {
            let mut sums = [0f32; LANES];
            for k in 0..tile.depth {
                // SAFETY: one of the `a(row, k)`, and row `k` of `b`.
                let (a, b) = unsafe {
                    let b = tile.b.add(k * LANES).cast::<[u32; LANES]>();
                    (*tile.a.add(row + k * TILE), b.read_unaligned())
                };
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<FMA>(low(a), low(b), *sum);
                    *sum = fma::<FMA>(high(a), high(b), *sum);
                }
            }
            for (lane, sum) in sums.iter().enumerate() {
                let index = row * LANES + lane;
                // SAFETY: a wanted row of `c` and of `from`.
                unsafe {
                    let sum = tile.from.map_or(*sum, |from| *from.add(index) + sum);
                    *tile.c.add(index) = sum;
                }
            }
        }
    }
}

/// The first number of a pair.
#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

/// The second number of a pair.
#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}
