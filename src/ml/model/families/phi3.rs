//! Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (transformers' `configuration_phi3.py` and `modular_phi3.py`): fused projections, a rotary embedding
//! of a part of each head, and `LongRoPE`.

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::ropes::RopeDefaults;
use super::{Defaults, Family, common};
use crate::ml::model::arch::{Arch, LayerArch, RopeScaling};

pub(super) const PHI3: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    knows: &["sliding_window"],
    describe,
    prescribe: |_| (),
    write,
};

/// The original length of models whose files lack it.
const ORIGINAL: usize = 4096;

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        pad_token_id: Some(32_000),
        rope: RopeDefaults {
            partial: true,
            old_longrope: true,
            original: Some(ORIGINAL),
            ..RopeDefaults::default()
        },
        ..Defaults::default()
    };
    let name = "resid_pdrop";
    ensure!(
        keys.number_or(name, 0.)? == 0.,
        "`{name}` is not 0: dropout of the blocks' results is not supported; hint: set it to 0"
    );
    let window = keys.some("sliding_window");
    let window = window.map(|_| keys.size("sliding_window")).transpose()?;
    let layer = LayerArch {
        window,
        ..LayerArch::default()
    };
    let arch = common(keys, PHI3.model_type, &defaults)?;
    ensure!(
        arch.ropes
            .iter()
            .all(|rope| matches!(rope.scaling, None | Some(RopeScaling::LongRope(_)))),
        "the `rope_type` is none of `default` and `longrope`, which are those of transformers for this model type"
    );
    Ok(Arch {
        layers: vec![layer; keys.size("num_hidden_layers")?],
        fused_projections: true,
        ..arch
    })
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    let window = arch.layers.first().and_then(|layer| layer.window);
    keys.insert("sliding_window".into(), json!(window));
    let original = match arch.ropes.first().and_then(|rope| rope.scaling.as_ref()) {
        Some(RopeScaling::LongRope(long)) => long.original_max_position_embeddings,
        _ => arch.max_position_embeddings,
    };
    keys.insert("original_max_position_embeddings".into(), json!(original));
    keys.insert("resid_pdrop".into(), json!(0.));
    keys.insert("embd_pdrop".into(), json!(0.));
    if arch.rotary_dim != arch.head_dim {
        let (part, whole) = (arch.rotary_dim as f64, arch.head_dim as f64);
        let factor = part / whole;
        // transformers takes the whole part of the product.
        let factor = if whole * factor < part {
            factor.next_up()
        } else {
            factor
        };
        keys.insert("partial_rotary_factor".into(), json!(factor));
    }
}
