//! Tensors of a model folder: one `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};

/// The tensors of a folder, read one by one.
pub struct Weights {
    files: MmapedSafetensors,
    names: Vec<String>,
    folder: PathBuf,
}

/// The safetensors files of a model folder, in order. A single file wins over an index.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).with_context(|| {
        format!(
            "`{}` has neither `model.safetensors` nor `model.safetensors.index.json`",
            folder.display()
        )
    })?;
    let index: serde_json::Value = serde_json::from_str(&text)
        .with_context(|| format!("`{}` is not JSON", index.display()))?;
    let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
        bail!("the index of `{}` has no `weight_map`", folder.display());
    };
    let mut names: Vec<&str> = map.values().filter_map(|name| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let mut files = Vec::new();
    for name in names {
        let plain = Path::new(name).file_name().is_some_and(|file| file == name);
        let file = folder.join(name);
        if !plain || !file.is_file() {
            bail!(
                "the index of `{}` names the shard `{name}`, which is not there",
                folder.display()
            );
        }
        files.push(file);
    }
    if files.is_empty() {
        bail!("the index of `{}` names no shards", folder.display());
    }
    Ok(files)
}

impl Weights {
    /// Opens a model folder: only the headers are read.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let paths = files(folder)?;
        #[expect(
            unsafe_code,
            reason = "mapped files spare a copy of the whole model in memory"
        )]
        // SAFETY: artifacts are read-only once committed, so nobody changes the files under the map.
        let files = unsafe { MmapedSafetensors::multi(&paths) }
            .with_context(|| format!("could not read the weights in `{}`", folder.display()))?;
        let mut names: Vec<String> = files.tensors().into_iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        Ok(Self {
            files,
            names,
            folder: folder.to_path_buf(),
        })
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.names
            .binary_search_by(|own| own.as_str().cmp(name))
            .is_ok()
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    /// A tensor in its stored dtype.
    pub fn tensor(&self, name: &str, device: &Device) -> anyhow::Result<Tensor> {
        if !self.contains(name) {
            return Err(anyhow!(
                "`{}` has no tensor `{name}`",
                self.folder.display()
            ));
        }
        let tensor = self.files.load(name, device);
        tensor.with_context(|| format!("could not read `{name}` from `{}`", self.folder.display()))
    }
}

/// Writes a small safetensors file: tensors in the order of their names, with metadata.
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &[(&str, &str)],
) -> anyhow::Result<()> {
    let pairs = metadata.iter();
    let metadata: HashMap<String, String> = pairs
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("could not write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_found_by_the_index() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        assert!(Weights::open(place).is_err());
        let one = Tensor::new(&[1f32, 2.], &Device::Cpu).unwrap();
        for (file, name) in [("a.safetensors", "x"), ("b.safetensors", "y")] {
            let tensors = BTreeMap::from([(name.to_owned(), one.clone())]);
            save(&place.join(file), &tensors, &[("format", "pt")]).unwrap();
        }
        let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#;
        std::fs::write(place.join("model.safetensors.index.json"), index).unwrap();
        let weights = Weights::open(place).unwrap();
        assert_eq!(weights.names(), ["x", "y"]);
        let read = weights.tensor("y", &Device::Cpu).unwrap();
        assert_eq!(read.to_vec1::<f32>().unwrap(), [1., 2.]);
        assert!(weights.tensor("z", &Device::Cpu).is_err());

        let index = r#"{"weight_map": {"x": "../a.safetensors"}}"#;
        std::fs::write(place.join("model.safetensors.index.json"), index).unwrap();
        assert!(Weights::open(place).is_err());
    }
}
