//! Rows of weights times a few vectors in AVX-512 and AVX2. A weight's stored values become floats, or pairs of bf16, in registers.
//!
//! Weights are taken 64 at a time, in the order that is cheapest to load: where two of them share a byte or a word, those with even
//! indices come before those with odd ones. The vectors are brought into the same order before ([`lay_out`]).

mod converted;
mod weights;

use std::marker::PhantomData;
use std::ops::Range;

use converted::Converted;
use weights::{Arithmetic, BF16, Codes, Dense, F16, F32, Floats256, Floats512, Pairs512, Weight};

use super::{Outputs, Part};
use crate::FloatType;
use crate::bf16::bf16_bits;
use crate::dispatch::{self, Isa, Loop};
use crate::matrix::{Matrix, NF4_BLOCK, Values};

/// The number of weights that are taken at a time.
const BLOCK: usize = 64;
const _: () = assert!(BLOCK == NF4_BLOCK);

/// The number of vectors from which weights are converted before they are multiplied: for eight that would not pay.
const MANY: usize = 16;

/// The order of a vector's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Floats in their order.
    Plain,
    /// Of each 16 floats, those with even indices before those with odd ones.
    Split8,
    /// Of each 32 floats, those with even indices before those with odd ones.
    Split16,
    /// Pairs of bf16 in their order.
    Pairs,
    /// Pairs of bf16: of each 64 numbers, those with even indices before those with odd ones.
    SplitPairs,
}

impl Layout {
    /// The layout for products with a weight, if this module has a loop for it. `rounded` says whether vectors are exact in bf16.
    pub(super) fn for_weight(weight: &Matrix<'_>, rounded: bool) -> Option<Self> {
        let isa = Isa::current();
        let pairs = rounded && isa >= Isa::Avx512Bf16;
        let split = if isa >= Isa::Avx512 {
            Self::Split16
        } else if isa == Isa::Avx2 {
            Self::Split8
        } else {
            return None;
        };
        match weight.values() {
            Values::F32(_) => Some(Self::Plain),
            Values::Bf16(_) if pairs => Some(Self::Pairs),
            // The plain loop converts a row of half precision at once, with instructions made for it.
            Values::F16(_) => None,
            // There is no loop for rows that begin within a block, nor for half precision in AVX2, which may lack the instructions.
            Values::Nf4(_) if !weight.depth().is_multiple_of(BLOCK) => None,
            Values::Nf4(nf4) if nf4.rounding == FloatType::Bf16 && pairs => Some(Self::SplitPairs),
            Values::Nf4(nf4) if nf4.rounding == FloatType::F16 && isa == Isa::Avx2 => None,
            Values::Bf16(_) | Values::Nf4(_) => Some(split),
        }
    }

    /// The number of words that hold 64 values.
    const fn words(self) -> usize {
        match self {
            Self::Plain | Self::Split8 | Self::Split16 => BLOCK,
            Self::Pairs | Self::SplitPairs => BLOCK / 2,
        }
    }

    /// The number of words of a vector of `depth` values.
    pub(super) const fn stride(self, depth: usize) -> usize {
        depth.div_ceil(BLOCK) * self.words()
    }
}

/// Sixteen words on a cache line of their own: a register that is read across two lines takes twice as long.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u32; 16]);

/// Brings vectors (vectors, depth) into their layout, as words of floats or of pairs of bf16. Each vector is filled up with zeros to a
/// whole number of blocks.
pub(super) fn lay_out(layout: Layout, x: &[f32], depth: usize) -> Vec<Line> {
    let vectors = x.len().checked_div(depth).unwrap_or(0);
    let mut lines = Vec::with_capacity(vectors * layout.stride(depth) / 16);
    dispatch::run(LayOut {
        layout,
        x,
        depth,
        lines: &mut lines,
    });
    lines
}

struct LayOut<'a> {
    layout: Layout,
    x: &'a [f32],
    depth: usize,
    lines: &'a mut Vec<Line>,
}

impl Loop for LayOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for x in self.x.chunks_exact(self.depth) {
            let (blocks, rest) = x.as_chunks::<BLOCK>();
            for block in blocks {
                lay_out_block(self.layout, block, self.lines);
            }
            if !rest.is_empty() {
                let mut block = [0f32; BLOCK];
                block[..rest.len()].copy_from_slice(rest);
                lay_out_block(self.layout, &block, self.lines);
            }
        }
    }
}

#[inline(always)]
fn lay_out_block(layout: Layout, block: &[f32; BLOCK], out: &mut Vec<Line>) {
    let pair = |low: f32, high: f32| bf16_bits(low) | bf16_bits(high) << 16;
    let line = |word: &dyn Fn(usize) -> u32| Line(std::array::from_fn(word));
    for number in 0..layout.words() / 16 {
        let first = number * 16;
        out.push(match layout {
            Layout::Plain => line(&|i| block[first + i].to_bits()),
            Layout::Split8 => line(&|i| block[first + i % 8 * 2 + i / 8].to_bits()),
            // Lines of even indices and of odd ones in turn.
            Layout::Split16 => line(&|i| block[number / 2 * 32 + 2 * i + number % 2].to_bits()),
            Layout::Pairs => line(&|i| pair(block[2 * (first + i)], block[2 * (first + i) + 1])),
            Layout::SplitPairs => line(&|i| pair(block[4 * i + number], block[4 * i + 2 + number])),
        });
    }
}

/// Computes some rows of a product from the words that [`lay_out`] made of its vectors.
pub(super) fn run(part: &Part<'_>, layout: Layout, lines: &[Line]) {
    let depth = part.weight.depth();
    let stride = layout.stride(depth);
    let job = Job {
        depth,
        rows: part.rows.clone(),
        x: lines,
        stride,
        vectors: (lines.len() * 16).checked_div(stride).unwrap_or(0),
        out: part.out,
    };
    assert!(
        job.rows.end <= part.weight.height() && job.vectors <= part.out.vectors,
        "rows and vectors of the product"
    );
    let isa = Isa::current();
    // SAFETY: the weight has `depth` values in each of its rows; `Layout::for_weight` gave the layout, for this instruction set or a
    // better one, which the processor was found to have; and nobody else uses the rows' results.
    unsafe {
        match (part.weight.values(), layout) {
            (Values::F32(values), Layout::Plain) if isa >= Isa::Avx512 => {
                avx512(Dense(values.as_ptr(), depth), &job);
            }
            (Values::F32(values), Layout::Plain) => {
                avx2(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Pairs) => {
                avx512bf16(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Split16) => {
                avx512(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Bf16(values), Layout::Split8) => {
                avx2(Dense(values.as_ptr(), depth), &job);
            }
            (Values::Nf4(nf4), Layout::SplitPairs) => {
                avx512bf16(Codes::<BF16>::new(nf4, depth), &job);
            }
            (Values::Nf4(nf4), Layout::Split16) => match nf4.rounding {
                FloatType::F32 => avx512(Codes::<F32>::new(nf4, depth), &job),
                FloatType::Bf16 => avx512(Codes::<BF16>::new(nf4, depth), &job),
                FloatType::F16 => avx512(Codes::<F16>::new(nf4, depth), &job),
            },
            (Values::Nf4(nf4), Layout::Split8) => match nf4.rounding {
                FloatType::Bf16 => avx2(Codes::<BF16>::new(nf4, depth), &job),
                _ => avx2(Codes::<F32>::new(nf4, depth), &job),
            },
            (values, layout) => unreachable!("{layout:?} for {values:?}"),
        }
    }
}

struct Job<'a> {
    depth: usize,
    rows: Range<usize>,
    x: &'a [Line],
    stride: usize,
    vectors: usize,
    out: Outputs,
}

/// # Safety
/// The processor has AVX-512 with bf16; for the rest see [`all`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
unsafe fn avx512bf16<W: Weight<Pairs512>>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Pairs512, W, 8>(w, job) }
}

/// # Safety
/// The processor has AVX-512; for the rest see [`all`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn avx512<W: Weight<Floats512>>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Floats512, W, 8>(w, job) }
}

/// # Safety
/// The processor has AVX2 with FMA; for the rest see [`all`].
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<W: Weight<Floats256>>(w: W, job: &Job<'_>) {
    // SAFETY: the caller's promise.
    unsafe { all::<Floats256, W, 4>(w, job) }
}

/// Multiplies all rows by all vectors, by `M` (4 or 8) of them at a time as long as there are so many.
///
/// # Safety
/// The processor has the instructions of `A`; `w` has the job's rows and depth; nobody else uses their results.
#[inline(always)]
unsafe fn all<A: Arithmetic, W: Weight<A>, const M: usize>(w: W, job: &Job<'_>) {
    let mut vector = 0;
    if M == 8 && W::IS_CONVERTED && job.vectors >= MANY {
        vector = job.vectors / 8 * 8;
        // SAFETY: the caller's promise, and so many vectors are there.
        unsafe { converted::<A, W>(w, job, vector) };
    }
    while vector < job.vectors {
        // SAFETY: the caller's promise, and so many vectors are left.
        unsafe {
            vector += match job.vectors - vector {
                8.. if M == 8 => through::<A, W, 8>(w, job, vector),
                4.. => through::<A, W, 4>(w, job, vector),
                2.. => through::<A, W, 2>(w, job, vector),
                _ => through::<A, W, 1>(w, job, vector),
            };
        }
    }
}

/// Multiplies all rows by `V` vectors from `first` on, one row after the other, because one sequential read of memory is twice as
/// fast as several in parallel. Returns `V`.
///
/// Eight vectors take two neighbouring rows at a time where that costs no second conversion of the weights: four of them, and then the
/// other four, while the rows are in the first cache. So a value of a vector is loaded once for two rows, which else takes as long as
/// multiplying.
///
/// # Safety
/// See [`all`]; so many vectors are there.
#[inline(always)]
unsafe fn through<A: Arithmetic, W: Weight<A>, const V: usize>(
    w: W,
    job: &Job<'_>,
    first: usize,
) -> usize {
    let mut rows = job.rows.clone();
    if V == 8 && !W::IS_CONVERTED {
        while rows.len() >= 2 {
            // SAFETY: the caller's promise, and two rows are left.
            unsafe {
                two_rows::<A, W, true>(w, job, rows.start, first);
                two_rows::<A, W, false>(w, job, rows.start, first + 4);
            }
            rows.start += 2;
        }
    }
    for row in rows {
        // SAFETY: the caller's promise.
        unsafe { sums::<A, W, V>(w, job, row, first) };
    }
    V
}

/// Multiplies a row and the next one by four vectors, in the order of [`sums`]. `AHEAD` says whether weights are asked for.
///
/// # Safety
/// See [`all`]; four vectors and two rows are there.
#[inline(always)]
unsafe fn two_rows<A: Arithmetic, W: Weight<A>, const AHEAD: bool>(
    w: W,
    job: &Job<'_>,
    row: usize,
    first: usize,
) {
    let words = 2 * W::PAIRS * A::WORDS;
    let whole = job.depth / BLOCK;
    // SAFETY: as in `sums`.
    unsafe {
        let mut x = job.x.as_ptr().cast::<u32>().add(first * job.stride);
        // Those of the first row, and then those of the second.
        let mut sums = [[A::zero(); 2]; 8];
        for block in 0..whole {
            let blocks = [w.block(row, block), w.block(row + 1, block)];
            if AHEAD {
                W::prefetch(&blocks[0]);
                W::prefetch(&blocks[1]);
            }
            step_of_two::<A, W>(&mut sums, &blocks, x, job.stride);
            x = x.add(words);
        }
        if !job.depth.is_multiple_of(BLOCK) {
            let mut rooms = [W::Room::default(); 2];
            let [room, other] = &mut rooms;
            let blocks = [w.rest(row, room), w.rest(row + 1, other)];
            step_of_two::<A, W>(&mut sums, &blocks, x, job.stride);
        }
        for (number, total) in A::totals(sums).into_iter().enumerate() {
            job.out.put(first + number % 4, row + number / 4, total);
        }
    }
}

/// [`step`] for a block of each of two rows.
///
/// # Safety
/// See [`step`]; four vectors are there.
#[inline(always)]
unsafe fn step_of_two<A: Arithmetic, W: Weight<A>>(
    sums: &mut [[A::Sum; 2]; 8],
    blocks: &[W::Block; 2],
    x: *const u32,
    stride: usize,
) {
    for pair in 0..W::PAIRS {
        // SAFETY: the caller's promise.
        unsafe {
            let weights = [W::pair(&blocks[0], pair), W::pair(&blocks[1], pair)];
            let index = 2 * pair * A::WORDS;
            for v in 0..4 {
                let x = x.add(v * stride + index);
                let x = [A::load(x), A::load(x.add(A::WORDS))];
                for (row, [even, odd]) in weights.into_iter().enumerate() {
                    let sums = &mut sums[4 * row + v];
                    sums[0] = A::add(sums[0], even, x[0]);
                    sums[1] = A::add(sums[1], odd, x[1]);
                }
            }
        }
    }
}

/// Multiplies all rows by the first `vectors` vectors, a multiple of eight: two rows are converted, into the first cache, and then multiplied
/// by four vectors at a time.
///
/// # Safety
/// See [`all`]; so many vectors are there.
#[inline(always)]
unsafe fn converted<A: Arithmetic, W: Weight<A>>(w: W, job: &Job<'_>, vectors: usize) {
    let blocks = job.depth / BLOCK;
    let mut room: Vec<[A::Factors; 2]> = Vec::with_capacity(2 * blocks * W::PAIRS);
    let values = room.as_mut_ptr();
    let mut rows = job.rows.clone();
    while rows.len() >= 2 {
        for index in 0..2 * blocks {
            // SAFETY: the caller's promise; there is room for the pairs of both rows' blocks.
            unsafe {
                let block = w.block(rows.start + index / blocks, index % blocks);
                W::prefetch(&block);
                for pair in 0..W::PAIRS {
                    let to = values.add(index * W::PAIRS + pair);
                    to.write(W::pair(&block, pair));
                }
            }
        }
        let two = Converted::<A, W> {
            values,
            first: rows.start,
            blocks,
            of: PhantomData,
        };
        for vector in (0..vectors).step_by(4) {
            // SAFETY: the caller's promise; `two` has these rows, and a weight that is converted has no incomplete blocks.
            unsafe { two_rows::<A, _, false>(two, job, rows.start, vector) };
        }
        rows.start += 2;
    }
    for row in rows {
        for vector in (0..vectors).step_by(8) {
            // SAFETY: the caller's promise.
            unsafe { sums::<A, W, 8>(w, job, row, vector) };
        }
    }
}

/// Multiplies a row by `V` vectors. The order of each sum does not depend on `V`.
///
/// # Safety
/// See [`all`]; so many vectors are there.
#[inline(always)]
unsafe fn sums<A: Arithmetic, W: Weight<A>, const V: usize>(
    w: W,
    job: &Job<'_>,
    row: usize,
    first: usize,
) {
    let words = 2 * W::PAIRS * A::WORDS;
    let whole = job.depth / BLOCK;
    // SAFETY: each vector has `stride` words, a whole number of blocks that covers the depth; rows and results are the caller's promise.
    unsafe {
        let mut x = job.x.as_ptr().cast::<u32>().add(first * job.stride);
        let mut sums = [[A::zero(); 2]; V];
        for block in 0..whole {
            let block = w.block(row, block);
            // With few vectors the processor reads ahead well enough by itself, and better undisturbed.
            if V >= 4 {
                W::prefetch(&block);
            }
            step::<A, W, V>(&mut sums, &block, x, job.stride);
            x = x.add(words);
        }
        if !job.depth.is_multiple_of(BLOCK) {
            let mut room = W::Room::default();
            step::<A, W, V>(&mut sums, &w.rest(row, &mut room), x, job.stride);
        }
        for (v, total) in A::totals(sums).into_iter().enumerate() {
            job.out.put(first + v, row, total);
        }
    }
}

/// Adds the products of a block. The two registers of a pair have sums of their own.
///
/// # Safety
/// See [`all`]; `x` has a block of words at each of `V` strides.
#[inline(always)]
unsafe fn step<A: Arithmetic, W: Weight<A>, const V: usize>(
    sums: &mut [[A::Sum; 2]; V],
    block: &W::Block,
    x: *const u32,
    stride: usize,
) {
    for pair in 0..W::PAIRS {
        // SAFETY: the caller's promise.
        unsafe {
            let [even, odd] = W::pair(block, pair);
            let index = 2 * pair * A::WORDS;
            for (v, sums) in sums.iter_mut().enumerate() {
                let x = x.add(v * stride + index);
                sums[0] = A::add(sums[0], even, A::load(x));
                sums[1] = A::add(sums[1], odd, A::load(x.add(A::WORDS)));
            }
        }
    }
}
