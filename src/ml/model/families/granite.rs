//! The dense models of Granite 3 (transformers' `configuration_granite.py` and `modular_granite.py`): Llama with four factors, of the
//! embeddings, of the attention scores, of the blocks' results and of the logits.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, biases, common};
use crate::ml::model::arch::{Arch, LayerArch, Projection};

pub(super) const GRANITE: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    knows: &[
        "attention_bias",
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "mlp_bias",
        "residual_multiplier",
    ],
    describe,
    prescribe,
    write,
};

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        max_position_embeddings: 2048,
        ..Defaults::default()
    };
    Ok(Arch {
        layers: vec![LayerArch::default(); keys.size("num_hidden_layers")?],
        biases: biases(keys)?,
        embedding_scale: keys.factor_or("embedding_multiplier", 1.)?,
        residual_scale: keys.factor_or("residual_multiplier", 1.)?,
        score_scale: keys.factor_or("attention_multiplier", 1.)?,
        logit_scale: 1. / keys.factor_or("logits_scaling", 1.)?,
        ..common(keys, GRANITE.model_type, &defaults)?
    })
}

/// The factors of Granite 3.3 2B, whose heads have 64 features.
fn prescribe(arch: &mut Arch) {
    arch.embedding_scale = 12.;
    arch.residual_scale = 0.22;
    arch.score_scale = 1. / arch.head_dim as f64;
    arch.logit_scale = 1. / 8.;
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let attention_bias = arch.has_bias(Projection::Q);
    keys.insert("attention_bias".into(), json!(attention_bias));
    keys.insert("mlp_bias".into(), json!(arch.has_bias(Projection::Up)));
    keys.insert("embedding_multiplier".into(), json!(arch.embedding_scale));
    keys.insert("residual_multiplier".into(), json!(arch.residual_scale));
    keys.insert("attention_multiplier".into(), json!(arch.score_scale));
    keys.insert("logits_scaling".into(), json!(1. / arch.logit_scale));
}
