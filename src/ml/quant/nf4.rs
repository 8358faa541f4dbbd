//! 4-bit weights as bitsandbytes stores them: NF4 codes in blocks of 64 values with the largest magnitude of each block, which may be
//! quantised itself (Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, arXiv 2305.14314, section 3; `bitsandbytes/functional.py`,
//! `QuantState`). Reading is here, writing in [`encode`].

pub mod encode;

use std::ops::Range;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Device, Result, Tensor};
use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::Nf4 as Packed;
pub(in crate::ml) use pipeline_kernels::nf4::{BLOCK, CODE};
use rayon::prelude::*;
use serde::Deserialize;

use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;

/// The suffixes that the names of the tensors of a 4-bit weight add to its own name.
pub(in crate::ml) const PARTS: [&str; 6] = [
    ".absmax",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];
/// The suffix of the tensor that describes how a weight is quantised.
const STATE: &str = PARTS[4];

/// The name of the 4-bit weight to which the tensor called `name` belongs, if its name has one of the suffixes [`PARTS`].
pub(in crate::ml) fn owner_of(name: &str) -> Option<&str> {
    PARTS.iter().find_map(|part| name.strip_suffix(part))
}

/// A 4-bit weight.
#[derive(Debug, Clone)]
pub struct Nf4 {
    /// Two 4-bit codes a byte, the first one in the high half.
    pub packed: Vec<u8>,
    /// The largest magnitude of each block of 64 values, in row-major order.
    pub absmax: Vec<f32>,
    /// The shape (out, in) of the weight.
    pub shape: (usize, usize),
    /// The type to which the values are rounded: f32, bf16 or f16.
    pub dtype: DType,
}

/// The JSON in the tensor of [`STATE`].
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl Nf4 {
    /// Reads the weight called `name` (`...q_proj.weight`); `None` if it is not stored in 4 bits.
    ///
    /// # Errors
    /// A part is missing, has another size than the weight's shape needs, or is of a kind that is not supported, such as FP4.
    pub fn load(weights: &Weights, name: &str) -> anyhow::Result<Option<Self>> {
        if !weights.contains(&format!("{name}{STATE}")) {
            let other = PARTS
                .iter()
                .find(|part| weights.contains(&format!("{name}{part}")));
            if let Some(part) = other {
                bail!(
                    "`{name}` is quantised in a way that is not supported (it has a `{part}`), expected bitsandbytes' nf4"
                );
            }
            return Ok(None);
        }
        let read = || Self::read(weights, name);
        read()
            .with_context(|| format!("could not read the 4-bit tensor `{name}`"))
            .map(Some)
    }

    /// The shape (out, in) and the type of the values of the 4-bit weight called `name`, without reading its values; `None` if it is not
    /// stored in 4 bits.
    ///
    /// # Errors
    /// As those of [`Nf4::load`] that concern its description.
    pub fn stored_shape(
        weights: &Weights,
        name: &str,
    ) -> anyhow::Result<Option<((usize, usize), Float)>> {
        if !weights.contains(&format!("{name}{STATE}")) {
            return Ok(None);
        }
        let read = || -> anyhow::Result<_> {
            let (_, shape, float) = QuantState::read(weights, name)?;
            Ok((shape, float))
        };
        let found = read().with_context(|| format!("could not read the 4-bit tensor `{name}`"))?;
        Ok(Some(found))
    }

    fn read(weights: &Weights, name: &str) -> anyhow::Result<Self> {
        let part = |suffix: &str| {
            let tensor = weights.tensor(&format!("{name}{suffix}"), &Device::Cpu)?;
            anyhow::Ok(tensor.flatten_all()?)
        };
        let (state, (rows, columns), float) = QuantState::read(weights, name)?;
        let count = rows * columns;
        let blocks = count.div_ceil(BLOCK);
        // The codes are bytes in a tensor of any type (`bnb_4bit_quant_storage`), which is chosen for sharding and has no meaning.
        let packed = weights.raw(name)?.bytes()?;
        ensure!(
            packed.len() == count.div_ceil(2),
            "it has {} bytes, expected {} for the shape ({rows}, {columns})",
            packed.len(),
            count.div_ceil(2)
        );
        let map = part(".quant_map")?.to_vec1::<f32>()?;
        ensure!(map == CODE, "its `quant_map` is not that of nf4");
        let absmax = if let Some(offset) = state.nested_offset {
            let nested = state.nested_blocksize.unwrap_or(encode::NESTED_BLOCK);
            let codes = part(".absmax")?.to_vec1::<u8>()?;
            let scales = part(".nested_absmax")?.to_vec1::<f32>()?;
            let map = part(".nested_quant_map")?.to_vec1::<f32>()?;
            ensure!(
                map.len() == 256 && nested > 0 && scales.len() == codes.len().div_ceil(nested),
                "its nested magnitudes do not fit"
            );
            let offset = offset as f32;
            let chunks = codes.chunks(nested).zip(&scales);
            chunks
                .flat_map(|(codes, scale)| {
                    let map = &map;
                    // This rounds twice, as bitsandbytes does.
                    codes
                        .iter()
                        .map(move |code| map[usize::from(*code)] * scale + offset)
                })
                .collect()
        } else {
            part(".absmax")?.to_vec1::<f32>()?
        };
        ensure!(
            absmax.len() == blocks,
            "it has {} magnitudes, expected {blocks}",
            absmax.len()
        );
        Ok(Self {
            packed,
            absmax,
            shape: (rows, columns),
            dtype: float.dtype(),
        })
    }

    /// Dequantises all values (out, in), row-major, rounded to the weight's dtype.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut out = vec![0.; self.shape.0 * self.shape.1];
        self.dequantise_rows(0..self.shape.0, &mut out);
        out
    }

    /// Dequantises the rows `rows` (rows, in) into `out`, as many values as it has room for.
    ///
    /// # Panics
    /// If the weight has fewer values.
    pub fn dequantise_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        const SPAN: usize = 1 << 14;
        let all = self.shape.0 * self.shape.1;
        let start = rows.start.saturating_mul(self.shape.1).min(all);
        let count = rows.len().saturating_mul(self.shape.1).min(all - start);
        let count = count.min(out.len());
        let out = out.get_mut(..count).unwrap_or_default();
        let spans = out.par_chunks_mut(SPAN).enumerate();
        spans.for_each(|(span, out)| self.span(start + span * SPAN, out));
    }

    /// Dequantises `out.len()` values from index `first` on, on the calling thread.
    ///
    /// # Panics
    /// If the weight has fewer values.
    pub fn dequantise_from(&self, first: usize, out: &mut [f32]) {
        let all = self.shape.0 * self.shape.1;
        let count = out.len().min(all.saturating_sub(first));
        self.span(first, out.get_mut(..count).unwrap_or_default());
    }

    /// Dequantises `out.len()` values from index `first` on, on all threads.
    fn span(&self, first: usize, out: &mut [f32]) {
        self.kernel().dequantise(first, out);
    }

    /// The weight in the form that the kernels read.
    pub(in crate::ml) fn kernel(&self) -> Packed<'_> {
        Packed {
            packed: &self.packed,
            absmax: &self.absmax,
            code: &CODE,
            rounding: match Float::from_candle(self.dtype) {
                Some(Float::BF16) => FloatType::Bf16,
                Some(Float::F16) => FloatType::F16,
                _ => FloatType::F32,
            },
        }
    }

    /// Dequantises all values into a tensor (out, in) of type `dtype`.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::from_vec(self.dequantise(), self.shape, device)?.to_dtype(dtype)
    }
}

impl QuantState {
    /// Reads the quantisation state of the weight called `name`, its shape (out, in) and the type of its values.
    fn read(weights: &Weights, name: &str) -> anyhow::Result<(Self, (usize, usize), Float)> {
        let text = weights.raw(&format!("{name}{STATE}"))?;
        let state: Self = serde_json::from_slice(&text.bytes()?)
            .with_context(|| format!("its `{STATE}` is damaged"))?;
        ensure!(
            state.quant_type == "nf4",
            "its type is `{}`, expected `nf4`",
            state.quant_type
        );
        ensure!(
            state.blocksize == BLOCK,
            "its blocks have {} values, expected {BLOCK}",
            state.blocksize
        );
        let [rows, columns] = state.shape[..] else {
            bail!("its shape is {:?}, expected two numbers", state.shape);
        };
        ensure!(
            rows.checked_mul(columns)
                .is_some_and(|count| count <= isize::MAX as usize / 4),
            "its shape ({rows}, {columns}) is too large"
        );
        let float = Float::from_name(&state.dtype)
            .with_context(|| format!("its dtype is `{}`, expected a float", state.dtype))?;
        Ok((state, (rows, columns), float))
    }
}

#[cfg(test)]
pub(in crate::ml) mod tests;
