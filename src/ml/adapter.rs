//! LoRA adapters in PEFT's folder layout: `adapter_config.json` and `adapter_model.safetensors`.

mod config;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::Value;

pub use config::{AdapterConfig, Bias, NewAdapter, Patterns, is_meant};

use super::finite;
use super::folder::sorted_json;
use super::weights::{self, Weights};

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";
/// The adapter's tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// The adapter's settings.
pub const CONFIG: &str = "adapter_config.json";

/// Behind a module's path, the names of what stands beside it.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const MAGNITUDE: &str = ".lora_magnitude_vector";

/// The two matrices beside one projection.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// A, (r, in).
    pub a: Tensor,
    /// B, (out, r).
    pub b: Tensor,
    /// The lengths of the rows of W + s B A (out), where they are trained (`DoRA`).
    pub magnitude: Option<Tensor>,
}

/// An adapter: pairs by module path (`model.layers.0.self_attn.q_proj`).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its pairs.
    pub tensors: BTreeMap<String, LoraPair>,
    /// What it puts in the place of the model's tensors, by their names (`lm_head.weight`): modules that are trained whole, and
    /// biases.
    pub saved: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// Reads an adapter folder.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<Self> {
            let text = std::fs::read(folder.join(CONFIG))
                .with_context(|| format!("could not read `{CONFIG}`"))?;
            let raw = serde_json::from_slice(&text);
            let config = raw
                .map_err(anyhow::Error::from)
                .and_then(AdapterConfig::parse);
            let config = config.with_context(|| format!("could not use `{CONFIG}`"))?;
            let weights = Weights::open_file(&folder.join(FILE))?;
            if let Some(found) = finite::find(&weights)? {
                bail!("{found}; the adapter may have diverged in its training");
            }
            let (tensors, saved) = tensors(&weights, &config)?;
            let adapter = Self {
                config,
                tensors,
                saved,
            };
            adapter.check()?;
            Ok(adapter)
        };
        read().with_context(|| format!("could not load the adapter `{}`", folder.display()))
    }

    /// Settings and tensors have to tell the same.
    fn check(&self) -> anyhow::Result<()> {
        for (path, pair) in &self.tensors {
            ensure!(
                !self.saved.contains_key(&format!("{path}.weight")),
                "the module `{path}` has both LoRA matrices and a weight of its own"
            );
            let says = if self.config.use_dora {
                "true"
            } else {
                "false"
            };
            ensure!(
                pair.magnitude.is_some() == self.config.use_dora,
                "`use_dora` is {says}, but `{path}` {} a `lora_magnitude_vector`",
                if self.config.use_dora { "lacks" } else { "has" }
            );
        }
        for name in &self.config.modules_to_save {
            let path = |tensor: &str| tensor.rsplit_once('.').map_or(0, |(path, _)| path.len());
            let found = self
                .saved
                .keys()
                .any(|tensor| is_meant(name, &tensor[..path(tensor)]));
            ensure!(
                found,
                "`modules_to_save` names `{name}`, but `{FILE}` has no tensor of it"
            );
        }
        ensure!(!self.tensors.is_empty(), "`{FILE}` has no LoRA matrices");
        Ok(())
    }

    /// Whether it is made of LoRA pairs alone.
    pub fn is_plain(&self) -> bool {
        !self.config.use_dora && self.saved.is_empty()
    }

    /// Whether a tensor of the model, in whose place the adapter has its own, is trained in a training of the adapter.
    pub fn trains(&self, name: &str) -> bool {
        match name.rsplit_once('.') {
            Some((path, "bias")) if !self.config.saves(path) => match self.config.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => self.tensors.contains_key(path),
            },
            Some((path, _)) => self.config.saves(path),
            None => false,
        }
    }

    /// Writes an adapter folder; the same adapter makes the same bytes. PEFT keeps `target_modules` in a set, whose order
    /// differs from run to run; here it is sorted.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let mut raw = self.config.raw.clone();
        if let Some(Value::Array(modules)) = raw.get_mut("target_modules") {
            modules.sort_by_key(ToString::to_string);
        }
        std::fs::write(folder.join(CONFIG), sorted_json(&Value::Object(raw))?)
            .with_context(|| format!("could not write `{CONFIG}` to `{}`", folder.display()))?;
        let mut tensors = BTreeMap::new();
        for (path, pair) in &self.tensors {
            tensors.insert(format!("{PREFIX}{path}{A}"), pair.a.clone());
            tensors.insert(format!("{PREFIX}{path}{B}"), pair.b.clone());
            if let Some(magnitude) = &pair.magnitude {
                tensors.insert(format!("{PREFIX}{path}{MAGNITUDE}"), magnitude.clone());
            }
        }
        for (name, tensor) in &self.saved {
            // PEFT wraps a module that gets matrices; its bias is in the wrapped one.
            let name = match name.strip_suffix(".bias") {
                Some(path) if self.tensors.contains_key(path) => format!("{path}.base_layer.bias"),
                _ => name.clone(),
            };
            tensors.insert(format!("{PREFIX}{name}"), tensor.clone());
        }
        weights::save(&folder.join(FILE), &tensors, &[("format", "pt")])
    }
}

type Tensors = (BTreeMap<String, LoraPair>, BTreeMap<String, Tensor>);

/// The tensors of a file by what they are for.
fn tensors(weights: &Weights, config: &AdapterConfig) -> anyhow::Result<Tensors> {
    let (mut pairs, mut saved) = (BTreeMap::new(), BTreeMap::new());
    for name in weights.names() {
        let own = name.strip_prefix(PREFIX).unwrap_or(name);
        let is_of_a_llama = own.starts_with("model.") || own.starts_with("lm_head.");
        ensure!(is_of_a_llama, "`{name}` belongs to no module of a Llama");
        if let Some(path) = own.strip_suffix(A) {
            pairs.insert(path.to_owned(), pair(weights, name, path, config)?);
        } else if own.contains(".lora_A.") || own.contains(".lora_B.") || own.contains(MAGNITUDE) {
            let a = own.split(".lora_").next().unwrap_or_default();
            let a = format!("{}{a}{A}", &name[..name.len() - own.len()]);
            ensure!(weights.contains(&a), "`{name}` has no `{a}` beside it");
        } else if !own.contains("lora_") && (own.ends_with(".weight") || own.ends_with(".bias")) {
            let own = own.replace(".base_layer.bias", ".bias");
            let tensor = weights.tensor(name, &Device::Cpu)?;
            ensure!(
                tensor.dtype().is_float(),
                "the tensor `{name}` has no floats"
            );
            saved.insert(own, tensor);
        } else if own.contains("lora_embedding") {
            bail!(
                "the tensor `{name}` is a LoRA matrix of embeddings, which is not supported; expected one of a projection"
            );
        } else {
            bail!("the tensor `{name}` is no LoRA matrix, weight or bias");
        }
    }
    Ok((pairs, saved))
}

fn pair(
    weights: &Weights,
    name: &str,
    path: &str,
    config: &AdapterConfig,
) -> anyhow::Result<LoraPair> {
    let stem = name.strip_suffix(A).unwrap_or(name);
    let other = format!("{stem}{B}");
    ensure!(
        weights.contains(&other),
        "`{name}` has no `{other}` beside it"
    );
    let a = weights.tensor(name, &Device::Cpu)?;
    let b = weights.tensor(&other, &Device::Cpu)?;
    let r = config.rank(path);
    ensure!(
        matches!((a.dims(), b.dims()), ([rank, _], [_, also]) if *rank == r && *also == r),
        "the matrices of `{path}` have the shapes {:?} and {:?}, expected the rank {r} of `{CONFIG}`",
        a.dims(),
        b.dims()
    );
    ensure!(
        a.dtype().is_float() && b.dtype().is_float(),
        "the matrices of `{path}` are no floats"
    );
    // Inside PEFT it is a layer's weight, and some programs write it so.
    let magnitude = [MAGNITUDE.to_owned(), format!("{MAGNITUDE}.weight")];
    let magnitude = magnitude.map(|suffix| format!("{stem}{suffix}"));
    let magnitude = magnitude.iter().find(|name| weights.contains(name));
    let magnitude = magnitude.map(|name| -> anyhow::Result<Tensor> {
        let tensor = weights.tensor(name, &Device::Cpu)?.flatten_all()?;
        ensure!(
            tensor.dtype().is_float() && tensor.dim(0)? == b.dim(0)?,
            "`{name}` has {} values, expected {} floats",
            tensor.elem_count(),
            b.dim(0)?
        );
        Ok(tensor)
    });
    Ok(LoraPair {
        a,
        b,
        magnitude: magnitude.transpose()?,
    })
}

#[cfg(test)]
mod tests;
