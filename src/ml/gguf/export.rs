//! A model folder as a GGUF file, tensor by tensor.
//!
//! Weights are read in pieces of some megabytes, changed to what llama.cpp expects of the architecture (rows of q and k in another order, 1
//! added to Gemma's norms), converted or quantised by all threads, and handed to the thread that writes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use pipeline_kernels::ggml::{BlockType, quantize};
use rayon::prelude::*;

use super::dequantise::dequantise;
use super::hyperparameters::hyperparameters;
use super::mixture::{self, FileType, tensor_type};
use super::names::GgufArch;
use super::write::{Sink, TensorInfo, write_file};
use super::{GgmlType, Value};
use crate::ml::io::finite;
use crate::ml::io::float::Float;
use crate::ml::io::rewrite::Written;
use crate::ml::io::weights::{RawTensor, Weights};
use crate::ml::model::arch::Arch;
use crate::ml::model::{tensors, tied};

/// The values of a piece: few enough for memory, and enough for all threads.
const PIECE: usize = 1 << 21;
/// The values that a thread converts at once.
const SPAN: usize = 1 << 14;

/// What rounding to a tensor's type changed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounding {
    /// The sum of the squares of its values.
    pub length: f64,
    /// The sum of the squares of the differences of its values and those in the file.
    pub apart: f64,
}

impl Rounding {
    /// What another part of the same tensor, or another tensor, adds.
    pub(super) fn add(&mut self, other: Self) {
        self.length += other.length;
        self.apart += other.apart;
    }

    /// The norm of the differences relative to the norm of the values.
    pub fn relative(self) -> f64 {
        if self.length > 0. {
            (self.apart / self.length).sqrt()
        } else {
            0.
        }
    }

    /// Of values and what became of them.
    pub(super) fn of(values: &[f32], rounded: &[f32]) -> Self {
        // Each span's sums are added in order, so they don't depend on the threads.
        let spans = values.par_chunks(SPAN).zip(rounded.par_chunks(SPAN));
        let sums: Vec<Self> = spans
            .map(|(values, rounded)| {
                let mut sums = Self::default();
                for (value, rounded) in values.iter().zip(rounded) {
                    let (value, rounded) = (f64::from(*value), f64::from(*rounded));
                    sums.length += value * value;
                    sums.apart += (value - rounded) * (value - rounded);
                }
                sums
            })
            .collect();
        let mut all = Self::default();
        for sums in sums {
            all.add(sums);
        }
        all
    }
}

/// What was written.
#[derive(Debug)]
pub struct Exported {
    /// The file.
    pub file: Written,
    /// The number of tensors of each type, by ggml's names, in the order of the types' ids.
    pub types: Vec<(&'static str, usize)>,
    /// The number of tensors whose rows the wanted blocks don't fit, so that they have another type.
    pub fallbacks: usize,
    /// The size of the weights before, in bytes.
    pub bytes_before: u64,
    /// The size of the file.
    pub bytes_after: u64,
    /// What rounding changed in each of the model's tensors, by transformers' names.
    pub roundings: BTreeMap<String, Rounding>,
    /// What llama.cpp will do in another way.
    pub warnings: Vec<String>,
}

/// A tensor of the file, and where its values come from.
struct Planned<'a> {
    info: TensorInfo,
    source: Source<'a>,
}

enum Source<'a> {
    Weight {
        name: String,
        raw: RawTensor<'a>,
        float: Float,
        /// The rows of a head, if the rows of each head change their order.
        heads_of: Option<usize>,
        adds_one: bool,
    },
    Values(Vec<f32>),
}

/// Writes the model in the folder `model` to the file `name` in the folder `out`. `metadata` comes before the keys of the architecture.
/// `progress` is called with the bytes that were read and their total, and may stop with an error.
///
/// # Errors
/// The model's family has no counterpart in llama.cpp, its weights are quantised or not finite, or a file can't be read or written.
pub fn export(
    model: &Path,
    out: &Path,
    name: &str,
    file_type: FileType,
    metadata: Vec<(String, Value)>,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Exported> {
    let (arch, weights) = tied::open(model)?;
    ensure!(
        !arch.scores,
        "the model's head gives scores (`score.weight`), which is not written as GGUF"
    );
    let gguf = architecture(&arch)?;
    let hyperparameters = hyperparameters(gguf, &arch)?;
    let mut metadata = metadata;
    metadata.extend(hyperparameters.keys);
    metadata.push(("general.file_type".into(), Value::U32(file_type.id())));
    metadata.push(("general.quantization_version".into(), Value::U32(2)));
    let (planned, fallbacks) = plan(&arch, gguf, &weights, file_type, hyperparameters.tensors)?;
    let infos: Vec<TensorInfo> = planned.iter().map(|planned| planned.info.clone()).collect();
    let total = weights.bytes();
    let mut read = 0;
    let mut roundings = BTreeMap::new();
    let path = out.join(name);
    let blake3 = write_file(&path, &metadata, &infos, &mut |index, sink| {
        let planned = planned.get(index).context("a tensor was lost")?;
        let failed = || format!("could not make the tensor `{}`", planned.info.name);
        let rounding = make(planned, &weights, sink, &mut |bytes| {
            read += bytes;
            progress(read.min(total), total)
        });
        let rounding = rounding.with_context(failed)?;
        if let Source::Weight { name, .. } = &planned.source {
            roundings.insert(name.clone(), rounding);
        }
        Ok(())
    })?;
    let bytes_after = std::fs::metadata(&path)
        .with_context(|| format!("could not read `{}`", path.display()))?
        .len();
    let types = GgmlType::all().map(|kind| {
        let count = infos.iter().filter(|info| info.kind == kind).count();
        (kind.name(), count)
    });
    Ok(Exported {
        file: Written {
            name: name.to_owned(),
            blake3,
        },
        types: types.filter(|(_, count)| *count > 0).collect(),
        fallbacks,
        bytes_before: total,
        bytes_after,
        roundings,
        warnings: hyperparameters.warnings,
    })
}

/// The counterpart of a model in llama.cpp.
///
/// # Errors
/// There is none, or the weights are quantised.
pub fn architecture(arch: &Arch) -> anyhow::Result<&'static GgufArch> {
    ensure!(
        arch.quantization.is_none(),
        "the model's weights are in bitsandbytes' 4 bits; hint: export the dense model, which `merge` makes, or the one before `quantize`"
    );
    let gguf = GgufArch::by_model_type(arch.family);
    gguf.with_context(|| format!("llama.cpp has no architecture for `{}` models", arch.family))
}

/// The tensors of the file in llama.cpp's order: those of no layer by name, then layer by layer.
fn plan<'a>(
    arch: &Arch,
    gguf: &GgufArch,
    weights: &'a Weights,
    file_type: FileType,
    more: Vec<(&'static str, Vec<f32>)>,
) -> anyhow::Result<(Vec<Planned<'a>>, usize)> {
    let model = mixture::Model {
        layers: arch.num_hidden_layers(),
        tied: arch.tie_word_embeddings,
        is_70b: gguf.name == "llama"
            && arch.num_hidden_layers() == 80
            && arch.num_attention_heads != arch.num_key_value_heads,
    };
    let mut planned = Vec::new();
    for (name, values) in more {
        planned.push(Planned {
            info: TensorInfo {
                name: name.to_owned(),
                kind: GgmlType::F32,
                shape: vec![values.len()],
            },
            source: Source::Values(values),
        });
    }
    for name in weights.names() {
        if !tensors::is_used(arch, name) {
            continue;
        }
        let raw = weights.raw(name)?;
        let float = Float::from_safetensors(raw.dtype).with_context(|| {
            format!(
                "the tensor `{name}` has the type {:?}, which is no type of weights",
                raw.dtype
            )
        })?;
        let theirs = gguf.to_gguf(name).with_context(|| {
            format!(
                "llama.cpp's `{}` has no counterpart of the tensor `{name}`",
                gguf.name
            )
        })?;
        let kind = tensor_type(file_type, model, &theirs, raw.shape);
        planned.push(Planned {
            info: TensorInfo {
                name: theirs,
                kind,
                shape: raw.shape.to_vec(),
            },
            source: Source::Weight {
                name: name.to_owned(),
                raw,
                float,
                heads_of: gguf.permutes(name).then_some(arch.head_dim),
                adds_one: gguf.adds_one(name),
            },
        });
    }
    planned.sort_by_cached_key(|planned| place(&planned.info.name));
    let fits = |planned: &&Planned<'_>| {
        let matrix = planned.info.shape.len() > 1;
        let columns = planned.info.shape.last().copied().unwrap_or(0);
        !matrix || columns.is_multiple_of(file_type.main().block())
    };
    let fallbacks = planned.len() - planned.iter().filter(fits).count();
    Ok((planned, fallbacks))
}

/// The place of a tensor in a file.
fn place(name: &str) -> (i64, String) {
    let layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.')?.0.parse().ok());
    (layer.unwrap_or(-1), name.to_owned())
}

/// Makes a tensor's bytes, and tells what rounding changed. `read` is called with the number of bytes that were read.
fn make(
    planned: &Planned<'_>,
    weights: &Weights,
    sink: &mut Sink,
    read: &mut dyn FnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<Rounding> {
    let kind = planned.info.kind;
    let mut rounding = Rounding::default();
    let (raw, float, name, heads_of, adds_one) = match &planned.source {
        Source::Values(values) => {
            sink.send(store(kind, values, Vec::new())?)?;
            return Ok(rounding);
        }
        Source::Weight {
            name,
            raw,
            float,
            heads_of,
            adds_one,
        } => (raw, *float, name, *heads_of, *adds_one),
    };
    let columns = match (raw.shape, heads_of) {
        // A bias is permuted like the rows of a weight.
        ([_], Some(_)) => 1,
        (shape, _) => shape.last().copied().unwrap_or(1).max(1),
    };
    let all = raw.size() / float.size();
    // Whole rows, and whole heads where their rows change places.
    let unit = heads_of.unwrap_or(1) * columns;
    ensure!(
        all > 0 && all.is_multiple_of(unit),
        "its shape is {:?}, which is no whole number of heads",
        raw.shape
    );
    let step = (PIECE / unit).max(1) * unit;
    let (mut bytes, mut values, mut rounded) = (Vec::new(), Vec::new(), Vec::new());
    for first in (0..all).step_by(step) {
        let count = step.min(all - first);
        bytes.resize(count * float.size(), 0);
        raw.read(first * float.size(), &mut bytes)?;
        if !float.all_finite(&bytes) {
            match finite::check(weights, name)? {
                Some(found) => bail!("{found}; look at where the model comes from"),
                None => bail!("it has values that are not finite"),
            }
        }
        read(bytes.len() as u64)?;
        values.resize(count, 0.);
        let spans = values.par_chunks_mut(SPAN);
        spans
            .zip(bytes.par_chunks(SPAN * float.size()))
            .for_each(|(values, bytes)| float.read(bytes, values));
        if let Some(head) = heads_of {
            values = neighbours(&values, head, columns);
        }
        let offset = if adds_one { 1. } else { 0. };
        if adds_one {
            for value in &mut values {
                *value += offset;
            }
        }
        let piece = store(kind, &values, sink.piece())?;
        rounded.resize(count, 0.);
        load(kind, &piece, &mut rounded)?;
        if adds_one {
            for value in values.iter_mut().chain(&mut rounded) {
                *value -= offset;
            }
        }
        rounding.add(Rounding::of(&values, &rounded));
        sink.send(piece)?;
    }
    Ok(rounding)
}

/// The values of whole blocks.
fn load(kind: GgmlType, bytes: &[u8], out: &mut [f32]) -> anyhow::Result<()> {
    let spans = out.par_chunks_mut(SPAN);
    let bytes = bytes.par_chunks(kind.bytes(SPAN)?);
    spans
        .zip(bytes)
        .try_for_each(|(out, bytes)| dequantise(kind, bytes, out))
}

/// The rows of heads in llama.cpp's order: it rotates neighbours, where transformers rotates halves, so row `i + p * head / 2` of a head
/// becomes row `2 i + p` (i below `head / 2`, p 0 or 1).
fn neighbours(values: &[f32], head: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.; values.len()];
    let half = head / 2;
    let heads = values.chunks(head * columns);
    for (values, out) in heads.zip(out.chunks_mut(head * columns)) {
        for (row, values) in values.chunks(columns).enumerate() {
            let to = 2 * (row % half) + row / half;
            if let Some(out) = out.get_mut(to * columns..(to + 1) * columns) {
                out.copy_from_slice(values);
            }
        }
    }
    out
}

/// Values in a type of GGUF, in `out`, whose contents are replaced.
fn store(kind: GgmlType, values: &[f32], mut out: Vec<u8>) -> anyhow::Result<Vec<u8>> {
    out.resize(kind.bytes(values.len())?, 0);
    let float = match kind {
        GgmlType::F32 => Some(Float::F32),
        GgmlType::F16 => Some(Float::F16),
        GgmlType::BF16 => Some(Float::BF16),
        _ => None,
    };
    if let Some(float) = float {
        let spans = out.par_chunks_mut(SPAN * float.size());
        let fits = spans.zip(values.par_chunks(SPAN)).map(|(out, values)| {
            float.write(values, out);
            float.all_finite(out)
        });
        ensure!(
            fits.reduce(|| true, |a, b| a && b),
            "it has values that are too large for {kind}; hint: take `outtype: bf16`"
        );
        return Ok(out);
    }
    let block = block_type(kind)?;
    quantize(block, values, &mut out);
    Ok(out)
}

/// The kernels' name of a type of blocks.
fn block_type(kind: GgmlType) -> anyhow::Result<BlockType> {
    Ok(match kind {
        GgmlType::Q4_0 => BlockType::Q4_0,
        GgmlType::Q5_0 => BlockType::Q5_0,
        GgmlType::Q5_1 => BlockType::Q5_1,
        GgmlType::Q8_0 => BlockType::Q8_0,
        GgmlType::Q4_K => BlockType::Q4K,
        GgmlType::Q5_K => BlockType::Q5K,
        GgmlType::Q6_K => BlockType::Q6K,
        other => bail!("tensors are not written in the type {other}"),
    })
}

#[cfg(test)]
mod tests;
