//! The loops of [`super`] in AVX-512, for complete blocks only. Codes are looked up instead of counted.
//!
//! A scaled value is multiplied by [`STEPS`] and rounded, which gives one of 31 cells so narrow that none holds two midpoints. Its
//! code is the number of midpoints in lower cells, plus one if the value is above the midpoint in its own cell.

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _CMP_GT_OQ, _mm256_loadu_si256, _mm256_permutexvar_epi16,
    _mm256_set_epi16, _mm256_storeu_si256, _mm512_and_si512, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi16_epi8, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_maddubs_epi16, _mm512_mask_add_epi32,
    _mm512_max_epu32, _mm512_mul_ps, _mm512_packs_epi32, _mm512_packus_epi16,
    _mm512_permutex2var_epi32, _mm512_permutex2var_ps, _mm512_reduce_max_epu32, _mm512_set1_epi16,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
};

use super::{BLOCK, MIDPOINTS, inverse_absmax};
use crate::FloatType;

/// The number of cells between 0 and 1.
const STEPS: f32 = 15.4;
/// Added to a small number, it leaves the nearest integer in the lowest bits.
const ROUNDER: f32 = 12_582_912.;

/// For each cell, by the lowest five bits of its number: the midpoint in it (infinity if there is none), and the number of midpoints
/// in lower cells.
const CELLS: ([f32; 32], [i32; 32]) = cells();

const fn cells() -> ([f32; 32], [i32; 32]) {
    let mut own = [f32::INFINITY; 32];
    let mut below = [0; 32];
    let mut cell = -16;
    while cell < 16 {
        let index = (cell & 31) as usize;
        let mut number = 0;
        while number < MIDPOINTS.len() {
            // The conversion rounds towards zero, which is down for this sum, because it is not negative.
            let found = (MIDPOINTS[number] as f64 * STEPS as f64 + 16.5) as i32 - 16;
            if found < cell {
                below[index] += 1;
            }
            if found == cell {
                assert!(own[index] == f32::INFINITY, "two midpoints in a cell");
                own[index] = MIDPOINTS[number];
            }
            number += 1;
        }
        cell += 1;
    }
    (own, below)
}

/// The values of a complete block.
#[target_feature(enable = "avx512f")]
fn values(dtype: FloatType, block: &[u8]) -> [__m512; 4] {
    assert!(block.len() >= BLOCK * dtype.size());
    let half = |quarter: usize| {
        // SAFETY: 32 bytes of the block, which was found to be long enough.
        unsafe { _mm256_loadu_si256(block.as_ptr().add(quarter * 32).cast()) }
    };
    match dtype {
        FloatType::F32 => std::array::from_fn(|quarter| {
            // SAFETY: 64 bytes of the block.
            unsafe { _mm512_loadu_ps(block.as_ptr().add(quarter * 64).cast()) }
        }),
        FloatType::F16 => std::array::from_fn(|quarter| _mm512_cvtph_ps(half(quarter))),
        FloatType::Bf16 => std::array::from_fn(|quarter| {
            let upper = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half(quarter)));
            _mm512_castsi512_ps(upper)
        }),
    }
}

/// The largest magnitude, see `super::block_absmax`.
#[target_feature(enable = "avx512f")]
fn block_absmax(values: &[__m512; 4]) -> f32 {
    let no_sign = _mm512_set1_epi32(0x7fff_ffff);
    let [a, b, c, d] = values.map(|x| _mm512_and_si512(_mm512_castps_si512(x), no_sign));
    let largest = _mm512_max_epu32(_mm512_max_epu32(a, b), _mm512_max_epu32(c, d));
    f32::from_bits(_mm512_reduce_max_epu32(largest))
}

/// See [`super::absmax`]. Returns the number of blocks that are done, which is all complete ones.
#[target_feature(enable = "avx512f")]
pub(super) fn absmax(dtype: FloatType, bytes: &[u8], out: &mut [f32]) -> usize {
    let blocks = bytes.chunks_exact(BLOCK * dtype.size()).zip(out);
    let mut done = 0;
    for (block, out) in blocks {
        *out = block_absmax(&values(dtype, block));
        done += 1;
    }
    done
}

/// See [`super::pack`]. Returns the number of blocks that are done, which is all complete ones.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn pack(dtype: FloatType, bytes: &[u8], packed: &mut [u8]) -> usize {
    let tables = Tables::new();
    let packed = packed.as_chunks_mut::<{ BLOCK / 2 }>().0;
    let blocks = bytes.chunks_exact(BLOCK * dtype.size()).zip(packed);
    let mut done = 0;
    for (block, packed) in blocks {
        let values = values(dtype, block);
        let scale = _mm512_set1_ps(inverse_absmax(block_absmax(&values)));
        let codes = values.map(|x| tables.codes(_mm512_mul_ps(x, scale)));
        let bytes = tables.pairs(codes);
        // SAFETY: 32 bytes, as long as `packed`.
        unsafe { _mm256_storeu_si256(packed.as_mut_ptr().cast(), bytes) };
        done += 1;
    }
    done
}

/// The constants, which stay in registers.
struct Tables {
    steps: __m512,
    rounder: __m512,
    own: [__m512; 2],
    below: [__m512i; 2],
    one: __m512i,
    /// 16 for the first of two codes, 1 for the second.
    factors: __m512i,
    order: __m256i,
}

impl Tables {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn new() -> Self {
        let (own, below) = &CELLS;
        // SAFETY: either half of 32 values.
        let own = unsafe {
            [
                _mm512_loadu_ps(own.as_ptr()),
                _mm512_loadu_ps(own.as_ptr().add(16)),
            ]
        };
        let below = below.as_ptr().cast::<f32>();
        // SAFETY: the same.
        let below = unsafe { [_mm512_loadu_ps(below), _mm512_loadu_ps(below.add(16))] };
        Self {
            steps: _mm512_set1_ps(STEPS),
            rounder: _mm512_set1_ps(ROUNDER),
            own,
            below: below.map(|x| _mm512_castps_si512(x)),
            one: _mm512_set1_epi32(1),
            factors: _mm512_set1_epi16(0x0110),
            // Pair `4 a + b` lies at `4 b + a`. The intrinsic takes the last element first.
            order: _mm256_set_epi16(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0),
        }
    }

    /// The codes of 16 scaled values from -1 to 1.
    #[target_feature(enable = "avx512f")]
    fn codes(&self, shares: __m512) -> __m512i {
        let cell = _mm512_fmadd_ps(shares, self.steps, self.rounder);
        let cell = _mm512_castps_si512(cell);
        let own = _mm512_permutex2var_ps(self.own[0], cell, self.own[1]);
        let below = _mm512_permutex2var_epi32(self.below[0], cell, self.below[1]);
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(shares, own);
        _mm512_mask_add_epi32(below, above, below, self.one)
    }

    /// Packs two codes a byte, the first one in the upper half.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn pairs(&self, [a, b, c, d]: [__m512i; 4]) -> __m256i {
        // Each quarter of 16 bytes has four codes of `a`, of `b`, of `c` and of `d`.
        let bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
        let pairs = _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(bytes, self.factors));
        _mm256_permutexvar_epi16(self.order, pairs)
    }
}
