//! Weights as they are stored on the device, and matrices made of them.

use std::ops::Range;

use cubecl::prelude::*;
use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::{NF4_BLOCK, Nf4, Values};

use crate::buffer::Buffer;
use crate::device::Device;
use crate::error::Error;

/// The form of a weight's values in 32-bit words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    /// Two in a word, the first one in the low half.
    Bf16,
    /// The same.
    F16,
    /// Eight in a word as bitsandbytes has them in bytes, and what the values are rounded to.
    Nf4(FloatType),
}

impl Format {
    /// The number of the format for kernels: 0 f32, 1 bf16, 2 f16, 3 to 5 NF4 rounded to f32, bf16 and f16.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 1,
            Self::F16 => 2,
            Self::Nf4(FloatType::F32) => 3,
            Self::Nf4(FloatType::Bf16) => 4,
            Self::Nf4(FloatType::F16) => 5,
        }
    }

    /// The bits of a value.
    fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::Bf16 | Self::F16 => 16,
            Self::Nf4(_) => 4,
        }
    }
}

/// Rows of a weight in one buffer.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) rows: Range<usize>,
    pub(crate) words: Buffer,
    /// For NF4 the values of the 16 codes, then the largest magnitude of each block.
    pub(crate) scales: Option<Buffer>,
}

/// A weight (rows, columns) on the device, in as many buffers as the adapter's limit asks for.
#[derive(Debug)]
pub struct Weight {
    pub(crate) parts: Vec<Part>,
    pub(crate) format: Format,
    rows: usize,
    columns: usize,
}

impl Weight {
    /// The whole weight as a matrix.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix {
            weight: self,
            rows: 0..self.rows,
            transposed: false,
        }
    }

    /// Some rows of the weight as a matrix.
    ///
    /// # Panics
    /// If it has not so many rows.
    pub fn rows(&self, rows: Range<usize>) -> Matrix<'_> {
        let all = self.rows;
        assert!(
            rows.start <= rows.end && rows.end <= all,
            "rows {rows:?} of a weight of {all}"
        );
        Matrix {
            weight: self,
            rows,
            transposed: false,
        }
    }

    /// The number of buffers that hold it.
    pub fn buffers(&self) -> usize {
        self.parts.len()
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }
}

/// Rows of a weight, or the transpose of such a matrix, as the left factor of a product.
#[derive(Debug, Clone)]
pub struct Matrix<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) rows: Range<usize>,
    pub(crate) transposed: bool,
}

impl Matrix<'_> {
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
            self.weight.columns
        } else {
            self.rows.len()
        }
    }

    /// The number of terms of each sum: the features of the product's input.
    pub fn depth(&self) -> usize {
        if self.transposed {
            self.rows.len()
        } else {
            self.weight.columns
        }
    }
}

impl Device {
    /// Copies a weight (rows, columns) to the device. A weight beyond the adapter's limit is split by rows.
    ///
    /// # Errors
    /// As [`Device::allocate`]; a single row beyond the limit can't be split.
    ///
    /// # Panics
    /// If `values` are not `rows * columns` values.
    pub fn upload_weight(
        &self,
        values: Values<'_>,
        rows: usize,
        columns: usize,
    ) -> Result<Weight, Error> {
        let fits = pipeline_kernels::matrix::Matrix::new(values, rows, columns).is_some();
        assert!(fits, "the values of a weight ({rows}, {columns})");
        let format = match values {
            Values::F32(_) => Format::F32,
            Values::Bf16(_) => Format::Bf16,
            Values::F16(_) => Format::F16,
            Values::Nf4(nf4) => Format::Nf4(nf4.rounding),
        };
        // The words of a part, and its NF4 scales, fit into a buffer each, and parts begin with a block.
        let row_bits = (columns as u64 * format.bits()).max(1);
        let limit = self.weight_part().saturating_mul(8);
        let mut step = usize::try_from(limit / row_bits).unwrap_or(usize::MAX);
        if step < rows {
            step -= step % NF4_BLOCK;
        }
        let step = if step == 0 { NF4_BLOCK } else { step }.min(rows.max(1));
        let mut parts = Vec::new();
        for start in (0..rows).step_by(step) {
            let rows = start..(start + step).min(rows);
            let (words, scales) = self.upload_rows(values, rows.clone(), columns)?;
            parts.push(Part {
                rows,
                words,
                scales,
            });
        }
        Ok(Weight {
            parts,
            format,
            rows,
            columns,
        })
    }

    /// A weight (rows, columns) whose f32 values are those of a buffer, row after row, and whatever is written there.
    ///
    /// # Panics
    /// If the buffer has another number of words.
    pub fn weight_in(values: Buffer, rows: usize, columns: usize) -> Weight {
        let found = values.len();
        assert!(
            rows.checked_mul(columns) == Some(found),
            "{found} values of a weight ({rows}, {columns})"
        );
        Weight {
            parts: vec![Part {
                rows: 0..rows,
                words: values,
                scales: None,
            }],
            format: Format::F32,
            rows,
            columns,
        }
    }

    fn upload_rows(
        &self,
        values: Values<'_>,
        rows: Range<usize>,
        columns: usize,
    ) -> Result<(Buffer, Option<Buffer>), Error> {
        let (start, end) = (rows.start * columns, rows.end * columns);
        Ok(match values {
            Values::F32(values) => (self.upload(&values[start..end])?, None),
            Values::Bf16(values) => {
                let bytes = bytemuck::cast_slice(&values[start..end]);
                (self.upload_bytes(bytes)?, None)
            }
            Values::F16(values) => {
                let bytes = bytemuck::cast_slice(&values[start..end]);
                (self.upload_bytes(bytes)?, None)
            }
            Values::Nf4(Nf4 {
                packed,
                absmax,
                code,
                ..
            }) => {
                let bytes = &packed[start / 2..end.div_ceil(2)];
                let blocks = &absmax[start / NF4_BLOCK..end.div_ceil(NF4_BLOCK)];
                let scales = [&code[..], blocks].concat();
                (self.upload_bytes(bytes)?, Some(self.upload(&scales)?))
            }
        })
    }

    /// Overwrites an f32 weight that is in one buffer.
    ///
    /// # Panics
    /// If the weight is not in f32, is in several buffers, or `values` are not as many as it has.
    pub fn write_weight(&self, weight: &mut Weight, values: &[f32]) {
        assert!(weight.format == Format::F32, "an f32 weight is written");
        assert_eq!(
            values.len(),
            weight.rows * weight.columns,
            "a weight's values"
        );
        for part in &mut weight.parts {
            let range = part.rows.start * weight.columns..part.rows.end * weight.columns;
            self.write(&mut part.words, &values[range]);
        }
    }
}

/// An f32 rounded to bf16, ties to even; NaN stays NaN.
#[cube]
pub(crate) fn round_to_bf16(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    let mut out = f32::reinterpret(rounded);
    if (bits & 0x7fff_ffff) > 0x7f80_0000 {
        out = x;
    }
    out
}

/// An f32 rounded to half precision, ties to even, with its subnormal numbers; beyond its range the largest ones stay what they are.
#[cube]
pub(crate) fn round_to_f16(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    let rounded = (bits + 0xfff + ((bits >> 13) & 1)) & 0xffff_e000;
    let mut out = f32::reinterpret(rounded);
    if (bits & 0x7fff_ffff) < 0x3880_0000 {
        // Below 2^-14: multiples of 2^-24, by whole numbers, because compilers take a large number that is added and subtracted for nothing.
        let units = x.abs() * 16_777_216.0f32;
        let mut whole = u32::cast_from(units);
        let rest = units - f32::cast_from(whole);
        if rest > 0.5f32 || (rest >= 0.5f32 && whole % 2 == 1) {
            whole += 1u32;
        }
        out = f32::cast_from(whole) * 5.960_464_5e-8f32;
        if x < 0.0f32 {
            out = -out;
        }
    }
    out
}

/// The same for a factor of a product: what is beyond the range becomes infinite, as it does where products are in half precision.
#[cube]
pub(crate) fn round_factor_to_f16(x: f32) -> f32 {
    let mut out = round_to_f16(x);
    if x.abs() >= 65520.0f32 {
        let sign = u32::reinterpret(x) & 0x8000_0000;
        out = f32::reinterpret(sign | 0x7f80_0000);
    }
    out
}

/// Half precision's 16 bits as a number.
#[cube]
pub(crate) fn half_value(bits: u32) -> f32 {
    let exponent = (bits >> 10) & 31;
    let fraction = bits & 1023;
    let mut magnitude = f32::reinterpret(((exponent + 112) << 23) | (fraction << 13));
    if exponent == 0 {
        magnitude = f32::cast_from(fraction) * 5.960_464_5e-8f32;
    }
    if exponent == 31 {
        magnitude = f32::reinterpret(0x7f80_0000u32 | (fraction << 13));
    }
    let mut out = magnitude;
    if (bits >> 15) == 1 {
        out = -magnitude;
    }
    out
}

/// Value `index` of a weight's words in the format with this number.
#[cube]
pub(crate) fn weight_value(
    words: &[u32],
    scales: &[f32],
    index: usize,
    #[comptime] format: u32,
) -> f32 {
    if comptime!(format == 0) {
        f32::reinterpret(words[index])
    } else if comptime!(format <= 2) {
        let word = words[index / 2];
        let shift = (index as u32 % 2) * 16;
        let bits = (word >> shift) & 0xffff;
        if comptime!(format == 1) {
            f32::reinterpret(bits << 16)
        } else {
            half_value(bits)
        }
    } else {
        let word = words[index / 8];
        let within = index as u32 % 8;
        // Two values a byte, the first one in the high half.
        let shift = (within / 2) * 8 + (1 - within % 2) * 4;
        let code = (word >> shift) & 15;
        let value = scales[code as usize] * scales[16 + index / NF4_BLOCK];
        if comptime!(format == 4) {
            round_to_bf16(value)
        } else if comptime!(format == 5) {
            round_to_f16(value)
        } else {
            value
        }
    }
}
