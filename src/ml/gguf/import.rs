//! Makes a model folder of a GGUF file: `config.json`, `generation_config.json` and the weights, dequantised, with transformers' names.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;

use super::GgmlType;
use super::config::{self, Description};
use super::dequantise::{self, dequantise};
use super::read::{File, TensorInfo};
use super::rope;
use crate::ml::io::float::Float;
use crate::ml::io::folder::{self, sorted_json};
use crate::ml::io::rewrite::{Index, Output, Written, write_file};
use crate::ml::io::weights::{Entry, SINGLE};

/// The file with the settings of generation.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The largest number of names in an error.
const NAMED: usize = 5;
/// The values that a thread computes at once.
const SPAN: usize = 1 << 15;

/// The result of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// llama.cpp's architecture.
    pub arch: &'static str,
    /// The number of tensors of each type.
    pub kinds: BTreeMap<GgmlType, usize>,
    /// The files of weights that were written.
    pub files: Vec<Written>,
}

/// The type that a file's own values suggest: that of its matrices if they are floats of up to 32 bits, else bfloat16.
pub fn suggested(file: &File) -> Float {
    let mut sizes: BTreeMap<GgmlType, usize> = BTreeMap::new();
    for tensor in file.tensors().values() {
        if tensor.shape.len() > 1 {
            *sizes.entry(tensor.kind).or_default() += tensor.bytes;
        }
    }
    let most = sizes.into_iter().max_by_key(|(_, bytes)| *bytes);
    match most.map(|(kind, _)| kind) {
        Some(GgmlType::F32 | GgmlType::F64) => Float::F32,
        Some(GgmlType::F16) => Float::F16,
        _ => Float::BF16,
    }
}

/// A tensor of the file and what becomes of it.
struct Tensor<'a> {
    /// transformers' name.
    name: String,
    info: &'a TensorInfo,
    /// The rows of a head, if rows are permuted.
    head: Option<usize>,
    /// What is subtracted from each value.
    offset: f32,
}

impl Tensor<'_> {
    /// Rows and their width. A permuted vector has rows of one value.
    fn rows(&self) -> (usize, usize) {
        let values = self.info.values();
        match (self.info.shape.as_slice(), self.head) {
            ([_], Some(_)) => (values, 1),
            ([.., width], _) => (values / (*width).max(1), *width),
            ([], _) => (1, 1),
        }
    }

    /// The row of the file that becomes row `row`. Within a head of d rows, transformers' row i + p d/2 is the file's row 2 i + p.
    fn source(&self, row: usize) -> usize {
        let Some(head) = self.head else {
            return row;
        };
        let (half, inside) = (head / 2, row % head);
        row - inside + 2 * (inside % half) + inside / half
    }

    /// Computes `out`, the bytes from offset `first` on of the tensor in the type `float`.
    fn fill(&self, file: &File, float: Float, first: usize, out: &mut [u8]) -> anyhow::Result<()> {
        let size = float.size();
        let (first, count) = (first / size, out.len() / size);
        // What has to be read: whole blocks, and whole heads where rows are permuted.
        let (block, bytes) = (self.info.kind.block(), self.info.kind.block_bytes());
        let unit = match (self.head, self.info.shape.len()) {
            (None, _) => block,
            (Some(_), 1) => self.info.values(),
            (Some(head), _) => self.rows().1 * head,
        };
        let start = first / unit * unit;
        let end = (first + count).next_multiple_of(unit);
        let mut raw = vec![0; (end - start) / block * bytes];
        file.read(self.info, start / block * bytes, &mut raw)?;
        let parts = out.par_chunks_mut(SPAN * size).enumerate();
        parts.try_for_each(|(number, out)| {
            let mut values = vec![0f32; out.len() / size];
            self.values(&raw, start, first + number * SPAN, &mut values)?;
            float.write(&values, out);
            ensure!(
                float.all_finite(out),
                "it has values that are not finite in {}{}",
                float.name(),
                if values.iter().all(|value| value.is_finite()) {
                    "; hint: take `dtype: bfloat16` or `float32`"
                } else {
                    ", and not in the file either"
                }
            );
            Ok(())
        })
    }

    /// Computes the values from index `first` on. `raw` has the blocks from value `start` of the file on.
    fn values(
        &self,
        raw: &[u8],
        start: usize,
        first: usize,
        out: &mut [f32],
    ) -> anyhow::Result<()> {
        let (_, width) = self.rows();
        let (block, bytes) = (self.info.kind.block(), self.info.kind.block_bytes());
        let mut scratch = Vec::new();
        let mut done = 0;
        while done < out.len() {
            // The rest of this row that is wanted, and the blocks that hold it.
            let (row, column) = ((first + done) / width, (first + done) % width);
            let count = (width - column).min(out.len() - done);
            let at = self.source(row) * width + column - start;
            let blocks = at / block..(at + count).div_ceil(block);
            scratch.resize(blocks.len() * block, 0.);
            let raw = &raw[blocks.start * bytes..blocks.end * bytes];
            dequantise(self.info.kind, raw, &mut scratch)?;
            let values = &scratch[at % block..at % block + count];
            for (out, value) in out[done..done + count].iter_mut().zip(values) {
                *out = value - self.offset;
            }
            done += count;
        }
        Ok(())
    }
}

/// What becomes of each tensor of the file, in the order in which a model has them.
fn plan<'a>(file: &'a File, description: &Description) -> anyhow::Result<Vec<Tensor<'a>>> {
    let arch = description.arch;
    let mut unknown = Vec::new();
    let mut tensors = Vec::new();
    for (own, info) in file.tensors() {
        let Some(name) = arch.to_transformers(own) else {
            if !rope::TENSORS.contains(&own.as_str()) {
                unknown.push(format!("`{own}`"));
            }
            continue;
        };
        let checked = dequantise::check(info.kind);
        checked.with_context(|| format!("the tensor `{own}` can't be read"))?;
        let tensor = Tensor {
            head: arch.permutes(&name).then_some(description.head_dim),
            offset: if arch.adds_one(&name) { 1. } else { 0. },
            name,
            info,
        };
        if let Some(head) = tensor.head {
            let (rows, _) = tensor.rows();
            ensure!(
                rows.is_multiple_of(head),
                "the tensor `{own}` has {rows} rows, expected a multiple of a head's {head}"
            );
        }
        tensors.push(tensor);
    }
    let more = unknown.len().saturating_sub(NAMED);
    unknown.truncate(NAMED);
    ensure!(
        unknown.is_empty(),
        "it has tensors that the architecture `{}` doesn't have here: {}{}; what they stand for would not be computed",
        arch.name,
        unknown.join(", "),
        if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        }
    );
    // Embeddings, the layers by their numbers, the last norm and the head.
    let place = |name: &str| {
        let layer = name.strip_prefix("model.layers.");
        let layer = layer.and_then(|rest| rest.split('.').next()?.parse::<u64>().ok());
        match layer {
            Some(layer) => layer + 1,
            None if name.starts_with("model.embed_tokens") => 0,
            None => u64::MAX,
        }
    };
    tensors.sort_by(|a, b| (place(&a.name), &a.name).cmp(&(place(&b.name), &b.name)));
    Ok(tensors)
}

/// Writes `config.json`, `generation_config.json` and the weights of the model in `file` to the folder `out`. Memory holds a few MiB, or
/// one head of the widest permuted tensor. A file of weights is complete when the next tensor would take it above `max_shard_size`
/// bytes. `progress` is called with the bytes written so far and their total, and may stop with an error.
///
/// # Errors
/// The architecture, a type or a tensor is not supported, a value is not finite in the type `float`, or a file can't be read or written.
pub fn import(
    file: &File,
    float: Float,
    max_shard_size: u64,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let description = config::describe(file, float)?;
    let tensors = plan(file, &description)?;
    let mut kinds = BTreeMap::new();
    for tensor in &tensors {
        *kinds.entry(tensor.info.kind).or_default() += 1;
    }
    folder::write_config(out, description.config)?;
    let generation = serde_json::Value::Object(config::generation_config(file)?);
    std::fs::write(out.join(GENERATION_CONFIG), sorted_json(&generation)?)
        .with_context(|| format!("could not write `{GENERATION_CONFIG}`"))?;

    let mut total = 0u64;
    let mut shards: Vec<Vec<(Entry, Tensor<'_>)>> = vec![Vec::new()];
    let mut filled = 0u64;
    for tensor in tensors {
        let entry = Entry::new(&tensor.name, float.stored(), tensor.info.shape.clone());
        let size = entry.size()? as u64;
        total = total.checked_add(size).context("the model is too large")?;
        if filled > 0 && filled + size > max_shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(last) = shards.last_mut() {
            last.push((entry, tensor));
        }
    }
    let mut index = Index::default();
    let mut done = 0;
    let mut files = Vec::new();
    let count = shards.len();
    for (number, shard) in shards.into_iter().enumerate() {
        let name = if count == 1 {
            SINGLE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", number + 1)
        };
        let mut sizes = BTreeMap::new();
        let mut outputs = Vec::new();
        for (entry, tensor) in shard {
            index.add(&entry, &name)?;
            sizes.insert(entry.name.clone(), entry.size()? as u64);
            outputs.push(Output::pieces(entry, move |first, bytes| {
                tensor.fill(file, float, first, bytes)
            }));
        }
        let blake3 = write_file(&out.join(&name), outputs, &mut |name| {
            done += sizes.get(name).copied().unwrap_or(0);
            progress(done, total)
        })?;
        files.push(Written { name, blake3 });
    }
    if count > 1 {
        index.write(out)?;
    }
    Ok(Report {
        arch: description.arch.name,
        kinds,
        files,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::gguf::{MAGIC, VERSION};

    /// A vector of quantised values whose blocks are longer than heads, and a matrix, in pieces of all sizes.
    #[test]
    fn rows_are_permuted_back_whatever_the_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(b"x");
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(128u64.to_le_bytes());
        bytes.extend(GgmlType::Q8_0.id().to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        for block in 0..4u8 {
            bytes.extend(half::f16::ONE.to_le_bytes());
            bytes.extend((0..32).map(|value| block * 32 + value));
        }
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let vector = file.tensors()["x"].clone();
        let matrix = TensorInfo {
            shape: vec![4, 32],
            ..vector.clone()
        };
        for (info, head, width) in [(&vector, 16, 1), (&vector, 64, 1), (&matrix, 4, 32)] {
            let tensor = Tensor {
                name: String::new(),
                info,
                head: Some(head),
                offset: 1.,
            };
            let expected: Vec<f32> = (0..128)
                .map(|value: usize| {
                    let (row, column) = (value / width, value % width);
                    let inside = row % head;
                    let source = row - inside + 2 * (inside % (head / 2)) + inside / (head / 2);
                    (source * width + column) as f32 - 1.
                })
                .collect();
            for piece in [1, 7, 32, 100, 128] {
                let mut found = Vec::new();
                for first in (0..128).step_by(piece) {
                    let mut out = vec![0; 4 * piece.min(128 - first)];
                    tensor.fill(&file, Float::F32, 4 * first, &mut out).unwrap();
                    let values = out.as_chunks::<4>().0.iter();
                    found.extend(values.map(|bytes| f32::from_le_bytes(*bytes)));
                }
                let same = found
                    .iter()
                    .zip(&expected)
                    .all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(
                    same && found.len() == 128,
                    "{head} {width} {piece}: {found:?}"
                );
            }
        }
    }
}
