//! Gemma 2 (transformers' `configuration_gemma2.py` and `modular_gemma2.py`): Gemma with norms before and after both blocks, windows in every
//! other layer, and soft-caps of attention scores and logits.

use serde_json::{Map, Value, json};

use super::keys::Keys;
use super::{Family, gemma, windows};
use crate::ml::model::arch::{Arch, NormPlaces};

pub(super) const GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    knows: &[
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
        "query_pre_attn_scalar",
        "sliding_window",
        "use_bidirectional_attention",
    ],
    describe,
    prescribe,
    write,
};

/// Every layer whose number, counted from 1, is a multiple of this has no window, unless a file says otherwise.
const INTERVAL: usize = 2;
/// The soft-caps of attention scores and of logits.
const SOFTCAPS: (f64, f64) = (50., 30.);

fn describe(keys: Keys<'_>) -> anyhow::Result<Arch> {
    let window = windows::own(keys, 4096)?;
    Ok(Arch {
        layers: windows::all_but_every(keys, window, INTERVAL, 0)?,
        norm_places: NormPlaces::Both,
        score_scale: score_scale(keys)?,
        score_softcap: keys.cap_or("attn_logit_softcapping", Some(SOFTCAPS.0))?,
        logit_softcap: keys.cap_or("final_logit_softcapping", Some(SOFTCAPS.1))?,
        ..gemma::gemma(keys, GEMMA2.model_type, &gemma::defaults())?
    })
}

/// The factor of the attention scores, `query_pre_attn_scalar^-1/2`.
pub(super) fn score_scale(keys: Keys<'_>) -> anyhow::Result<f64> {
    Ok(keys.factor_or("query_pre_attn_scalar", 256.)?.powf(-0.5))
}

/// The keys that Gemma 2 and 3 have beside those of Gemma 1.
pub(super) fn write_options(arch: &Arch, keys: &mut Map<String, Value>) {
    gemma::write(arch, keys);
    let scalar = arch.score_scale.powi(-2);
    // The scale of a whole number is written as that number.
    let whole = scalar.round();
    let scalar = if whole.powf(-0.5).to_bits() == arch.score_scale.to_bits() {
        json!(whole as u64)
    } else {
        json!(scalar)
    };
    keys.insert("query_pre_attn_scalar".into(), scalar);
    keys.insert("attn_logit_softcapping".into(), json!(arch.score_softcap));
    keys.insert("final_logit_softcapping".into(), json!(arch.logit_softcap));
    windows::write_types(arch, keys);
}

fn prescribe(arch: &mut Arch) {
    windows::keep_but_every(arch, INTERVAL, 0);
    (arch.score_softcap, arch.logit_softcap) = (Some(SOFTCAPS.0), Some(SOFTCAPS.1));
}

fn write(arch: &Arch, keys: &mut Map<String, Value>) {
    write_options(arch, keys);
}
