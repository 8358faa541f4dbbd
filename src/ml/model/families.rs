//! The families of models, one file each: from a `config.json` to the [`Arch`] that it describes.
//!
//! A new family is one file beside these and its line in [`FAMILIES`].

mod keys;
mod llama;

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use self::keys::Keys;
use super::arch::{Arch, QkNorm, WIDEST};

/// A family of models.
pub struct Family {
    /// What `config.json` calls it.
    pub model_type: &'static str,
    /// Reads the description. What can't be computed is an error that names the key.
    describe: fn(Keys<'_>) -> anyhow::Result<Arch>,
}

/// Every family that can be computed.
pub const FAMILIES: &[Family] = &[llama::LLAMA];

impl Arch {
    /// Reads `config.json` of a model folder. What this program can't compute is an error.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("could not read `{}`", path.display()))?;
        let parsed = serde_json::from_str(&text).map_err(anyhow::Error::from);
        let arch = parsed.and_then(|config| describe(&config));
        arch.with_context(|| format!("`{}` does not describe a supported model", path.display()))
    }
}

fn describe(config: &Value) -> anyhow::Result<Arch> {
    let known = || {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
        format!("expected `{}`", names.join("`, `"))
    };
    let kind = config.get("model_type").and_then(Value::as_str);
    let kind = kind.with_context(|| format!("`model_type` is missing, {}", known()))?;
    let family = FAMILIES.iter().find(|family| family.model_type == kind);
    let family =
        family.with_context(|| format!("the model type `{kind}` is not supported, {}", known()))?;
    (family.describe)(Keys(config))
}

/// What all families read alike; layers, biases and norms of q and k are left to the family.
fn common(keys: Keys<'_>, family: &'static str) -> anyhow::Result<Arch> {
    keys.check_activation()?;
    let hidden_size = keys.size("hidden_size")?;
    let num_attention_heads = keys.size("num_attention_heads")?;
    let num_key_value_heads = keys.size_or("num_key_value_heads", num_attention_heads)?;
    let head_dim = keys.size_or("head_dim", hidden_size / num_attention_heads)?;
    ensure!(
        num_attention_heads.is_multiple_of(num_key_value_heads),
        "{num_attention_heads} query heads can't share {num_key_value_heads} key heads evenly"
    );
    ensure!(
        head_dim > 0 && head_dim.is_multiple_of(2),
        "the width of a head is {head_dim}, expected an even number"
    );
    let width = num_attention_heads * head_dim;
    ensure!(
        width <= WIDEST,
        "{num_attention_heads} heads of the width {head_dim} are {width} wide, expected at most {WIDEST}"
    );
    let rms_norm_eps = keys.number_or("rms_norm_eps", 1e-6)?;
    ensure!(
        rms_norm_eps >= 0.,
        "`rms_norm_eps` is {rms_norm_eps}, expected a number not below 0"
    );
    Ok(Arch {
        family,
        vocab_size: keys.size("vocab_size")?,
        hidden_size,
        intermediate_size: keys.size("intermediate_size")?,
        layers: Vec::new(),
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps,
        rope: keys.rope()?,
        qk_norm: QkNorm::None,
        biases: Vec::new(),
        tie_word_embeddings: keys.flag("tie_word_embeddings")?,
        max_position_embeddings: keys.size_or("max_position_embeddings", 2048)?,
        attention_dropout: keys.number_or("attention_dropout", 0.)?,
        bos_token_id: keys.id("bos_token_id")?,
        eos_token_ids: keys.eos_ids()?,
        pad_token_id: keys.id("pad_token_id")?,
        dtype: keys.dtype(),
        quantization: keys.quantization()?,
    })
}

/// Keys that change the numbers of other model types; a Llama has none of them.
const OF_OTHERS: [&str; 14] = [
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "sliding_window",
    "use_qk_norm",
];

/// The keys of a folder's `config.json` that change the numbers of other model types, but have no effect on a Llama, here as in
/// transformers.
pub fn without_effect(folder: &Path) -> anyhow::Result<Vec<&'static str>> {
    let config = Value::Object(crate::ml::io::folder::config(folder)?);
    let is_set = |name: &&'static str| {
        let value = config.get(*name).unwrap_or(&Value::Null);
        let neutral = [json!(null), json!(false), json!(0), json!([])].contains(value);
        !neutral && value.as_f64() != Some(1.)
    };
    Ok(OF_OTHERS.into_iter().filter(is_set).collect())
}

#[cfg(test)]
mod tests;
