//! Numbers that are none: which stored tensor holds a NaN or an infinity.

use std::fmt;
use std::path::Path;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::float::Float;
use super::weights::{RawTensor, Weights};
use crate::ml::quant::nf4::Nf4;

/// Bytes that a thread looks through at once; whole numbers of any type.
const SPAN: usize = 1 << 18;
/// Bytes that are read at once; whole spans.
const PIECE: usize = 1 << 22;

/// The first value of a tensor that is not finite.
#[derive(Debug, Clone, PartialEq)]
pub struct NotFinite {
    /// The tensor's name.
    pub tensor: String,
    /// The name of the file that holds it.
    pub file: String,
    /// The value's number in row-major order.
    pub at: usize,
    /// How many values the tensor has.
    pub count: usize,
    /// The value.
    pub value: f32,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            tensor,
            file,
            at,
            count,
            value,
        } = self;
        write!(
            f,
            "`{tensor}` in `{file}` holds {} (value {at} of {count}, from 0)",
            named(*value)
        )
    }
}

/// A value that is not finite, in words.
pub fn named(value: f32) -> &'static str {
    if value.is_nan() {
        "a NaN"
    } else {
        "an infinity"
    }
}

/// The number of the first value that is not finite, and the value.
pub fn first_in(float: Float, bytes: &[u8]) -> Option<(usize, f32)> {
    let spans = bytes.par_chunks(SPAN).enumerate();
    let (span, bytes) = spans.find_first(|(_, bytes)| !float.all_finite(bytes))?;
    let mut values = vec![0f32; bytes.len() / float.size()];
    float.read(bytes, &mut values);
    let (at, value) = values
        .iter()
        .enumerate()
        .find(|(_, value)| !value.is_finite())?;
    Some((span * (SPAN / float.size()) + at, *value))
}

/// The first value of a stored tensor that is not finite; none for whole numbers.
fn first_of(raw: &RawTensor<'_>) -> anyhow::Result<Option<(usize, f32)>> {
    let Some(float) = Float::of(raw.dtype) else {
        return Ok(None);
    };
    let mut piece = Vec::new();
    for first in (0..raw.size()).step_by(PIECE) {
        piece.resize(PIECE.min(raw.size() - first), 0);
        raw.read(first, &mut piece)?;
        if let Some((at, value)) = first_in(float, &piece) {
            return Ok(Some((first / float.size() + at, value)));
        }
    }
    Ok(None)
}

/// Looks through one tensor. The codes of a 4-bit weight are bytes, whatever their tensor's type.
pub fn check(weights: &Weights, name: &str) -> anyhow::Result<Option<NotFinite>> {
    if Nf4::shape_of(weights, name)?.is_some() {
        return Ok(None);
    }
    let raw = weights.raw(name)?;
    Ok(first_of(&raw)?.map(|(at, value)| NotFinite {
        tensor: name.to_owned(),
        file: weights.file_of(name).unwrap_or_default().to_owned(),
        at,
        count: raw.shape.iter().product(),
        value,
    }))
}

/// Looks through all tensors of a folder or file and gives the first one, by name, that has a value that is not finite.
pub fn find(weights: &Weights) -> anyhow::Result<Option<NotFinite>> {
    for name in weights.names() {
        let found = check(weights, name)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Which of some stored weights holds a value that is not finite. Each has a noun (`model`) and a folder or file; the answer is
/// a clause that names tensor, file and noun.
pub fn blame(sources: &[(&str, &Path)]) -> anyhow::Result<Option<String>> {
    for (noun, path) in sources {
        let weights = if path.is_file() {
            Weights::open_file(path)?
        } else {
            Weights::open(path)?
        };
        if let Some(found) = find(&weights)? {
            let NotFinite {
                tensor,
                file,
                at,
                count,
                value,
            } = found;
            return Ok(Some(format!(
                "`{tensor}` in `{file}` of the {noun} holds {} (value {at} of {count}, from 0); look at where the {noun} comes from",
                named(value)
            )));
        }
    }
    Ok(None)
}

/// The first value of a tensor in memory that is not finite.
pub fn in_memory(tensor: &Tensor) -> candle_core::Result<Option<f32>> {
    let values = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(values.into_iter().find(|value| !value.is_finite()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ml::io::weights::save;
    use crate::ml::testing::golden;

    #[test]
    fn a_value_is_found_where_it_stands() {
        for float in Float::ALL {
            for (at, value) in [
                (0, f32::NAN),
                (7, f32::INFINITY),
                (SPAN, f32::NEG_INFINITY),
                (SPAN + 5, f32::NAN),
            ] {
                let mut values = vec![1f32; SPAN + 6];
                values[at] = value;
                let mut bytes = vec![0; values.len() * float.size()];
                float.write(&values, &mut bytes);
                let (found, same) = first_in(float, &bytes).unwrap();
                assert_eq!(
                    (found, same.to_bits() == value.to_bits() || same.is_nan()),
                    (at, true)
                );
            }
            assert_eq!(first_in(float, &vec![0; 4 * SPAN]), None);
        }
    }

    #[test]
    fn good_folders_have_none_and_a_bad_tensor_is_named_with_its_file() {
        // Codes in a tensor of floats look like a NaN here and there.
        for name in [
            "model",
            "model_nf4",
            "four_bit/bf16_head",
            "four_bit/f32_skip",
        ] {
            let weights = Weights::open(&golden::folder(name)).unwrap();
            assert_eq!(find(&weights).unwrap(), None, "{name}");
        }
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = golden::tensors("model_nf4/model.safetensors");
        let name = "model.layers.1.mlp.down_proj.weight.nested_absmax";
        let bad = Tensor::new(&[f32::INFINITY], &Device::Cpu).unwrap();
        tensors.insert(name.into(), bad);
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let said = blame(&[
            (
                "adapter",
                &golden::folder("adapter_init/adapter_model.safetensors"),
            ),
            ("model", folder.path()),
        ]);
        let said = said.unwrap().unwrap();
        assert!(
            said.starts_with(&format!(
                "`{name}` in `model.safetensors` of the model holds an infinity"
            )),
            "{said}"
        );
    }
}
