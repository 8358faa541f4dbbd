//! shim weights
use anyhow::Context as _;
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
pub struct Weights(HashMap<String, Tensor>);
impl Weights {
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self(candle_core::safetensors::load(
            dir.join("model.safetensors"),
            &Device::Cpu,
        )?))
    }
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
    pub fn tensor(&self, name: &str, device: &Device) -> anyhow::Result<Tensor> {
        Ok(self
            .0
            .get(name)
            .with_context(|| name.to_owned())?
            .to_device(device)?)
    }
}
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &[(&str, &str)],
) -> anyhow::Result<()> {
    let m: HashMap<String, String> = metadata
        .iter()
        .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
        .collect();
    safetensors::serialize_to_file(tensors.iter(), Some(m), path)?;
    Ok(())
}
