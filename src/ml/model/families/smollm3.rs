//! `SmolLM3` (transformers' `configuration_smollm3.py` and `modular_smollm3.py`): Llama whose every fourth layer has no rotary embedding.

use anyhow::{bail, ensure};
use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::ropes::RopeDefaults;
use super::{Defaults, Family, biases, common, windows};
use crate::ml::model::arch::{Arch, LayerArch, Projection};

pub(super) const SMOLLM3: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    knows: &[
        "attention_bias",
        "layer_types",
        "mlp_bias",
        "no_rope_layer_interval",
        "no_rope_layers",
        "sliding_window",
        "use_sliding_window",
    ],
    describe,
    prescribe,
    write,
};

/// Every layer whose number, counted from 1, is a multiple of this has no rotary embedding, unless a file says otherwise.
const INTERVAL: usize = 4;

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        num_key_value_heads: Some(4),
        max_position_embeddings: 32_768,
        tie_word_embeddings: true,
        pad_token_id: Some(128_004),
        rope: RopeDefaults {
            theta: 2e6,
            ..RopeDefaults::default()
        },
        ..Defaults::default()
    };
    let count = keys.size("num_hidden_layers")?;
    let rotated = rotated(keys, count)?;
    // Where a file has no `layer_types`, layers without a rotary embedding have the window.
    let window = windows::switched(keys, None)?;
    let slides = windows::sliding(keys, count, window, |number| {
        window.is_some() && !rotated[number]
    })?;
    let layers = rotated
        .iter()
        .zip(slides)
        .map(|(rotated, slides)| LayerArch {
            window: window.filter(|_| slides),
            rope: rotated.then_some(0),
        });
    Ok(Arch {
        layers: layers.collect(),
        biases: biases(keys)?,
        ..common(keys, SMOLLM3.model_type, &defaults)?
    })
}

/// Whether each layer has a rotary embedding: `no_rope_layers` has 1 for those that do.
fn rotated(keys: Keys<'_>, count: usize) -> anyhow::Result<Vec<bool>> {
    let name = "no_rope_layers";
    let Some(listed) = keys.some(name) else {
        let interval = keys.size_or("no_rope_layer_interval", INTERVAL)?;
        return Ok((1..=count)
            .map(|number| !number.is_multiple_of(interval))
            .collect());
    };
    let Some(listed) = listed.as_array() else {
        bail!("`{name}` is {listed}, expected a list");
    };
    ensure!(
        listed.len() >= count,
        "`{name}` has {} entries, expected one for each of the {count} layers",
        listed.len()
    );
    let rotated = listed
        .iter()
        .take(count)
        .map(|value| match (value.as_u64(), value.as_bool()) {
            (Some(1), _) | (_, Some(true)) => Ok(true),
            (Some(0), _) | (_, Some(false)) => Ok(false),
            _ => bail!("`{name}` has {value}, expected 1 for layers with a rotary embedding and 0 for the others"),
        });
    rotated.collect()
}

fn prescribe(arch: &mut Arch) {
    for (number, layer) in (1..).zip(&mut arch.layers) {
        let is_rotated = !usize::is_multiple_of(number, INTERVAL);
        layer.rope = is_rotated.then_some(0);
        if is_rotated {
            layer.window = None;
        }
    }
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    keys.insert("mlp_bias".into(), json!(arch.has_bias(Projection::Up)));
    let rotated = arch.layers.iter().map(|layer| layer.rope.is_some());
    let rotated: Vec<_> = rotated.map(u8::from).collect();
    keys.insert("no_rope_layers".into(), json!(rotated));
    keys.insert("no_rope_layer_interval".into(), json!(INTERVAL));
    windows::write_types(arch, keys);
    let has_windows = arch.layers.iter().any(|layer| layer.window.is_some());
    keys.insert("use_sliding_window".into(), json!(has_windows));
}
