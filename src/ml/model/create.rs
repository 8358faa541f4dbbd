//! A Llama with random weights, as transformers initialises one: normal for matrices, ones for norms.
//!
//! Every value depends only on the seed, the tensor's name and its place in it, so neither threads nor the order of tensors
//! matter; and it is made from whole numbers, additions, multiplications, divisions and square roots, which every machine
//! rounds alike, so neither do machines.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use bytesize::ByteSize;
use pipeline_kernels::normal;
use pipeline_kernels::random::splitmix64;
use rayon::prelude::*;
use serde_json::json;

use super::arch::{Arch, LayerArch};
use crate::ml::io::float::Float;
use crate::ml::io::folder::{self, CONFIG};
use crate::ml::io::rewrite::{Index, Output, Written, write_file};
use crate::ml::io::weights::{Entry, SINGLE};
use crate::ml::lora::init::projections;

/// The most bytes of weights: some hundred times what the largest models have.
const LARGEST: u64 = 1 << 48;
/// Values that a thread takes at once; even, for they come in pairs.
const SPAN: usize = 1 << 12;

/// What a new model is made of beside its shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The standard deviation of the matrices' values.
    pub initializer_range: f64,
    /// The type that they are stored in.
    pub float: Float,
    /// The seed.
    pub seed: u64,
    /// Above so many bytes, weights go into several files.
    pub max_shard_size: u64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The number of values.
    pub parameters: u64,
    /// The files of weights.
    pub files: Vec<Written>,
}

/// Writes `config.json` and the weights. In memory are a few MiB at a time. `progress` is told the bytes written so far, of all,
/// and may stop.
pub fn create(
    config: &Arch,
    settings: Settings,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let bytes = parameters(config).saturating_mul(settings.float.size() as u64);
    ensure!(
        bytes <= LARGEST,
        "the model would have {} of weights, expected at most {}; are its sizes right?",
        ByteSize(bytes),
        ByteSize(LARGEST)
    );
    let entries = entries(config, settings.float);
    let size = |entry: &Entry| -> anyhow::Result<u64> { Ok(entry.size()? as u64) };
    let mut total = 0u64;
    for entry in &entries {
        let sum = total.checked_add(size(entry)?);
        total = sum.context("the model is too large")?;
    }
    write_config(config, settings, out)?;

    // As in transformers: a file is closed when the next tensor would take it above the limit.
    let mut files: Vec<Vec<Entry>> = vec![Vec::new()];
    let mut filled = 0u64;
    for entry in entries {
        let size = size(&entry)?;
        if filled > 0 && filled + size > settings.max_shard_size {
            files.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(last) = files.last_mut() {
            last.push(entry);
        }
    }
    let mut index = Index::default();
    let mut done = 0;
    let mut written = Vec::new();
    let count = files.len();
    for (number, entries) in files.into_iter().enumerate() {
        let file = if count == 1 {
            SINGLE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", number + 1)
        };
        let mut sizes = BTreeMap::new();
        let mut outputs = Vec::new();
        for entry in entries {
            index.add(&entry, &file)?;
            sizes.insert(entry.name.clone(), size(&entry)?);
            let name = entry.name.clone();
            outputs.push(Output::pieces(entry, move |first, bytes| {
                tensor(&name, first / settings.float.size(), bytes, settings);
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

/// The number of weights that a model of this shape has; a tied head counts once. Whatever [`Arch::read`] accepts can be
/// counted.
pub fn parameters(config: &Arch) -> u64 {
    let values = |entry: &Entry| {
        let sizes = entry.shape.iter().map(|size| *size as u64);
        sizes.fold(1, u64::saturating_mul)
    };
    let one = Arch {
        layers: vec![LayerArch::default()],
        ..config.clone()
    };
    let layers = config.num_hidden_layers() as u64;
    let all = entries(&one, Float::F32);
    let sizes = all.iter().map(|entry| {
        let times = if entry.name.contains(".layers.") {
            layers
        } else {
            1
        };
        values(entry).saturating_mul(times)
    });
    sizes.fold(0, u64::saturating_add)
}

/// All tensors, in the order of torch's modules.
fn entries(config: &Arch, float: Float) -> Vec<Entry> {
    let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
    let matrix = |name: String, (rows, columns)| Entry::new(name, float.stored(), [rows, columns]);
    let norm = |name: String| Entry::new(name, float.stored(), [hidden]);
    let mut entries = vec![matrix(
        "model.embed_tokens.weight".into(),
        (vocabulary, hidden),
    )];
    for layer in 0..config.num_hidden_layers() {
        let path = format!("model.layers.{layer}");
        for projection in projections(config) {
            entries.push(matrix(
                format!("{path}.{}.weight", projection.path),
                projection.shape,
            ));
        }
        entries.push(norm(format!("{path}.input_layernorm.weight")));
        entries.push(norm(format!("{path}.post_attention_layernorm.weight")));
    }
    entries.push(norm("model.norm.weight".into()));
    if !config.tie_word_embeddings {
        entries.push(matrix("lm_head.weight".into(), (vocabulary, hidden)));
    }
    entries
}

/// The values of a tensor from number `first` on, which is even.
fn tensor(name: &str, first: usize, bytes: &mut [u8], settings: Settings) {
    let size = settings.float.size();
    let is_norm = name.ends_with("norm.weight");
    let key = key(settings.seed, name);
    let spans = bytes.par_chunks_mut(SPAN * size).enumerate();
    spans.for_each(|(span, bytes)| {
        let mut values = [1f32; SPAN];
        let values = &mut values[..bytes.len() / size];
        if !is_norm {
            let pair = (first as u64 + (span * SPAN) as u64) >> 1;
            normal::fill(key, pair, settings.initializer_range, values);
        }
        settings.float.write(values, bytes);
    });
}

/// A tensor's own number: FNV-1a of its name, mixed with the seed.
fn key(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut state = seed;
    let mixed = splitmix64(&mut state);
    let mut state = mixed ^ hash;
    splitmix64(&mut state)
}

/// `config.json` in the spelling of transformers 4, which 5 reads too.
fn write_config(config: &Arch, settings: Settings, out: &Path) -> anyhow::Result<()> {
    let eos = match config.eos_token_ids[..] {
        [] => json!(null),
        [one] => json!(one),
        _ => json!(config.eos_token_ids),
    };
    let scaling = config.rope.scaling.as_ref().map(|rope| {
        json!({
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        })
    });
    let raw = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": settings.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers(),
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": settings.float.name(),
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    let serde_json::Value::Object(raw) = raw else {
        return Ok(());
    };
    folder::write_config(out, raw)?;
    // What we write must be what we read, or the shape was never possible.
    let read = Arch::read(out)?;
    let expected = Arch {
        dtype: Some(settings.float.dtype()),
        ..config.clone()
    };
    ensure!(read == expected, "`{CONFIG}` would not describe the model");
    Ok(())
}

#[cfg(test)]
mod tests;
