//! The shape of a Llama, from `config.json` in either of transformers' spellings.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use crate::ml::io::float::Float;

/// Llama 3's scaling of the rotation's long waves.
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Rope {
    /// By how much long waves are stretched.
    pub factor: f64,
    /// The share of the original length above which a wave is long.
    pub low_freq_factor: f64,
    /// The share below which it is short.
    pub high_freq_factor: f64,
    /// The length the model was first trained for.
    pub original_max_position_embeddings: usize,
}

/// What `config.json` says about a Llama.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Token ids.
    pub vocab_size: usize,
    /// The width of the hidden states.
    pub hidden_size: usize,
    /// The width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key heads, each shared by as many query heads.
    pub num_key_value_heads: usize,
    /// The width of a head.
    pub head_dim: usize,
    /// Keeps the norm's division finite.
    pub rms_norm_eps: f64,
    /// The base of the rotation's waves.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: Option<Llama3Rope>,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the head is the embeddings.
    pub tie_word_embeddings: bool,
    /// Whether the attention's projections add a bias.
    pub attention_bias: bool,
    /// Whether those of the feed-forward part do.
    pub mlp_bias: bool,
    /// The probability of dropping an attention weight in training, which is not computed here.
    pub attention_dropout: f64,
    /// The first id of a text.
    pub bos_token_id: Option<u32>,
    /// The ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The id that fills batches up.
    pub pad_token_id: Option<u32>,
    /// The dtype the weights are meant to have.
    pub dtype: Option<DType>,
    /// How the weights are quantised, if they are.
    pub quantization: Option<Quantization>,
}

/// What `quantization_config` says about weights in bitsandbytes' NF4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// Whether the magnitudes are quantised too.
    pub double_quant: bool,
    /// The dtype that transformers computes products in.
    pub compute_dtype: Option<DType>,
}

/// The largest numbers that are accepted. They are far above any model's, and the bytes of all weights of the largest such model
/// can be counted in 63 bits.
const LARGEST: [(&str, usize); 7] = [
    ("vocab_size", 1 << 26),
    ("hidden_size", 1 << 20),
    ("intermediate_size", 1 << 24),
    ("num_hidden_layers", 1 << 14),
    ("num_attention_heads", 1 << 16),
    ("num_key_value_heads", 1 << 16),
    ("head_dim", 1 << 16),
];
/// The largest product of `num_attention_heads` and `head_dim`.
const WIDEST: usize = 1 << 24;

/// The largest number that is accepted for a size of `config.json`.
pub fn largest(name: &str) -> usize {
    let own = LARGEST.iter().find(|(own, _)| *own == name);
    own.map_or(u32::MAX as usize, |(_, largest)| *largest)
}

fn dtype(value: Option<&Value>) -> Option<DType> {
    let name = value.and_then(Value::as_str)?;
    let name = name.strip_prefix("torch.").unwrap_or(name);
    Some(Float::named(name)?.dtype())
}

fn quantization(config: &Value) -> anyhow::Result<Quantization> {
    let method = config.get("quant_method").and_then(Value::as_str);
    ensure!(
        method.is_none_or(|method| method == "bitsandbytes"),
        "weights quantised by `{}` are not supported, expected plain ones or bitsandbytes' nf4",
        method.unwrap_or_default()
    );
    let on = |name: &str| config.get(name).and_then(Value::as_bool) == Some(true);
    let kind = config.get("bnb_4bit_quant_type").and_then(Value::as_str);
    ensure!(
        on("load_in_4bit") && kind == Some("nf4"),
        "bitsandbytes' {} is not supported, expected nf4",
        if on("load_in_8bit") {
            "8 bits"
        } else {
            kind.unwrap_or("quantisation of an unnamed type")
        }
    );
    Ok(Quantization {
        double_quant: on("bnb_4bit_use_double_quant"),
        compute_dtype: dtype(config.get("bnb_4bit_compute_dtype")),
    })
}

fn size(config: &Value, name: &str) -> anyhow::Result<usize> {
    let value = config.get(name).and_then(Value::as_u64);
    let value = value.and_then(|value| usize::try_from(value).ok());
    let largest = largest(name);
    match value {
        Some(value) if value > 0 && value <= largest => Ok(value),
        _ => bail!("`{name}` is missing or not a whole number from 1 to {largest}"),
    }
}

fn size_or(config: &Value, name: &str, default: usize) -> anyhow::Result<usize> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(_) => size(config, name),
    }
}

fn number(config: &Value, name: &str) -> anyhow::Result<f64> {
    let value = config.get(name).and_then(Value::as_f64);
    value.with_context(|| format!("`{name}` is missing or not a number"))
}

/// A token id; `null`, and -1 in old files, mean that there is none.
fn id(value: &Value, name: &str) -> anyhow::Result<Option<u32>> {
    if value.is_null() || value.as_i64() == Some(-1) {
        return Ok(None);
    }
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    let id = id.with_context(|| format!("`{name}` is {value}, expected a token id"))?;
    Ok(Some(id))
}

fn id_of(config: &Value, name: &str) -> anyhow::Result<Option<u32>> {
    config.get(name).map_or(Ok(None), |value| id(value, name))
}

fn eos_ids(config: &Value) -> anyhow::Result<Vec<u32>> {
    let name = "eos_token_id";
    let ids = match config.get(name) {
        Some(Value::Array(ids)) => ids.iter().collect(),
        one => one.into_iter().collect::<Vec<_>>(),
    };
    let ids: Vec<_> = ids
        .into_iter()
        .map(|one| id(one, name))
        .collect::<anyhow::Result<_>>()?;
    Ok(ids.into_iter().flatten().collect())
}

/// Yes or no; a key that is not there means no.
fn flag(config: &Value, name: &str) -> anyhow::Result<bool> {
    match config.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(other) => bail!("`{name}` is {other}, expected true or false"),
    }
}

/// transformers 5 keeps both in `rope_parameters`; before, there were `rope_theta` and `rope_scaling`. Where a file has both
/// spellings, `rope_scaling` counts, as in transformers.
fn rope(config: &Value) -> anyhow::Result<(f64, Option<Llama3Rope>)> {
    let some = |name: &str| config.get(name).filter(|value| !value.is_null());
    let filled = |name: &str| some(name).filter(|value| *value != &json!({}));
    let positive = |value: f64| value > 0. && value.is_finite();
    let name = if filled("rope_scaling").is_some() {
        "rope_scaling"
    } else {
        "rope_parameters"
    };
    let parameters = filled(name);
    let theta = match parameters.and_then(|rope| rope.get("rope_theta")) {
        Some(theta) => Some(theta),
        None => some("rope_theta"),
    };
    let theta = match theta {
        Some(theta) => theta
            .as_f64()
            .filter(|theta| positive(*theta))
            .with_context(|| format!("`rope_theta` is {theta}, expected a number above 0"))?,
        // The only guess: transformers' own, for the first Llamas, whose files don't say it.
        None => 10_000.,
    };
    let full = some("partial_rotary_factor").is_none_or(|factor| factor.as_f64() == Some(1.));
    ensure!(
        full,
        "`partial_rotary_factor` is not 1; the heads of a Llama are rotated whole"
    );
    let scaling = parameters.map_or(Ok(None), |rope| rope_scaling(config, name, rope))?;
    if let Some(rope) = &scaling {
        ensure!(
            positive(rope.factor)
                && positive(rope.low_freq_factor)
                && rope.high_freq_factor > rope.low_freq_factor,
            "the factors of the rope type `llama3` are out of order"
        );
    }
    Ok((theta, scaling))
}

/// The parameters of the rope types that are computed.
const ROPE_KEYS: [(&str, &[&str]); 2] = [
    ("default", &[]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor"]),
];

fn rope_scaling(config: &Value, name: &str, scaling: &Value) -> anyhow::Result<Option<Llama3Rope>> {
    let keys = scaling.as_object();
    let keys = keys.with_context(|| format!("`{name}` is {scaling}, expected an object"))?;
    let kind = match scaling.get("rope_type").or_else(|| scaling.get("type")) {
        None => "default",
        Some(kind) => kind
            .as_str()
            .with_context(|| format!("the `rope_type` is {kind}, expected a text"))?,
    };
    let found = ROPE_KEYS.iter().find(|(known, _)| *known == kind);
    let Some((_, own)) = found else {
        bail!("the rope type `{kind}` is not supported, expected `default` or `llama3`");
    };
    let common = [
        "rope_type",
        "type",
        "rope_theta",
        "original_max_position_embeddings",
    ];
    // Factors that change nothing.
    let neutral = |key: &str, value: &Value| {
        value.is_null() || key.ends_with("factor") && value.as_f64() == Some(1.)
    };
    for (key, value) in keys {
        let known = common.contains(&key.as_str()) || own.contains(&key.as_str());
        ensure!(
            known || neutral(key, value),
            "`{name}` has `{key}`, which the rope type `{kind}` doesn't know; was another `rope_type` meant? transformers \
             warns of it and goes on without; hint: remove the key if that is right"
        );
    }
    if kind == "default" {
        return Ok(None);
    }
    // As in transformers: the file's own, else the rope's, else the model's length.
    let original = "original_max_position_embeddings";
    let some = |place: &Value| place.get(original).is_some_and(|value| !value.is_null());
    let original_max_position_embeddings = if some(config) {
        size(config, original)?
    } else if some(scaling) {
        size(scaling, original)?
    } else {
        size_or(config, "max_position_embeddings", 2048)?
    };
    Ok(Some(Llama3Rope {
        factor: number(scaling, "factor")?,
        low_freq_factor: number(scaling, "low_freq_factor")?,
        high_freq_factor: number(scaling, "high_freq_factor")?,
        original_max_position_embeddings,
    }))
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

impl LlamaConfig {
    /// Reads `config.json` of a model folder. What this program can't compute is an error.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("could not read `{}`", path.display()))?;
        let parsed = serde_json::from_str(&text).map_err(anyhow::Error::from);
        let config = parsed.and_then(|config| Self::parse(&config));
        config.with_context(|| format!("`{}` does not describe a Llama", path.display()))
    }

    fn parse(config: &Value) -> anyhow::Result<Self> {
        let kind = config.get("model_type").and_then(Value::as_str);
        let kind = kind.context("`model_type` is missing, expected `llama`")?;
        ensure!(
            kind == "llama",
            "the model type `{kind}` is not supported, expected `llama`"
        );
        if let Some(act) = config.get("hidden_act") {
            // Two names of one function.
            ensure!(
                act == "silu" || act == "swish",
                "the activation `{}` (`hidden_act`) is not supported, expected `silu`",
                act.as_str().map_or_else(|| act.to_string(), str::to_owned)
            );
        }
        let hidden_size = size(config, "hidden_size")?;
        let num_attention_heads = size(config, "num_attention_heads")?;
        let num_key_value_heads = size_or(config, "num_key_value_heads", num_attention_heads)?;
        let head_dim = size_or(config, "head_dim", hidden_size / num_attention_heads)?;
        ensure!(
            hidden_size.is_multiple_of(num_attention_heads),
            "`hidden_size` {hidden_size} is no multiple of the {num_attention_heads} attention heads, which transformers refuses"
        );
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
        let some = |name: &str| config.get(name).filter(|value| !value.is_null());
        let (rope_theta, rope_scaling) = rope(config)?;
        let quantized = some("quantization_config").map(quantization).transpose()?;
        let rms_norm_eps =
            some("rms_norm_eps").map_or(Ok(1e-6), |_| number(config, "rms_norm_eps"))?;
        ensure!(
            rms_norm_eps >= 0.,
            "`rms_norm_eps` is {rms_norm_eps}, expected a number not below 0"
        );
        let attention_dropout =
            some("attention_dropout").map_or(Ok(0.), |_| number(config, "attention_dropout"))?;
        Ok(Self {
            vocab_size: size(config, "vocab_size")?,
            hidden_size,
            intermediate_size: size(config, "intermediate_size")?,
            num_hidden_layers: size(config, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            max_position_embeddings: size_or(config, "max_position_embeddings", 2048)?,
            tie_word_embeddings: flag(config, "tie_word_embeddings")?,
            attention_bias: flag(config, "attention_bias")?,
            mlp_bias: flag(config, "mlp_bias")?,
            attention_dropout,
            bos_token_id: id_of(config, "bos_token_id")?,
            eos_token_ids: eos_ids(config)?,
            pad_token_id: id_of(config, "pad_token_id")?,
            dtype: dtype(some("dtype").or_else(|| some("torch_dtype"))),
            quantization: quantized,
        })
    }
}

#[cfg(test)]
mod tests;
