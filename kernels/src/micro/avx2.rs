//! The tiles of [`super`] in AVX2 with fused multiply-add: six rows by 16 lanes at a time, whose twelve sums, two vectors of `b`
//! and one broadcast value fill the 16 registers (the shape of BLIS's kernel for this instruction set, Van Zee and van de Geijn
//! 2015, "BLIS: A Framework for Rapidly Instantiating BLAS Functionality", section 5).

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::Tile;

/// The floats of a vector.
const VECTOR: usize = 8;
/// The lanes of a part of a tile.
const PART: usize = 2 * VECTOR;

/// # Safety
/// See [`Tile`]; the processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn multiply<const M: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
) {
    tile.prefetch_sums(V * 16);
    let rows = tile.rows.min(M);
    for lane in (0..V * 16).step_by(PART) {
        let mut row = 0;
        // SAFETY: parts of the tile that the caller promised; no more rows than are wanted.
        unsafe {
            while rows - row >= 6 {
                part::<6, V, RS, KS>(tile, row, lane);
                row += 6;
            }
            match rows - row {
                5 => part::<5, V, RS, KS>(tile, row, lane),
                4 => part::<4, V, RS, KS>(tile, row, lane),
                3 => part::<3, V, RS, KS>(tile, row, lane),
                2 => part::<2, V, RS, KS>(tile, row, lane),
                1 => part::<1, V, RS, KS>(tile, row, lane),
                _ => {}
            }
        }
    }
}

/// Multiplies `R` rows of the tile from `row` on, and 16 of its lanes from `lane` on.
///
/// # Safety
/// All of these are wanted rows and lanes of a [`Tile`]; the processor must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn part<const R: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
    row: usize,
    lane: usize,
) {
    let mut sums: [[__m256; 2]; R] = [[_mm256_setzero_ps(); 2]; R];
    let mut a = tile.a.wrapping_add(row * RS);
    let mut b = tile.b.wrapping_add(lane);
    for _ in 0..tile.depth {
        // SAFETY: 16 lanes of one of the promised rows of `b`.
        let (low, high) = unsafe { (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(VECTOR))) };
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: one of the promised `a(i, k)`.
            let value = unsafe { _mm256_broadcast_ss(&*a.add(i * RS)) };
            sums[0] = _mm256_fmadd_ps(value, low, sums[0]);
            sums[1] = _mm256_fmadd_ps(value, high, sums[1]);
        }
        // After the last row these may point outside of their allocation; nothing reads them there.
        (a, b) = (a.wrapping_add(KS), b.wrapping_add(V * 16));
    }
    for (i, sums) in sums.iter().enumerate() {
        for (at, sum) in sums.iter().enumerate() {
            // SAFETY: one of the promised rows of `c` and of `from`.
            unsafe {
                let index = (row + i) * V * 16 + lane + at * VECTOR;
                let sum = match tile.from {
                    Some(from) => _mm256_add_ps(_mm256_loadu_ps(from.add(index)), *sum),
                    None => *sum,
                };
                _mm256_storeu_ps(tile.c.add(index), sum);
            }
        }
    }
}
