//! The dequantisation of NF4 codes.

use super::{NF4_BLOCK, Nf4};
use crate::FloatType;
use crate::bf16::bf16_bits;
#[cfg(target_arch = "x86_64")]
use crate::dispatch::Isa;
use crate::dispatch::{Loop, run};

impl Nf4<'_> {
    /// Dequantises `out.len()` of the weight's values, from index `first` on, into `out`.
    ///
    /// # Panics
    /// If there are too few codes or magnitudes for them.
    pub fn dequantise(&self, first: usize, out: &mut [f32]) {
        let end = first.checked_add(out.len());
        let fits = |end: usize| {
            end.div_ceil(2) <= self.packed.len() && end.div_ceil(NF4_BLOCK) <= self.absmax.len()
        };
        assert!(
            end.is_some_and(fits),
            "values {first} to {end:?} of {} bytes of codes and {} magnitudes",
            self.packed.len(),
            self.absmax.len()
        );
        self.values(first, out);
    }

    /// Writes the values from index `first` on.
    pub(super) fn values(&self, first: usize, out: &mut [f32]) {
        self.look_up(first, out, |values| values, vectors);
    }

    /// Writes the values from index `first` on as bits of bf16.
    pub(super) fn bf16_values(&self, first: usize, out: &mut [u16]) {
        self.look_up(first, out, |values| run(Words(&values)), words);
    }

    /// Writes the values from index `first` on. `table` converts the 16 values of a block to the output's type; `vectors` looks up as
    /// many codes as whole vectors hold and returns how many these were.
    fn look_up<T: Copy>(
        &self,
        mut first: usize,
        mut out: &mut [T],
        table: impl Fn([f32; 16]) -> [T; 16],
        vectors: impl Fn(&[T; 16], &[u8], &mut [T]) -> usize,
    ) {
        while !out.is_empty() {
            let count = (NF4_BLOCK - first % NF4_BLOCK).min(out.len());
            let (now, rest) = out.split_at_mut(count);
            let absmax = self.absmax[first / NF4_BLOCK];
            // Each of the block's values is one of these 16, so only these are rounded.
            let values = table(run(Table {
                code: self.code,
                absmax,
                rounding: self.rounding,
            }));
            let packed = &self.packed[first / 2..(first + count).div_ceil(2)];
            if first.is_multiple_of(2) {
                let done = vectors(&values, packed, now);
                let (pairs, last) = now[done..].as_chunks_mut::<2>();
                for (out, byte) in pairs.iter_mut().zip(&packed[done / 2..]) {
                    *out = [
                        values[usize::from(byte >> 4)],
                        values[usize::from(byte & 15)],
                    ];
                }
                if let (Some(out), Some(byte)) = (last.first_mut(), packed.last()) {
                    *out = values[usize::from(byte >> 4)];
                }
            } else {
                let codes = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
                for (out, code) in now.iter_mut().zip(codes.skip(1)) {
                    *out = values[usize::from(code)];
                }
            }
            first += count;
            out = rest;
        }
    }
}

/// Computes the rounded values of a block's 16 codes.
struct Table<'a> {
    code: &'a [f32; 16],
    absmax: f32,
    rounding: FloatType,
}

impl Loop for Table<'_> {
    type Output = [f32; 16];

    #[inline(always)]
    fn run<const FMA: bool>(self) -> [f32; 16] {
        let mut values = [0f32; 16];
        for i in 0..16 {
            values[i] = self.code[i] * self.absmax;
        }
        match self.rounding {
            FloatType::F32 => {}
            FloatType::Bf16 => {
                for value in &mut values {
                    *value = FloatType::Bf16.round(*value);
                }
            }
            FloatType::F16 => values = values.map(|value| self.rounding.round(value)),
        }
        values
    }
}

/// Converts values to bits of bf16.
struct Words<'a>(&'a [f32; 16]);

impl Loop for Words<'_> {
    type Output = [u16; 16];

    #[inline(always)]
    fn run<const FMA: bool>(self) -> [u16; 16] {
        let mut words = [0u16; 16];
        for i in 0..16 {
            words[i] = bf16_bits(self.0[i]) as u16;
        }
        words
    }
}

/// Looks up as many codes as whole vectors hold and returns how many these were.
fn vectors(values: &[f32; 16], packed: &[u8], out: &mut [f32]) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let isa = Isa::current();
        let count = out.len().min(2 * packed.len()) / 16 * 16;
        if isa >= Isa::Avx2 && count > 0 {
            // SAFETY: the processor has AVX2, and `count` codes and values are there.
            unsafe { avx2::look_up(values, packed.as_ptr(), out.as_mut_ptr(), count) };
            return count;
        }
    }
    let _ = (values, packed, out);
    0
}

/// Like [`vectors`], for values of 16 bits.
fn words(values: &[u16; 16], packed: &[u8], out: &mut [u16]) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let isa = Isa::current();
        let count = out.len().min(2 * packed.len()) / 32 * 32;
        if isa >= Isa::Avx512 && count > 0 {
            // SAFETY: the processor has AVX-512, and `count` codes and values are there.
            unsafe { avx512::look_up(values, packed.as_ptr(), out.as_mut_ptr(), count) };
            return count;
        }
    }
    let _ = (values, packed, out);
    0
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm256_loadu_si256, _mm512_castsi256_si512, _mm512_cvtepu8_epi32,
        _mm512_or_si512, _mm512_permutexvar_epi16, _mm512_slli_epi32, _mm512_srli_epi32,
        _mm512_storeu_si512,
    };

    /// # Safety
    /// The processor must have AVX-512, and `packed` and `out` `count` codes and values, a multiple of 32.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn look_up(
        values: &[u16; 16],
        packed: *const u8,
        out: *mut u16,
        count: usize,
    ) {
        // SAFETY: `values` has 16 values. Codes are below 16, so nothing in the upper half of the register is looked up.
        let table = unsafe { _mm512_castsi256_si512(_mm256_loadu_si256(values.as_ptr().cast())) };
        for first in (0..count).step_by(32) {
            // SAFETY: these are the 16 bytes of the next 32 codes, which the caller promised.
            let bytes = unsafe { _mm_loadu_si128(packed.add(first / 2).cast()) };
            let both = _mm512_cvtepu8_epi32(bytes);
            // The first of two codes is in the upper half of its byte. The permutation uses the low five bits of a word.
            let first_code = _mm512_srli_epi32::<4>(both);
            let second_code = _mm512_slli_epi32::<28>(both);
            let codes = _mm512_or_si512(first_code, _mm512_srli_epi32::<12>(second_code));
            let words = _mm512_permutexvar_epi16(codes, table);
            // SAFETY: `out` has room for these 32 values, as the caller promised.
            unsafe { _mm512_storeu_si512(out.add(first).cast(), words) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m128i, __m256, __m256i, _mm_loadl_epi64, _mm256_blendv_ps, _mm256_castsi256_ps,
        _mm256_cvtepu8_epi32, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_permutevar8x32_ps,
        _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };

    /// # Safety
    /// The processor must have AVX2, and `packed` and `out` `count` codes and values, a multiple of 16.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn look_up(
        values: &[f32; 16],
        packed: *const u8,
        out: *mut f32,
        count: usize,
    ) {
        // SAFETY: each load reads one half of the 16 values.
        let table = unsafe {
            [
                _mm256_loadu_ps(values.as_ptr()),
                _mm256_loadu_ps(values.as_ptr().add(8)),
            ]
        };
        for first in (0..count).step_by(16) {
            // SAFETY: these are the eight bytes of the next 16 codes, which the caller promised.
            let bytes: __m128i = unsafe { _mm_loadl_epi64(packed.add(first / 2).cast()) };
            let both = _mm256_cvtepu8_epi32(bytes);
            // The first of two codes is in the upper half of its byte.
            let (even, odd) = (
                value(table, _mm256_srli_epi32::<4>(both)),
                value(table, both),
            );
            let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
            // SAFETY: `out` has room for these 16 values, as the caller promised.
            unsafe {
                let out = out.add(first);
                _mm256_storeu_ps(out, _mm256_permute2f128_ps::<0x20>(low, high));
                _mm256_storeu_ps(out.add(8), _mm256_permute2f128_ps::<0x31>(low, high));
            }
        }
    }

    /// The values of the codes in the lowest four bits.
    #[target_feature(enable = "avx2")]
    fn value([low, high]: [__m256; 2], codes: __m256i) -> __m256 {
        let low = _mm256_permutevar8x32_ps(low, codes);
        let high = _mm256_permutevar8x32_ps(high, codes);
        // The code's fourth bit becomes the sign, by which the blend chooses.
        _mm256_blendv_ps(
            low,
            high,
            _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::product::tests::numbers;

    #[test]
    fn each_code_is_looked_up() {
        let code: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.) / 9.);
        let packed: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        let absmax = numbers(packed.len() * 2 / NF4_BLOCK, 4);
        let nf4 = Nf4 {
            packed: &packed,
            absmax: &absmax,
            code: &code,
            rounding: FloatType::F32,
        };
        let value = |index: usize| {
            let byte = packed[index / 2];
            let code = if index.is_multiple_of(2) {
                byte >> 4
            } else {
                byte & 15
            };
            nf4.code[usize::from(code)] * absmax[index / NF4_BLOCK]
        };
        with_each(|isa| {
            for (first, count) in [
                (0, 1024),
                (0, 64),
                (64, 33),
                (3, 200),
                (10, 15),
                (60, 900),
                (1007, 17),
            ] {
                let mut out = vec![9.; count];
                nf4.values(first, &mut out);
                for (i, out) in out.iter().enumerate() {
                    assert_eq!(
                        out.to_bits(),
                        value(first + i).to_bits(),
                        "{isa:?} {first} {i}"
                    );
                }
                let mut out = vec![9; count];
                nf4.bf16_values(first, &mut out);
                for (i, out) in out.iter().enumerate() {
                    let expected = half::bf16::from_f32(value(first + i)).to_bits();
                    assert_eq!(*out, expected, "{isa:?} {first} {i}");
                }
            }
        });
    }
}
