//! The innermost loops of products: a tile of a few rows by 32 lanes, summed up in registers.
//!
//! `c[i][lane] = sum over k of a(i, k) * b[k][lane]`, where `b` and `c` have `V` times 16 lanes a row (of floats, or of pairs
//! of bf16) and `a(i, k)` lies at `a[i * RS + k * KS]`. Rows of `a` that are packed have `RS = 1, KS = TILE`; those of a
//! panel have `RS = 32, KS = 1`, and a panel transposed `RS = 1, KS = 32`.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::dispatch::Isa;
use crate::dispatch::run;
use crate::panels::LANES;
use plain::{Plain, PlainPairs};

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

#[cfg(target_arch = "x86_64")]
impl<A, B> Tile<A, B> {
    /// Asks for what the sums are added to, rows of so many lanes, to be in the first cache soon.
    #[inline(always)]
    fn ask_for_sums(&self, lanes: usize) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        if let Some(from) = self.from {
            for place in (0..self.rows * lanes).step_by(16) {
                // SAFETY: no access, a wish.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(place).cast()) };
            }
        }
    }
}

/// Asks for values to be in the second cache soon.
#[inline]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for place in (0..size_of_val(values)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let place = values.as_ptr().cast::<i8>().wrapping_add(place);
        // SAFETY: no access, a wish.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place) };
    }
    let _ = values;
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
    match Isa::current() {
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 if RS == 1 || tile.rows >= M => {
            // SAFETY: the processor has AVX-512; the rest is the caller's promise.
            unsafe { avx512::multiply::<M, V, RS, KS>(tile) };
            return;
        }
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 => {
            // SAFETY: the processor has AVX2 and FMA; the rest is the caller's promise.
            unsafe { avx2::multiply::<M, V, RS, KS>(tile) };
            return;
        }
        Isa::Portable => {}
    }
    #[cfg(target_arch = "aarch64")]
    if Isa::current() >= Isa::Neon {
        // SAFETY: every 64-bit Arm has NEON; the rest is the caller's promise.
        unsafe { neon::multiply::<M, V, RS, KS>(tile) };
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
        unsafe { avx512::multiply_pairs::<M>(tile) };
        return;
    }
    run(PlainPairs::<M>(tile));
}

/// Puts tiles of [`TILE`] packed rows of pairs in the order in which the instruction set in use wants them, if that is another
/// one, and says so: [`multiply_arranged`] takes them then. What was in `spare` is lost.
pub(crate) fn arrange(pairs: &mut Vec<u32>, spare: &mut Vec<u32>, depth: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::AmxBf16 {
        amx::arrange(pairs, spare, depth);
        return true;
    }
    #[cfg(target_arch = "aarch64")]
    if Isa::current() >= Isa::NeonBf16 {
        neon::arrange(pairs, depth);
        return true;
    }
    let _ = (pairs, spare, depth);
    false
}

/// A tile of [`TILE`] packed rows of pairs that [`arrange`] put in order. `depth` counts pairs.
///
/// # Safety
/// See [`Tile`]; all [`TILE`] rows of `a` may be read.
pub(crate) unsafe fn multiply_arranged(tile: Tile<u32, u32>) {
    // SAFETY: `arrange` saw that the processor has AMX; the rest is the caller's promise.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        amx::multiply(tile);
    }
    // SAFETY: `arrange` saw that the processor has bf16; the rest is the caller's promise.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        neon::multiply_pairs(tile);
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    unreachable!("nothing is arranged for {} pairs", tile.depth);
}

/// Says that this thread has no more tiles to multiply for now.
pub(crate) fn done() {
    #[cfg(target_arch = "x86_64")]
    amx::release();
}

/// Rounds rows to bf16 and puts each two of them together as pairs, the first in the low halves; behind an odd last row, zeros.
/// Gives false, and does nothing, where the processor has no instruction for it. AVX-512 makes denormal numbers 0, NEON leaves
/// them; products of pairs take them for 0 in both.
#[inline]
pub(crate) fn pair_rows(rows: &[[f32; LANES]], out: &mut [[u32; LANES]]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if Isa::current() >= Isa::Avx512Bf16 {
        for (out, rows) in out.iter_mut().zip(rows.chunks(2)) {
            let second = rows.get(1).unwrap_or(&[0.; LANES]);
            // SAFETY: the processor has AVX-512 with bf16.
            unsafe { avx512::pair_rows(&rows[0], second, out) };
        }
        return true;
    }
    #[cfg(target_arch = "aarch64")]
    if Isa::current() >= Isa::NeonBf16 {
        for (out, rows) in out.iter_mut().zip(rows.chunks(2)) {
            let second = rows.get(1).unwrap_or(&[0.; LANES]);
            // SAFETY: the processor has bf16.
            unsafe { neon::pair_rows(&rows[0], second, out) };
        }
        return true;
    }
    let _ = (rows, out);
    false
}
