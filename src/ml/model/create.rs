//! A model with random weights, initialised as in transformers: normal numbers for matrices, ones for norms, zeros for biases.
//!
//! Every value depends only on the seed, the tensor's name and the value's index in it, so neither the threads nor the order of tensors
//! matter. Only integer arithmetic, additions, multiplications, divisions and square roots are used, which every machine rounds alike, so
//! the machine does not matter either.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use bytesize::ByteSize;
use pipeline_kernels::normal;
use pipeline_kernels::random::splitmix64;
use rayon::prelude::*;

use super::arch::Arch;
use super::families;
use super::tensors::{Role, TensorSpec, layer_tensors, tensors};
use crate::ml::io::float::Float;
use crate::ml::io::folder::{self, CONFIG};
use crate::ml::io::rewrite::{Index, Output, Written, write_file};
use crate::ml::io::weights::{Entry, SINGLE};

/// The largest accepted size of all weights in bytes, some hundred times that of the largest models.
const LARGEST: u64 = 1 << 48;
/// The values that a thread takes at once; an even number, because they are drawn in pairs.
const SPAN: usize = 1 << 12;

/// The settings of a new model beside its architecture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The standard deviation of the matrices' values.
    pub initializer_range: f64,
    /// The type in which weights are stored.
    pub float: Float,
    /// The seed.
    pub seed: u64,
    /// The size in bytes above which weights are split into several files.
    pub max_shard_size: u64,
}

/// The result of a creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The number of parameters.
    pub parameters: u64,
    /// The files of weights that were written.
    pub files: Vec<Written>,
}

/// Writes `config.json` and the weights of a new model to the folder `out`. Memory holds a few MiB at a time. `progress` is called with the
/// bytes written so far and their total, and may stop with an error.
///
/// # Errors
/// The model is too large, no family has this architecture, or a file can't be written.
pub fn create(
    arch: &Arch,
    settings: Settings,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let bytes = parameters(arch).saturating_mul(settings.float.size() as u64);
    ensure!(
        bytes <= LARGEST,
        "the model would have {} of weights, expected at most {}; are its sizes right?",
        ByteSize(bytes),
        ByteSize(LARGEST)
    );
    let tensors: Vec<_> = tensors(arch)
        .map(|tensor| {
            let entry = Entry::new(tensor.name, settings.float.stored(), tensor.shape);
            (entry, Fill::for_role(arch, tensor.role))
        })
        .collect();
    let size = |entry: &Entry| -> anyhow::Result<u64> { Ok(entry.size()? as u64) };
    let mut total = 0u64;
    for (entry, _) in &tensors {
        let sum = total.checked_add(size(entry)?);
        total = sum.context("the model is too large")?;
    }
    write_config(arch, settings, out)?;

    // As in transformers, a file is complete when the next tensor would take it above the limit.
    let mut files: Vec<Vec<(Entry, Fill)>> = vec![Vec::new()];
    let mut filled = 0u64;
    for (entry, fill) in tensors {
        let size = size(&entry)?;
        if filled > 0 && filled + size > settings.max_shard_size {
            files.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(last) = files.last_mut() {
            last.push((entry, fill));
        }
    }
    let mut index = Index::default();
    let mut done = 0;
    let mut written = Vec::new();
    let count = files.len();
    for (number, tensors) in files.into_iter().enumerate() {
        let file = if count == 1 {
            SINGLE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", number + 1)
        };
        let mut sizes = BTreeMap::new();
        let mut outputs = Vec::new();
        for (entry, fill) in tensors {
            index.add(&entry, &file)?;
            sizes.insert(entry.name.clone(), size(&entry)?);
            let name = entry.name.clone();
            outputs.push(Output::pieces(entry, move |first, bytes| {
                tensor(&name, fill, first / settings.float.size(), bytes, settings);
                Ok(())
            }));
        }
        let blake3 = write_file(&out.join(&file), outputs, &mut |name| {
            done += sizes.get(name).copied().unwrap_or(0);
            progress(done, total)
        })?;
        written.push(Written { name: file, blake3 });
    }
    if count > 1 {
        index.write(out)?;
    }
    Ok(Report {
        parameters: total / settings.float.size() as u64,
        files: written,
    })
}

/// The number of parameters of a model of this architecture; a tied head is not counted. It fits into `u64` for whatever [`Arch::read`]
/// accepts.
pub fn parameters(arch: &Arch) -> u64 {
    let values = |tensor: TensorSpec| {
        let sizes = tensor.shape.iter().map(|size| *size as u64);
        sizes.fold(1, u64::saturating_mul)
    };
    let none = Arch {
        layers: Vec::new(),
        ..arch.clone()
    };
    // All layers have tensors of the same shapes.
    let layer = layer_tensors(arch, 0).into_iter().map(values);
    let layer = layer.fold(0, u64::saturating_add);
    let layers = layer.saturating_mul(arch.num_hidden_layers() as u64);
    tensors(&none).map(values).fold(layers, u64::saturating_add)
}

/// The initial values of a tensor, as in transformers' `_init_weights`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fill {
    Normal,
    Constant(f32),
}

impl Fill {
    fn for_role(arch: &Arch, role: Role) -> Self {
        match role {
            Role::Embeddings | Role::Head | Role::Projection(_) => Self::Normal,
            Role::Norm(_) if arch.norm_adds_one => Self::Constant(0.),
            Role::Norm(_) => Self::Constant(1.),
            Role::Bias(_) => Self::Constant(0.),
        }
    }
}

/// Writes the values of a tensor from index `first` on, which must be even, to `bytes`.
fn tensor(name: &str, fill: Fill, first: usize, bytes: &mut [u8], settings: Settings) {
    let size = settings.float.size();
    let key = key(settings.seed, name);
    let spans = bytes.par_chunks_mut(SPAN * size).enumerate();
    spans.for_each(|(span, bytes)| {
        let mut values = [0f32; SPAN];
        let values = &mut values[..bytes.len() / size];
        match fill {
            Fill::Normal => {
                let pair = (first as u64 + (span * SPAN) as u64) >> 1;
                normal::fill(key, pair, settings.initializer_range, values);
            }
            Fill::Constant(value) => values.fill(value),
        }
        settings.float.write(values, bytes);
    });
}

/// The key of a tensor's random numbers: the FNV-1a hash of its name, mixed with the seed.
fn key(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut state = seed;
    let mixed = splitmix64(&mut state);
    let mut state = mixed ^ hash;
    splitmix64(&mut state)
}

/// Writes `config.json` in the spelling of transformers 4, which 5 reads too.
fn write_config(arch: &Arch, settings: Settings, out: &Path) -> anyhow::Result<()> {
    let mut raw = families::config_keys(arch)?;
    raw.insert(
        "initializer_range".into(),
        settings.initializer_range.into(),
    );
    raw.insert("torch_dtype".into(), settings.float.name().into());
    folder::write_config(out, raw)?;
    // Reading the file must give the same architecture; otherwise the architecture was never possible.
    let read = Arch::read(out)?;
    let expected = Arch {
        dtype: Some(settings.float.dtype()),
        ..arch.clone()
    };
    ensure!(read == expected, "`{CONFIG}` would not describe the model");
    Ok(())
}

#[cfg(test)]
mod tests;
