//! `OLMo` 3 (transformers' `configuration_olmo3.py` and `modular_olmo3.py`): `OLMo` 2 with windows in three of four layers, and a scaling of the
//! rotary embedding in the others alone.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, attention_biases, common, olmo2, ropes, windows};
use crate::ml::model::arch::{Arch, NormPlaces, Projection, QkNorm, Rope};

pub(super) const OLMO3: Family = Family {
    model_type: "olmo3",
    architecture: "Olmo3ForCausalLM",
    knows: &["attention_bias", "layer_types", "sliding_window"],
    describe,
    prescribe,
    write,
};

/// The base of both rotary embeddings. In version 4's spelling, `rope_theta` is that of the layers without a window.
const THETA: f64 = 500_000.;
/// Every layer whose number, counted from 1, is a multiple of this has no window, unless a file says otherwise.
const INTERVAL: usize = 4;

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        by_layer_type: Some(([THETA; 2], [Some("rope_theta"), None])),
        ..olmo2::defaults()
    };
    let window = windows::own(keys, 4096)?;
    Ok(Arch {
        layers: windows::all_but_every(keys, window, INTERVAL, 1)?,
        biases: attention_biases(keys)?,
        qk_norm: QkNorm::Whole,
        norm_places: NormPlaces::After,
        ..common(keys, OLMO3.model_type, &defaults)?
    })
}

fn prescribe(arch: &mut Arch) {
    windows::keep_but_every(arch, INTERVAL, 1);
    let theta = arch.ropes.first().map_or(THETA, |rope| rope.theta);
    arch.ropes = vec![
        Rope {
            theta,
            scaling: None
        };
        2
    ];
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    windows::write_types(arch, keys);
    ropes::write_by_layer_type(arch, keys);
}
