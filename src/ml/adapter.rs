//! LoRA adapters in PEFT's folder layout.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Map, Value};

use super::weights;

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";
const FILE: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// What `adapter_config.json` says, and all its keys to write back.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The rank.
    pub r: usize,
    /// The scaling's numerator.
    pub lora_alpha: f64,
    /// The probability of dropping an input value in training.
    pub lora_dropout: f64,
    /// Whether the scaling divides by the root of the rank.
    pub use_rslora: bool,
    /// The file as it was read.
    pub raw: Map<String, Value>,
}

impl AdapterConfig {
    /// What B A is multiplied by: alpha / r, or alpha / sqrt(r).
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn parse(raw: Map<String, Value>) -> anyhow::Result<Self> {
        let kind = raw.get("peft_type").and_then(Value::as_str);
        ensure!(
            kind == Some("LORA"),
            "its type is {kind:?}, expected `LORA`"
        );
        for name in ["use_dora", "lora_bias", "fan_in_fan_out"] {
            let on = raw.get(name).and_then(Value::as_bool) == Some(true);
            ensure!(!on, "`{name}: true` is not supported");
        }
        for name in ["rank_pattern", "alpha_pattern"] {
            let empty = raw.get(name).is_none_or(|value| {
                value.is_null() || value.as_object().is_some_and(Map::is_empty)
            });
            ensure!(empty, "`{name}` is not supported");
        }
        let number = |name: &str| raw.get(name).and_then(Value::as_f64);
        let r = raw.get("r").and_then(Value::as_u64).unwrap_or(0);
        ensure!(r > 0, "`r` is missing or not a number above 0");
        Ok(Self {
            r: usize::try_from(r)?,
            lora_alpha: number("lora_alpha").context("`lora_alpha` is missing")?,
            lora_dropout: number("lora_dropout").unwrap_or(0.),
            use_rslora: raw.get("use_rslora").and_then(Value::as_bool) == Some(true),
            raw,
        })
    }
}

/// The two matrices beside one projection.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// A, (r, in).
    pub a: Tensor,
    /// B, (out, r).
    pub b: Tensor,
}

/// An adapter: pairs by module path (`model.layers.0.self_attn.q_proj`).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its pairs.
    pub tensors: BTreeMap<String, LoraPair>,
}

impl Adapter {
    /// Reads an adapter folder.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<Self> {
            let text = std::fs::read_to_string(folder.join(CONFIG))
                .with_context(|| format!("could not read `{CONFIG}`"))?;
            let config = AdapterConfig::parse(serde_json::from_str(&text)?)?;
            let tensors = candle_core::safetensors::load(folder.join(FILE), &Device::Cpu)
                .with_context(|| format!("could not read `{FILE}`"))?;
            let tensors: BTreeMap<String, Tensor> = tensors.into_iter().collect();
            let mut pairs = BTreeMap::new();
            for (name, tensor) in &tensors {
                let own = name.strip_prefix(PREFIX).unwrap_or(name);
                if let Some(path) = own.strip_suffix(".lora_A.weight") {
                    let other = name.replace(".lora_A.", ".lora_B.");
                    let b = tensors.get(&other);
                    let b = b.with_context(|| format!("`{name}` has no `{other}` beside it"))?;
                    let pair = LoraPair {
                        a: tensor.clone(),
                        b: b.clone(),
                    };
                    pairs.insert(path.to_owned(), pair);
                } else if !own.ends_with(".lora_B.weight") {
                    bail!("the tensor `{name}` is no LoRA matrix");
                }
            }
            ensure!(!pairs.is_empty(), "it has no LoRA matrices");
            Ok(Self {
                config,
                tensors: pairs,
            })
        };
        read().with_context(|| format!("could not load the adapter `{}`", folder.display()))
    }

    /// Writes an adapter folder; the same adapter makes the same bytes.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let sorted: BTreeMap<&String, &Value> = self.config.raw.iter().collect();
        let text = serde_json::to_string_pretty(&sorted)? + "\n";
        std::fs::write(folder.join(CONFIG), text)
            .with_context(|| format!("could not write `{CONFIG}` to `{}`", folder.display()))?;
        let mut tensors = BTreeMap::new();
        for (path, pair) in &self.tensors {
            tensors.insert(format!("{PREFIX}{path}.lora_A.weight"), pair.a.clone());
            tensors.insert(format!("{PREFIX}{path}.lora_B.weight"), pair.b.clone());
        }
        weights::save(&folder.join(FILE), &tensors, &[("format", "pt")])
    }
}
