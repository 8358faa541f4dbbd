//! Frozen and trained weights as they lie in memory, and how blocks of them are made ready for a product.
//!
//! A product reads a weight once for all tokens of a batch. So each block of it is converted, dequantised, turned around and
//! put in order for the innermost loop in one go, into a buffer that stays in the cache; no second copy is ever kept.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use crate::dispatch::{Loop, run};
use crate::micro::TILE;
use crate::panels::bf16_bits;

/// Values of an NF4 weight that share a largest magnitude.
pub const NF4_BLOCK: usize = 64;

/// A weight (rows, columns), row by row.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// bitsandbytes' NF4.
    Nf4(Nf4<'a>),
}

/// A weight in NF4: `code[nibble] * absmax[place / 64]`, rounded.
#[derive(Debug, Clone, Copy)]
pub struct Nf4<'a> {
    /// Two codes a byte, the first in the high half.
    pub packed: &'a [u8],
    /// The largest magnitude of each block.
    pub absmax: &'a [f32],
    /// The 16 values.
    pub code: &'a [f32; 16],
    /// What the values are rounded to.
    pub rounding: Rounding,
}

/// To what a dequantised value is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Not at all.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
}

impl Rounding {
    fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            Self::F16 => f16::from_f32(x).to_f32(),
        }
    }
}

/// A weight (rows, columns), or that turned around.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: Values<'a>,
    rows: usize,
    columns: usize,
    turned: bool,
}

impl<'a> Matrix<'a> {
    /// A weight of `rows` by `columns`; `None` if there are not that many values.
    pub fn new(values: Values<'a>, rows: usize, columns: usize) -> Option<Self> {
        let count = rows.checked_mul(columns)?;
        let fits = match values {
            Values::F32(values) => values.len() == count,
            Values::Bf16(values) => values.len() == count,
            Values::Nf4(nf4) => {
                nf4.packed.len() == count.div_ceil(2)
                    && nf4.absmax.len() == count.div_ceil(NF4_BLOCK)
            }
        };
        fits.then_some(Self {
            values,
            rows,
            columns,
            turned: false,
        })
    }

    /// A weight in f32.
    pub fn f32(values: &'a [f32], rows: usize, columns: usize) -> Option<Self> {
        Self::new(Values::F32(values), rows, columns)
    }

    /// The transpose, which costs nothing.
    #[must_use]
    pub fn turned(self) -> Self {
        Self {
            turned: !self.turned,
            ..self
        }
    }

    /// Rows of the product: features that come out.
    pub fn height(&self) -> usize {
        if self.turned { self.columns } else { self.rows }
    }

    /// The length of its sums: features that go in.
    pub fn depth(&self) -> usize {
        if self.turned { self.rows } else { self.columns }
    }

    /// Whether it is turned around.
    pub(crate) fn is_turned(&self) -> bool {
        self.turned
    }

    /// Its values as they are stored.
    pub(crate) fn values(&self) -> Values<'a> {
        self.values
    }

    /// Whether its values are bf16 as they are.
    pub(crate) fn is_bf16(&self) -> bool {
        matches!(self.values, Values::Bf16(_))
    }

    /// The values `span` of one stored row.
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
        match self.values {
            Values::F32(values) => &values[start..start + span.len()],
            Values::Bf16(values) => {
                buffer.clear();
                buffer.extend(
                    values[start..start + span.len()]
                        .iter()
                        .map(|x| f32::from_bits(u32::from(x.to_bits()) << 16)),
                );
                buffer
            }
            Values::Nf4(nf4) => {
                buffer.resize(span.len(), 0.);
                nf4.values(start, buffer);
                buffer
            }
        }
    }

    /// The same as bits of bf16, rounded where they were not.
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
            return Cow::Borrowed(reinterpret(&values[start..start + span.len()]));
        }
        let values = self.row(row, span, buffer);
        bits.clear();
        bits.extend(values.iter().map(|x| bf16_bits(*x) as u16));
        Cow::Borrowed(bits)
    }

    /// Puts the block `rows` by `depths` of the product's weight in order: `[rows / TILE][depth][TILE]`, zeros behind the
    /// last row.
    pub(crate) fn pack(&self, rows: Range<usize>, depths: Range<usize>, out: &mut Vec<f32>) {
        let depth = depths.len();
        sized(out, rows.len(), depth);
        let mut buffer = Vec::new();
        if self.turned {
            for (k, row) in depths.enumerate() {
                let values = self.row(row, rows.clone(), &mut buffer);
                let (whole, rest) = values.as_chunks::<TILE>();
                let mut place = k * TILE;
                for values in whole {
                    out[place..place + TILE].copy_from_slice(values);
                    place += depth * TILE;
                }
                if !rest.is_empty() {
                    out[place..place + rest.len()].copy_from_slice(rest);
                }
            }
        } else if let Values::F32(values) = self.values {
            let columns = self.columns;
            let tiles = out.chunks_exact_mut((depth * TILE).max(1));
            for (first, tile) in rows.clone().step_by(TILE).zip(tiles) {
                let count = (rows.end - first).min(TILE);
                run(Turn {
                    values: &values[first * columns + depths.start..],
                    stride: columns,
                    count,
                    tile,
                });
            }
        } else {
            for (i, row) in rows.enumerate() {
                let values = self.row(row, depths.clone(), &mut buffer);
                let tile = &mut out[i / TILE * depth * TILE..][..depth * TILE];
                let places = tile[i % TILE..].iter_mut().step_by(TILE);
                for (out, value) in places.zip(values) {
                    *out = *value;
                }
            }
        }
    }

    /// The same in pairs of bf16: `[rows / TILE][depth / 2][TILE]`. `depths` starts at an even number.
    pub(crate) fn pack_pairs(&self, rows: Range<usize>, depths: Range<usize>, out: &mut Vec<u32>) {
        let depth = depths.len().div_ceil(2);
        sized(out, rows.len(), depth);
        let (mut buffer, mut bits) = (Vec::new(), Vec::new());
        let (mut second_buffer, mut second_bits) = (Vec::new(), Vec::new());
        if self.turned {
            for k in 0..depth {
                let row = depths.start + 2 * k;
                let first = self.row_bf16(row, rows.clone(), &mut buffer, &mut bits);
                let second = if row + 1 < depths.end {
                    self.row_bf16(row + 1, rows.clone(), &mut second_buffer, &mut second_bits)
                } else {
                    Cow::Owned(vec![0; first.len()])
                };
                let chunks = first.chunks(TILE).zip(second.chunks(TILE)).enumerate();
                for (tile, (first, second)) in chunks {
                    let place = (tile * depth + k) * TILE;
                    let out = out[place..place + first.len()].iter_mut();
                    for (out, (first, second)) in out.zip(first.iter().zip(second)) {
                        *out = u32::from(*first) | (u32::from(*second) << 16);
                    }
                }
            }
        } else {
            for (i, row) in rows.enumerate() {
                let values = self.row_bf16(row, depths.clone(), &mut buffer, &mut bits);
                let tile = &mut out[i / TILE * depth * TILE..][..depth * TILE];
                let places = tile[i % TILE..].iter_mut().step_by(TILE);
                for (out, pair) in places.zip(values.chunks(2)) {
                    let second = pair.get(1).copied().unwrap_or(0);
                    *out = u32::from(pair[0]) | (u32::from(second) << 16);
                }
            }
        }
    }
}

/// Turns `count` rows, `stride` values apart, into a tile: 16 columns at a time, which stay in the registers' reach.
struct Turn<'a> {
    values: &'a [f32],
    stride: usize,
    count: usize,
    tile: &'a mut [f32],
}

impl Loop for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        const BLOCK: usize = 16;
        let row = |i: usize| &self.values[i.min(self.count - 1) * self.stride..];
        let rows: [&[f32]; TILE] = std::array::from_fn(row);
        let (columns, _) = self.tile.as_chunks_mut::<TILE>();
        for (block, columns) in columns.chunks_mut(BLOCK).enumerate() {
            let first = block * BLOCK;
            let mut part = [[0f32; BLOCK]; TILE];
            for (part, row) in part.iter_mut().zip(rows).take(self.count) {
                if let Some(whole) = row.get(first..).and_then(|row| row.first_chunk::<BLOCK>()) {
                    *part = *whole;
                } else {
                    for (part, value) in part.iter_mut().zip(&row[first..]) {
                        *part = *value;
                    }
                }
            }
            for (k, column) in columns.iter_mut().enumerate() {
                for i in 0..TILE {
                    column[i] = part[i][k];
                }
            }
        }
    }
}

/// Makes a buffer as large as a block of so many rows, with zeros in the tile that the rows may not fill.
fn sized<T: Copy + Default>(out: &mut Vec<T>, rows: usize, depth: usize) {
    let size = rows.div_ceil(TILE) * depth * TILE;
    out.resize(size, T::default());
    if !rows.is_multiple_of(TILE) {
        out[size - depth * TILE..].fill(T::default());
    }
}

fn reinterpret(values: &[bf16]) -> &[u16] {
    use half::slice::HalfFloatSliceExt as _;
    values.reinterpret_cast()
}

impl Nf4<'_> {
    /// The values from the place `first` on.
    fn values(&self, mut first: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let count = (NF4_BLOCK - first % NF4_BLOCK).min(out.len());
            let (now, rest) = out.split_at_mut(count);
            let absmax = self.absmax[first / NF4_BLOCK];
            // Each of the block's values is one of these 16, so they are rounded once.
            let values = self.code.map(|code| self.rounding.round(code * absmax));
            let packed = &self.packed[first / 2..(first + count).div_ceil(2)];
            if first.is_multiple_of(2) {
                let (pairs, last) = now.as_chunks_mut::<2>();
                for (out, byte) in pairs.iter_mut().zip(packed) {
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
