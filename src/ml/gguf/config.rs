//! From a GGUF file's metadata to the keys of transformers' `config.json` and `generation_config.json`.
//!
//! Which key means what, and what llama.cpp takes for a key that is missing, is in its `src/models/*.cpp` and in its converter
//! (`conversion/*.py`).

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value as Json, json};

use super::Array;
use super::names::{ARCHS, GgufArch};
use super::read::File;
use super::rope;
use crate::ml::io::float::Float;
use crate::ml::model::families::family;

/// The largest accepted number of layers, far above that of any model.
const MOST_LAYERS: u64 = 1 << 14;
/// Gemma 2 and 3 with so many layers (27B) scale scores by the width of the hidden states for each head, not by the head's.
const LARGEST_GEMMAS: [u64; 2] = [46, 62];

/// What a file says of its model.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// llama.cpp's architecture.
    pub arch: &'static GgufArch,
    /// The keys of `config.json`.
    pub config: Map<String, Json>,
    /// The number of rows of a head of q and of k: `head_dim`.
    pub head_dim: usize,
}

/// The metadata of one architecture.
struct Keys<'a> {
    file: &'a File,
    arch: &'static GgufArch,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch.name)
    }

    fn number(&self, name: &str) -> anyhow::Result<Option<f64>> {
        self.file.number(&self.key(name))
    }

    /// A whole number, or an array of equal ones for all layers.
    fn optional_size(&self, name: &str) -> anyhow::Result<Option<u64>> {
        let key = self.key(name);
        if let Ok(Some(array)) = self.file.array(&key) {
            let values = array.unsigned().unwrap_or_default();
            let first = values.first();
            ensure!(
                first.is_some() && values.iter().all(|value| Some(value) == first),
                "`{key}` differs from layer to layer, which is not supported"
            );
            return Ok(first.copied());
        }
        self.file.unsigned(&key)
    }

    fn size(&self, name: &str) -> anyhow::Result<u64> {
        let size = self.optional_size(name)?;
        size.with_context(|| format!("`{}` is missing", self.key(name)))
    }

    fn has(&self, tensor: &str) -> bool {
        self.file.tensors().contains_key(tensor)
    }
}

/// The architecture of a file.
fn arch(file: &File) -> anyhow::Result<&'static GgufArch> {
    let known = || {
        let names: Vec<_> = ARCHS.iter().map(|arch| arch.name).collect();
        format!("expected one of `{}`", names.join("`, `"))
    };
    let name = file
        .text("general.architecture")?
        .with_context(|| format!("`general.architecture` is missing, {}", known()))?;
    let kind = file.text("general.type")?.unwrap_or("model");
    ensure!(
        kind == "model",
        "it holds no model (`general.type` is `{kind}`); hint: take the model's own file"
    );
    if let Some(count) = file.unsigned("split.count")? {
        ensure!(
            count <= 1,
            "it is one of {count} parts of a model; hint: join them by `llama-gguf-split --merge`"
        );
    }
    let arch = GgufArch::by_name(name);
    arch.with_context(|| format!("the architecture `{name}` is not supported, {}", known()))
}

/// transformers' `model_type` of the model in a file.
///
/// # Errors
/// Its architecture or its family is not supported, or it has experts.
pub fn model_type(file: &File) -> anyhow::Result<&'static str> {
    let arch = arch(file)?;
    let keys = Keys { file, arch };
    let experts = keys.optional_size("expert_count")?.unwrap_or(0);
    ensure!(
        experts == 0,
        "it has {experts} experts a layer; models with experts are not supported"
    );
    let model_type = stored_family(&keys)?;
    family(Some(model_type))?;
    Ok(model_type)
}

/// The family of a file: several are stored as `llama`, and `OLMo` 3 as `OLMo` 2.
fn stored_family(keys: &Keys<'_>) -> anyhow::Result<&'static str> {
    let [first, others @ ..] = keys.arch.model_types else {
        bail!("the architecture `{}` has no family", keys.arch.name);
    };
    let second = match keys.arch.name {
        // A Mistral is computed as a Llama; the name decides, as in transformers.
        "llama" => {
            let name = keys.file.text("general.name")?.unwrap_or_default();
            name.to_lowercase().contains("mistral")
        }
        "olmo2" => keys.optional_size("attention.sliding_window")?.unwrap_or(0) > 0,
        _ => false,
    };
    Ok(if second {
        others.first().unwrap_or(first)
    } else {
        first
    })
}

/// Reads what a file says of its model.
///
/// # Errors
/// Its architecture is not supported, or a key is missing or out of bounds.
pub fn describe(file: &File, float: Float) -> anyhow::Result<Description> {
    let keys = Keys {
        file,
        arch: arch(file)?,
    };
    let model_type = model_type(file)?;
    let layers = keys.size("block_count")?;
    ensure!(
        (1..=MOST_LAYERS).contains(&layers),
        "`{}` is {layers}, expected 1 to {MOST_LAYERS}",
        keys.key("block_count")
    );
    let (hidden, heads) = (
        keys.size("embedding_length")?,
        keys.size("attention.head_count")?,
    );
    let embeddings = file.tensors().get("token_embd.weight");
    let embeddings = embeddings.context("it has no tensor `token_embd.weight`")?;
    let [vocabulary, _] = embeddings.shape[..] else {
        bail!(
            "`token_embd.weight` has the shape {:?}, expected two dimensions",
            embeddings.shape
        );
    };
    let head_dim = head_dim(&keys, hidden, heads)?;
    let epsilon = keys.number("attention.layer_norm_rms_epsilon")?;
    let epsilon = epsilon.with_context(|| {
        format!(
            "`{}` is missing",
            keys.key("attention.layer_norm_rms_epsilon")
        )
    })?;
    let id = |name: &str| file.unsigned(&format!("tokenizer.ggml.{name}_token_id"));
    let common = json!({
        "architectures": [family(Some(model_type))?.architecture],
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "attention_dropout": 0.0,
        "bos_token_id": id("bos")?,
        "eos_token_id": id("eos")?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": keys.size("feed_forward_length")?,
        "max_position_embeddings": keys.size("context_length")?,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        "pad_token_id": id("padding")?,
        "rms_norm_eps": epsilon,
        "rope_theta": keys.number("rope.freq_base")?.unwrap_or(10_000.),
        "tie_word_embeddings": !keys.has("output.weight"),
        "torch_dtype": float.name(),
        "use_cache": true,
        "vocab_size": vocabulary,
    });
    let Json::Object(mut config) = common else {
        bail!("no object");
    };
    let context = rope::Context {
        layers,
        head_dim,
        theta: config.get("rope_theta").and_then(Json::as_f64),
        length: keys.size("context_length")?,
    };
    own_keys(&keys, model_type, &context, &mut config)?;
    rope::scaling(file, keys.arch, &context, &mut config)?;
    Ok(Description {
        arch: keys.arch,
        config,
        head_dim: usize::try_from(head_dim)?,
    })
}

/// The width of a head.
fn head_dim(keys: &Keys<'_>, hidden: u64, heads: u64) -> anyhow::Result<u64> {
    ensure!(heads > 0, "`{}` is 0", keys.key("attention.head_count"));
    let key = keys.optional_size("attention.key_length")?;
    // Files of Llama from before that key have its rotated part, which is all of it. Phi-3 rotates less.
    let rotated = match keys.arch.name {
        "llama" | "smollm3" => keys.optional_size("rope.dimension_count")?,
        _ => None,
    };
    let dim = key.or(rotated).unwrap_or(hidden / heads);
    if let Some(value) = keys.optional_size("attention.value_length")? {
        ensure!(
            value == dim,
            "keys are {dim} wide and values {value}; different widths are not supported"
        );
    }
    let all = keys
        .optional_size("rope.dimension_count")?
        .filter(|_| keys.arch.name != "phi3");
    if let Some(rotated) = all {
        ensure!(
            rotated == dim,
            "heads are {dim} wide, of which {rotated} are rotated; that is not supported for `{}`",
            keys.arch.name
        );
    }
    ensure!(
        dim > 0 && dim.is_multiple_of(2) && dim <= 1 << 16,
        "heads are {dim} wide, expected an even number up to 65536"
    );
    Ok(dim)
}

/// The types of layers by a pattern of windows: from the file, or every `period`-th layer without a window.
fn layer_types(keys: &Keys<'_>, layers: u64, period: u64) -> anyhow::Result<Json> {
    let name = keys.key("attention.sliding_window_pattern");
    let mut period = period;
    if let Ok(Some(array)) = keys.file.array(&name) {
        let flags: Option<Vec<bool>> = match array {
            Array::Bool(flags) => Some(flags.clone()),
            other => other
                .unsigned()
                .map(|values| values.into_iter().map(|value| value != 0).collect()),
        };
        let flags = flags.filter(|flags| flags.len() as u64 == layers);
        let flags = flags
            .with_context(|| format!("`{name}` has {} values for {layers} layers", array.len()))?;
        return Ok(types(flags.into_iter()));
    }
    if let Some(value) = keys.file.unsigned(&name)? {
        ensure!(value > 0, "`{name}` is 0");
        period = value;
    }
    Ok(types((0..layers).map(|layer| layer % period < period - 1)))
}

fn types(windows: impl Iterator<Item = bool>) -> Json {
    windows
        .map(|window| {
            if window {
                "sliding_attention"
            } else {
                "full_attention"
            }
        })
        .collect()
}

/// Adds the keys that not all families have.
fn own_keys(
    keys: &Keys<'_>,
    model_type: &str,
    context: &rope::Context,
    config: &mut Map<String, Json>,
) -> anyhow::Result<()> {
    let window = keys.optional_size("attention.sliding_window")?;
    let window = window.filter(|window| *window > 0);
    let mut set = |key: &str, value: Json| {
        config.insert(key.into(), value);
    };
    match model_type {
        "llama" => {
            set("mlp_bias", json!(keys.has("blk.0.ffn_up.bias")));
            set("pretraining_tp", json!(1));
        }
        "mistral" => set("sliding_window", json!(window)),
        "qwen2" | "qwen3" => {
            set("sliding_window", json!(null));
            set("use_sliding_window", json!(false));
        }
        "smollm3" => {
            // llama.cpp leaves out every fourth layer's rotation, whatever the file says.
            let rotated: Vec<u8> = (1..=context.layers)
                .map(|layer| u8::from(!layer.is_multiple_of(4)))
                .collect();
            set("mlp_bias", json!(keys.has("blk.0.ffn_up.bias")));
            set("no_rope_layers", json!(rotated));
            set("no_rope_layer_interval", json!(4));
            set("sliding_window", json!(null));
            set("use_sliding_window", json!(false));
        }
        "granite" => {
            let finetuned = keys.file.flag(&keys.key("rope.scaling.finetuned"))?;
            ensure!(
                finetuned.unwrap_or(true),
                "a Granite without rotary embeddings is not supported"
            );
            let scale = |name: &str| -> anyhow::Result<Option<f64>> {
                Ok(keys.number(name)?.filter(|scale| *scale != 0.))
            };
            let natural = (context.head_dim as f64).powf(-0.5);
            set(
                "attention_multiplier",
                json!(scale("attention.scale")?.unwrap_or(natural)),
            );
            for (theirs, key) in [
                ("embedding_scale", "embedding_multiplier"),
                ("residual_scale", "residual_multiplier"),
                ("logit_scale", "logits_scaling"),
            ] {
                set(key, json!(scale(theirs)?.unwrap_or(1.)));
            }
            set("mlp_bias", json!(keys.has("blk.0.ffn_up.bias")));
        }
        "gemma" => {
            set("hidden_act", json!("gelu_pytorch_tanh"));
            set("hidden_activation", json!("gelu_pytorch_tanh"));
        }
        "gemma2" | "gemma3_text" => {
            let wide = LARGEST_GEMMAS.contains(&context.layers);
            let (hidden, heads) = (
                keys.size("embedding_length")?,
                keys.size("attention.head_count")?,
            );
            let scalar = if wide {
                hidden / heads
            } else {
                context.head_dim
            };
            let soft_cap = |name: &str, default: Option<f64>| -> anyhow::Result<Json> {
                let value = keys.number(name)?.or(default);
                Ok(json!(value.filter(|value| *value != 0.)))
            };
            set("hidden_act", json!("gelu_pytorch_tanh"));
            set("hidden_activation", json!("gelu_pytorch_tanh"));
            set("query_pre_attn_scalar", json!(scalar));
            let (capped, period) = if model_type == "gemma2" {
                (true, 2)
            } else {
                (false, 6)
            };
            let attention = soft_cap("attn_logit_softcapping", capped.then_some(50.))?;
            set("attn_logit_softcapping", attention);
            let last = soft_cap("final_logit_softcapping", capped.then_some(30.))?;
            set("final_logit_softcapping", last);
            let default = if capped { Some(4096) } else { None };
            let window = window.or(default);
            set("sliding_window", json!(window));
            if window.is_some() {
                set("layer_types", layer_types(keys, context.layers, period)?);
            } else {
                let full = vec!["full_attention"; usize::try_from(context.layers)?];
                set("layer_types", json!(full));
            }
            if model_type == "gemma3_text" {
                let local = keys.number("rope.freq_base_swa")?.unwrap_or(10_000.);
                set("rope_local_base_freq", json!(local));
                set("use_bidirectional_attention", json!(false));
            }
        }
        "olmo3" => {
            set("sliding_window", json!(window));
            set("layer_types", layer_types(keys, context.layers, 4)?);
        }
        "phi3" => {
            let rotated = keys.optional_size("rope.dimension_count")?;
            let rotated = rotated.unwrap_or(context.head_dim);
            ensure!(
                rotated <= context.head_dim,
                "heads are {} wide, but {rotated} are rotated",
                context.head_dim
            );
            set(
                "partial_rotary_factor",
                json!(rotated as f64 / context.head_dim as f64),
            );
            set("sliding_window", json!(window));
            set("embd_pdrop", json!(0.0));
            set("resid_pdrop", json!(0.0));
        }
        _ => {}
    }
    Ok(())
}

/// Tokens that end a turn, by their texts, for files that don't say `tokenizer.ggml.eot_token_id`.
const ENDS_OF_TURN: [&str; 4] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"];

/// The keys of `generation_config.json`: the tokens that end an answer, and the settings of sampling that the file recommends.
///
/// # Errors
/// A key has another type than it should.
pub fn generation_config(file: &File) -> anyhow::Result<Map<String, Json>> {
    let id = |name: &str| file.unsigned(&format!("tokenizer.ggml.{name}_token_id"));
    let tokens = file.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
    let kinds = file.array("tokenizer.ggml.token_type")?;
    let kinds = kinds.and_then(Array::unsigned).unwrap_or_default();
    // 3 is a control token.
    let by_text = tokens
        .iter()
        .zip(&kinds)
        .position(|(text, kind)| *kind == 3 && ENDS_OF_TURN.contains(&text.as_str()));
    let turn = id("eot")?.or(by_text.map(|id| id as u64));
    let mut ends: Vec<u64> = Vec::new();
    for end in [id("eos")?, turn, id("eom")?].into_iter().flatten() {
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    let mut config = Map::new();
    let ends = match ends[..] {
        [] => json!(null),
        [one] => json!(one),
        _ => json!(ends),
    };
    config.insert("bos_token_id".into(), json!(id("bos")?));
    config.insert("eos_token_id".into(), ends);
    config.insert("pad_token_id".into(), json!(id("padding")?));
    let mut samples = false;
    for (theirs, key) in [
        ("temp", "temperature"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("penalty_repeat", "repetition_penalty"),
    ] {
        let theirs = format!("general.sampling.{theirs}");
        let value = if key == "top_k" {
            file.unsigned(&theirs)?.map(|value| json!(value))
        } else {
            file.number(&theirs)?.map(|value| json!(value))
        };
        if let Some(value) = value {
            config.insert(key.into(), value);
            samples |= key != "repetition_penalty";
        }
    }
    if samples {
        config.insert("do_sample".into(), json!(true));
    }
    Ok(config)
}
