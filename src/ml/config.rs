//! The shape of a Llama, from `config.json` in either of transformers' spellings.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;
use serde_json::Value;

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
    /// The first id of a text.
    pub bos_token_id: Option<u32>,
    /// The ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The id that fills batches up.
    pub pad_token_id: Option<u32>,
    /// The dtype the weights are meant to have.
    pub dtype: Option<DType>,
}

fn size(config: &Value, name: &str) -> anyhow::Result<usize> {
    let value = config.get(name).and_then(Value::as_u64);
    let value = value.and_then(|value| usize::try_from(value).ok());
    match value {
        Some(value) if value > 0 => Ok(value),
        _ => bail!("`{name}` is missing or not a number above 0"),
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

fn id(value: Option<&Value>) -> Option<u32> {
    value
        .and_then(Value::as_u64)
        .and_then(|id| u32::try_from(id).ok())
}

fn rope_scaling(scaling: &Value) -> anyhow::Result<Option<Llama3Rope>> {
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
    match kind.and_then(Value::as_str) {
        None | Some("default") => Ok(None),
        Some("llama3") => Ok(Some(Llama3Rope {
            factor: number(scaling, "factor")?,
            low_freq_factor: number(scaling, "low_freq_factor")?,
            high_freq_factor: number(scaling, "high_freq_factor")?,
            original_max_position_embeddings: size(scaling, "original_max_position_embeddings")?,
        })),
        Some(other) => {
            bail!("the rope type `{other}` is not supported, expected `default` or `llama3`")
        }
    }
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
        if let Some(kind) = config.get("model_type").and_then(Value::as_str) {
            ensure!(
                kind == "llama",
                "the model type `{kind}` is not supported, expected `llama`"
            );
        }
        if let Some(act) = config.get("hidden_act").and_then(Value::as_str) {
            ensure!(
                act == "silu",
                "the activation `{act}` is not supported, expected `silu`"
            );
        }
        for name in ["attention_bias", "mlp_bias"] {
            let on = config.get(name).and_then(Value::as_bool) == Some(true);
            ensure!(!on, "`{name}: true` is not supported");
        }
        let hidden_size = size(config, "hidden_size")?;
        let num_attention_heads = size(config, "num_attention_heads")?;
        let num_key_value_heads = size_or(config, "num_key_value_heads", num_attention_heads)?;
        let head_dim = size_or(config, "head_dim", hidden_size / num_attention_heads)?;
        ensure!(
            num_attention_heads.is_multiple_of(num_key_value_heads),
            "{num_attention_heads} query heads can't share {num_key_value_heads} key heads evenly"
        );
        ensure!(
            head_dim > 0 && head_dim.is_multiple_of(2),
            "the width of a head is {head_dim}, expected an even number"
        );
        let some = |name: &str| config.get(name).filter(|value| !value.is_null());
        // transformers 5 keeps both in `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
        let rope = some("rope_parameters");
        let scaling = rope.or_else(|| some("rope_scaling"));
        let theta = rope
            .and_then(|rope| rope.get("rope_theta"))
            .or_else(|| some("rope_theta"));
        let eos = some("eos_token_id");
        let eos_token_ids = match eos {
            Some(Value::Array(ids)) => ids.iter().filter_map(|value| id(Some(value))).collect(),
            one => id(one).into_iter().collect(),
        };
        let dtype = some("dtype").or_else(|| some("torch_dtype"));
        Ok(Self {
            vocab_size: size(config, "vocab_size")?,
            hidden_size,
            intermediate_size: size(config, "intermediate_size")?,
            num_hidden_layers: size(config, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: some("rms_norm_eps")
                .map_or(Ok(1e-6), |_| number(config, "rms_norm_eps"))?,
            rope_theta: theta.and_then(Value::as_f64).unwrap_or(10_000.),
            rope_scaling: scaling.map_or(Ok(None), rope_scaling)?,
            max_position_embeddings: size_or(config, "max_position_embeddings", 2048)?,
            tie_word_embeddings: some("tie_word_embeddings") == Some(&Value::Bool(true)),
            bos_token_id: id(some("bos_token_id")),
            eos_token_ids,
            pad_token_id: id(some("pad_token_id")),
            dtype: match dtype.and_then(Value::as_str) {
                Some("float32") => Some(DType::F32),
                Some("bfloat16") => Some(DType::BF16),
                Some("float16") => Some(DType::F16),
                _ => None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_say_the_same() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model");
        let new = LlamaConfig::read(&golden).unwrap();
        let text = std::fs::read_to_string(golden.join("config.v4style.json")).unwrap();
        let old = LlamaConfig::parse(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(new, old);
        assert!((new.rope_theta - 500_000.).abs() < 1e-9);
        assert_eq!(new.dtype, Some(DType::F32));
        assert_eq!(new.eos_token_ids, [1019]);
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let golden = include_str!("../../tests/golden/model/config.json");
        for (name, value) in [
            ("model_type", serde_json::json!("mistral")),
            ("attention_bias", serde_json::json!(true)),
            ("hidden_act", serde_json::json!("gelu")),
            ("rope_parameters", serde_json::json!({"rope_type": "yarn"})),
            ("num_key_value_heads", serde_json::json!(3)),
            ("vocab_size", serde_json::json!(-1)),
        ] {
            let mut config: Value = serde_json::from_str(golden).unwrap();
            config[name] = value;
            assert!(LlamaConfig::parse(&config).is_err(), "{name}");
        }
    }
}
