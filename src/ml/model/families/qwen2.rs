//! Qwen2 and Qwen2.5 (transformers' `configuration_qwen2.py` and `modular_qwen2.py`): queries, keys and values always have biases, without
//! any key for them, and the attention's output has none.

use super::keys::Keys;
use super::{Defaults, Family, common, windows};
use crate::ml::model::arch::{Arch, Projection};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    knows: &windows::KEYS,
    describe,
    prescribe: |_| (),
    write: windows::write,
};

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    };
    Ok(Arch {
        layers: windows::read(keys)?,
        biases: vec![Projection::Q, Projection::K, Projection::V],
        // The key `head_dim` is read by `LlamaAttention`, from which Qwen2's attention is derived.
        ..common(keys, QWEN2.model_type, &defaults)?
    })
}
