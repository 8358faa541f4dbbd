//! Gemma 1 (transformers' `configuration_gemma.py` and `modular_gemma.py`), and what the later ones have in common with it: norms that
//! multiply by `1 + w`, scaled embeddings, and GELU for the gate.

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, attention_biases, common};
use crate::ml::io::float::Float;
use crate::ml::model::arch::{Activation, Arch, LayerArch, Projection};

pub(super) const GEMMA: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    knows: &["attention_bias", "use_bidirectional_attention"],
    describe,
    prescribe: |_| (),
    write,
};

/// What all Gemmas take where a file is silent.
pub(super) fn defaults() -> Defaults {
    Defaults {
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        pad_token_id: Some(0),
        activation: Activation::GeluTanh,
        activation_key: "hidden_activation",
        ..Defaults::default()
    }
}

/// What all Gemmas compute.
pub(super) fn gemma(
    keys: Keys<'_>,
    model_type: &'static str,
    defaults: &Defaults,
) -> anyhow::Result<Arch> {
    let bidirectional = "use_bidirectional_attention";
    ensure!(
        !keys.flag(bidirectional)?,
        "`{bidirectional}` is true: attention to later tokens is not supported"
    );
    let arch = common(keys, model_type, defaults)?;
    // transformers rounds the factor to the dtype of the weights.
    let scale = (arch.hidden_size as f64).sqrt();
    let float = arch.dtype.and_then(Float::from_candle);
    let embedding_scale = float.unwrap_or(Float::F32).round(scale as f32);
    Ok(Arch {
        biases: attention_biases(keys)?,
        norm_adds_one: true,
        embedding_scale: f64::from(embedding_scale),
        ..arch
    })
}

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        num_key_value_heads: Some(16),
        activation_key: "hidden_act",
        old_gelu: true,
        ..defaults()
    };
    Ok(Arch {
        layers: vec![LayerArch::default(); keys.size("num_hidden_layers")?],
        ..gemma(keys, GEMMA.model_type, &defaults)?
    })
}

/// Writes the keys of all Gemmas.
pub(super) fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    let activation = keys.get("hidden_act").cloned();
    keys.insert("hidden_activation".into(), json!(activation));
}
