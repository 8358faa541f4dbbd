//! Llama 1 to 3 and what is built like them (transformers' `configuration_llama.py` and `modeling_llama.py`).

use anyhow::ensure;

use super::keys::Keys;
use super::{Family, common};
use crate::ml::model::arch::{Arch, LayerArch, Projection};

pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    describe,
};

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let arch = common(keys, LLAMA.model_type)?;
    let (hidden, heads) = (arch.hidden_size, arch.num_attention_heads);
    ensure!(
        hidden.is_multiple_of(heads),
        "`hidden_size` {hidden} is no multiple of the {heads} attention heads, which transformers refuses"
    );
    let mut biases = Vec::new();
    if keys.flag("attention_bias")? {
        biases.extend(Projection::ATTENTION);
    }
    if keys.flag("mlp_bias")? {
        biases.extend(Projection::MLP);
    }
    let layers = vec![LayerArch::default(); keys.size("num_hidden_layers")?];
    Ok(Arch {
        layers,
        biases,
        ..arch
    })
}
