//! Tensors in safetensors files: a model folder with one `model.safetensors` or shards with an index, or a single file.
//!
//! When a file is opened, only its header is read and checked; errors name the file. Values are read where they are used, so a tensor
//! costs memory only while it is used. Files are read instead of mapped into memory: if somebody else truncated a mapped file, the
//! process would die of SIGBUS, where a read returns an error.

mod header;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use bytemuck::{Pod, Zeroable, cast_slice_mut};
use candle_core::{DType, Device, Tensor};
use half::vec::HalfBitsVecExt as _;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

pub use header::{Header, TensorInfo};
pub(in crate::ml) use writer::bytes;
pub use writer::{Entry, Writer, save};

/// The file of weights of a model that is not sharded.
pub const SINGLE: &str = "model.safetensors";
/// The index of a sharded model.
pub const INDEX: &str = "model.safetensors.index.json";

/// The bytes that one thread reads at once.
const PART: usize = 1 << 21;

/// A tensor in its file. Its values are little-endian and in row-major order.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    /// The type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    name: &'a str,
    shard: &'a Shard,
    /// The start and the end of its bytes in the file.
    range: (usize, usize),
}

impl RawTensor<'_> {
    /// The size of all its values in bytes.
    pub fn size(&self) -> usize {
        self.range.1 - self.range.0
    }

    /// Reads all its bytes.
    ///
    /// # Errors
    /// The file can't be read, or was truncated since it was opened.
    pub fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; self.size()];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` with its bytes from offset `first` on.
    ///
    /// # Errors
    /// The tensor has fewer bytes, the file can't be read, or it was truncated since it was opened.
    pub fn read(&self, first: usize, out: &mut [u8]) -> anyhow::Result<()> {
        let inside = first.checked_add(out.len());
        ensure!(
            inside.is_some_and(|end| end <= self.size()),
            "the tensor `{}` has {} bytes, fewer than are wanted",
            self.name,
            self.size()
        );
        let start = (self.range.0 + first) as u64;
        let file = &self.shard.file;
        let read = if out.len() <= PART {
            file.read_exact_at(out, start)
        } else {
            let parts = out.par_chunks_mut(PART).enumerate();
            parts.try_for_each(|(number, part)| {
                file.read_exact_at(part, start + (number * PART) as u64)
            })
        };
        read.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => anyhow!("the file became shorter while it was read"),
            _ => error.into(),
        })
        .with_context(|| {
            format!(
                "could not read the tensor `{}` from `{}`",
                self.name,
                self.shard.path.display()
            )
        })
    }

    /// Reads all its values. `T` must be the type in which they are stored.
    fn values<T: Pod>(&self) -> anyhow::Result<Vec<T>> {
        self.values_from(0, self.size() / size_of::<T>())
    }

    /// Reads `count` of its values, from index `first` on. `T` must be the type in which they are stored.
    ///
    /// # Errors
    /// The tensor has fewer values, the file can't be read, or it was truncated since it was opened.
    pub fn values_from<T: Pod>(&self, first: usize, count: usize) -> anyhow::Result<Vec<T>> {
        let mut values = vec![<T as Zeroable>::zeroed(); count];
        self.read(first * size_of::<T>(), cast_slice_mut(&mut values))?;
        Ok(values)
    }
}

/// One safetensors file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct TensorLocation {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// The start and the end of its bytes in the file.
    range: (usize, usize),
}

/// The tensors of a folder or file, read one by one.
#[derive(Debug)]
pub struct Weights {
    source: PathBuf,
    shards: Vec<Shard>,
    sharded: bool,
    tensors: BTreeMap<String, TensorLocation>,
}

/// The index's map from tensor to file, if the folder is sharded. As in transformers, a single file takes precedence over an index.
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
    /// Opens a model folder, of which only the headers are read.
    ///
    /// # Errors
    /// There are no weights, a file can't be read, a header or the index is damaged, or two files hold the same tensor.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let mut weights = Self {
            source: folder.to_path_buf(),
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
                .map(|location| weights.file_name(location.shard));
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

    /// Opens one safetensors file, of which only the header is read.
    ///
    /// # Errors
    /// The file can't be read, or its header is damaged.
    pub fn open_file(path: &Path) -> anyhow::Result<Self> {
        let mut weights = Self {
            source: path.to_path_buf(),
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
            let header = Header::read(&file).context("it is damaged or not a safetensors file")?;
            let shard = self.shards.len();
            for (name, info) in header.tensors {
                let (start, end) = info.data_offsets;
                let location = TensorLocation {
                    shard,
                    dtype: info.dtype,
                    shape: info.shape,
                    range: (
                        usize::try_from(header.start + start)?,
                        usize::try_from(header.start + end)?,
                    ),
                };
                if let Some(earlier) = self.tensors.insert(name.clone(), location) {
                    bail!(
                        "it has the tensor `{name}`, which `{}` has too",
                        self.file_name(earlier.shard)
                    );
                }
            }
            self.shards.push(Shard {
                path: path.to_path_buf(),
                file,
                metadata: header.metadata,
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

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Hides a tensor, as if no file had it.
    pub fn hide(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Renames a tensor, if it exists.
    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(location) = self.tensors.remove(from) {
            self.tensors.insert(to.to_owned(), location);
        }
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// Whether the model is sharded, that is, has an index.
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
            .filter(|(_, location)| self.file_name(location.shard) == file);
        inside.map(|(name, _)| name.as_str()).collect()
    }

    /// The name of the file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&str> {
        Some(self.file_name(self.tensors.get(name)?.shard))
    }

    /// The metadata in the header of a file, if it has any.
    pub fn metadata(&self, file: &str) -> Option<&BTreeMap<String, String>> {
        let shard = (0..self.shards.len()).find(|shard| self.file_name(*shard) == file)?;
        Some(&self.shards.get(shard)?.metadata)
    }

    /// The size of all tensors together in bytes.
    pub fn bytes(&self) -> u64 {
        let sizes = self
            .tensors
            .values()
            .map(|location| location.range.1 - location.range.0);
        sizes.map(|size| size as u64).sum()
    }

    /// The size of a tensor in bytes; 0 if there is none of this name.
    pub fn size_of(&self, name: &str) -> u64 {
        let location = self.tensors.get(name);
        location.map_or(0, |location| (location.range.1 - location.range.0) as u64)
    }

    /// A tensor in its file, whose values are not read yet.
    ///
    /// # Errors
    /// There is no tensor called `name`.
    pub fn raw(&self, name: &str) -> anyhow::Result<RawTensor<'_>> {
        let missing = || anyhow!("`{}` has no tensor `{name}`", self.source.display());
        let (stored, location) = self.tensors.get_key_value(name).ok_or_else(missing)?;
        let shard = self.shards.get(location.shard).ok_or_else(missing)?;
        Ok(RawTensor {
            dtype: location.dtype,
            shape: &location.shape,
            name: stored,
            shard,
            range: location.range,
        })
    }

    /// Reads a tensor in its stored shape and dtype.
    ///
    /// # Errors
    /// There is no tensor called `name`, candle does not know its type, or the file can't be read.
    pub fn tensor(&self, name: &str, device: &Device) -> anyhow::Result<Tensor> {
        let raw = self.raw(name)?;
        let read = || -> anyhow::Result<Tensor> {
            Ok(match raw.dtype {
                Dtype::F32 => Tensor::from_vec(raw.values::<f32>()?, raw.shape, device)?,
                // Zeros of `u16` come from the system as they are; those of `bf16` and `f16` are written one by one.
                Dtype::BF16 => {
                    let values: Vec<bf16> = raw.values::<u16>()?.reinterpret_into();
                    Tensor::from_vec(values, raw.shape, device)?
                }
                Dtype::F16 => {
                    let values: Vec<f16> = raw.values::<u16>()?.reinterpret_into();
                    Tensor::from_vec(values, raw.shape, device)?
                }
                Dtype::U8 => Tensor::from_vec(raw.bytes()?, raw.shape, device)?,
                other => {
                    let dtype = DType::try_from(other)?;
                    Tensor::from_raw_buffer(&raw.bytes()?, dtype, raw.shape, device)?
                }
            })
        };
        read().with_context(|| {
            format!(
                "could not read `{name}` ({:?}) from `{}`",
                raw.dtype,
                self.source.display()
            )
        })
    }
}

#[cfg(test)]
mod tests;
