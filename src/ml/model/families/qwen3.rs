//! The dense models of Qwen3 (transformers' `configuration_qwen3.py` and `modular_qwen3.py`): an RMS norm of the queries and keys of each
//! head, and a head width that is independent of the hidden size.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, attention_biases, common, windows};
use crate::ml::model::arch::{Arch, Projection, QkNorm};

pub(super) const QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    knows: &[
        "attention_bias",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
    ],
    describe,
    prescribe: |_| (),
    write,
};

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    };
    Ok(Arch {
        layers: windows::read(keys)?,
        qk_norm: QkNorm::PerHead,
        biases: attention_biases(keys)?,
        ..common(keys, QWEN3.model_type, &defaults)?
    })
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    windows::write(arch, keys);
}
