//! Rows of weights times a few vectors in AVX-512 and AVX2: what a weight is stored as becomes floats, or pairs of bf16, in
//! registers.
//!
//! Weights are taken 64 at a time. In which order their registers hold them is left to what makes them cheapest (even ones
//! and odd ones apart, where two share a byte or a word); the vectors are laid out alike before ([`lay`]).

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_prefetch, _mm256_add_epi32, _mm256_and_si256, _mm256_blendv_ps, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mul_ps, _mm256_permutevar8x32_ps, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps, _mm512_add_epi32,
    _mm512_and_si512, _mm512_broadcast_i64x4, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_cvtneps_pbh, _mm512_cvtph_ps,
    _mm512_cvtps_ph, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_permutexvar_ps, _mm512_reduce_add_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi16,
    _mm512_srli_epi32,
};
use std::ops::Range;

use half::bf16;

use super::{Outputs, Part};
use crate::dispatch::{self, Isa, Loop};
use crate::matrix::{Matrix, NF4_BLOCK, Nf4, Rounding, Values};
use crate::panels::bf16_bits;

/// Weights that are taken at a time.
const BLOCK: usize = 64;
const _: () = assert!(BLOCK == NF4_BLOCK);

/// How the values of a vector are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Floats in their order.
    Plain,
    /// Of each 16, the even ones, then the odd ones.
    Split8,
    /// Of each 32, likewise.
    Split16,
    /// Pairs of bf16 in their order.
    Pairs,
    /// Pairs of bf16: of each 64 the even ones, then the odd ones.
    SplitPairs,
}

impl Layout {
    /// That for products of a weight, if there is a loop for it here. `rounded` says whether vectors hold bf16.
    pub(super) fn of(weight: &Matrix<'_>, rounded: bool) -> Option<Self> {
        let isa = Isa::current();
        let pairs = rounded && isa >= Isa::Avx512Bf16;
        let split = match isa {
            Isa::Portable => return None,
            Isa::Avx2 => Self::Split8,
            _ => Self::Split16,
        };
        match weight.values() {
            Values::F32(_) => Some(Self::Plain),
            Values::Bf16(_) if pairs => Some(Self::Pairs),
            Values::Bf16(_) => Some(split),
            // A row is widened as a whole, which has instructions of its own.
            Values::F16(_) => None,
            // A row that begins within a block has no loop here, nor has half precision in AVX2, which may lack instructions for it.
            Values::Nf4(_) if !weight.depth().is_multiple_of(BLOCK) => None,
            Values::Nf4(nf4) if nf4.rounding == Rounding::Bf16 && pairs => Some(Self::SplitPairs),
            Values::Nf4(nf4) if nf4.rounding == Rounding::F16 && isa == Isa::Avx2 => None,
            Values::Nf4(_) => Some(split),
        }
    }

    /// Words of 64 values.
    const fn words(self) -> usize {
        match self {
            Self::Plain | Self::Split8 | Self::Split16 => BLOCK,
            Self::Pairs | Self::SplitPairs => BLOCK / 2,
        }
    }

    /// Words of a vector.
    pub(super) const fn stride(self, depth: usize) -> usize {
        depth.div_ceil(BLOCK) * self.words()
    }
}

/// Vectors (vectors, depth) in their layout, zeros behind each to a whole block: floats or pairs of bf16 as words.
pub(super) fn lay(layout: Layout, x: &[f32], depth: usize) -> Vec<u32> {
    let mut words = Vec::new();
    dispatch::run(Lay {
        layout,
        x,
        depth,
        words: &mut words,
    });
    words
}

struct Lay<'a> {
    layout: Layout,
    x: &'a [f32],
    depth: usize,
    words: &'a mut Vec<u32>,
}

impl Loop for Lay<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for x in self.x.chunks_exact(self.depth) {
            let (blocks, rest) = x.as_chunks::<BLOCK>();
            for block in blocks {
                words(self.layout, block, self.words);
            }
            if !rest.is_empty() {
                let mut block = [0f32; BLOCK];
                block[..rest.len()].copy_from_slice(rest);
                words(self.layout, &block, self.words);
            }
        }
    }
}

#[inline(always)]
fn words(layout: Layout, block: &[f32; BLOCK], out: &mut Vec<u32>) {
    let split = |chunk: &[f32]| {
        let even: [f32; 32] = std::array::from_fn(|i| chunk.get(2 * i).copied().unwrap_or(0.));
        let odd: [f32; 32] = std::array::from_fn(|i| chunk.get(2 * i + 1).copied().unwrap_or(0.));
        (even, odd)
    };
    let pair = |low: f32, high: f32| bf16_bits(low) | bf16_bits(high) << 16;
    match layout {
        Layout::Plain => out.extend(block.map(f32::to_bits)),
        Layout::Split8 | Layout::Split16 => {
            let size = if layout == Layout::Split8 { 8 } else { 16 };
            for chunk in block.chunks_exact(2 * size) {
                let (even, odd) = split(chunk);
                out.extend(even[..size].iter().map(|x| x.to_bits()));
                out.extend(odd[..size].iter().map(|x| x.to_bits()));
            }
        }
        Layout::Pairs => out.extend(block.as_chunks::<2>().0.iter().map(|[a, b]| pair(*a, *b))),
        Layout::SplitPairs => {
            let (fours, _) = block.as_chunks::<4>();
            out.extend(fours.iter().map(|[a, _, c, _]| pair(*a, *c)));
            out.extend(fours.iter().map(|[_, b, _, d]| pair(*b, *d)));
        }
    }
}

/// Some rows of a product, with vectors laid out for it by [`lay`].
pub(super) fn run(part: &Part<'_>, layout: Layout, words: &[u32]) {
    let depth = part.weight.depth();
    let stride = layout.stride(depth);
    let job = Job {
        depth,
        rows: part.rows.clone(),
        x: words,
        stride,
        vectors: words.len().checked_div(stride).unwrap_or(0),
        out: part.out,
    };
    assert!(
        job.rows.end <= part.weight.height() && job.vectors <= part.out.vectors,
        "rows and vectors of the product"
    );
    let isa = Isa::current();
    // SAFETY: the weight has `depth` values in each of its rows; `Layout::of` gave the layout, for this instruction set or a
    // better one, which the processor was found to have; and nobody else uses the rows' results.
    unsafe {
        match (part.weight.values(), layout) {
            (Values::F32(values), Layout::Plain) if isa >= Isa::Avx512 => {
                avx512::<_, 4, 2>(Dense(values.as_ptr(), depth), &job);
            }
            (Values::F32(values), Layout::Plain) => {
                avx2::<_, 4, 2>(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Pairs) => {
                avx512bf16::<_, 4, 2>(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Split16) => {
                avx512::<_, 4, 2>(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Split8) => {
                avx2::<_, 4, 2>(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Nf4(nf4), Layout::SplitPairs) => {
                avx512bf16::<_, 4, 2>(Codes::<BF16>::new(nf4, depth), &job);
            }
            (Values::Nf4(nf4), Layout::Split16) => match nf4.rounding {
                Rounding::F32 => avx512::<_, 4, 2>(Codes::<F32>::new(nf4, depth), &job),
                Rounding::Bf16 => avx512::<_, 4, 2>(Codes::<BF16>::new(nf4, depth), &job),
                Rounding::F16 => avx512::<_, 4, 2>(Codes::<F16>::new(nf4, depth), &job),
            },
            (Values::Nf4(nf4), Layout::Split8) => match nf4.rounding {
                Rounding::Bf16 => avx2::<_, 2, 2>(Codes::<BF16>::new(nf4, depth), &job),
                _ => avx2::<_, 2, 2>(Codes::<F32>::new(nf4, depth), &job),
            },
            (values, layout) => unreachable!("{layout:?} for {values:?}"),
        }
    }
}

struct Job<'a> {
    depth: usize,
    rows: Range<usize>,
    x: &'a [u32],
    stride: usize,
    vectors: usize,
    out: Outputs,
}

/// # Safety
/// The processor has AVX-512 with bf16; for the rest see [`all`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
unsafe fn avx512bf16<W: Weight<Pairs512>, const R: usize, const R8: usize>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Pairs512, W, R, R8, 8>(w, job) }
}

/// # Safety
/// The processor has AVX-512; for the rest see [`all`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn avx512<W: Weight<Floats512>, const R: usize, const R8: usize>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Floats512, W, R, R8, 8>(w, job) }
}

/// # Safety
/// The processor has AVX2 with FMA; for the rest see [`all`].
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<W: Weight<Floats256>, const R: usize, const R4: usize>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Floats256, W, R, R4, 4>(w, job) }
}

/// `R` rows at a time with one or two vectors, `RM` with the most vectors `M` at a time (4 or 8) and with four.
///
/// # Safety
/// The processor has the instructions of `A`; `w` has the job's rows and depth; nobody else uses their results.
#[inline(always)]
unsafe fn all<A: Arithmetic, W: Weight<A>, const R: usize, const RM: usize, const M: usize>(
    w: W,
    job: &Job<'_>,
) {
    let mut vector = 0;
    while vector < job.vectors {
        // SAFETY: the caller's promise, and so many vectors are left.
        unsafe {
            vector += match job.vectors - vector {
                8.. if M == 8 => through::<A, W, RM, 8>(w, job, vector),
                4.. => through::<A, W, RM, 4>(w, job, vector),
                2.. => through::<A, W, R, 2>(w, job, vector),
                _ => through::<A, W, R, 1>(w, job, vector),
            };
        }
    }
}

/// All rows with `V` vectors from `first` on. Returns `V`.
///
/// # Safety
/// See [`all`]; so many vectors are there.
#[inline(always)]
unsafe fn through<A: Arithmetic, W: Weight<A>, const R: usize, const V: usize>(
    w: W,
    job: &Job<'_>,
    first: usize,
) -> usize {
    let mut row = job.rows.start;
    // SAFETY: the caller's promise; rows below the end.
    unsafe {
        while row + R <= job.rows.end {
            sums::<A, W, R, V>(w, job, row, first);
            row += R;
        }
        while row < job.rows.end {
            sums::<A, W, 1, V>(w, job, row, first);
            row += 1;
        }
    }
    V
}

/// `R` rows with `V` vectors. The order of each sum depends on neither.
///
/// # Safety
/// See [`all`]; so many rows and vectors are there.
#[inline(always)]
unsafe fn sums<A: Arithmetic, W: Weight<A>, const R: usize, const V: usize>(
    w: W,
    job: &Job<'_>,
    row: usize,
    first: usize,
) {
    let words = 2 * W::PAIRS * A::WORDS;
    let whole = job.depth / BLOCK;
    // SAFETY: each vector has `stride` words, a whole number of blocks that covers the depth; rows and results are the caller's promise.
    unsafe {
        let mut x = job.x.as_ptr().add(first * job.stride);
        let mut sums = [[A::zero(); V]; R];
        for block in 0..whole {
            let mut blocks = [w.block(row, block); R];
            for (r, block_of) in blocks.iter_mut().enumerate().skip(1) {
                *block_of = w.block(row + r, block);
            }
            w.ahead::<R>(row, block);
            step::<A, W, R, V>(&mut sums, &blocks, x, job.stride);
            x = x.add(words);
        }
        if !job.depth.is_multiple_of(BLOCK) {
            let mut rooms = [W::Room::default(); R];
            let mut blocks = [w.rest(row, &mut rooms[0]); R];
            for (r, (block_of, room)) in blocks.iter_mut().zip(&mut rooms).enumerate().skip(1) {
                *block_of = w.rest(row + r, room);
            }
            step::<A, W, R, V>(&mut sums, &blocks, x, job.stride);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                job.out.put(first + v, row + r, A::total(*sum));
            }
        }
    }
}

/// Adds the products of a block.
///
/// # Safety
/// See [`all`]; `x` has a block of words at each of `V` strides.
#[inline(always)]
unsafe fn step<A: Arithmetic, W: Weight<A>, const R: usize, const V: usize>(
    sums: &mut [[A::Sum; V]; R],
    blocks: &[W::Block; R],
    x: *const u32,
    stride: usize,
) {
    for pair in 0..W::PAIRS {
        // SAFETY: the caller's promise.
        unsafe {
            let mut weights = [W::pair(&blocks[0], pair); R];
            for r in 1..R {
                weights[r] = W::pair(&blocks[r], pair);
            }
            let place = 2 * pair * A::WORDS;
            for v in 0..V {
                let x = x.add(v * stride + place);
                let (x0, x1) = (A::load(x), A::load(x.add(A::WORDS)));
                for r in 0..R {
                    let sum = A::add(sums[r][v], weights[r][0], x0);
                    sums[r][v] = A::add(sum, weights[r][1], x1);
                }
            }
        }
    }
}

/// Sums of products in registers.
///
/// # Safety of its functions
/// The processor has the instructions.
trait Arithmetic {
    /// Some factors.
    type Factors: Copy;
    /// Sums side by side.
    type Sum: Copy;
    /// Words of a register.
    const WORDS: usize;
    unsafe fn zero() -> Self::Sum;
    /// Reads `WORDS` words.
    unsafe fn load(x: *const u32) -> Self::Factors;
    unsafe fn add(sum: Self::Sum, a: Self::Factors, b: Self::Factors) -> Self::Sum;
    unsafe fn total(sum: Self::Sum) -> f32;
}

/// 16 floats.
struct Floats512;
/// 32 bf16 in pairs, whose products are added to 16 floats.
struct Pairs512;
/// 8 floats.
struct Floats256;

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
trait Weight<A: Arithmetic>: Copy {
    /// Where 64 weights lie, and what they are made with.
    type Block: Copy;
    /// Room for the last weights of a row.
    type Room: Copy + Default;
    /// Pairs of registers that hold 64 weights.
    const PAIRS: usize;
    unsafe fn block(self, row: usize, block: usize) -> Self::Block;
    /// The weights of a row behind its last whole block, in `room`, zeros behind them.
    unsafe fn rest(self, row: usize, room: &mut Self::Room) -> Self::Block;
    unsafe fn pair(block: &Self::Block, pair: usize) -> [A::Factors; 2];
    /// Fetches the same block of the next `R` rows into the cache, if they are there.
    unsafe fn ahead<const R: usize>(self, row: usize, block: usize);
}

/// A weight as it is: its first value and its depth.
struct Dense<T>(*const T, usize);

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

    #[inline(always)]
    unsafe fn fetch<const R: usize>(self, row: usize, block: usize) {
        for r in 0..R {
            let place = (row + R + r) * self.1 + block * BLOCK;
            let line = self.0.wrapping_add(place).cast::<i8>();
            for line in (0..BLOCK * size_of::<T>())
                .step_by(64)
                .map(|at| line.wrapping_add(at))
            {
                // SAFETY: a prefetch reads nothing, wherever it points.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
            }
        }
    }
}

/// What the numbers of a block are copied to; arrays of 64 have no `Default`.
#[derive(Clone, Copy)]
struct Room<T>([T; BLOCK]);

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

            #[inline(always)]
            unsafe fn block(self, row: usize, block: usize) -> *const $stored {
                // SAFETY: see the trait.
                unsafe { self.at(row, block) }
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

            #[inline(always)]
            unsafe fn ahead<const R: usize>(self, row: usize, block: usize) {
                // SAFETY: only fetches.
                unsafe { self.fetch::<R>(row, block) }
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

const F32: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;

/// A weight in NF4 whose rows are whole blocks, rounded to `ROUNDING`.
#[derive(Clone, Copy)]
struct Codes<const ROUNDING: u8> {
    packed: *const u8,
    absmax: *const f32,
    code: *const f32,
    /// Blocks of a row.
    blocks: usize,
}

impl<const ROUNDING: u8> Codes<ROUNDING> {
    fn new(nf4: Nf4<'_>, depth: usize) -> Self {
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
        let place = row * self.blocks + block;
        // SAFETY: the caller's promise.
        unsafe {
            (
                self.packed.add(place * (BLOCK / 2)),
                *self.absmax.add(place),
            )
        }
    }

    #[inline(always)]
    unsafe fn fetch<const R: usize>(self, row: usize, block: usize) {
        for r in 0..R {
            let place = (row + R + r) * self.blocks + block;
            let codes = self.packed.wrapping_add(place * (BLOCK / 2)).cast();
            // SAFETY: a prefetch reads nothing, wherever it points.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(codes) };
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
                    // To the nearest, halfway to the even one.
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
    unsafe fn pair((codes, numbers): &Self::Block, pair: usize) -> [__m512; 2] {
        // SAFETY: 16 of the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(16 * pair).cast()));
            // Only the lowest four bits of each word count.
            [
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(both), *numbers),
                _mm512_permutexvar_ps(both, *numbers),
            ]
        }
    }

    #[inline(always)]
    unsafe fn ahead<const R: usize>(self, row: usize, block: usize) {
        // SAFETY: only fetches.
        unsafe { self.fetch::<R>(row, block) }
    }
}

impl Weight<Pairs512> for Codes<BF16> {
    type Block = (*const u8, __m512i);
    type Room = ();
    const PAIRS: usize = 1;

    #[inline(always)]
    unsafe fn block(self, row: usize, block: usize) -> Self::Block {
        // SAFETY: see the trait; 256 bits either way, and every bit pattern is a value.
        unsafe {
            let (codes, absmax) = self.at(row, block);
            let numbers = _mm512_mul_ps(_mm512_loadu_ps(self.code), _mm512_set1_ps(absmax));
            let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(numbers));
            // Twice, so that a number's fifth bit does not count.
            (codes, _mm512_broadcast_i64x4(rounded))
        }
    }

    #[inline(always)]
    unsafe fn rest(self, row: usize, (): &mut ()) -> Self::Block {
        // SAFETY: see the trait; rows are whole blocks, so that this is never called.
        unsafe { Weight::<Pairs512>::block(self, row, 0) }
    }

    #[inline(always)]
    unsafe fn pair((codes, numbers): &Self::Block, _: usize) -> [__m512i; 2] {
        // SAFETY: the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast()));
            // Only the lowest five bits of each word count.
            [
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(both), *numbers),
                _mm512_permutexvar_epi16(both, *numbers),
            ]
        }
    }

    #[inline(always)]
    unsafe fn ahead<const R: usize>(self, row: usize, block: usize) {
        // SAFETY: only fetches.
        unsafe { self.fetch::<R>(row, block) }
    }
}

impl<const ROUNDING: u8> Weight<Floats256> for Codes<ROUNDING> {
    type Block = (*const u8, [__m256; 2]);
    type Room = ();
    const PAIRS: usize = 4;

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
    unsafe fn pair((codes, numbers): &Self::Block, pair: usize) -> [__m256; 2] {
        // SAFETY: eight of the block's 32 bytes; see the trait.
        unsafe {
            let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.add(8 * pair).cast()));
            // The lowest three bits choose among eight, the fourth, as a sign, between the two.
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

    #[inline(always)]
    unsafe fn ahead<const R: usize>(self, row: usize, block: usize) {
        // SAFETY: only fetches.
        unsafe { self.fetch::<R>(row, block) }
    }
}
