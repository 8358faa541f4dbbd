//! Rotary embeddings in a `config.json`, in the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), with
//! all types of `modeling_rope_utils.py` but those of models that are not supported anyway.

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value, json};

use super::keys::Keys;
use crate::ml::model::arch::{
    Arch, Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling,
};

/// The types with their parameters.
const TYPES: [(&str, &[&str]); 6] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    ),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor"]),
    (
        "longrope",
        &["factor", "attention_factor", "short_factor", "long_factor"],
    ),
];
/// The parameters of all types.
const COMMON: [&str; 4] = [
    "rope_type",
    "type",
    "rope_theta",
    "original_max_position_embeddings",
];
const ORIGINAL: &str = "original_max_position_embeddings";
const PARTIAL: &str = "partial_rotary_factor";

/// What a family takes where a file is silent, and what else it reads.
pub(super) struct RopeDefaults {
    /// transformers' `default_theta`.
    pub(super) theta: f64,
    /// Whether a part of a head may be rotated (`partial_rotary_factor`).
    pub(super) partial: bool,
    /// Whether old files call the type `longrope` `su` or `yarn` (Phi-3).
    pub(super) old_longrope: bool,
    /// The original length, where the family has one of its own, whatever the scaling says.
    pub(super) original: Option<usize>,
}

impl Default for RopeDefaults {
    fn default() -> Self {
        Self {
            theta: 10_000.,
            partial: false,
            old_longrope: false,
            original: None,
        }
    }
}

/// The value of a key, unless it is empty.
fn filled<'a>(keys: Keys<'a>, name: &str) -> Option<&'a Value> {
    keys.some(name).filter(|value| *value != &json!({}))
}

fn positive(value: f64) -> bool {
    value > 0. && value.is_finite()
}

fn theta(value: &Value) -> anyhow::Result<f64> {
    let number = value.as_f64().filter(|theta| positive(*theta));
    number.with_context(|| format!("`rope_theta` is {value}, expected a number above 0"))
}

/// The one rotary embedding of a model whose layers share it, and the number of features of a head that it rotates. If a file has both
/// spellings, `rope_scaling` takes precedence, as in transformers. `length` is the longest sequence of the model, `head_dim` the width of a
/// head.
pub(super) fn shared(
    keys: Keys<'_>,
    length: usize,
    head_dim: usize,
    defaults: &RopeDefaults,
) -> anyhow::Result<(Rope, usize)> {
    let name = if filled(keys, "rope_scaling").is_some() {
        "rope_scaling"
    } else {
        "rope_parameters"
    };
    let parameters = filled(keys, name);
    let given = match parameters.and_then(|rope| rope.get("rope_theta")) {
        Some(given) => Some(given),
        None => keys.some("rope_theta"),
    };
    let theta = given.map_or(Ok(defaults.theta), theta)?;
    let partial = parameters.and_then(|rope| rope.get(PARTIAL));
    let partial = partial.or_else(|| keys.some(PARTIAL));
    let rotary_dim = match partial.map(|value| (value, value.as_f64())) {
        None => head_dim,
        Some((_, Some(factor))) if factor.to_bits() == 1f64.to_bits() => head_dim,
        Some((value, factor)) => {
            ensure!(
                defaults.partial,
                "`{PARTIAL}` is not 1; the heads are rotated whole"
            );
            let factor = factor.filter(|factor| *factor > 0. && *factor <= 1.);
            let factor = factor.with_context(|| {
                format!("`{PARTIAL}` is {value}, expected a number above 0, at most 1")
            })?;
            (head_dim as f64 * factor) as usize
        }
    };
    ensure!(
        rotary_dim > 0 && rotary_dim.is_multiple_of(2),
        "{rotary_dim} features of a head would be rotated (`{PARTIAL}`), expected an even number"
    );
    let original = match defaults.original {
        // As in transformers, the file's own value comes first, then that of the scaling, then the model's length.
        None if keys.some(ORIGINAL).is_some() => Some(keys.size(ORIGINAL)?),
        None => None,
        Some(default) => Some(keys.size_or(ORIGINAL, default)?),
    };
    let context = Context {
        name,
        length,
        original,
        rotary_dim,
        theta,
        old_longrope: defaults.old_longrope,
    };
    let scaling = parameters.map_or(Ok(None), |rope| scaling(rope, &context))?;
    Ok((Rope { theta, scaling }, rotary_dim))
}

/// The names of layers in `layer_types`, in the order of the rotary embeddings of [`by_layer_type`].
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// The two rotary embeddings of a model that has one for layers without a window and one for the others (Gemma 3, `OLMo` 3): in version 5
/// `rope_parameters` has both by the layers' names; in version 4 `rope_scaling` is that of the first alone. `thetas` are the bases where a
/// file is silent, and `theta_keys` the keys for them in version 4.
pub(super) fn by_layer_type(
    keys: Keys<'_>,
    length: usize,
    head_dim: usize,
    thetas: [f64; 2],
    theta_keys: [Option<&str>; 2],
) -> anyhow::Result<Vec<Rope>> {
    ensure!(
        keys.some(PARTIAL)
            .is_none_or(|factor| factor.as_f64() == Some(1.)),
        "`{PARTIAL}` is not 1; the heads are rotated whole"
    );
    let name = "rope_parameters";
    let empty = Map::new();
    let all = match filled(keys, name) {
        None => &empty,
        Some(Value::Object(all)) => all,
        Some(other) => bail!("`{name}` is {other}, expected an object"),
    };
    if let Some(other) = all.keys().find(|key| !LAYER_TYPES.contains(&key.as_str())) {
        bail!(
            "`{name}` has `{other}`, which is no type of layer; expected `{}` and `{}`",
            LAYER_TYPES[0],
            LAYER_TYPES[1]
        );
    }
    let mut ropes = Vec::new();
    for (number, kind) in LAYER_TYPES.into_iter().enumerate() {
        let mut parameters = match all.get(kind) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(parameters)) => parameters.clone(),
            Some(other) => bail!("`{name}.{kind}` is {other}, expected an object"),
        };
        if number == 0
            && let Some(scaling) = filled(keys, "rope_scaling")
        {
            let scaling = scaling.as_object();
            let scaling = scaling.context("`rope_scaling` is no object")?;
            parameters.extend(scaling.clone());
        }
        ensure!(
            parameters
                .get(PARTIAL)
                .is_none_or(|factor| factor.as_f64() == Some(1.)),
            "`{name}.{kind}` has a `{PARTIAL}` other than 1; the heads are rotated whole"
        );
        let old = theta_keys[number].and_then(|key| keys.some(key));
        let given = parameters.get("rope_theta").or(old);
        let theta = given.map_or(Ok(thetas[number]), theta)?;
        let context = Context {
            name: &format!("{name}.{kind}"),
            length,
            original: None,
            rotary_dim: head_dim,
            theta,
            old_longrope: false,
        };
        let mut scaling = scaling(&Value::Object(parameters), &context)?;
        if let Some(RopeScaling::Yarn(yarn)) = &mut scaling {
            // transformers looks for it beside the layers' names.
            yarn.truncate = true;
        }
        ropes.push(Rope { theta, scaling });
    }
    Ok(ropes)
}

/// What the reading of a scaling depends on.
struct Context<'a> {
    /// The key that holds it.
    name: &'a str,
    length: usize,
    /// The original length, if it is not that of the scaling.
    original: Option<usize>,
    rotary_dim: usize,
    theta: f64,
    old_longrope: bool,
}

fn scaling(scaling: &Value, context: &Context<'_>) -> anyhow::Result<Option<RopeScaling>> {
    let name = context.name;
    let keys = scaling.as_object();
    let keys = keys.with_context(|| format!("`{name}` is {scaling}, expected an object"))?;
    let kind = match scaling.get("rope_type").or_else(|| scaling.get("type")) {
        None => "default",
        Some(kind) => kind
            .as_str()
            .with_context(|| format!("the `rope_type` is {kind}, expected a text"))?,
    };
    let kind = match kind {
        "su" | "yarn" if context.old_longrope => "longrope",
        other => other,
    };
    let Some((_, own)) = TYPES.iter().find(|(known, _)| *known == kind) else {
        let names: Vec<_> = TYPES.iter().map(|(kind, _)| format!("`{kind}`")).collect();
        bail!(
            "the rope type `{kind}` is not supported, expected one of {}",
            names.join(", ")
        );
    };
    // Factors that change nothing.
    let neutral = |key: &str, value: &Value| {
        value.is_null() || key.ends_with("factor") && value.as_f64() == Some(1.)
    };
    for (key, value) in keys {
        let known = COMMON.contains(&key.as_str()) || own.contains(&key.as_str()) || key == PARTIAL;
        ensure!(
            known || neutral(key, value),
            "`{name}` has `{key}`, which the rope type `{kind}` doesn't know; was another `rope_type` meant? transformers \
             warns of it and goes on without; hint: remove the key if that is right"
        );
    }
    let rope = Keys(scaling);
    let factor = |key: &str| -> anyhow::Result<Option<f64>> {
        let number = rope.some(key).map(|_| rope.number(key)).transpose()?;
        ensure!(
            number.is_none_or(positive),
            "`{key}` of the rope type `{kind}` is out of range, expected a number above 0"
        );
        Ok(number)
    };
    let needed = |key: &str| {
        let missing = || format!("`{key}` of the rope type `{kind}` is missing");
        factor(key)?.with_context(missing)
    };
    let original = match context.original {
        Some(original) => original,
        None => rope.size_or(ORIGINAL, context.length)?,
    };
    let grown = || context.length as f64 / original as f64;
    Ok(Some(match kind {
        "linear" => RopeScaling::Linear {
            factor: needed("factor")?,
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: needed("factor")?,
            max_position_embeddings: context.length,
        },
        "yarn" => {
            ensure!(
                context.theta > 1.,
                "`rope_theta` is {}, expected a number above 1 for the rope type `yarn`",
                context.theta
            );
            ensure!(
                rope.has("factor"),
                "`factor` of the rope type `yarn` is missing"
            );
            let scale = factor("factor")?.unwrap_or_else(grown);
            let given = factor("attention_factor")?;
            let scales = (
                rope.number_or("mscale", 0.)?,
                rope.number_or("mscale_all_dim", 0.)?,
            );
            let attention_factor = given.unwrap_or_else(|| yarn_attention(scale, scales));
            ensure!(
                positive(attention_factor),
                "`mscale` and `mscale_all_dim` make a factor of {attention_factor}, expected one above 0"
            );
            RopeScaling::Yarn(YarnScaling {
                factor: scale,
                attention_factor,
                beta_fast: factor("beta_fast")?.unwrap_or(32.),
                beta_slow: factor("beta_slow")?.unwrap_or(1.),
                original_max_position_embeddings: original,
                truncate: rope.flag_or("truncate", true)?,
            })
        }
        "llama3" => {
            let scaling = Llama3Scaling {
                factor: rope.number("factor")?,
                low_freq_factor: rope.number("low_freq_factor")?,
                high_freq_factor: rope.number("high_freq_factor")?,
                original_max_position_embeddings: original,
            };
            ensure!(
                positive(scaling.factor)
                    && positive(scaling.low_freq_factor)
                    && scaling.high_freq_factor > scaling.low_freq_factor,
                "the factors of the rope type `llama3` are out of order"
            );
            RopeScaling::Llama3(scaling)
        }
        "longrope" => {
            let scale = factor("factor")?.unwrap_or_else(grown);
            let attention_factor = match factor("attention_factor")? {
                Some(given) => given,
                None if scale <= 1. => 1.,
                None => (1. + scale.ln() / (original as f64).ln()).sqrt(),
            };
            ensure!(
                positive(attention_factor),
                "`{ORIGINAL}` is {original}, which is too short for the rope type `longrope`"
            );
            let list = |key: &str| factors(rope, key, context.rotary_dim / 2);
            RopeScaling::LongRope(LongRopeScaling {
                short_factor: list("short_factor")?,
                long_factor: list("long_factor")?,
                attention_factor,
                original_max_position_embeddings: original,
            })
        }
        _ => return Ok(None),
    }))
}

/// The factor of cosines and sines that the `factor` of `YaRN` brings (`get_mscale`).
fn yarn_attention(factor: f64, (scale, scale_all): (f64, f64)) -> f64 {
    let grown = |scale: f64| {
        if factor <= 1. {
            1.
        } else {
            0.1 * scale * factor.ln() + 1.
        }
    };
    if scale == 0. || scale_all == 0. {
        grown(1.)
    } else {
        grown(scale) / grown(scale_all)
    }
}

/// A list of `count` factors.
fn factors(rope: Keys<'_>, key: &str, count: usize) -> anyhow::Result<Vec<f64>> {
    let list = rope.some(key).and_then(Value::as_array);
    let list = list.with_context(|| format!("`{key}` of the rope type `longrope` is no list"))?;
    ensure!(
        list.len() == count,
        "`{key}` has {} factors, expected {count}, one for each two rotated features of a head",
        list.len()
    );
    let numbers = list.iter().map(|value| {
        let number = value.as_f64().filter(|number| positive(*number));
        number.with_context(|| format!("`{key}` has {value}, expected numbers above 0"))
    });
    numbers.collect()
}

/// Writes the two rotary embeddings of [`by_layer_type`] in version 5's spelling, beside version 4's.
pub(super) fn write_by_layer_type(arch: &Arch, keys: &mut Map<String, Value>) {
    let both = LAYER_TYPES.iter().zip(&arch.ropes);
    let both: Map<_, _> = both
        .map(|(kind, rope)| ((*kind).to_owned(), parameters(rope)))
        .collect();
    keys.insert("rope_parameters".into(), both.into());
}

/// The keys of a rotary embedding in an object of its own, as `rope_parameters` has them.
fn parameters(rope: &Rope) -> Value {
    let mut keys = match rope.scaling.as_ref().map(write_scaling) {
        Some(Value::Object(keys)) => keys,
        _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
    };
    keys.insert("rope_theta".into(), json!(rope.theta));
    Value::Object(keys)
}

/// The keys of a scaling in `rope_scaling`.
pub(super) fn write_scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn(yarn) => json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "attention_factor": yarn.attention_factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "truncate": yarn.truncate,
        }),
        RopeScaling::Llama3(rope) => json!({
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }),
        RopeScaling::LongRope(rope) => json!({
            "rope_type": "longrope",
            "short_factor": rope.short_factor,
            "long_factor": rope.long_factor,
            "attention_factor": rope.attention_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }),
    }
}
