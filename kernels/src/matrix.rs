//! Weights as they are stored in memory, and how blocks of them are packed for a product.
//!
//! A product reads a weight once for all tokens of a batch. So each block of it is converted, dequantised, transposed and
//! packed for the innermost loop in one pass, into a buffer that stays in the cache; no second copy of the weight is ever kept.

mod transpose;
mod unpack;

use std::borrow::Cow;
use std::ops::Range;

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use crate::FloatType;
use crate::bf16::bf16_bits;
use crate::dispatch::{Loop, run};
use crate::micro::{TILE, prefetch};
use transpose::transpose;

pub use crate::nf4::BLOCK as NF4_BLOCK;

/// The values of a weight (rows, columns), row-major.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Single precision, `rows * columns` values.
    F32(&'a [f32]),
    /// bfloat16, `rows * columns` values.
    Bf16(&'a [bf16]),
    /// Half precision, `rows * columns` values.
    F16(&'a [f16]),
    /// bitsandbytes' NF4.
    Nf4(Nf4<'a>),
}

/// A weight in NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3): value `i` is `code[nibble i] * absmax[i / 64]`, rounded.
#[derive(Debug, Clone, Copy)]
pub struct Nf4<'a> {
    /// Two 4-bit codes a byte, the first one in the high half.
    pub packed: &'a [u8],
    /// The largest magnitude of each block of 64 values.
    pub absmax: &'a [f32],
    /// The value of each code, between -1 and 1.
    pub code: &'a [f32; 16],
    /// The type to which dequantised values are rounded: that of the model's weights before they were quantised.
    pub rounding: FloatType,
}

/// A weight (rows, columns), or its transpose, as the left factor of a product.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: Values<'a>,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    /// A weight (rows, columns); `None` if `values` are not `rows * columns` values.
    pub fn new(values: Values<'a>, rows: usize, columns: usize) -> Option<Self> {
        let count = rows.checked_mul(columns)?;
        let fits = match values {
            Values::F32(values) => values.len() == count,
            Values::Bf16(values) => values.len() == count,
            Values::F16(values) => values.len() == count,
            Values::Nf4(nf4) => {
                nf4.packed.len() == count.div_ceil(2)
                    && nf4.absmax.len() == count.div_ceil(NF4_BLOCK)
            }
        };
        fits.then_some(Self {
            values,
            rows,
            columns,
            transposed: false,
        })
    }

    /// A weight (rows, columns) in f32; `None` if there are not `rows * columns` values.
    pub fn f32(values: &'a [f32], rows: usize, columns: usize) -> Option<Self> {
        Self::new(Values::F32(values), rows, columns)
    }

    /// The transpose; nothing is copied.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    /// The number of rows of the product: the features of its output.
    pub fn height(&self) -> usize {
        if self.transposed {
            self.columns
        } else {
            self.rows
        }
    }

    /// The number of terms of each sum: the features of the product's input.
    pub fn depth(&self) -> usize {
        if self.transposed {
            self.rows
        } else {
            self.columns
        }
    }

    /// Whether it is transposed.
    pub(crate) fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Its values as they are stored.
    pub(crate) fn values(&self) -> Values<'a> {
        self.values
    }

    /// Whether its values are stored in bf16.
    pub(crate) fn is_bf16(&self) -> bool {
        matches!(self.values, Values::Bf16(_))
    }

    /// The values at columns `span` of one stored row, converted into `buffer` where they are not f32.
    pub(crate) fn row<'b>(
        &self,
        row: usize,
        span: Range<usize>,
        buffer: &'b mut Vec<f32>,
    ) -> &'b [f32]
    where
        'a: 'b,
    {
        let start = row * self.columns + span.start;
        if let Values::F32(values) = self.values {
            return &values[start..start + span.len()];
        }
        buffer.resize(span.len(), 0.);
        self.widen(row, span, buffer);
        buffer
    }

    /// The values at columns `span` of one stored row as bits of bf16, rounded where they are stored otherwise.
    fn row_bf16<'b>(
        &self,
        row: usize,
        span: Range<usize>,
        buffer: &'b mut Vec<f32>,
        bits: &'b mut Vec<u16>,
    ) -> Cow<'b, [u16]>
    where
        'a: 'b,
    {
        if let Values::Bf16(values) = self.values {
            let start = row * self.columns + span.start;
            return Cow::Borrowed(values[start..start + span.len()].reinterpret_cast());
        }
        if let Values::Nf4(nf4) = self.values {
            bits.resize(span.len(), 0);
            nf4.bf16_values(row * self.columns + span.start, bits);
            return Cow::Borrowed(bits);
        }
        let values = self.row(row, span, buffer);
        bits.resize(values.len(), 0);
        run(RoundWords(values, bits));
        Cow::Borrowed(bits)
    }

    /// Packs the block of rows `rows` and depths `depths` of the product's weight as `[rows / TILE][depth][TILE]`, with zeros after
    /// the last row.
    pub(crate) fn pack(&self, rows: Range<usize>, depths: Range<usize>, out: &mut Vec<f32>) {
        let depth = depths.len();
        sized(out, rows.len(), depth);
        let mut buffer = Vec::new();
        if self.transposed {
            for (k, row) in depths.clone().enumerate() {
                self.prefetch_row(row + AHEAD, rows.clone(), depths.end);
                let values = self.row(row, rows.clone(), &mut buffer);
                let (whole, rest) = values.as_chunks::<TILE>();
                let mut index = k * TILE;
                for values in whole {
                    out[index..index + TILE].copy_from_slice(values);
                    index += depth * TILE;
                }
                if !rest.is_empty() {
                    out[index..index + rest.len()].copy_from_slice(rest);
                }
            }
            return;
        }
        let mut tile_rows = Vec::new();
        let tiles = out.chunks_exact_mut((depth * TILE).max(1));
        for (first, tile) in rows.clone().step_by(TILE).zip(tiles) {
            let count = (rows.end - first).min(TILE);
            if let Values::F32(values) = self.values {
                let values = &values[first * self.columns + depths.start..];
                transpose(values, self.columns, count, tile);
                continue;
            }
            tile_rows.resize(count * depth, 0.);
            for (i, to) in tile_rows.chunks_exact_mut(depth.max(1)).enumerate() {
                self.widen(first + i, depths.clone(), to);
            }
            transpose(&tile_rows, depth, count, tile);
        }
    }

    /// Prefetches a part of a stored row, if the row is before `end`. Hardware prefetchers don't foresee the step from one row to
    /// the next.
    fn prefetch_row(&self, row: usize, span: Range<usize>, end: usize) {
        if row >= end {
            return;
        }
        let indices = row * self.columns + span.start..row * self.columns + span.end;
        match self.values {
            Values::F32(values) => prefetch(&values[indices]),
            Values::Bf16(values) => prefetch(&values[indices]),
            Values::F16(values) => prefetch(&values[indices]),
            Values::Nf4(nf4) => prefetch(&nf4.packed[indices.start / 2..indices.end / 2]),
        }
    }

    /// Converts the values at columns `span` of one stored row to f32.
    fn widen(&self, row: usize, span: Range<usize>, out: &mut [f32]) {
        let start = row * self.columns + span.start;
        let end = start + span.len();
        match self.values {
            Values::F32(values) => out.copy_from_slice(&values[start..end]),
            Values::Bf16(values) => run(Widen(&values[start..end], out)),
            // This uses the instructions of F16C where the processor has them.
            Values::F16(values) => values[start..end].convert_to_f32_slice(out),
            Values::Nf4(nf4) => nf4.values(start, out),
        }
    }

    /// Like [`Matrix::pack`] with pairs of bf16: `[rows / TILE][depth / 2][TILE]`. `depths` must start at an even number.
    pub(crate) fn pack_pairs(&self, rows: Range<usize>, depths: Range<usize>, out: &mut Vec<u32>) {
        let depth = depths.len().div_ceil(2);
        sized(out, rows.len(), depth);
        let (mut buffer, mut bits) = (Vec::new(), Vec::new());
        let (mut second_buffer, mut second_bits) = (Vec::new(), Vec::new());
        if self.transposed {
            for k in 0..depth {
                let row = depths.start + 2 * k;
                self.prefetch_row(row + AHEAD, rows.clone(), depths.end);
                self.prefetch_row(row + AHEAD + 1, rows.clone(), depths.end);
                let first = self.row_bf16(row, rows.clone(), &mut buffer, &mut bits);
                let second = if row + 1 < depths.end {
                    self.row_bf16(row + 1, rows.clone(), &mut second_buffer, &mut second_bits)
                } else {
                    Cow::Owned(vec![0; first.len()])
                };
                run(PairTiles {
                    first: &first,
                    second: &second,
                    out: &mut out[k * TILE..],
                    stride: depth * TILE,
                });
            }
            return;
        }
        let mut tile_rows = Vec::new();
        let tiles = out.chunks_exact_mut((depth * TILE).max(1));
        for (first, tile) in rows.clone().step_by(TILE).zip(tiles) {
            let count = (rows.end - first).min(TILE);
            tile_rows.resize(count * depth, 0);
            for (i, to) in tile_rows.chunks_exact_mut(depth.max(1)).enumerate() {
                let row = self.row_bf16(first + i, depths.clone(), &mut buffer, &mut bits);
                run(PairUp(&row, to));
            }
            transpose(&tile_rows, depth, count, tile);
        }
    }
}

/// How many stored rows ahead of the one that is read are prefetched.
const AHEAD: usize = 8;

struct Widen<'a>(&'a [bf16], &'a mut [f32]);

impl Loop for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, x) in self.1.iter_mut().zip(self.0) {
            *out = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

/// Joins neighbouring numbers to pairs, the first in the low half; an odd last one is paired with zero.
struct PairUp<'a>(&'a [u16], &'a mut [u32]);

impl Loop for PairUp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (pairs, rest) = self.0.as_chunks::<2>();
        for (out, pair) in self.1.iter_mut().zip(pairs) {
            *out = u32::from(pair[0]) | (u32::from(pair[1]) << 16);
        }
        if let (Some(out), [last]) = (self.1.last_mut(), rest) {
            *out = u32::from(*last);
        }
    }
}

/// Rounds numbers to bits of bf16.
struct RoundWords<'a>(&'a [f32], &'a mut [u16]);

impl Loop for RoundWords<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, x) in self.1.iter_mut().zip(self.0) {
            *out = bf16_bits(*x) as u16;
        }
    }
}

/// Joins two rows to pairs, [`TILE`] of them at every `stride`.
struct PairTiles<'a> {
    first: &'a [u16],
    second: &'a [u16],
    out: &'a mut [u32],
    stride: usize,
}

impl Loop for PairTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let pair = |first: u16, second: u16| u32::from(first) | (u32::from(second) << 16);
        let (first, first_rest) = self.first.as_chunks::<TILE>();
        let (second, second_rest) = self.second.as_chunks::<TILE>();
        for (tile, (first, second)) in first.iter().zip(second).enumerate() {
            let out = &mut self.out[tile * self.stride..][..TILE];
            for i in 0..TILE {
                out[i] = pair(first[i], second[i]);
            }
        }
        let index = first.len() * self.stride;
        for (i, (first, second)) in first_rest.iter().zip(second_rest).enumerate() {
            self.out[index + i] = pair(*first, *second);
        }
    }
}

/// Resizes a buffer to a packed block of `rows` rows and fills the last tile with zeros where the rows don't fill it.
fn sized<T: Copy + Default>(out: &mut Vec<T>, rows: usize, depth: usize) {
    let size = rows.div_ceil(TILE) * depth * TILE;
    out.resize(size, T::default());
    if !rows.is_multiple_of(TILE) {
        out[size - depth * TILE..].fill(T::default());
    }
}
