//! Llama 1 to 3 and what is built like them (transformers' `configuration_llama.py` and `modeling_llama.py`).

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, biases, common};
use crate::ml::model::arch::{Arch, LayerArch, Projection};

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    knows: &["attention_bias", "mlp_bias"],
    describe,
    prescribe: |_| (),
    write,
};

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        max_position_embeddings: 2048,
        ..Defaults::default()
    };
    let arch = common(keys, LLAMA.model_type, &defaults)?;
    let (hidden, heads) = (arch.hidden_size, arch.num_attention_heads);
    ensure!(
        hidden.is_multiple_of(heads),
        "`hidden_size` {hidden} is no multiple of the {heads} attention heads, which transformers refuses"
    );
    let layers = vec![LayerArch::default(); keys.size("num_hidden_layers")?];
    Ok(Arch {
        layers,
        biases: biases(keys)?,
        ..arch
    })
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    keys.insert("mlp_bias".into(), json!(arch.has_bias(Projection::Up)));
    keys.insert("pretraining_tp".into(), json!(1));
}
