//! The tiles of [`super`] in AVX-512.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::{LANES, TILE, Tile};

/// # Safety
/// See [`Tile`]; the processor must have AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn multiply<const M: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
) {
    tile.prefetch_sums(V * 16);
    let mut sums = [[_mm512_setzero_ps(); V]; M];
    let (mut a, mut b) = (tile.a, tile.b);
    for _ in 0..tile.depth {
        // SAFETY: the maker of the tile promised `depth` rows.
        let row: [__m512; V] = std::array::from_fn(|at| unsafe { _mm512_loadu_ps(b.add(at * 16)) });
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: one of the promised `a(i, k)`.
            let value = _mm512_set1_ps(unsafe { *a.add(i * RS) });
            for (sum, b) in sums.iter_mut().zip(row) {
                *sum = _mm512_fmadd_ps(value, b, *sum);
            }
        }
        // After the last row these may point outside of their allocation; nothing reads them there.
        (a, b) = (a.wrapping_add(KS), b.wrapping_add(V * 16));
    }
    for (i, sums) in sums.iter().enumerate() {
        if i < tile.rows {
            for (at, sum) in sums.iter().enumerate() {
                // SAFETY: one of the promised rows of `c`.
                unsafe {
                    let index = (i * V + at) * 16;
                    let sum = match tile.from {
                        Some(from) => _mm512_add_ps(_mm512_loadu_ps(from.add(index)), *sum),
                        None => *sum,
                    };
                    _mm512_storeu_ps(tile.c.add(index), sum);
                }
            }
        }
    }
}

/// # Safety
/// See [`Tile`]; the processor must have AVX-512 with bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply_pairs<const M: usize>(tile: Tile<u32, u32>) {
    tile.prefetch_sums(LANES);
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let (mut a, mut b) = (tile.a, tile.b);
    for _ in 0..tile.depth {
        // SAFETY: the maker of the tile promised `depth` rows of 32 pairs.
        let (low, high) = unsafe { (load(b), load(b.add(16))) };
        for (i, sums) in sums.iter_mut().enumerate() {
            // SAFETY: one of the promised pairs.
            let value = unsafe { *a.add(i) }.cast_signed();
            let value = from_integers(_mm512_set1_epi32(value));
            sums[0] = _mm512_dpbf16_ps(sums[0], value, low);
            sums[1] = _mm512_dpbf16_ps(sums[1], value, high);
        }
        (a, b) = (a.wrapping_add(TILE), b.wrapping_add(LANES));
    }
    for (i, sums) in sums.iter().enumerate() {
        if i < tile.rows {
            for (at, sum) in sums.iter().enumerate() {
                // SAFETY: one of the promised rows of `c`.
                unsafe {
                    let index = (i * 2 + at) * 16;
                    let sum = match tile.from {
                        Some(from) => _mm512_add_ps(_mm512_loadu_ps(from.add(index)), *sum),
                        None => *sum,
                    };
                    _mm512_storeu_ps(tile.c.add(index), sum);
                }
            }
        }
    }
}

/// # Safety
/// The processor must have AVX-512 with bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn pair_rows(first: &[f32; LANES], second: &[f32; LANES], out: &mut [u32; LANES]) {
    // Word 2 i is word i, word 2 i + 1 is word 16 + i.
    let words: [i16; 32] = std::array::from_fn(|at| (at / 2 + at % 2 * 16) as i16);
    // SAFETY: `words` has 512 bits.
    let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    for at in (0..LANES).step_by(16) {
        // SAFETY: both halves of a row are there.
        let row = |row: &[f32; LANES]| unsafe { _mm512_loadu_ps(row.as_ptr().add(at)) };
        let both = to_integers(_mm512_cvtne2ps_pbh(row(second), row(first)));
        let pairs = _mm512_permutexvar_epi16(words, both);
        // SAFETY: both halves of the result are there too.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), pairs) };
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const u32) -> __m512bh {
    // SAFETY: the caller's promise.
    from_integers(unsafe { _mm512_loadu_si512(from.cast()) })
}

#[inline(always)]
fn to_integers(value: __m512bh) -> __m512i {
    // SAFETY: 512 bits either way, and every bit pattern is a value.
    unsafe { std::mem::transmute(value) }
}

#[inline(always)]
fn from_integers(value: __m512i) -> __m512bh {
    // SAFETY: 512 bits either way, and every bit pattern is a value.
    unsafe { std::mem::transmute(value) }
}
