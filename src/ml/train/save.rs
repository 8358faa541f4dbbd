//! Writes the result of a training in the layout of its source.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use candle_core::Tensor;

use crate::ml::adapter::{Adapter, DELTA};
use crate::ml::io::finite;
use crate::ml::io::float::Float;
use crate::ml::io::rewrite::{Output, rewrite};
use crate::ml::io::weights::{Entry, bytes};
use crate::ml::model::CausalLm;
use crate::ml::model::tensors::{EMBEDDINGS, HEAD};
use crate::ml::model::tied;

fn trained(model: &CausalLm) -> candle_core::Result<BTreeMap<&str, Tensor>> {
    let parameters = model.parameters.iter();
    parameters
        .map(|parameter| Ok((parameter.name.as_str(), parameter.stored()?)))
        .collect()
}

/// Writes the trained adapter of `model` to the folder `out`, with the settings of `adapter`, from which the training started.
///
/// # Errors
/// A file can't be written.
pub fn save_adapter(model: &CausalLm, mut adapter: Adapter, out: &Path) -> anyhow::Result<()> {
    for parameter in &model.parameters {
        let tensor = parameter.stored()?;
        if let Some(path) = parameter.name.strip_suffix(DELTA) {
            let rows = adapter.token_rows.get_mut(path);
            let rows = rows.with_context(|| format!("`{path}` was trained without being there"))?;
            rows.values = tensor;
            continue;
        }
        let Some((path, part)) = parameter.name.split_once(".lora_") else {
            adapter.saved.insert(parameter.name.clone(), tensor);
            continue;
        };
        let pair = adapter.tensors.get_mut(path);
        let pair = pair.with_context(|| format!("`{path}` was trained without being there"))?;
        match part {
            "A.weight" => pair.a = tensor,
            "B.weight" => pair.b = tensor,
            _ => pair.magnitude = Some(tensor),
        }
    }
    // As in PEFT, the file also has the head if it stays tied to the trained embeddings.
    if model.arch.tie_word_embeddings
        && adapter.config.ensure_weight_tying
        && adapter.saved.contains_key(HEAD)
        && let Some(embeddings) = adapter.saved.get(EMBEDDINGS)
    {
        adapter.saved.insert(HEAD.into(), embeddings.clone());
    }
    adapter.save(out)
}

/// Writes a fully trained model to the folder `out`: that of `source` with new weights of the same names, types and files. Beside the model,
/// memory holds one tensor.
///
/// # Errors
/// A value is not finite in the type in which it is stored, or a file can't be read or written.
pub fn save_model(model: &CausalLm, source: &Path, out: &Path) -> anyhow::Result<()> {
    let trained = trained(model)?;
    let (config, weights) = tied::open(source)?;
    let outputs = |name: &str| {
        let Some(tensor) = trained.get(name) else {
            return Ok(vec![Output::same(&weights, name)?]);
        };
        let raw = weights.raw(name)?;
        let dtype = raw.dtype.try_into()?;
        let float = Float::from_safetensors(raw.dtype);
        let entry = Entry::new(name, raw.dtype, raw.shape);
        let bytes = move || {
            let bytes = bytes(&tensor.to_dtype(dtype)?)?;
            if let Some(float) = float
                && let Some((at, _)) = finite::first_in(float, &bytes)
            {
                let value = tensor.flatten_all()?.get(at)?.to_scalar::<f32>()?;
                bail!(
                    "value {at} was trained to {value:e}, which {} can't hold; hint: store the model in bfloat16 or float32 before it is \
                     trained",
                    float.name()
                );
            }
            Ok(Cow::Owned(bytes))
        };
        Ok(vec![Output::whole(entry, bytes)])
    };
    rewrite(&weights, out, outputs, &mut |_| Ok(()))?;
    tied::carry(source, out, config.tie_word_embeddings, |_| ())
}
