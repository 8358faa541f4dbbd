//! Tensors in safetensors files: a model folder with one `model.safetensors` or shards with an index, or a single file.
//!
//! Files are mapped, so a tensor costs memory only while it is used. Whatever is wrong with a file is an error with the
//! file's name when it is opened, before a byte of a tensor is touched.

mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

pub(in crate::ml) use writer::bytes;
pub use writer::{Entry, Writer, save};

/// The name of a model's only file of weights.
pub const SINGLE: &str = "model.safetensors";
/// The name of the index of a model with several.
pub const INDEX: &str = "model.safetensors.index.json";

/// A tensor as it lies in its file.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    /// The type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its values, little-endian and in row-major order.
    pub bytes: &'a [u8],
}

/// One safetensors file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the file.
    range: (usize, usize),
}

/// The tensors of a folder or file, read one by one.
#[derive(Debug)]
pub struct Weights {
    place: PathBuf,
    shards: Vec<Shard>,
    sharded: bool,
    tensors: BTreeMap<String, Place>,
}

/// The index's map from tensor to file, if the folder is sharded. A single file wins over an index, as in transformers.
fn weight_map(folder: &Path) -> anyhow::Result<Option<BTreeMap<String, String>>> {
    if folder.join(SINGLE).is_file() {
        return Ok(None);
    }
    let path = folder.join(INDEX);
    ensure!(
        path.is_file(),
        "`{}` has neither `{SINGLE}` nor `{INDEX}`",
        folder.display()
    );
    let read = || -> anyhow::Result<BTreeMap<String, String>> {
        let index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let map = index.get("weight_map").cloned();
        let map: BTreeMap<String, String> =
            serde_json::from_value(map.context("it has no `weight_map`")?)
                .context("its `weight_map` is not a map from tensors to files")?;
        ensure!(!map.is_empty(), "it names no weights");
        for file in map.values() {
            let plain = Path::new(file)
                .file_name()
                .is_some_and(|name| name == file.as_str());
            ensure!(
                plain,
                "it names the shard `{file}`, expected a file of the same folder"
            );
        }
        Ok(map)
    };
    let map = read().with_context(|| format!("could not use `{}`", path.display()))?;
    Ok(Some(map))
}

impl Weights {
    /// Opens a model folder: only the headers are read.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let mut weights = Self {
            place: folder.to_path_buf(),
            shards: Vec::new(),
            sharded: false,
            tensors: BTreeMap::new(),
        };
        let Some(map) = weight_map(folder)? else {
            weights.add(&folder.join(SINGLE))?;
            return Ok(weights);
        };
        weights.sharded = true;
        let mut files: Vec<&String> = map.values().collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            let path = folder.join(file);
            ensure!(
                path.is_file(),
                "`{}` names the shard `{file}`, which is not there",
                folder.join(INDEX).display()
            );
            weights.add(&path)?;
        }
        for (name, file) in &map {
            let found = weights
                .tensors
                .get(name)
                .map(|place| weights.file_name(place.shard));
            ensure!(
                found == Some(file.as_str()),
                "`{}` says that `{name}` is in `{file}`, but {}",
                folder.join(INDEX).display(),
                match found {
                    Some(other) => format!("it is in `{other}`"),
                    None => "no shard has it".into(),
                }
            );
        }
        Ok(weights)
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path) -> anyhow::Result<Self> {
        let mut weights = Self {
            place: path.to_path_buf(),
            shards: Vec::new(),
            sharded: false,
            tensors: BTreeMap::new(),
        };
        weights.add(path)?;
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut add = || -> anyhow::Result<()> {
            let file = File::open(path)?;
            ensure!(file.metadata()?.is_file(), "it is not a file");
            #[expect(
                unsafe_code,
                reason = "a mapped file spares a copy of the whole model in memory"
            )]
            // SAFETY: artifacts are read-only once committed and are replaced by renaming, never rewritten in place, so
            // nobody changes or cuts the file under the map.
            let map = unsafe { Mmap::map(&file) }?;
            let (header, metadata) = SafeTensors::read_metadata(&map)
                .context("it is damaged or not a safetensors file")?;
            let shard = self.shards.len();
            let tensors: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
            for (name, info) in tensors {
                let (start, end) = info.data_offsets;
                let range = (8 + header + start, 8 + header + end);
                let place = Place {
                    shard,
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    range,
                };
                if let Some(earlier) = self.tensors.insert(name.clone(), place) {
                    bail!(
                        "it has the tensor `{name}`, which `{}` has too",
                        self.file_name(earlier.shard)
                    );
                }
            }
            let metadata = metadata.metadata().clone().unwrap_or_default();
            self.shards.push(Shard {
                path: path.to_path_buf(),
                map,
                metadata: metadata.into_iter().collect(),
            });
            Ok(())
        };
        add().with_context(|| format!("could not read the weights in `{}`", path.display()))
    }

    fn file_name(&self, shard: usize) -> &str {
        let path = self.shards.get(shard).map(|shard| shard.path.as_path());
        let name = path
            .and_then(Path::file_name)
            .and_then(|name| name.to_str());
        name.unwrap_or_default()
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Leaves a tensor out, as if the file had none of the name.
    pub fn hide(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Gives a tensor another name.
    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(place) = self.tensors.remove(from) {
            self.tensors.insert(to.to_owned(), place);
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// Whether an index says which file holds which tensor.
    pub fn sharded(&self) -> bool {
        self.sharded
    }

    /// The names of the files, sorted.
    pub fn files(&self) -> Vec<&str> {
        (0..self.shards.len())
            .map(|shard| self.file_name(shard))
            .collect()
    }

    /// The names of the tensors in a file, sorted.
    pub fn names_in(&self, file: &str) -> Vec<&str> {
        let inside = self
            .tensors
            .iter()
            .filter(|(_, place)| self.file_name(place.shard) == file);
        inside.map(|(name, _)| name.as_str()).collect()
    }

    /// The name of the file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&str> {
        Some(self.file_name(self.tensors.get(name)?.shard))
    }

    /// The notes in a file's header.
    pub fn metadata(&self, file: &str) -> Option<&BTreeMap<String, String>> {
        let shard = (0..self.shards.len()).find(|shard| self.file_name(*shard) == file)?;
        Some(&self.shards.get(shard)?.metadata)
    }

    /// The bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        let sizes = self
            .tensors
            .values()
            .map(|place| place.range.1 - place.range.0);
        sizes.map(|size| size as u64).sum()
    }

    /// The bytes of a tensor; 0 if it is not there.
    pub fn size_of(&self, name: &str) -> u64 {
        let place = self.tensors.get(name);
        place.map_or(0, |place| (place.range.1 - place.range.0) as u64)
    }

    /// A tensor where it lies.
    pub fn raw(&self, name: &str) -> anyhow::Result<RawTensor<'_>> {
        let missing = || anyhow!("`{}` has no tensor `{name}`", self.place.display());
        let place = self.tensors.get(name).ok_or_else(missing)?;
        let shard = self.shards.get(place.shard).ok_or_else(missing)?;
        let bytes = shard.map.get(place.range.0..place.range.1);
        Ok(RawTensor {
            dtype: place.dtype,
            shape: &place.shape,
            bytes: bytes.ok_or_else(missing)?,
        })
    }

    /// Gives the memory under a tensor back to the system, which reads it from the file again if it is used once more: going
    /// through a large model then takes the memory of what is in use.
    pub fn let_go(&self, name: &str) {
        #[cfg(unix)]
        if let Some(place) = self.tensors.get(name)
            && let Some(shard) = self.shards.get(place.shard)
        {
            let (start, end) = place.range;
            #[expect(unsafe_code, reason = "the advice is unchecked in general")]
            // SAFETY: the map is shared and read-only and nobody changes its file (see `add`), so a page that was given back
            // has the same bytes when it is read again; nothing can be lost or seen to change.
            let advised = unsafe {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                shard.map.unchecked_advise_range(advice, start, end - start)
            };
            // It is only advice.
            let _ = advised;
        }
    }

    /// Gives the memory under all tensors back, see [`Weights::let_go`].
    pub fn release(&self) {
        self.tensors.keys().for_each(|name| self.let_go(name));
    }

    /// A tensor in its stored dtype.
    pub fn tensor(&self, name: &str, device: &Device) -> anyhow::Result<Tensor> {
        let raw = self.raw(name)?;
        let read = || -> candle_core::Result<Tensor> {
            let dtype = DType::try_from(raw.dtype)?;
            Tensor::from_raw_buffer(raw.bytes, dtype, raw.shape, device)
        };
        read().with_context(|| {
            format!(
                "could not read `{name}` ({:?}) from `{}`",
                raw.dtype,
                self.place.display()
            )
        })
    }
}

#[cfg(test)]
mod tests;
