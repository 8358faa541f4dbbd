//! The innermost loops of products: a tile of a few rows by 32 lanes, whose sums stay in registers.
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

/// The number of rows in a tile of packed weights.
pub(crate) const TILE: usize = 12;

/// The operands of one tile's product.
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
    /// The number of rows that are computed.
    pub(crate) rows: usize,
    /// The values to which the sums are added, if there are any: rows like those of `c`, or `c` itself.
    pub(crate) from: Option<*const f32>,
}

#[cfg(target_arch = "x86_64")]
impl<A, B> Tile<A, B> {
    /// Prefetches the values to which the sums are added, rows of `lanes` floats, into the first-level cache.
    #[inline(always)]
    fn prefetch_sums(&self, lanes: usize) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        if let Some(from) = self.from {
            for index in (0..self.rows * lanes).step_by(16) {
                // SAFETY: a prefetch is only a hint and never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(index).cast()) };
            }
        }
    }
}

/// Prefetches values into the second-level cache.
#[inline]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for index in (0..size_of_val(values)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let index = values.as_ptr().cast::<i8>().wrapping_add(index);
        // SAFETY: a prefetch is only a hint and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(index) };
    }
    let _ = values;
}

/// Multiplies a tile of `M` rows in f32.
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

/// Multiplies the first `M` of a tile's [`TILE`] packed rows of pairs of bf16, with sums in f32. `depth` counts pairs.
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

/// Reorders tiles of [`TILE`] packed rows of pairs if the instruction set in use reads them in another order, and returns whether it
/// did: then [`multiply_arranged`] multiplies them. The contents of `spare` are overwritten.
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

/// Multiplies a tile of [`TILE`] packed rows of pairs that [`arrange`] reordered. `depth` counts pairs.
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

/// Releases the tile registers, to be called when a thread has no more tiles to multiply for now.
pub(crate) fn done() {
    #[cfg(target_arch = "x86_64")]
    amx::release();
}

/// Rounds rows to bf16 and joins each two of them to pairs, the first in the low halves; an odd last row is paired with zeros.
/// Returns false, and does nothing, where the processor has no instruction for it. AVX-512 rounds subnormal numbers to 0 and NEON
/// keeps them; products of pairs take them for 0 on both.
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
