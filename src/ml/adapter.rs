//! shim adapter
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    pub raw: serde_json::Value,
}
impl AdapterConfig {
    pub fn scaling(&self) -> f64 {
        if self.use_rslora {
            self.lora_alpha / (self.r as f64).sqrt()
        } else {
            self.lora_alpha / self.r as f64
        }
    }
}
#[derive(Debug, Clone)]
pub struct LoraPair {
    pub a: Tensor,
    pub b: Tensor,
}
#[derive(Debug, Clone)]
pub struct Adapter {
    pub config: AdapterConfig,
    pub tensors: BTreeMap<String, LoraPair>,
}
impl Adapter {
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let raw: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json"))?)?;
        let t =
            candle_core::safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu)?;
        let mut tensors = BTreeMap::new();
        for (k, a) in &t {
            if let Some(p) = k.strip_suffix(".lora_A.weight") {
                let b = &t[&format!("{p}.lora_B.weight")];
                tensors.insert(
                    p.trim_start_matches("base_model.model.").to_owned(),
                    LoraPair {
                        a: a.clone(),
                        b: b.clone(),
                    },
                );
            }
        }
        Ok(Self {
            config: AdapterConfig {
                r: raw["r"].as_u64().unwrap_or(8) as usize,
                lora_alpha: raw["lora_alpha"].as_f64().unwrap_or(8.),
                lora_dropout: raw["lora_dropout"].as_f64().unwrap_or(0.),
                use_rslora: raw["use_rslora"].as_bool().unwrap_or(false),
                raw,
            },
            tensors,
        })
    }
    pub fn save(&self, dir: &Path) -> anyhow::Result<()> {
        std::fs::write(dir.join("adapter_config.json"), self.config.raw.to_string())?;
        let mut m = BTreeMap::new();
        for (k, p) in &self.tensors {
            m.insert(format!("base_model.model.{k}.lora_A.weight"), p.a.clone());
            m.insert(format!("base_model.model.{k}.lora_B.weight"), p.b.clone());
        }
        super::weights::save(
            &dir.join("adapter_model.safetensors"),
            &m,
            &[("format", "pt")],
        )
    }
}
