//! A model's architecture as the keys of a GGUF file, by the names and with the meaning of llama.cpp's converter (`conversion/*.py`), and the
//! tensors that hold factors of the rotary embedding.
//!
//! What llama.cpp computes in another way than the family does in transformers is an error, or a warning where it only matters beyond
//! some length.

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

    /// The setting of the rotary embedding; newer files have it in `rope_parameters`, for each type of layer where they differ.
    fn rope(&self, name: &str) -> Option<&Json> {
        let parameters = self.keys.get("rope_parameters").and_then(Json::as_object);
        let own = parameters.map(|all| {
            let full = all.get("full_attention").and_then(Json::as_object);
            full.unwrap_or(all)
        });
        let scaling = self.keys.get("rope_scaling").and_then(Json::as_object);
        let found = own.and_then(|own| own.get(name));
        let found = found.or_else(|| scaling.and_then(|scaling| scaling.get(name)));
        found.or_else(|| self.keys.get(name).filter(|_| name == "rope_theta"))
    }

    fn rope_number(&self, name: &str) -> Option<f64> {
        self.rope(name).and_then(Json::as_f64)
    }

    fn rope_factors(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        let factors = self.rope(name).and_then(Json::as_array);
        let factors = factors.with_context(|| format!("the rotary embedding has no `{name}`"))?;
        let numbers = factors
            .iter()
            .map(|factor| factor.as_f64().map(|f| f as f32));
        let numbers: Option<Vec<f32>> = numbers.collect();
        numbers.with_context(|| format!("`{name}` of the rotary embedding is no list of numbers"))
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
    rope(&mut config, u32::try_from(arch.rotary_dim)?)?;
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
    let gelu = ["gemma2", "gemma3"].contains(&gguf.name);
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

/// The rotary embedding.
fn rope(config: &mut Config<'_>, width: u32) -> anyhow::Result<()> {
    let theta = config.rope_number("rope_theta").unwrap_or(10_000.);
    config.put("rope.dimension_count", Value::U32(width));
    config.put_number("rope.freq_base", theta);
    let local = config.keys.get("rope_parameters");
    let local = local.and_then(|all| all.get("sliding_attention")?.get("rope_theta")?.as_f64());
    if let Some(local) = local.or_else(|| config.number("rope_local_base_freq")) {
        config.put_number("rope.freq_base_swa", local);
    }
    let kind = config.rope("rope_type").or_else(|| config.rope("type"));
    let kind = kind.and_then(Json::as_str).unwrap_or("default").to_owned();
    let needed = |config: &Config<'_>, name: &str| {
        let number = config.rope_number(name);
        number.with_context(|| format!("the rotary embedding has no `{name}`"))
    };
    match kind.as_str() {
        "default" => {}
        "linear" => {
            let factor = needed(config, "factor")?;
            config.put("rope.scaling.type", Value::String("linear".into()));
            config.put_number("rope.scaling.factor", factor);
        }
        "llama3" => {
            let factors = llama3_factors(
                theta,
                width,
                needed(config, "factor")?,
                needed(config, "low_freq_factor")?,
                needed(config, "high_freq_factor")?,
                needed(config, "original_max_position_embeddings")?,
            );
            config.out.tensors.push(("rope_freqs.weight", factors));
        }
        "yarn" => {
            let factor = needed(config, "factor")?;
            let original = match config.rope_number("original_max_position_embeddings") {
                Some(original) => original,
                None => f64::from(config.size("max_position_embeddings")?),
            };
            config.put("rope.scaling.type", Value::String("yarn".into()));
            config.put_number("rope.scaling.factor", factor);
            config.put(
                "rope.scaling.original_context_length",
                Value::U32(original as u32),
            );
            for (name, from) in [
                ("rope.scaling.yarn_attn_factor", "attention_factor"),
                ("rope.scaling.yarn_beta_fast", "beta_fast"),
                ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ] {
                if let Some(value) = config.rope_number(from) {
                    config.put_number(name, value);
                }
            }
        }
        "longrope" | "su" => longrope(config)?,
        "dynamic" => config.out.warnings.push(
            "llama.cpp has no dynamic scaling of the rotary embedding: answers are the model's up to its original length only".into(),
        ),
        other => bail!("llama.cpp has no rotary embedding of the type `{other}`"),
    }
    Ok(())
}

/// Phi-3's two lists of factors, of which llama.cpp takes one by the length of its context, and the factor of the rotation.
fn longrope(config: &mut Config<'_>) -> anyhow::Result<()> {
    let (long, short) = (
        config.rope_factors("long_factor")?,
        config.rope_factors("short_factor")?,
    );
    let most = f64::from(config.size("max_position_embeddings")?);
    let original = config
        .rope_number("original_max_position_embeddings")
        .or_else(|| config.number("original_max_position_embeddings"))
        .context("the rotary embedding has no `original_max_position_embeddings`")?;
    let scale = most / original;
    let factor = config.rope_number("attention_factor").unwrap_or_else(|| {
        if scale > 1. {
            (1. + scale.ln() / original.ln()).sqrt()
        } else {
            1.
        }
    });
    config.put("rope.scaling.type", Value::String("longrope".into()));
    config.put(
        "rope.scaling.original_context_length",
        Value::U32(original as u32),
    );
    config.put_number("rope.scaling.attn_factor", factor);
    config.out.tensors.push(("rope_factors_long.weight", long));
    config
        .out
        .tensors
        .push(("rope_factors_short.weight", short));
    Ok(())
}

/// Llama 3's scaling as factors by which llama.cpp divides frequencies (`_compute_llama3_parameters` in transformers'
/// `modeling_rope_utils.py`): 1 for short wavelengths, `factor` for long ones, and between them a mean of both.
fn llama3_factors(
    theta: f64,
    width: u32,
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
) -> Vec<f32> {
    let pairs = (0..width / 2).map(f64::from);
    let factors = pairs.map(|pair| {
        let frequency = theta.powf(-2. * pair / f64::from(width));
        let wavelength = 2. * std::f64::consts::PI / frequency;
        if wavelength < original / high {
            1.
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1. / ((1. - smooth) / factor + smooth)
        }
    });
    factors.map(|factor| factor as f32).collect()
}
