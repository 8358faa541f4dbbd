//! Mistral 7B and Nemo (transformers' `configuration_mistral.py` and `modular_mistral.py`): a sliding window in all layers or in
//! none.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, common, windows};
use crate::ml::model::arch::{Arch, LayerArch};

pub(super) const MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    knows: &["sliding_window"],
    describe,
    prescribe: |_| (),
    write,
};

/// The window of the first models, whose files lack the key; newer ones have `null`.
const WINDOW: usize = 4096;

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        num_key_value_heads: Some(8),
        max_position_embeddings: 4096 * 32,
        ..Defaults::default()
    };
    let layer = LayerArch {
        window: windows::own(keys, WINDOW)?,
        ..LayerArch::default()
    };
    Ok(Arch {
        layers: vec![layer; keys.size("num_hidden_layers")?],
        ..common(keys, MISTRAL.model_type, &defaults)?
    })
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let window = arch.layers.first().and_then(|layer| layer.window);
    keys.insert("sliding_window".into(), json!(window));
}
