//! `OLMo` 2 (transformers' `configuration_olmo2.py` and `modular_olmo2.py`): norms after the blocks instead of before them, and norms of the
//! queries and keys of all heads together.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, attention_biases, common};
use crate::ml::model::arch::{Arch, LayerArch, NormPlaces, Projection, QkNorm};

pub(super) const OLMO2: Family = Family {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    knows: &["attention_bias"],
    describe,
    prescribe: |_| (),
    write,
};

/// What `OLMo` 2 and 3 take where a file is silent.
pub(super) fn defaults() -> Defaults {
    Defaults {
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-5,
        pad_token_id: Some(1),
        ..Defaults::default()
    }
}

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    Ok(Arch {
        layers: vec![LayerArch::default(); keys.size("num_hidden_layers")?],
        biases: attention_biases(keys)?,
        qk_norm: QkNorm::Whole,
        norm_places: NormPlaces::After,
        ..common(keys, OLMO2.model_type, &defaults())?
    })
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
}
