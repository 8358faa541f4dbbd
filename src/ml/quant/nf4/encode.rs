//! The quantisation of weights to NF4, with the same bits as bitsandbytes.
//!
//! In double quantisation, bitsandbytes' devices differ from each other, and this module does what is exact. The 8-bit codes of the
//! magnitudes are the *nearest* of the table, as on CUDA; on a CPU, bitsandbytes 0.50 looks them up in a coarse grid, and about one
//! code in 200 is a neighbour of the nearest one. The mean of the magnitudes is rounded once, while the last bit of torch's mean depends
//! on the order of its sum. The tests substitute the CPU's rules for these two, and then reproduce its files byte for byte.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use pipeline_kernels::nf4;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use super::{BLOCK, CODE};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Entry;
use crate::ml::quant::dynamic_map::Table;

/// The number of magnitudes in a block of double quantisation.
pub(crate) const NESTED_BLOCK: usize = 256;
/// The blocks that a thread takes at once.
const SPAN: usize = 256;
/// The blocks that are read at once.
const PIECE: usize = 1 << 15;

/// Computes the largest magnitude of each block of 64 values of a tensor of `size` bytes with values of type `float`.
/// `read(first, out)` reads its bytes from offset `first` on, a few MiB at a time.
///
/// # Errors
/// A value is a NaN or infinite, which has no code, or `read` fails.
pub fn block_absmax(
    float: Float,
    size: usize,
    mut read: impl FnMut(usize, &mut [u8]) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f32>> {
    let value = float.size();
    let mut absmax = vec![0f32; (size / value).div_ceil(BLOCK)];
    let mut bytes = Vec::new();
    let parts = absmax
        .chunks_mut(PIECE)
        .zip((0..size).step_by(PIECE * BLOCK * value));
    for (absmax, first) in parts {
        bytes.resize((PIECE * BLOCK * value).min(size - first), 0);
        read(first, &mut bytes)?;
        if is_alone() {
            nf4::absmax(float.kernel(), &bytes, absmax);
        } else {
            absmax
                .par_chunks_mut(SPAN)
                .zip(bytes.par_chunks(BLOCK * SPAN * value))
                .for_each(|(absmax, bytes)| nf4::absmax(float.kernel(), bytes, absmax));
        }
    }
    if let Some(block) = absmax.iter().position(|x| !x.is_finite()) {
        let first = block * BLOCK;
        bail!(
            "a NaN or infinity is among the values from {first} to {}, and nf4 can't store it",
            first + BLOCK - 1
        );
    }
    Ok(absmax)
}

/// A function for [`block_absmax`] that reads from memory.
pub fn from_memory(bytes: &[u8]) -> impl FnMut(usize, &mut [u8]) -> anyhow::Result<()> {
    |first, out| {
        out.copy_from_slice(&bytes[first..first + out.len()]);
        Ok(())
    }
}

/// Quantises the values in `bytes`, of type `float`, and writes two codes a byte to `packed`. The values must begin with a block. An
/// odd last value is followed by the code of 0.
///
/// # Panics
/// If `bytes` ends within a value, or `packed` has not one byte for every two values.
pub fn pack(float: Float, bytes: &[u8], packed: &mut [u8]) {
    if is_alone() {
        nf4::pack(float.kernel(), bytes, packed);
    } else {
        packed
            .par_chunks_mut(BLOCK / 2 * SPAN)
            .zip(bytes.par_chunks(BLOCK * SPAN * float.size()))
            .for_each(|(packed, bytes)| nf4::pack(float.kernel(), bytes, packed));
    }
}

/// Whether the pool has only one thread. Then waiting for it would take longer than the work on a small tensor.
fn is_alone() -> bool {
    rayon::current_num_threads() == 1
}

/// The largest magnitudes of a weight's blocks, in the form in which they are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Magnitudes {
    /// In f32, one for each block.
    Plain(Vec<f32>),
    /// Quantised to 8 bits after their mean was subtracted (Dettmers et al. 2023, arXiv 2305.14314, section 3, double quantisation).
    Nested {
        /// The 8-bit code of each magnitude.
        codes: Vec<u8>,
        /// The largest magnitude of each block of 256 differences to the mean.
        absmax: Vec<f32>,
        /// The mean of the magnitudes.
        offset: f32,
    },
}

impl Magnitudes {
    /// Quantises the magnitudes, each to the nearest code.
    pub fn nested(absmax: &[f32]) -> Self {
        let table = Table::get(true);
        Self::nested_by(absmax, mean(absmax), |x| table.code(x))
    }

    /// Quantises the magnitudes with the given mean, and a function that chooses the code of a value from -1 to 1.
    pub(in crate::ml) fn nested_by(absmax: &[f32], offset: f32, code: impl Fn(f32) -> u8) -> Self {
        let mut codes = Vec::with_capacity(absmax.len());
        let mut largest = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
        for block in absmax.chunks(NESTED_BLOCK) {
            let above = block.iter().map(|x| x - offset);
            let most = above.clone().fold(0f32, |most, x| most.max(x.abs()));
            let inverse = 1. / most.max(f32::MIN_POSITIVE);
            codes.extend(above.map(|x| code(x * inverse)));
            largest.push(most);
        }
        Self::Nested {
            codes,
            absmax: largest,
            offset,
        }
    }
}

/// The mean, rounded once. torch sums in f32 in an order that depends on the device, so the last bit of its mean may differ.
fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|x| f64::from(*x)).sum();
    (sum / values.len().max(1) as f64) as f32
}

/// One tensor of a quantised weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its name, type and shape.
    pub entry: Entry,
    /// Its bytes; `None` for the packed codes, which [`pack`] computes when they are written.
    pub bytes: Option<Vec<u8>>,
}

/// The tensors in which the weight called `name`, of shape (out, in) and with values of type `float`, is stored once it is quantised.
///
/// # Errors
/// The weight has too many values to be counted.
pub fn parts(
    name: &str,
    float: Float,
    shape: (usize, usize),
    magnitudes: &Magnitudes,
) -> anyhow::Result<Vec<Part>> {
    let (rows, columns) = shape;
    let count = rows
        .checked_mul(columns)
        .context("its shape is too large")?;
    let part = |suffix: &str, dtype: Dtype, bytes: Vec<u8>| {
        let count = bytes.len() * 8 / dtype.bitsize();
        Part {
            entry: Entry::new(format!("{name}{suffix}"), dtype, [count]),
            bytes: Some(bytes),
        }
    };
    let floats = |values: &[f32]| {
        values
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let mut state = format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {BLOCK}, \"dtype\": \"{}\", \"shape\": [{rows}, {columns}]",
        float.name()
    );
    let mut parts = vec![
        Part {
            entry: Entry::new(name, Dtype::U8, [count.div_ceil(2), 1]),
            bytes: None,
        },
        part(".quant_map", Dtype::F32, floats(&CODE)),
    ];
    match magnitudes {
        Magnitudes::Plain(absmax) => parts.push(part(".absmax", Dtype::F32, floats(absmax))),
        Magnitudes::Nested {
            codes,
            absmax,
            offset,
        } => {
            let map = &Table::get(true).values;
            parts.push(part(".absmax", Dtype::U8, codes.clone()));
            parts.push(part(".nested_absmax", Dtype::F32, floats(absmax)));
            parts.push(part(".nested_quant_map", Dtype::F32, floats(map)));
            let offset = python_float(f64::from(*offset));
            // Formatting into a `String` never fails.
            let _ = write!(
                state,
                ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
            );
        }
    }
    state.push('}');
    parts.push(part(super::STATE, Dtype::U8, state.into_bytes()));
    Ok(parts)
}

/// Formats a number as Python's `repr` does: with the fewest digits that are parsed back to it, and an exponent only far from 1.
fn python_float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0. && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        if let Some((digits, exponent)) = text.split_once('e') {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            return format!("{digits}e{sign}{exponent:0>2}");
        }
    }
    json!(x).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_does() {
        for (number, text) in [
            (0.306_928_038_597_106_93, "0.30692803859710693"),
            (1., "1.0"),
            (0., "0.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (-3e-7, "-3e-07"),
            (1e16, "1e+16"),
            (2.5e-101, "2.5e-101"),
            (123_456.75, "123456.75"),
        ] {
            assert_eq!(python_float(number), text);
        }
    }

    #[test]
    fn what_has_no_code_is_refused() {
        let mut values = vec![1f32; 200];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[130] = bad;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let error = block_absmax(Float::F32, bytes.len(), from_memory(&bytes)).unwrap_err();
            assert!(error.to_string().contains("from 128 to 191"), "{error}");
        }
    }
}
