//! Sums of products in registers, and the conversion of stored weights to what is multiplied there.

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_prefetch, _mm256_add_epi32, _mm256_and_si256, _mm256_blendv_ps, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mul_ps, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_broadcast_i64x4, _mm512_castpd_ps, _mm512_castps_pd,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32,
    _mm512_cvtneps_pbh, _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_permutexvar_epi16,
    _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_shuffle_ps, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpacklo_pd,
};

use half::bf16;

use super::BLOCK;
use crate::matrix::Nf4;

/// Sums of products in registers.
///
/// # Safety of its functions
/// The processor has the instructions.
pub(super) trait Arithmetic {
    /// A register of factors.
    type Factors: Copy;
    /// A register of partial sums.
    type Sum: Copy;
    /// The number of words in a register.
    const WORDS: usize;
    unsafe fn zero() -> Self::Sum;
    /// Reads `WORDS` words.
    unsafe fn load(x: *const u32) -> Self::Factors;
    unsafe fn add(sum: Self::Sum, a: Self::Factors, b: Self::Factors) -> Self::Sum;
    unsafe fn total(sum: Self::Sum) -> f32;
    /// The sum of both registers' lanes, for each of `V` pairs: each is [`Arithmetic::total`] of one plus that of the other.
    #[inline(always)]
    unsafe fn totals<const V: usize>(sums: [[Self::Sum; 2]; V]) -> [f32; V] {
        let mut totals = [0.; V];
        for (total, [even, odd]) in totals.iter_mut().zip(sums) {
            // SAFETY: see the trait.
            *total = unsafe { Self::total(even) + Self::total(odd) };
        }
        totals
    }
}

/// 512-bit registers of 16 floats.
pub(super) struct Floats512;
/// 512-bit registers of 32 bf16 numbers in pairs, whose products are added to 16 floats.
pub(super) struct Pairs512;
/// 256-bit registers of 8 floats.
pub(super) struct Floats256;

impl Arithmetic for Floats512 {
    type Factors = __m512;
    type Sum = __m512;
    const WORDS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(x: *const u32) -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_loadu_ps(x.cast()) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn total(sum: __m512) -> f32 {
        // SAFETY: see the trait.
        unsafe { _mm512_reduce_add_ps(sum) }
    }

    #[inline(always)]
    unsafe fn totals<const V: usize>(sums: [[__m512; 2]; V]) -> [f32; V] {
        // SAFETY: see the trait.
        unsafe { totals512(sums) }
    }
}

impl Arithmetic for Pairs512 {
    type Factors = __m512i;
    type Sum = __m512;
    const WORDS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(x: *const u32) -> __m512i {
        // SAFETY: see the trait.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: see the trait; 512 bits either way, and every bit pattern is a value.
        unsafe {
            let [a, b] = [a, b].map(|x| std::mem::transmute::<__m512i, __m512bh>(x));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }

    #[inline(always)]
    unsafe fn total(sum: __m512) -> f32 {
        // SAFETY: see the trait.
        unsafe { _mm512_reduce_add_ps(sum) }
    }

    #[inline(always)]
    unsafe fn totals<const V: usize>(sums: [[__m512; 2]; V]) -> [f32; V] {
        // SAFETY: see the trait.
        unsafe { totals512(sums) }
    }
}

/// [`Arithmetic::totals`]. Those of eight vectors are added up together: registers are added to each other half by half as
/// `_mm512_reduce_add_ps` adds each of them, in a third of the instructions.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
unsafe fn totals512<const V: usize>(sums: [[__m512; 2]; V]) -> [f32; V] {
    let mut totals = [0.; V];
    // SAFETY: the caller has AVX-512.
    unsafe {
        if V != 8 {
            for (total, [even, odd]) in totals.iter_mut().zip(sums) {
                *total = _mm512_reduce_add_ps(even) + _mm512_reduce_add_ps(odd);
            }
            return totals;
        }
        let none = _mm512_setzero_ps();
        // The halves of each register: its even sums in the lower half, its odd ones in the upper.
        let mut halves = [none; 8];
        for (half, [even, odd]) in halves.iter_mut().zip(sums) {
            let lower = _mm512_shuffle_f32x4::<0x44>(even, odd);
            let upper = _mm512_shuffle_f32x4::<0xee>(even, odd);
            *half = _mm512_add_ps(lower, upper);
        }
        // Quarters: those of the even and odd sums of two vectors.
        let mut quarters = [none; 4];
        for (i, quarter) in quarters.iter_mut().enumerate() {
            let [a, b] = [halves[2 * i], halves[2 * i + 1]];
            let lower = _mm512_shuffle_f32x4::<0x88>(a, b);
            let upper = _mm512_shuffle_f32x4::<0xdd>(a, b);
            *quarter = _mm512_add_ps(lower, upper);
        }
        let mut eighths = [none; 2];
        for (i, eighth) in eighths.iter_mut().enumerate() {
            let [a, b] = [quarters[2 * i], quarters[2 * i + 1]].map(|x| _mm512_castps_pd(x));
            let lower = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            let upper = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            *eighth = _mm512_add_ps(lower, upper);
        }
        let [a, b] = eighths;
        let lower = _mm512_shuffle_ps::<0x88>(a, b);
        let upper = _mm512_shuffle_ps::<0xdd>(a, b);
        // By quarters: the even sums of vectors 0, 2, 4 and 6, their odd ones, and the same of vectors 1, 3, 5 and 7.
        let all = _mm512_add_ps(lower, upper);
        let other = _mm512_shuffle_f32x4::<0xb1>(all, all);
        let mut lanes = [0f32; 16];
        _mm512_storeu_ps(lanes.as_mut_ptr(), _mm512_add_ps(all, other));
        for (v, total) in totals.iter_mut().enumerate() {
            *total = lanes[v % 2 * 8 + v / 2];
        }
    }
    totals
}

impl Arithmetic for Floats256 {
    type Factors = __m256;
    type Sum = __m256;
    const WORDS: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: see the trait.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(x: *const u32) -> __m256 {
        // SAFETY: see the trait.
        unsafe { _mm256_loadu_ps(x.cast()) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the trait.
        unsafe { _mm256_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        let mut lanes = [0f32; 8];
        // SAFETY: see the trait; eight floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        let [a, b, c, d, e, f, g, h] = lanes;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// Rows of a weight, read for an arithmetic.
///
/// # Safety of its functions
/// The processor has the instructions, and the row and the block are there.
pub(super) trait Weight<A: Arithmetic>: Copy {
    /// The address of 64 stored weights, and the values that their conversion needs.
    type Block: Copy;
    /// A buffer for the incomplete last block of a row.
    type Room: Copy + Default;
    /// The number of pairs of registers that hold 64 weights.
    const PAIRS: usize;
    /// Whether it takes more than loading, shifting and masking to make numbers of stored weights.
    const IS_CONVERTED: bool;
    unsafe fn block(self, row: usize, block: usize) -> Self::Block;
    /// The weights of a row after its last whole block, copied to `room` and followed by zeros.
    unsafe fn rest(self, row: usize, room: &mut Self::Room) -> Self::Block;
    unsafe fn pair(block: &Self::Block, pair: usize) -> [A::Factors; 2];
    /// Asks for the weights a little behind a block, which will be needed soon.
    fn prefetch(block: &Self::Block);
}

/// How many blocks ahead of the one in use a weight is asked for.
const AHEAD: usize = 64;

/// Asks for the cache lines of a block of `BYTES` bytes that lies [`AHEAD`] of an address, so that they come as far as the second cache:
/// the first one has too few places for lines that are on their way. What does not exist there is not asked for.
#[inline(always)]
fn prefetch<const BYTES: usize>(from: *const u8) {
    for line in 0..BYTES.div_ceil(64) {
        let address = from.wrapping_add(AHEAD * BYTES + line * 64);
        // SAFETY: every address may be asked for, and every x86-64 processor has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
}

/// A weight that is not quantised: the address of its first value, and its depth.
pub(super) struct Dense<T>(pub(super) *const T, pub(super) usize);

impl<T> Copy for Dense<T> {}
impl<T> Clone for Dense<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Copy> Dense<T> {
    #[inline(always)]
    unsafe fn at(self, row: usize, block: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(row * self.1 + block * BLOCK) }
    }

    #[inline(always)]
    unsafe fn copy_rest(self, row: usize, room: &mut [T; BLOCK]) -> *const T {
        let whole = self.1 / BLOCK;
        // SAFETY: the caller's promise; fewer than a block are left of the row.
        unsafe {
            let from = self.at(row, whole);
            from.copy_to_nonoverlapping(room.as_mut_ptr(), self.1 - whole * BLOCK);
        }
        room.as_ptr()
    }
}

/// A buffer for a block's values; arrays of 64 elements have no `Default`.
#[derive(Clone, Copy)]
pub(super) struct Room<T>([T; BLOCK]);

impl<T: Copy + Default> Default for Room<T> {
    fn default() -> Self {
        Self([T::default(); BLOCK])
    }
}

macro_rules! dense {
    ($stored:ty, $arithmetic:ty, $pairs:literal, |$from:ident| $pair:expr) => {
        impl Weight<$arithmetic> for Dense<$stored> {
            type Block = *const $stored;
            type Room = Room<$stored>;
            const PAIRS: usize = $pairs;
            const IS_CONVERTED: bool = false;

            #[inline(always)]
            unsafe fn block(self, row: usize, block: usize) -> *const $stored {
                // SAFETY: see the trait.
                unsafe { self.at(row, block) }
            }

            #[inline(always)]
            fn prefetch(block: &*const $stored) {
                prefetch::<{ BLOCK * size_of::<$stored>() }>(block.cast());
            }

            #[inline(always)]
            unsafe fn rest(self, row: usize, room: &mut Self::Room) -> *const $stored {
                // SAFETY: see the trait.
                unsafe { self.copy_rest(row, &mut room.0) }
            }

            #[inline(always)]
            unsafe fn pair(
                block: &*const $stored,
                pair: usize,
            ) -> [<$arithmetic as Arithmetic>::Factors; 2] {
                // SAFETY: a part of the block; see the trait.
                unsafe {
                    let $from = block.add(pair * (BLOCK / $pairs));
                    $pair
                }
            }
        }
    };
}

dense!(f32, Floats512, 2, |from| [
    _mm512_loadu_ps(from),
    _mm512_loadu_ps(from.add(16))
]);
dense!(bf16, Floats512, 2, |from| {
    let both = _mm512_loadu_si512(from.cast());
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
        _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x1_0000))),
    ]
});
dense!(bf16, Pairs512, 1, |from| [
    _mm512_loadu_si512(from.cast()),
    _mm512_loadu_si512(from.add(32).cast())
]);
dense!(f32, Floats256, 4, |from| [
    _mm256_loadu_ps(from),
    _mm256_loadu_ps(from.add(8))
]);
dense!(bf16, Floats256, 4, |from| {
    let both = _mm256_loadu_si256(from.cast());
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)),
        _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x1_0000))),
    ]
});

pub(super) const F32: u8 = 0;
pub(super) const BF16: u8 = 1;
pub(super) const F16: u8 = 2;

/// A weight in NF4 whose rows are whole blocks, rounded to `ROUNDING`.
#[derive(Clone, Copy)]
pub(super) struct Codes<const ROUNDING: u8> {
    packed: *const u8,
    absmax: *const f32,
    code: *const f32,
    /// Blocks of a row.
    blocks: usize,
}

impl<const ROUNDING: u8> Codes<ROUNDING> {
    pub(super) fn new(nf4: Nf4<'_>, depth: usize) -> Self {
        Self {
            packed: nf4.packed.as_ptr(),
            absmax: nf4.absmax.as_ptr(),
            code: nf4.code.as_ptr(),
            blocks: depth / BLOCK,
        }
    }

    /// A block's codes, two a byte, and its largest magnitude.
    #[inline(always)]
    unsafe fn at(self, row: usize, block: usize) -> (*const u8, f32) {
        let index = row * self.blocks + block;
        // SAFETY: the caller's promise.
        unsafe {
            (
                self.packed.add(index * (BLOCK / 2)),
                *self.absmax.add(index),
            )
        }
    }

    /// The block's 16 numbers, rounded.
    #[inline(always)]
    unsafe fn numbers512(self, absmax: f32) -> __m512 {
        // SAFETY: 16 floats; the caller has AVX-512.
        unsafe {
            let numbers = _mm512_mul_ps(_mm512_loadu_ps(self.code), _mm512_set1_ps(absmax));
            match ROUNDING {
                BF16 => {
                    // Rounds to the nearest bf16, ties to even.
                    let bits = _mm512_castps_si512(numbers);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                    let rounded = _mm512_add_epi32(bits, up);
                    let upper = _mm512_set1_epi32(-0x1_0000);
                    _mm512_castsi512_ps(_mm512_and_si512(rounded, upper))
                }
                F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<0>(numbers)),
                _ => numbers,
            }
        }
    }

    /// Eight of the block's 16 numbers, rounded.
    #[inline(always)]
    unsafe fn numbers256(self, first: usize, absmax: f32) -> __m256 {
        // SAFETY: eight of 16 floats; the caller has AVX2.
        unsafe {
            let code = _mm256_loadu_ps(self.code.add(first));
            let numbers = _mm256_mul_ps(code, _mm256_set1_ps(absmax));
            if ROUNDING != BF16 {
                return numbers;
            }
            let bits = _mm256_castps_si256(numbers);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(-0x1_0000)))
        }
    }
}

impl<const ROUNDING: u8> Weight<Floats512> for Codes<ROUNDING> {
    type Block = (*const u8, __m512);
    type Room = ();
    const PAIRS: usize = 2;
    const IS_CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn block(self, row: usize, block: usize) -> Self::Block {
        // SAFETY: see the trait.
        unsafe {
            let (codes, absmax) = self.at(row, block);
            (codes, self.numbers512(absmax))
        }
    }

    #[inline(always)]
    unsafe fn rest(self, row: usize, (): &mut ()) -> Self::Block {
        // SAFETY: see the trait; rows are whole blocks, so that this is never called.
        unsafe { Weight::<Floats512>::block(self, row, 0) }
    }

    #[inline(always)]
    fn prefetch((codes, _): &Self::Block) {
        prefetch::<{ BLOCK / 2 }>(*codes);
    }

    #[inline(always)]
    unsafe fn pair((codes, numbers): &Self::Block, pair: usize) -> [__m512; 2] {
        // SAFETY: 16 of the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(16 * pair).cast()));
            // The permutation uses only the lowest four bits of each word.
            [
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(both), *numbers),
                _mm512_permutexvar_ps(both, *numbers),
            ]
        }
    }
}

impl Weight<Pairs512> for Codes<BF16> {
    type Block = (*const u8, __m512i);
    type Room = ();
    const PAIRS: usize = 1;
    const IS_CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn block(self, row: usize, block: usize) -> Self::Block {
        // SAFETY: see the trait; 256 bits either way, and every bit pattern is a value.
        unsafe {
            let (codes, absmax) = self.at(row, block);
            let numbers = _mm512_mul_ps(_mm512_loadu_ps(self.code), _mm512_set1_ps(absmax));
            let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(numbers));
            // The 16 numbers are there twice, so that the fifth bit of an index makes no difference.
            (codes, _mm512_broadcast_i64x4(rounded))
        }
    }

    #[inline(always)]
    unsafe fn rest(self, row: usize, (): &mut ()) -> Self::Block {
        // SAFETY: see the trait; rows are whole blocks, so that this is never called.
        unsafe { Weight::<Pairs512>::block(self, row, 0) }
    }

    #[inline(always)]
    fn prefetch((codes, _): &Self::Block) {
        prefetch::<{ BLOCK / 2 }>(*codes);
    }

    #[inline(always)]
    unsafe fn pair((codes, numbers): &Self::Block, _: usize) -> [__m512i; 2] {
        // SAFETY: the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast()));
            // The permutation uses only the lowest five bits of each word.
            [
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(both), *numbers),
                _mm512_permutexvar_epi16(both, *numbers),
            ]
        }
    }
}

impl<const ROUNDING: u8> Weight<Floats256> for Codes<ROUNDING> {
    type Block = (*const u8, [__m256; 2]);
    type Room = ();
    const PAIRS: usize = 4;
    const IS_CONVERTED: bool = true;

    #[inline(always)]
    unsafe fn block(self, row: usize, block: usize) -> Self::Block {
        // SAFETY: see the trait.
        unsafe {
            let (codes, absmax) = self.at(row, block);
            let numbers = [self.numbers256(0, absmax), self.numbers256(8, absmax)];
            (codes, numbers)
        }
    }

    #[inline(always)]
    unsafe fn rest(self, row: usize, (): &mut ()) -> Self::Block {
        // SAFETY: see the trait; rows are whole blocks, so that this is never called.
        unsafe { Weight::<Floats256>::block(self, row, 0) }
    }

    #[inline(always)]
    fn prefetch((codes, _): &Self::Block) {
        prefetch::<{ BLOCK / 2 }>(*codes);
    }

    #[inline(always)]
    unsafe fn pair((codes, numbers): &Self::Block, pair: usize) -> [__m256; 2] {
        // SAFETY: eight of the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.add(8 * pair).cast()));
            // The lowest three bits choose one of eight numbers; the fourth, as a sign, chooses between the two registers.
            let number = |code: __m256i, sign: __m256i| {
                _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(numbers[0], code),
                    _mm256_permutevar8x32_ps(numbers[1], code),
                    _mm256_castsi256_ps(sign),
                )
            };
            [
                number(_mm256_srli_epi32::<4>(both), _mm256_slli_epi32::<24>(both)),
                number(both, _mm256_slli_epi32::<28>(both)),
            ]
        }
    }
}
