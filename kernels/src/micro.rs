//! The innermost loops of products: a tile of a few rows by 32 lanes, summed up in registers.
//!
//! `c[i][lane] = sum over k of a(i, k) * b[k][lane]`, where `b` and `c` have `V` times 16 lanes a row (of floats, or of pairs
//! of bf16) and `a(i, k)` lies at `a[i * RS + k * KS]`. Rows of `a` that are packed have `RS = 1, KS = TILE`; those of a
//! panel have `RS = 32, KS = 1`, and a panel turned around `RS = 1, KS = 32`.

use crate::dispatch::{Isa, Loop, fma, run};
use crate::panels::LANES;

/// Rows of a tile of packed weights.
pub(crate) const TILE: usize = 12;

/// One tile's operands.
///
/// # Safety
/// Whoever makes one has to see to it that `a` may be read at every `i * RS + k * KS` for `k < depth` and `i < rows`, or
/// `i < M` where `RS` is 1; `b` over `depth` rows; `from` over `rows` rows; and `c` written over `rows` rows, by nobody else at the time.
#[derive(Clone, Copy)]
pub(crate) struct Tile<A, B> {
    pub(crate) a: *const A,
    pub(crate) b: *const B,
    pub(crate) depth: usize,
    pub(crate) c: *mut f32,
    /// How many of the rows are wanted.
    pub(crate) rows: usize,
    /// What the sum is added to, if anything: rows like those of `c`, or `c` itself.
    pub(crate) from: Option<*const f32>,
}

/// A tile of `M` rows in f32.
///
/// # Safety
/// See [`Tile`].
#[inline]
pub(crate) unsafe fn multiply<const M: usize, const V: usize, const RS: usize, const KS: usize>(
    tile: Tile<f32, f32>,
) {
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512 && (RS == 1 || tile.rows >= M) {
        // SAFETY: the processor has AVX-512; the rest is the caller's promise.
        unsafe { wide::multiply::<M, V, RS, KS>(tile) };
        return;
    }
    run(Plain::<M, V, RS, KS>(tile));
}

/// A tile of `M` of [`TILE`] packed rows of pairs of bf16, with sums in f32. `depth` counts pairs.
///
/// # Safety
/// See [`Tile`].
#[inline]
pub(crate) unsafe fn multiply_pairs<const M: usize>(tile: Tile<u32, u32>) {
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        // SAFETY: the processor has AVX-512 with bf16; the rest is the caller's promise.
        unsafe { wide::multiply_pairs::<M>(tile) };
        return;
    }
    run(PlainPairs::<M>(tile));
}

/// Rounds rows to bf16 and puts each two of them together as pairs, the first in the low halves; behind an odd last row, zeros.
/// Gives false, and does nothing, where the processor has no instruction for it. Denormal numbers become 0, which products of
/// such a processor take them for.
#[inline]
pub(crate) fn pair_rows(rows: &[[f32; LANES]], out: &mut [[u32; LANES]]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        for (out, rows) in out.iter_mut().zip(rows.chunks(2)) {
            let second = rows.get(1).unwrap_or(&[0.; LANES]);
            // SAFETY: the processor has AVX-512 with bf16.
            unsafe { wide::pair_rows(&rows[0], second, out) };
        }
        return true;
    }
    let _ = (rows, out);
    false
}

/// The tile by loops that the compiler makes vectors of: four rows and half the lanes at a time, so that 16 registers do.
struct Plain<const M: usize, const V: usize, const RS: usize, const KS: usize>(Tile<f32, f32>);

/// Lanes of a vector.
const VECTOR: usize = 16;

impl<const M: usize, const V: usize, const RS: usize, const KS: usize> Loop
    for Plain<M, V, RS, KS>
{
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in (0..self.0.rows.min(M)).step_by(4) {
            for lane in (0..V * VECTOR).step_by(VECTOR) {
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
        let mut sums = [[0f32; VECTOR]; 4];
        // Rows that are not wanted repeat the last one.
        let places: [usize; 4] = std::array::from_fn(|i| (row + i.min(count - 1)) * RS);
        for k in 0..tile.depth {
            // SAFETY: inside row `k` of `b`.
            let b = unsafe {
                tile.b
                    .add(k * V * VECTOR + lane)
                    .cast::<[f32; VECTOR]>()
                    .read_unaligned()
            };
            for (sums, place) in sums.iter_mut().zip(places) {
                // SAFETY: one of the `a(i, k)`.
                let a = unsafe { *tile.a.add(place + k * KS) };
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = fma::<FMA>(a, b, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate().take(count) {
            for (at, sum) in sums.iter().enumerate() {
                // SAFETY: a wanted row of `c`.
                unsafe {
                    let place = (row + i) * V * VECTOR + lane + at;
                    let sum = tile.from.map_or(*sum, |from| *from.add(place) + sum);
                    *tile.c.add(place) = sum;
                }
            }
        }
    }
}

/// The tile of pairs by loops, for processors without an instruction for it.
struct PlainPairs<const M: usize>(Tile<u32, u32>);

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
                let place = row * LANES + lane;
                // SAFETY: a wanted row of `c` and of `from`.
                unsafe {
                    let sum = tile.from.map_or(*sum, |from| *from.add(place) + sum);
                    *tile.c.add(place) = sum;
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

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
        _mm512_storeu_si512,
    };

    use super::{LANES, TILE, Tile};

    /// # Safety
    /// See [`Tile`]; the processor must have AVX-512.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply<
        const M: usize,
        const V: usize,
        const RS: usize,
        const KS: usize,
    >(
        tile: Tile<f32, f32>,
    ) {
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.depth {
            // SAFETY: the maker of the tile promised `depth` rows.
            let row: [__m512; V] =
                std::array::from_fn(|at| unsafe { _mm512_loadu_ps(b.add(at * 16)) });
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: one of the promised `a(i, k)`.
                let value = _mm512_set1_ps(unsafe { *a.add(i * RS) });
                for (sum, b) in sums.iter_mut().zip(row) {
                    *sum = _mm512_fmadd_ps(value, b, *sum);
                }
            }
            // Behind the last row these may point outside of what they came from, where nothing reads them.
            (a, b) = (a.wrapping_add(KS), b.wrapping_add(V * 16));
        }
        for (i, sums) in sums.iter().enumerate() {
            if i < tile.rows {
                for (at, sum) in sums.iter().enumerate() {
                    // SAFETY: one of the promised rows of `c`.
                    unsafe {
                        let place = (i * V + at) * 16;
                        let sum = match tile.from {
                            Some(from) => _mm512_add_ps(_mm512_loadu_ps(from.add(place)), *sum),
                            None => *sum,
                        };
                        _mm512_storeu_ps(tile.c.add(place), sum);
                    }
                }
            }
        }
    }

    /// # Safety
    /// See [`Tile`]; the processor must have AVX-512 with bf16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply_pairs<const M: usize>(tile: Tile<u32, u32>) {
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.depth {
            // SAFETY: the maker of the tile promised `depth` rows of 32 pairs.
            let (low, high) = unsafe { (load(b), load(b.add(16))) };
            for (i, sums) in sums.iter_mut().enumerate() {
                // SAFETY: one of the promised pairs.
                let value = unsafe { *a.add(i) }.cast_signed();
                let value = of_integers(_mm512_set1_epi32(value));
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
                        let place = (i * 2 + at) * 16;
                        let sum = match tile.from {
                            Some(from) => _mm512_add_ps(_mm512_loadu_ps(from.add(place)), *sum),
                            None => *sum,
                        };
                        _mm512_storeu_ps(tile.c.add(place), sum);
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
        // SAFETY: 512 bits.
        let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
        for at in (0..LANES).step_by(16) {
            // SAFETY: both halves of a row are there.
            let row = |row: &[f32; LANES]| unsafe { _mm512_loadu_ps(row.as_ptr().add(at)) };
            let both = to_integers(_mm512_cvtne2ps_pbh(row(second), row(first)));
            let pairs = _mm512_permutexvar_epi16(words, both);
            // SAFETY: and so are those of the result.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), pairs) };
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const u32) -> __m512bh {
        // SAFETY: the caller's promise.
        of_integers(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    fn to_integers(value: __m512bh) -> __m512i {
        // SAFETY: 512 bits either way, and every bit pattern is a value.
        unsafe { std::mem::transmute(value) }
    }

    #[inline(always)]
    fn of_integers(value: __m512i) -> __m512bh {
        // SAFETY: 512 bits either way, and every bit pattern is a value.
        unsafe { std::mem::transmute(value) }
    }
}
