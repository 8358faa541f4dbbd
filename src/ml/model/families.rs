//! The families of models, one file each: they convert a `config.json` to the [`Arch`] that it describes, and back.
//!
//! A new family is a file beside these, declared here, and a line in [`FAMILIES`]. [`super::arch`] has the options that it may use; options
//! that no family has had before go there too.

mod gemma;
mod gemma2;
mod gemma3_text;
mod granite;
mod keys;
mod llama;
mod mistral;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen3;
mod ropes;
mod smollm3;
mod windows;

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value, json};

use self::keys::Keys;
use self::ropes::RopeDefaults;
use super::arch::{
    Activation, Arch, NormPlaces, Projection, QkNorm, Rope, WIDEST, default_score_scale,
};
use crate::ml::io::float::Float;

/// A family of models.
pub struct Family {
    /// Its `model_type` in `config.json`.
    pub model_type: &'static str,
    /// transformers' class of its causal language models.
    pub architecture: &'static str,
    /// The keys among [`FAMILY_KEYS`] that it reads.
    knows: &'static [&'static str],
    /// Reads the architecture. It is an error, which names the key, if something is not supported.
    describe: fn(Keys<'_>) -> anyhow::Result<Arch>,
    /// Gives a new model what the family prescribes: its pattern of layers, and the factors of its published models.
    prescribe: fn(&mut Arch),
    /// Writes the keys that not all families have.
    write: fn(&Arch, &mut Map<String, Value>),
}

/// All supported families.
pub const FAMILIES: &[Family] = &[
    llama::LLAMA,
    mistral::MISTRAL,
    qwen2::QWEN2,
    qwen3::QWEN3,
    smollm3::SMOLLM3,
    granite::GRANITE,
    gemma::GEMMA,
    gemma2::GEMMA2,
    gemma3_text::GEMMA3_TEXT,
    olmo2::OLMO2,
    olmo3::OLMO3,
    phi3::PHI3,
];

/// Model types that people try and that are not supported, each with what is missing.
const MISSING: [(&str, &str); 17] = [
    ("gemma3", "its vision part"),
    ("gemma3n", "its per-layer embeddings"),
    (
        "gemma4",
        "its per-layer embeddings and shared keys and values",
    ),
    ("granitemoe", "its mixture of experts"),
    (
        "granitemoehybrid",
        "its mixture of experts and its Mamba-2 layers",
    ),
    ("lfm2", "its convolution layers"),
    ("llama4", "its mixture of experts and its vision part"),
    ("mistral3", "its vision part"),
    ("mixtral", "its mixture of experts"),
    ("olmoe", "its mixture of experts"),
    ("gpt_oss", "its mixture of experts and its attention sinks"),
    ("phimoe", "its mixture of experts"),
    ("qwen2_5_vl", "its vision part"),
    ("qwen2_moe", "its mixture of experts"),
    ("qwen3_5", "its linear attention"),
    ("qwen3_moe", "its mixture of experts"),
    (
        "qwen3_next",
        "its mixture of experts and its linear attention",
    ),
];

/// transformers' defaults that differ between families, for keys that a file does not have.
struct Defaults {
    /// The number of key heads; if `None`, that of query heads.
    num_key_value_heads: Option<usize>,
    /// The width of a head; if `None`, `hidden_size / num_attention_heads`.
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    pad_token_id: Option<u32>,
    activation: Activation,
    /// The key of the activation.
    activation_key: &'static str,
    /// Whether `gelu` means its approximation by tanh.
    old_gelu: bool,
    rope: RopeDefaults,
    /// The bases of the rotary embeddings, and their keys in version 4, where layers without and with a window have one each.
    by_layer_type: Option<([f64; 2], [Option<&'static str>; 2])>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            pad_token_id: None,
            activation: Activation::Silu,
            activation_key: "hidden_act",
            old_gelu: false,
            rope: RopeDefaults::default(),
            by_layer_type: None,
        }
    }
}

/// Keys that change numbers in some families. In the others they have no effect, here as in transformers.
const FAMILY_KEYS: [&str; 22] = [
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_local_base_freq",
    "sliding_window",
    "sliding_window_pattern",
    "use_bidirectional_attention",
    "use_qk_norm",
    "use_sliding_window",
];

/// Keys that every family of transformers obeys and that are not supported, each with the only value that is accepted beside `null`.
const REFUSED: [(&str, Value, &str); 3] = [
    (
        "is_causal",
        Value::Bool(true),
        "attention to later tokens is not supported",
    ),
    (
        "per_layer_config",
        Value::Null,
        "layers of different sizes are not supported",
    ),
    (
        "transformers_weights",
        Value::Null,
        "weights by another name are not supported; hint: rename them to `model.safetensors`",
    ),
];

/// The family called `model_type`.
///
/// # Errors
/// There is no `model_type`, or it is not supported; the error names those that are.
pub fn family(model_type: Option<&str>) -> anyhow::Result<&'static Family> {
    let known = || {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
        format!("expected one of `{}`", names.join("`, `"))
    };
    let kind = model_type.with_context(|| format!("`model_type` is missing, {}", known()))?;
    if let Some((_, part)) = MISSING.iter().find(|(name, _)| *name == kind) {
        let instead = match kind {
            "gemma3" => "; expected a text model (`gemma3_text`), as those of 270M and 1B are",
            _ => "",
        };
        bail!("the model type `{kind}` is not supported: {part} can't be computed yet{instead}");
    }
    let family = FAMILIES.iter().find(|family| family.model_type == kind);
    family.with_context(|| format!("the model type `{kind}` is not supported, {}", known()))
}

impl Family {
    /// Whether its layers may have sliding windows.
    pub fn has_windows(&self) -> bool {
        self.knows.contains(&"sliding_window")
    }
}

impl Arch {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// The file can't be read, lacks a key, or has a setting that is not supported.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("could not read `{}`", path.display()))?;
        let parsed = serde_json::from_str(&text).map_err(anyhow::Error::from);
        let arch = parsed.and_then(|config| describe(&config));
        arch.with_context(|| format!("`{}` can't be used", path.display()))
    }
}

fn describe(config: &Value) -> anyhow::Result<Arch> {
    let family = family(config.get("model_type").and_then(Value::as_str))?;
    let keys = Keys(config);
    for (name, accepted, why) in &REFUSED {
        let value = keys.some(name).unwrap_or(accepted);
        let empty = value.as_object().is_some_and(Map::is_empty);
        ensure!(value == accepted || empty, "`{name}` is {value}: {why}");
    }
    (family.describe)(keys)
}

/// The keys of a `config.json` that describes a model, in the spelling of transformers 4, which 5 reads too. A family may have no key for
/// an option of [`Arch`]; reading the keys again shows whether something was lost.
///
/// # Errors
/// The family is not supported.
pub fn config_keys(arch: &Arch) -> anyhow::Result<Map<String, Value>> {
    let family = family(Some(arch.family))?;
    let eos = match arch.eos_token_ids[..] {
        [] => json!(null),
        [one] => json!(one),
        _ => json!(arch.eos_token_ids),
    };
    let rope = arch.ropes.first().context("there is no rotary embedding")?;
    let common = json!({
        "architectures": [family.architecture],
        "attention_dropout": arch.attention_dropout,
        "bos_token_id": arch.bos_token_id,
        "eos_token_id": eos,
        "head_dim": arch.head_dim,
        "hidden_act": match arch.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        },
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "model_type": family.model_type,
        "num_attention_heads": arch.num_attention_heads,
        "num_hidden_layers": arch.num_hidden_layers(),
        "num_key_value_heads": arch.num_key_value_heads,
        "pad_token_id": arch.pad_token_id,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_scaling": rope.scaling.as_ref().map(ropes::write_scaling),
        "rope_theta": rope.theta,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "use_cache": true,
        "vocab_size": arch.vocab_size,
    });
    let Value::Object(mut keys) = common else {
        return Ok(Map::new());
    };
    (family.write)(arch, &mut keys);
    Ok(keys)
}

/// The architecture `arch` with everything that its family prescribes (biases, norms, the pattern of layers, factors).
///
/// # Errors
/// It has a sliding window, which the family does not have, or sizes that the family refuses.
pub fn complete(arch: &Arch) -> anyhow::Result<Arch> {
    let mut arch = arch.clone();
    (family(Some(arch.family))?.prescribe)(&mut arch);
    let mut keys = config_keys(&arch)?;
    if let Some(float) = arch.dtype.and_then(Float::from_candle) {
        keys.insert("torch_dtype".into(), float.name().into());
    }
    let complete = describe(&Value::Object(keys))?;
    ensure!(
        complete.layers == arch.layers,
        "the model type `{}` has no sliding window",
        arch.family
    );
    Ok(Arch {
        dtype: arch.dtype,
        ..complete
    })
}

/// Reads what is the same in all families; layers, biases and norms of q and k are left to the family.
fn common(keys: Keys<'_>, family: &'static str, defaults: &Defaults) -> anyhow::Result<Arch> {
    let activation = keys.activation(
        defaults.activation_key,
        defaults.activation,
        defaults.old_gelu,
    )?;
    let hidden_size = keys.size("hidden_size")?;
    let num_attention_heads = keys.size("num_attention_heads")?;
    let num_key_value_heads = match defaults.num_key_value_heads {
        Some(default) if !keys.has("num_key_value_heads") => default,
        _ => keys.size_or("num_key_value_heads", num_attention_heads)?,
    };
    let head_dim = match defaults.head_dim {
        Some(default) if !keys.has("head_dim") => default,
        Some(_) => keys.size("head_dim")?,
        None => keys.size_or("head_dim", hidden_size / num_attention_heads)?,
    };
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
    let rms_norm_eps = keys.number_or("rms_norm_eps", defaults.rms_norm_eps)?;
    ensure!(
        rms_norm_eps >= 0.,
        "`rms_norm_eps` is {rms_norm_eps}, expected a number not below 0"
    );
    let length = keys.size_or("max_position_embeddings", defaults.max_position_embeddings)?;
    let (ropes, rotary_dim) = rotary_embeddings(keys, length, head_dim, defaults)?;
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
        rotary_dim,
        ropes,
        qk_norm: QkNorm::None,
        norm_places: NormPlaces::Before,
        norm_adds_one: false,
        activation,
        embedding_scale: 1.,
        residual_scale: 1.,
        score_scale: default_score_scale(head_dim),
        score_softcap: None,
        logit_scale: 1.,
        logit_softcap: None,
        fused_projections: false,
        biases: Vec::new(),
        tie_word_embeddings: keys.flag_or("tie_word_embeddings", defaults.tie_word_embeddings)?,
        scores: false,
        max_position_embeddings: length,
        attention_dropout: keys.number_or("attention_dropout", 0.)?,
        bos_token_id: keys.id("bos_token_id")?,
        eos_token_ids: keys.eos_ids()?,
        pad_token_id: if keys.has("pad_token_id") {
            keys.id("pad_token_id")?
        } else {
            defaults.pad_token_id
        },
        dtype: keys.dtype(),
        quantization: keys.quantization()?,
    })
}

/// The rotary embeddings of a model, and the number of features of a head that they rotate.
fn rotary_embeddings(
    keys: Keys<'_>,
    length: usize,
    head_dim: usize,
    defaults: &Defaults,
) -> anyhow::Result<(Vec<Rope>, usize)> {
    if let Some((thetas, names)) = defaults.by_layer_type {
        let ropes = ropes::by_layer_type(keys, length, head_dim, thetas, names)?;
        return Ok((ropes, head_dim));
    }
    let (rope, rotary_dim) = ropes::shared(keys, length, head_dim, &defaults.rope)?;
    Ok((vec![rope], rotary_dim))
}

/// The projections with biases in families whose attention has all or none of them, by the key `attention_bias`.
fn attention_biases(keys: Keys<'_>) -> anyhow::Result<Vec<Projection>> {
    let all = keys.flag("attention_bias")?;
    Ok(if all {
        Projection::ATTENTION.to_vec()
    } else {
        Vec::new()
    })
}

/// The same in families whose feed-forward block has biases by the key `mlp_bias` too.
fn biases(keys: Keys<'_>) -> anyhow::Result<Vec<Projection>> {
    let mut biases = attention_biases(keys)?;
    if keys.flag("mlp_bias")? {
        biases.extend(Projection::MLP);
    }
    Ok(biases)
}

/// The `model_type` of a folder's `config.json`, and the keys in it that change the numbers of other model types but have no effect on this
/// one, here as in transformers.
///
/// # Errors
/// The file can't be read, or its family is not supported.
pub fn without_effect(folder: &Path) -> anyhow::Result<(&'static str, Vec<&'static str>)> {
    let config = Value::Object(crate::ml::io::folder::config(folder)?);
    let family = family(config.get("model_type").and_then(Value::as_str))?;
    let is_set = |name: &&'static str| {
        let value = config.get(*name).unwrap_or(&Value::Null);
        let neutral = [json!(null), json!(false), json!(0), json!([])].contains(value);
        !neutral && value.as_f64() != Some(1.)
    };
    let unknown = FAMILY_KEYS
        .into_iter()
        .filter(|name| !family.knows.contains(name));
    Ok((family.model_type, unknown.filter(is_set).collect()))
}

#[cfg(test)]
mod published;
#[cfg(test)]
mod tests;
