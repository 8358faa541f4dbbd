//! The text models of Gemma 3 (transformers' `Gemma3TextConfig` in `configuration_gemma3.py`, and `modular_gemma3.py`): Gemma 2 with norms of
//! queries and keys instead of soft-caps, windows in five of six layers, and for these a rotary embedding of their own.

use anyhow::ensure;
use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Defaults, Family, gemma, gemma2, ropes, windows};
use crate::ml::model::arch::{Arch, NormPlaces, QkNorm, Rope};

pub(super) const GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    knows: &[
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "sliding_window",
        "sliding_window_pattern",
        "use_bidirectional_attention",
    ],
    describe,
    prescribe,
    write,
};

/// Every layer whose number, counted from 1, is a multiple of this has no window, unless a file says otherwise.
const INTERVAL: usize = 6;
/// The bases of the rotary embeddings of layers without and with a window.
const THETAS: [f64; 2] = [1e6, 1e4];
/// The key for the second one in version 4.
const LOCAL_THETA: &str = "rope_local_base_freq";

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let defaults = Defaults {
        max_position_embeddings: 131_072,
        by_layer_type: Some((THETAS, [Some("rope_theta"), Some(LOCAL_THETA)])),
        ..gemma::defaults()
    };
    let name = "attn_logit_softcapping";
    ensure!(
        keys.some(name).is_none(),
        "`{name}` is {}, which transformers 5 has no effect of for this model type; expected null",
        keys.some(name).unwrap_or(&Value::Null)
    );
    let window = windows::own(keys, 4096)?;
    let interval = keys.size_or("sliding_window_pattern", INTERVAL)?;
    Ok(Arch {
        layers: windows::all_but_every(keys, window, interval, 1)?,
        norm_places: NormPlaces::Both,
        qk_norm: QkNorm::PerHead,
        score_scale: gemma2::score_scale(keys)?,
        logit_softcap: keys.cap_or("final_logit_softcapping", None)?,
        ..gemma::gemma(keys, GEMMA3_TEXT.model_type, &defaults)?
    })
}

fn prescribe(arch: &mut Arch) {
    windows::keep_but_every(arch, INTERVAL, 1);
    arch.ropes.push(Rope {
        theta: THETAS[1],
        scaling: None,
    });
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    gemma2::write_options(arch, keys);
    let local = arch.ropes.get(1).map_or(THETAS[1], |rope| rope.theta);
    keys.insert(LOCAL_THETA.into(), json!(local));
    ropes::write_by_layer_type(arch, keys);
}
