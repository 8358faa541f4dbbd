//! What a training made, written in the layout that it was read from.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use candle_core::Tensor;

use crate::ml::adapter::Adapter;
use crate::ml::io::finite;
use crate::ml::io::float::Float;
use crate::ml::io::rewrite::{Output, rewrite};
use crate::ml::io::weights::{Entry, bytes};
use crate::ml::model::Llama;
use crate::ml::model::tied::{self, EMBEDDINGS, HEAD};

fn trained(model: &Llama) -> BTreeMap<&str, Tensor> {
    let parameters = model.parameters.iter();
    parameters
        .map(|parameter| (parameter.name.as_str(), parameter.var.as_detached_tensor()))
        .collect()
}

/// Writes the adapter that was trained, with the settings it had before.
pub fn save_adapter(model: &Llama, mut adapter: Adapter, out: &Path) -> anyhow::Result<()> {
    for parameter in &model.parameters {
        let tensor = parameter.var.as_detached_tensor();
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
    // As PEFT writes it: a head that stays the embeddings stands beside them.
    if model.arch.tie_word_embeddings
        && adapter.config.ensure_weight_tying
        && adapter.saved.contains_key(HEAD)
        && let Some(embeddings) = adapter.saved.get(EMBEDDINGS)
    {
        adapter.saved.insert(HEAD.into(), embeddings.clone());
    }
    adapter.save(out)
}

/// Writes a model of which every weight was trained: the source's folder with new weights of the same names, types and files.
/// In memory beside the model is one tensor.
pub fn save_model(model: &Llama, source: &Path, out: &Path) -> anyhow::Result<()> {
    let trained = trained(model);
    let (config, weights) = tied::open(source)?;
    let outputs = |name: &str| {
        let Some(tensor) = trained.get(name) else {
            return Ok(vec![Output::same(&weights, name)?]);
        };
        let raw = weights.raw(name)?;
        let dtype = raw.dtype.try_into()?;
        let float = Float::of(raw.dtype);
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
