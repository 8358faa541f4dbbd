//! The angles of the rotary embedding (Su et al. 2021, arXiv 2104.09864, section 3.4.2).

use candle_core::{Device, Result, Tensor};

use super::arch::Arch;

/// The cosines and sines of the angles (positions, `head_dim / 2`), in f32, with Llama 3's scaling if the model has it
/// (`_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`).
pub(in crate::ml) fn angles(
    config: &Arch,
    positions: impl IntoIterator<Item = usize>,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let half = config.head_dim / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = (2 * i) as f32 / config.head_dim as f32;
            let frequency = 1. / (config.rope.theta as f32).powf(exponent);
            match &config.rope.scaling {
                Some(scaling) => {
                    let wave = 2. * std::f32::consts::PI / frequency;
                    let original = scaling.original_max_position_embeddings as f32;
                    let (low, high) = (
                        scaling.low_freq_factor as f32,
                        scaling.high_freq_factor as f32,
                    );
                    let factor = scaling.factor as f32;
                    if wave < original / high {
                        frequency
                    } else if wave > original / low {
                        frequency / factor
                    } else {
                        let smooth = (original / wave - low) / (high - low);
                        (1. - smooth) * frequency / factor + smooth * frequency
                    }
                }
                None => frequency,
            }
        })
        .collect();
    let angles: Vec<f32> = positions
        .into_iter()
        .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
        .collect();
    let angles = Tensor::from_vec(angles, ((), half), device)?;
    Ok((angles.cos()?, angles.sin()?))
}
