//! A model's architecture as the keys of a GGUF file, by the names and with the meaning of llama.cpp's converter (`conversion/*.py`), and the
//! tensors that hold factors of the rotary embeddings.
//!
//! What llama.cpp computes in another way than the family does in transformers is an error, or a warning where it only matters beyond
//! some length.

mod ropes;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value as Json};

use super::names::GgufArch;
use super::{Array, Value};
use crate::ml::model::arch::{Activation, Arch, Projection};
use crate::ml::model::families::config_keys;

/// What a GGUF file says of an architecture.
#[derive(Debug, Default)]
pub(super) struct Hyperparameters {
    /// The keys of the metadata.
    pub(super) keys: Vec<(String, Value)>,
    /// Tensors beside the model's weights, by their names in the file.
    pub(super) tensors: Vec<(&'static str, Vec<f32>)>,
    /// What llama.cpp does in another way.
    pub(super) warnings: Vec<String>,
}

/// The keys of a `config.json`, with transformers' names.
struct Config<'c> {
    keys: &'c Map<String, Json>,
    prefix: &'static str,
    out: Hyperparameters,
}

impl Config<'_> {
    fn number(&self, name: &str) -> Option<f64> {
        self.keys.get(name).and_then(Json::as_f64)
    }

    fn size(&self, name: &str) -> anyhow::Result<u32> {
        let size = self.keys.get(name).and_then(Json::as_u64);
        let size = size.and_then(|size| u32::try_from(size).ok());
        size.with_context(|| format!("`{name}` is missing in the model's configuration"))
    }

    fn put(&mut self, name: &str, value: Value) {
        self.out
            .keys
            .push((format!("{}.{name}", self.prefix), value));
    }

    fn put_number(&mut self, name: &str, value: f64) {
        self.put(name, Value::F32(value as f32));
    }

    /// Copies a number, if there is one.
    fn copy(&mut self, name: &str, from: &str) {
        if let Some(value) = self.number(from) {
            self.put_number(name, value);
        }
    }
}

/// The keys and tensors for `arch`.
///
/// # Errors
/// llama.cpp computes such a model in another way, or the configuration lacks a key.
pub(super) fn hyperparameters(gguf: &GgufArch, arch: &Arch) -> anyhow::Result<Hyperparameters> {
    let keys = config_keys(arch)?;
    let mut config = Config {
        keys: &keys,
        prefix: gguf.name,
        out: Hyperparameters::default(),
    };
    for (name, from) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
    ] {
        let size = config.size(from)?;
        config.put(name, Value::U32(size));
    }
    let head = u32::try_from(arch.head_dim)?;
    for name in ["attention.key_length", "attention.value_length"] {
        config.put(name, Value::U32(head));
    }
    config.put_number("attention.layer_norm_rms_epsilon", arch.rms_norm_eps);
    ropes::write(&mut config, gguf, arch)?;
    check_options(gguf, arch)?;
    windows(&mut config, gguf, arch)?;
    match gguf.name {
        "granite" => {
            config.copy("attention.scale", "attention_multiplier");
            config.copy("embedding_scale", "embedding_multiplier");
            config.copy("residual_scale", "residual_multiplier");
            config.copy("logit_scale", "logits_scaling");
        }
        "gemma2" | "gemma3" => {
            // Without the keys llama.cpp takes 50 and 30.
            ensure!(
                gguf.name == "gemma3"
                    || arch.score_softcap.is_some() && arch.logit_softcap.is_some(),
                "llama.cpp computes Gemma 2 with soft-caps only, of scores and of logits, and this model lacks one"
            );
            config.copy("attn_logit_softcapping", "attn_logit_softcapping");
            config.copy("final_logit_softcapping", "final_logit_softcapping");
            score_scale(&config, gguf, arch)?;
        }
        _ => {}
    }
    Ok(config.out)
}

/// What llama.cpp has built in for an architecture: which layers rotate, the activation, and which projections may have biases.
fn check_options(gguf: &GgufArch, arch: &Arch) -> anyhow::Result<()> {
    let every_fourth = gguf.name == "smollm3";
    let rotates = |layer: usize| !(every_fourth && (layer + 1).is_multiple_of(4));
    let other = arch
        .layers
        .iter()
        .enumerate()
        .find(|(number, layer)| layer.rope.is_some() != rotates(*number));
    ensure!(
        other.is_none(),
        "llama.cpp rotates queries and keys of `{}` models in {}, and this model does not in layer {}",
        gguf.name,
        if every_fourth {
            "all layers but every fourth"
        } else {
            "all layers"
        },
        other.map_or(0, |(number, _)| number)
    );
    let gelu = ["gemma", "gemma2", "gemma3"].contains(&gguf.name);
    ensure!(
        gelu == (arch.activation == Activation::GeluTanh),
        "llama.cpp computes `{}` models with {} in the gate, and this model has {:?}",
        gguf.name,
        if gelu { "GELU" } else { "SiLU" },
        arch.activation
    );
    let all = ["llama", "granite"].contains(&gguf.name);
    let qkv = [Projection::Q, Projection::K, Projection::V, Projection::Qkv];
    let bias = arch.biases.iter().find(|bias| !all && !qkv.contains(bias));
    ensure!(
        bias.is_none(),
        "llama.cpp has no bias beside this projection of `{}` models: {bias:?}",
        gguf.name
    );
    check_shapes(gguf, arch)
}

/// What llama.cpp takes for granted of an architecture's tensors: it doesn't open a file in which that is otherwise.
fn check_shapes(gguf: &GgufArch, arch: &Arch) -> anyhow::Result<()> {
    let all_heads = arch.num_attention_heads * arch.head_dim;
    ensure!(
        all_heads == arch.hidden_size || !["qwen2", "olmo2", "phi3"].contains(&gguf.name),
        "the heads of `{}` models are together as wide as the hidden states in llama.cpp, and this model's are {all_heads} wide in place of {}",
        gguf.name,
        arch.hidden_size
    );
    let tied = arch.tie_word_embeddings;
    let (never, always) = (
        gguf.name == "olmo2",
        ["gemma", "gemma2"].contains(&gguf.name),
    );
    ensure!(
        !(tied && never || !tied && always),
        "llama.cpp knows `{}` models only {} the embeddings for a head, and this model has `tie_word_embeddings: {tied}`",
        gguf.name,
        if never { "without" } else { "with" }
    );
    Ok(())
}

/// llama.cpp scales Gemma's scores by the width of a head, and in the largest models by that of the hidden states for a head.
fn score_scale(config: &Config<'_>, gguf: &GgufArch, arch: &Arch) -> anyhow::Result<()> {
    let largest = match gguf.name {
        "gemma2" => 46,
        _ => 62,
    };
    let theirs = if arch.num_hidden_layers() == largest {
        arch.hidden_size / arch.num_attention_heads
    } else {
        arch.head_dim
    };
    let ours = config.number("query_pre_attn_scalar");
    let differs = ours.is_some_and(|ours| (ours - theirs as f64).abs() > 1e-6);
    ensure!(
        !differs,
        "`query_pre_attn_scalar` is {}, and llama.cpp takes {theirs} for such a model: its answers would be others",
        ours.unwrap_or_default()
    );
    Ok(())
}

/// Sliding windows: written where llama.cpp computes them.
fn windows(config: &mut Config<'_>, gguf: &GgufArch, arch: &Arch) -> anyhow::Result<()> {
    let mut sizes: Vec<usize> = arch
        .layers
        .iter()
        .filter_map(|layer| layer.window)
        .collect();
    sizes.dedup();
    let Some(size) = sizes.first().copied() else {
        if gguf.name == "phi3" {
            // llama.cpp tells Phi-4 from the others by it.
            config.put("attention.sliding_window", Value::U32(0));
        } else if gguf.name == "gemma2" {
            // Without a key llama.cpp takes 4096 for every second layer.
            bail!(
                "the model has no sliding window, and llama.cpp computes Gemma 2 with windows only"
            );
        }
        return Ok(());
    };
    ensure!(
        sizes.len() == 1,
        "the layers have windows of several sizes, which GGUF can't hold"
    );
    match gguf.name {
        "gemma2" | "gemma3" | "olmo2" => {
            config.put("attention.sliding_window", Value::U32(u32::try_from(size)?));
            let pattern = arch.layers.iter().map(|layer| layer.window.is_some());
            config.put(
                "attention.sliding_window_pattern",
                Value::Array(Array::Bool(pattern.collect())),
            );
            Ok(())
        }
        name => {
            if name == "phi3" {
                config.put("attention.sliding_window", Value::U32(u32::try_from(size)?));
            }
            config.out.warnings.push(format!(
                "llama.cpp computes `{name}` models without sliding windows: answers are the model's up to {size} tokens, and others beyond"
            ));
            Ok(())
        }
    }
}
