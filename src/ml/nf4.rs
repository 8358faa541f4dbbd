//! 4-bit weights as bitsandbytes stores them: NF4 codes in blocks of 64 with one largest magnitude each, which may be
//! quantised itself (Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, arXiv 2305.14314).

use std::ops::Range;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Deserialize;

use super::weights::Weights;

/// Values that share a largest magnitude.
const BLOCK: usize = 64;

/// The 16 values: quantiles of a normal distribution.
const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A 4-bit weight.
#[derive(Debug, Clone)]
pub struct Nf4 {
    /// Two codes a byte, the first in the high half.
    pub packed: Vec<u8>,
    /// The largest magnitude of each block.
    pub absmax: Vec<f32>,
    /// (out, in).
    pub shape: (usize, usize),
    /// What the values are rounded to.
    pub dtype: DType,
}

/// The JSON beside each weight.
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
    /// Reads the weight called `name` (`...q_proj.weight`); none if it is not stored in 4 bits.
    pub fn load(weights: &Weights, name: &str) -> anyhow::Result<Option<Self>> {
        if !weights.contains(&format!("{name}.quant_state.bitsandbytes__nf4")) {
            ensure!(
                !weights.contains(&format!("{name}.quant_state.bitsandbytes__fp4")),
                "`{name}` is stored as fp4; only nf4 is supported"
            );
            return Ok(None);
        }
        let read = || Self::read(weights, name);
        read()
            .with_context(|| format!("could not read the 4-bit tensor `{name}`"))
            .map(Some)
    }

    fn read(weights: &Weights, name: &str) -> anyhow::Result<Self> {
        let part = |suffix: &str| {
            let tensor = weights.tensor(&format!("{name}{suffix}"), &Device::Cpu)?;
            anyhow::Ok(tensor.flatten_all()?)
        };
        let state = part(".quant_state.bitsandbytes__nf4")?.to_vec1::<u8>()?;
        let state: QuantState = serde_json::from_slice(&state)?;
        ensure!(
            state.quant_type == "nf4",
            "its type is `{}`",
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
        let dtype = match state.dtype.as_str() {
            "float32" => DType::F32,
            "bfloat16" => DType::BF16,
            "float16" => DType::F16,
            other => bail!("its dtype is `{other}`"),
        };
        let count = rows
            .checked_mul(columns)
            .context("its shape is too large")?;
        let blocks = count.div_ceil(BLOCK);
        let packed = part("")?.to_vec1::<u8>()?;
        ensure!(
            packed.len() == count.div_ceil(2),
            "it has {} bytes",
            packed.len()
        );
        let absmax = if let Some(offset) = state.nested_offset {
            let nested = state.nested_blocksize.unwrap_or(256);
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
                    // Two roundings, as bitsandbytes has them.
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
            dtype,
        })
    }

    /// All values, rounded to the dtype of the weight.
    pub fn dequantise(&self) -> Vec<f32> {
        let mut out = vec![0.; self.shape.0 * self.shape.1];
        self.dequantise_rows(0..self.shape.0, &mut out);
        out
    }

    /// The values of some rows, as many as `out` has room for.
    pub fn dequantise_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        const SPAN: usize = 1 << 14; // a multiple of the block
        let start = rows.start * self.shape.1;
        let count = rows.len() * self.shape.1;
        let count = count.min(out.len());
        let out = out.get_mut(..count).unwrap_or_default();
        out.par_chunks_mut(SPAN)
            .enumerate()
            .for_each(|(span, out)| {
                let first = start + span * SPAN;
                for (place, out) in (first..).zip(out) {
                    let byte = self.packed.get(place / 2).copied().unwrap_or(0x77);
                    let code = if place % 2 == 0 { byte >> 4 } else { byte & 15 };
                    let absmax = self.absmax.get(place / BLOCK).copied().unwrap_or(0.);
                    let value = CODE[usize::from(code)] * absmax;
                    *out = match self.dtype {
                        DType::BF16 => bf16::from_f32(value).to_f32(),
                        DType::F16 => f16::from_f32(value).to_f32(),
                        _ => value,
                    };
                }
            });
    }

    /// All values as a tensor (out, in).
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::from_vec(self.dequantise(), self.shape, device)?.to_dtype(dtype)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn values_are_those_of_bitsandbytes() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let theirs = golden.join("nf4_model_outputs.safetensors");
        let theirs = candle_core::safetensors::load(theirs, &Device::Cpu).unwrap();
        let theirs: Vec<f32> = theirs["dequantised.layers.0.q_proj.weight"]
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let weights = Weights::open(&golden.join("model_nf4")).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let nf4 = Nf4::load(&weights, name).unwrap().unwrap();
        assert_eq!(nf4.shape, (64, 64));
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&nf4.dequantise()), bits(&theirs));
        let mut rows = vec![0.; 3 * 64];
        nf4.dequantise_rows(5..8, &mut rows);
        assert_eq!(bits(&rows), bits(&theirs[5 * 64..8 * 64]));
        assert!(Nf4::load(&weights, "lm_head.weight").unwrap().is_none());
    }
}
