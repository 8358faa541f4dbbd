//! The search for values that are not finite: which stored tensor holds a NaN or an infinity.

use std::fmt;
use std::path::Path;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::float::Float;
use super::weights::{RawTensor, Weights};
use crate::ml::quant::nf4::Nf4;

/// The bytes that a thread searches at once; a multiple of every type's size.
const SPAN: usize = 1 << 18;
/// The bytes that are read at once; a multiple of [`SPAN`].
const PIECE: usize = 1 << 22;

/// The first value of a tensor that is not finite.
#[derive(Debug, Clone, PartialEq)]
pub struct NotFinite {
    /// The tensor's name.
    pub tensor: String,
    /// The name of the file that holds it.
    pub file: String,
    /// The value's index in row-major order.
    pub at: usize,
    /// The number of values in the tensor.
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

/// What to call a value that is not finite in a message: `a NaN` or `an infinity`.
pub fn named(value: f32) -> &'static str {
    if value.is_nan() {
        "a NaN"
    } else {
        "an infinity"
    }
}

/// The index and the value of the first number in `bytes`, values of type `float`, that is not finite.
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

/// The index and the value of the first number of a stored tensor that is not finite; `None` for integer types.
fn first_of(raw: &RawTensor<'_>) -> anyhow::Result<Option<(usize, f32)>> {
    let Some(float) = Float::from_safetensors(raw.dtype) else {
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

/// Searches the tensor called `name`. The codes of a 4-bit weight are bytes and always finite, whatever the type of their tensor.
///
/// # Errors
/// There is no such tensor, or its file can't be read.
pub fn check(weights: &Weights, name: &str) -> anyhow::Result<Option<NotFinite>> {
    if Nf4::stored_shape(weights, name)?.is_some() {
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

/// Searches all tensors of a folder or file and returns the first value that is not finite in the first such tensor by name.
///
/// # Errors
/// A file can't be read.
pub fn find(weights: &Weights) -> anyhow::Result<Option<NotFinite>> {
    for name in weights.names() {
        let found = check(weights, name)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Searches several stored weights, each given by a noun (`model`) and a folder or file. Returns a clause for a message that names
/// the tensor, the file and the noun of the first value that is not finite, if there is one.
///
/// # Errors
/// A file can't be read.
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

/// The first value of a tensor of any shape that is not finite.
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
