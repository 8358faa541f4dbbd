//! The scaling of rotary embeddings in a GGUF file: keys for most types, a tensor of factors for Llama 3's and the long one of Phi-3.

use std::f64::consts::PI;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value as Json, json};

use super::GgmlType;
use super::dequantise::dequantise;
use super::names::GgufArch;
use super::read::File;

/// The tensor of factors by Llama 3's scaling.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";
/// The tensor of factors for texts longer than the original length.
pub(super) const LONG: &str = "rope_factors_long.weight";
/// The tensor of factors for other texts.
pub(super) const SHORT: &str = "rope_factors_short.weight";
/// Tensors of a file that are no weights: what they say goes to `config.json`.
pub(super) const TENSORS: [&str; 3] = [FREQUENCIES, LONG, SHORT];
/// The largest relative difference of a factor that is taken for rounding.
const ROUNDING: f64 = 2e-6;

/// What scaling depends on.
pub(super) struct Context {
    pub(super) layers: u64,
    pub(super) head_dim: u64,
    pub(super) theta: Option<f64>,
    /// The longest sequence.
    pub(super) length: u64,
}

/// The factor of cosines and sines that llama.cpp computes for `YaRN` by a `factor` of wavelengths; a file's `rope.scaling.attn_factor`
/// multiplies it.
pub(super) fn yarn_attention(factor: f64) -> f64 {
    if factor > 1. {
        1. + 0.1 * factor.ln()
    } else {
        1.
    }
}

/// Adds `rope_scaling`, where there is any.
pub(super) fn scaling(
    file: &File,
    arch: &GgufArch,
    context: &Context,
    config: &mut Map<String, Json>,
) -> anyhow::Result<()> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", arch.name);
    let number = |name: &str| file.number(&key(name));
    let original = file.unsigned(&key("original_context_length"))?;
    let kind = file.text(&key("type"))?;
    let factors = (factors(file, LONG)?, factors(file, SHORT)?);
    let scaling = if let (Some(long), Some(short)) = factors {
        let original =
            original.with_context(|| format!("`{}` is missing", key("original_context_length")))?;
        ensure!(
            long.len() == short.len(),
            "`{LONG}` and `{SHORT}` differ in length"
        );
        config.insert("original_max_position_embeddings".into(), json!(original));
        let mut scaling = json!({
            "rope_type": "longrope",
            "type": "longrope",
            "long_factor": long,
            "short_factor": short,
        });
        // transformers computes this factor unless it is given.
        let scale = context.length as f64 / original as f64;
        let usual = if scale > 1. {
            (1. + scale.ln() / (original as f64).ln()).sqrt()
        } else {
            1.
        };
        let own = number("attn_factor")?.filter(|own| (own / usual - 1.).abs() > 1e-5);
        if let Some(own) = own {
            scaling["attention_factor"] = json!(own);
        }
        scaling
    } else if let Some(factors) = self::factors(file, FREQUENCIES)? {
        let Some(scaling) = llama3(&factors, context)? else {
            return Ok(());
        };
        scaling
    } else {
        let factor = match number("factor")? {
            None => file.number(&format!("{}.rope.scale_linear", arch.name))?,
            factor => factor,
        };
        match (kind, factor) {
            (Some("none"), _) | (_, None | Some(0. | 1.)) => return Ok(()),
            (None | Some("linear"), Some(factor)) => {
                json!({"rope_type": "linear", "factor": factor})
            }
            (Some("yarn"), Some(factor)) => {
                let mut scaling = json!({"rope_type": "yarn", "factor": factor});
                scaling["original_max_position_embeddings"] =
                    json!(original.unwrap_or(context.length));
                for (theirs, ours) in [
                    ("yarn_beta_fast", "beta_fast"),
                    ("yarn_beta_slow", "beta_slow"),
                    ("yarn_attn_factor", "attention_factor"),
                ] {
                    if let Some(value) = number(theirs)? {
                        scaling[ours] = json!(value);
                    }
                }
                // `yarn_attn_factor` is what the model's own configuration said, by llama.cpp's converter.
                if let Some(own) = number("attn_factor")?
                    && scaling.get("attention_factor").is_none()
                {
                    scaling["attention_factor"] = json!(own * yarn_attention(factor));
                }
                scaling
            }
            (Some(other), _) => bail!(
                "`{}` is `{other}`, expected `none`, `linear`, `yarn` or `longrope`",
                key("type")
            ),
        }
    };
    config.insert("rope_scaling".into(), scaling);
    Ok(())
}

/// The values of a small tensor of factors.
fn factors(file: &File, name: &str) -> anyhow::Result<Option<Vec<f32>>> {
    let Some(tensor) = file.tensors().get(name) else {
        return Ok(None);
    };
    ensure!(
        tensor.kind == GgmlType::F32 && tensor.values() <= 1 << 16,
        "`{name}` has the type {} and the shape {:?}, expected F32 and half the width of a head",
        tensor.kind,
        tensor.shape
    );
    let mut bytes = vec![0; tensor.bytes];
    file.read(tensor, 0, &mut bytes)?;
    let mut values = vec![0.; tensor.values()];
    dequantise(tensor.kind, &bytes, &mut values)?;
    ensure!(
        values.iter().all(|value| value.is_finite() && *value > 0.),
        "`{name}` has values that are no factors"
    );
    Ok(Some(values))
}

/// Finds the settings of Llama 3's scaling that give these factors; `None` if all are 1.
///
/// The factors between 1 and the largest, F, are `1 / ((1 - s) / F + s)` with s linear in the frequency, so two of them tell the line.
/// Three settings give one line: `low_freq_factor` is taken to be 1, as it is in all of Llama's files.
fn llama3(factors: &[f32], context: &Context) -> anyhow::Result<Option<Json>> {
    let found: Vec<f64> = factors.iter().map(|factor| f64::from(*factor)).collect();
    ensure!(
        found.len() as u64 * 2 == context.head_dim,
        "`{FREQUENCIES}` has {} factors for heads of the width {}",
        found.len(),
        context.head_dim
    );
    let theta = context.theta.unwrap_or(10_000.);
    let frequency = |i: usize| theta.powf(-2. * i as f64 / context.head_dim as f64);
    let largest = found.iter().copied().fold(1., f64::max);
    if largest <= 1. + ROUNDING {
        return Ok(None);
    }
    let factor = whole(largest);
    // (high_freq_factor, original_max_position_embeddings)
    let mut candidates = vec![(4., 8192.)];
    let between: Vec<(f64, f64)> = found
        .iter()
        .enumerate()
        .filter(|(_, value)| **value > 1. + 1e-4 && **value < factor * (1. - 1e-4))
        .map(|(i, value)| {
            let smooth = (1. / value - 1. / factor) / (1. - 1. / factor);
            (frequency(i) / (2. * PI), smooth)
        })
        .collect();
    if let [first, .., last] = between[..] {
        let slope = (last.1 - first.1) / (last.0 - first.0);
        let at_zero = first.1 - slope * first.0;
        let high = 1. - 1. / at_zero;
        candidates.push((whole(high), whole(slope * (high - 1.))));
    }
    for (high, original) in candidates {
        let fits = found.iter().enumerate().all(|(i, value)| {
            let wavelength = 2. * PI / frequency(i);
            let computed = if wavelength < original / high {
                1.
            } else if wavelength > original {
                factor
            } else {
                let smooth = (original / wavelength - 1.) / (high - 1.);
                1. / ((1. - smooth) / factor + smooth)
            };
            (computed / value - 1.).abs() <= 100. * ROUNDING
        });
        if fits && original >= 1. && high > 1. {
            return Ok(Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original.round() as u64,
            })));
        }
    }
    bail!(
        "the factors in `{FREQUENCIES}` are not those of Llama 3's scaling of the rotary embedding; other factors are not supported"
    )
}

/// The nearest whole number, where rounding explains the difference.
fn whole(value: f64) -> f64 {
    let whole = value.round();
    if (value / whole - 1.).abs() < 1e-3 {
        whole
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The factors as llama.cpp's converter computes them, in single precision.
    fn made(dim: u64, theta: f64, factor: f64, low: f64, high: f64, original: f64) -> Vec<f32> {
        let one = |i: u64| {
            let wavelength = 2. * PI * theta.powf(2. * i as f64 / dim as f64);
            if wavelength < original / high {
                1.
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1. / ((1. - smooth) / factor + smooth)
            }
        };
        (0..dim / 2).map(|i| one(i) as f32).collect()
    }

    #[test]
    fn the_settings_are_found_from_the_factors() {
        for (dim, theta, factor, low, high, original) in [
            (128, 500_000., 8., 1., 4., 8192.),
            (64, 500_000., 32., 1., 4., 8192.),
            (16, 10_000., 8., 1., 4., 8192.),
            (128, 500_000., 16., 1., 8., 4096.),
            // The same line as 1, 4, 8192.
            (64, 500_000., 32., 2., 8., 16384.),
        ] {
            let context = Context {
                layers: 1,
                head_dim: dim,
                theta: Some(theta),
                length: 131_072,
            };
            let factors = made(dim, theta, factor, low, high, original);
            let found = llama3(&factors, &context).unwrap().unwrap();
            assert_eq!(found["factor"], json!(factor));
            assert_eq!(found["low_freq_factor"], json!(1.));
            assert_eq!(found["high_freq_factor"], json!(high / low), "{found}");
            let original = (original / low) as u64;
            assert_eq!(found["original_max_position_embeddings"], json!(original));
        }
    }

    #[test]
    fn other_factors_are_refused() {
        let context = Context {
            layers: 1,
            head_dim: 8,
            theta: None,
            length: 64,
        };
        assert_eq!(llama3(&[1.; 4], &context).unwrap(), None);
        assert!(llama3(&[1., 3., 2., 7.], &context).is_err());
        assert!(llama3(&[1., 2.], &context).is_err());
    }
}
