//! A model's rotary embeddings as the keys and tensors of a GGUF file.
//!
//! What llama.cpp makes of them is in its `src/llama-model.cpp` (keys), `src/llama-context.cpp` with `ggml/src/ggml-cpu/ops.cpp` (`YaRN`), and
//! `src/models/*.cpp` (which architectures have tensors of factors, and how layers with a window rotate).

use std::f64::consts::PI;

use anyhow::{Context as _, ensure};

use super::{Config, GgufArch, Value};
use crate::ml::gguf::rope::{FREQUENCIES, LONG, SHORT, yarn_attention};
use crate::ml::model::arch::{
    Arch, Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling,
};

/// The largest relative difference of a factor that is taken for rounding.
const ROUNDING: f64 = 1e-6;

/// Puts the rotary embeddings of `arch` into `config`.
///
/// # Errors
/// llama.cpp rotates such a model in another way.
pub(super) fn write(config: &mut Config<'_>, gguf: &GgufArch, arch: &Arch) -> anyhow::Result<()> {
    let main = arch.ropes.first();
    let main = main.context("the model has no rotary embedding")?;
    let width = u32::try_from(arch.rotary_dim)?;
    config.put("rope.dimension_count", Value::U32(width));
    config.put_number("rope.freq_base", main.theta);
    if let Some(local) = arch.ropes.get(1) {
        config.put_number("rope.freq_base_swa", local.theta);
        if arch.layers.iter().any(|layer| layer.rope == Some(1)) {
            check_windowed(gguf, main, local)?;
        }
    }
    match &main.scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => {
            config.put("rope.scaling.type", Value::String("linear".into()));
            config.put_number("rope.scaling.factor", *factor);
        }
        Some(RopeScaling::Dynamic {
            max_position_embeddings,
            ..
        }) => config.out.warnings.push(format!(
            "llama.cpp has no dynamic scaling of the rotary embedding: answers are the model's up to {max_position_embeddings} tokens, and \
             others beyond"
        )),
        Some(RopeScaling::Yarn(yarn)) => write_yarn(config, yarn)?,
        Some(RopeScaling::Llama3(scaling)) => {
            let known = ["llama", "granite"].contains(&gguf.name);
            ensure!(known, "{}", no_factors(gguf, "llama3"));
            let factors = llama3_factors(main.theta, width, scaling);
            config.out.tensors.push((FREQUENCIES, factors));
        }
        Some(RopeScaling::LongRope(scaling)) => {
            let known = ["llama", "granite", "phi3"].contains(&gguf.name);
            ensure!(known, "{}", no_factors(gguf, "longrope"));
            write_longrope(config, scaling)?;
        }
    }
    Ok(())
}

fn no_factors(gguf: &GgufArch, kind: &str) -> String {
    format!(
        "llama.cpp reads no factors of the rotary embedding for `{}` models, which the rope type `{kind}` needs",
        gguf.name
    )
}

/// Layers with a window rotate by `local`. llama.cpp gives them a base of their own in Gemma 3 alone, and scales their embedding nowhere.
fn check_windowed(gguf: &GgufArch, main: &Rope, local: &Rope) -> anyhow::Result<()> {
    ensure!(
        local.scaling.is_none(),
        "llama.cpp does not scale the rotary embedding of layers with a window, and this model does"
    );
    ensure!(
        gguf.name == "gemma3" || main.theta.to_bits() == local.theta.to_bits(),
        "layers with a window rotate by the base {}, and llama.cpp takes that of the other layers for them, {}",
        local.theta,
        main.theta
    );
    // OLMo's layers with a window are rotated without any factor, Gemma's with that of the others.
    if let Some(RopeScaling::Yarn(yarn)) = &main.scaling {
        ensure!(
            gguf.name != "gemma3" || own_attention(yarn).is_none(),
            "`attention_factor` of the rope type `yarn` would be that of layers with a window too in llama.cpp"
        );
    }
    Ok(())
}

/// The factor by which the rotation is larger than `YaRN` makes it, if it is.
fn own_attention(yarn: &YarnScaling) -> Option<f64> {
    let own = yarn.attention_factor / yarn_attention(yarn.factor);
    ((own - 1.).abs() > ROUNDING).then_some(own)
}

fn write_yarn(config: &mut Config<'_>, yarn: &YarnScaling) -> anyhow::Result<()> {
    ensure!(
        yarn.truncate,
        "llama.cpp rounds the range of the rope type `yarn` to whole pairs, and this model doesn't (`truncate: false`)"
    );
    let usual = [(yarn.beta_fast, 32f64), (yarn.beta_slow, 1.)];
    let usual = usual
        .iter()
        .all(|(own, usual)| own.to_bits() == usual.to_bits());
    ensure!(
        usual,
        "llama.cpp computes the rope type `yarn` with `beta_fast: 32` and `beta_slow: 1`, and this model has {} and {}",
        yarn.beta_fast,
        yarn.beta_slow
    );
    let original = u32::try_from(yarn.original_max_position_embeddings)?;
    config.put("rope.scaling.type", Value::String("yarn".into()));
    config.put_number("rope.scaling.factor", yarn.factor);
    config.put("rope.scaling.original_context_length", Value::U32(original));
    // Not `yarn_attn_factor`: llama.cpp computes that one anew, and multiplies it by this.
    if let Some(own) = own_attention(yarn) {
        config.put_number("rope.scaling.attn_factor", own);
    }
    config.put_number("rope.scaling.yarn_beta_fast", yarn.beta_fast);
    config.put_number("rope.scaling.yarn_beta_slow", yarn.beta_slow);
    Ok(())
}

/// Two lists of factors, and the factor of the rotation.
fn write_longrope(config: &mut Config<'_>, scaling: &LongRopeScaling) -> anyhow::Result<()> {
    let original = scaling.original_max_position_embeddings;
    config.put("rope.scaling.type", Value::String("longrope".into()));
    config.put(
        "rope.scaling.original_context_length",
        Value::U32(u32::try_from(original)?),
    );
    config.put_number("rope.scaling.attn_factor", scaling.attention_factor);
    let list = |factors: &[f64]| factors.iter().map(|factor| *factor as f32).collect();
    let tensors = &mut config.out.tensors;
    tensors.push((LONG, list(&scaling.long_factor)));
    tensors.push((SHORT, list(&scaling.short_factor)));
    config.out.warnings.push(format!(
        "llama.cpp takes the model's factors for long texts as soon as its context (`-c`) is longer than {original} tokens, and those for \
         short ones else, whatever the length of the text; the model itself goes by the text"
    ));
    Ok(())
}

/// Llama 3's scaling as factors by which llama.cpp divides frequencies (`_compute_llama3_parameters` in transformers'
/// `modeling_rope_utils.py`): 1 for short wavelengths, `factor` for long ones, and between them a mean of both.
fn llama3_factors(theta: f64, width: u32, scaling: &Llama3Scaling) -> Vec<f32> {
    let Llama3Scaling {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        ..
    } = *scaling;
    let original = scaling.original_max_position_embeddings as f64;
    let pairs = (0..width / 2).map(f64::from);
    let factors = pairs.map(|pair| {
        let frequency = theta.powf(-2. * pair / f64::from(width));
        let wavelength = 2. * PI / frequency;
        if wavelength < original / high {
            1.
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1. / ((1. - smooth) / factor + smooth)
        }
    });
    factors.map(|factor| factor as f32).collect()
}

#[cfg(test)]
mod tests;
