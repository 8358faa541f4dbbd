//! The angles of the rotary embedding (Su et al. 2021, arXiv 2104.09864, section 3.4.2), and its ways of scaling, as in transformers'
//! `modeling_rope_utils.py`.

use std::f32::consts::PI;

use candle_core::{Device, Result, Tensor, bail};

use super::arch::{Arch, Llama3Scaling, Rope, RopeScaling, YarnScaling};
use super::batch::Batch;

/// The cosines and sines (positions, `rotary_dim / 2`), in f32, of the angles of the model's rotary embedding number `rope`, times the
/// scaling's attention factor if it has one. `length` is one more than the largest position of the micro-batch to which the positions belong,
/// on which [`RopeScaling::Dynamic`] and [`RopeScaling::LongRope`] depend.
///
/// # Errors
/// The model has no rotary embedding of this number.
pub(in crate::ml) fn angles(
    arch: &Arch,
    rope: usize,
    positions: impl IntoIterator<Item = usize>,
    length: usize,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let Some(rope) = arch.ropes.get(rope) else {
        bail!("the model has no rotary embedding number {rope}")
    };
    let half = arch.rotary_dim / 2;
    let frequencies = frequencies(rope, arch.rotary_dim, length);
    let angles: Vec<f32> = positions
        .into_iter()
        .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
        .collect();
    let angles = Tensor::from_vec(angles, ((), half), device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    match attention_factor(rope) {
        Some(factor) => Ok(((cos * factor)?, (sin * factor)?)),
        None => Ok((cos, sin)),
    }
}

/// The angles of all rotary embeddings of a model, see [`angles`].
pub(super) fn all_angles<I: IntoIterator<Item = usize>>(
    arch: &Arch,
    positions: impl Fn() -> I,
    length: usize,
    device: &Device,
) -> Result<Vec<(Tensor, Tensor)>> {
    let all = 0..arch.ropes.len();
    all.map(|rope| angles(arch, rope, positions(), length, device))
        .collect()
}

/// The angles of all rotary embeddings of a model for a batch: (length, `rotary_dim / 2`), or (batch, length, `rotary_dim / 2`) if its
/// sequences hold several documents.
pub(super) fn batch_angles(
    arch: &Arch,
    batch: &Batch,
    device: &Device,
) -> Result<Vec<(Tensor, Tensor)>> {
    let Some(positions) = batch.positions() else {
        return all_angles(arch, || 0..batch.width, batch.width, device);
    };
    let length = positions.iter().max().map_or(0, |last| last + 1);
    let shape = (batch.sequences.len(), batch.width, ());
    let own = all_angles(arch, || positions.iter().copied(), length, device)?;
    own.into_iter()
        .map(|(cos, sin)| Ok((cos.reshape(shape)?, sin.reshape(shape)?)))
        .collect()
}

/// Whether keys that were rotated in a sequence of `before` tokens have to be rotated anew when it has `after`, as transformers does it for
/// `LongRoPE` when text is generated; with [`RopeScaling::Dynamic`] it keeps them.
pub(super) fn is_outdated(rope: &Rope, before: usize, after: usize) -> bool {
    match &rope.scaling {
        Some(RopeScaling::LongRope(long)) => {
            let original = long.original_max_position_embeddings;
            (before > original) != (after > original)
        }
        _ => false,
    }
}

/// Whether the angles of a position are the same in micro-batches of these two lengths, see [`angles`].
pub(in crate::ml) fn have_same_angles(arch: &Arch, a: usize, b: usize) -> bool {
    let same = |rope: &Rope| match &rope.scaling {
        Some(RopeScaling::Dynamic {
            max_position_embeddings: longest,
            ..
        }) => a.max(*longest) == b.max(*longest),
        Some(RopeScaling::LongRope(long)) => {
            let original = long.original_max_position_embeddings;
            (a > original) == (b > original)
        }
        _ => true,
    };
    a == b || arch.ropes.iter().all(same)
}

/// The factor of cosines and sines, if it is not 1.
fn attention_factor(rope: &Rope) -> Option<f64> {
    let factor = match &rope.scaling {
        Some(RopeScaling::Yarn(yarn)) => yarn.attention_factor,
        Some(RopeScaling::LongRope(long)) => long.attention_factor,
        _ => 1.,
    };
    (factor.to_bits() != 1f64.to_bits()).then_some(factor)
}

/// The radians (`rotary_dim / 2`) by which each pair of features rotates for a position.
pub(super) fn frequencies(rope: &Rope, rotary_dim: usize, length: usize) -> Vec<f32> {
    let dim = rotary_dim as f32;
    let plain =
        |theta: f32| (0..rotary_dim / 2).map(move |i| 1. / theta.powf((2 * i) as f32 / dim));
    let theta = rope.theta as f32;
    match &rope.scaling {
        None => plain(theta).collect(),
        Some(RopeScaling::Linear { factor }) => plain(theta)
            .map(|frequency| frequency / *factor as f32)
            .collect(),
        Some(RopeScaling::Dynamic {
            factor,
            max_position_embeddings,
        }) => plain(dynamic_base(
            rope.theta,
            rotary_dim,
            *factor,
            *max_position_embeddings,
            length,
        ) as f32)
        .collect(),
        Some(RopeScaling::Yarn(yarn)) => {
            let (low, high) = yarn_range(rope.theta, rotary_dim, yarn);
            let factor = yarn.factor as f32;
            let scale = |(i, frequency): (usize, f32)| {
                let extrapolated = 1. - ((i as f32 - low) / (high - low)).clamp(0., 1.);
                frequency / factor * (1. - extrapolated) + frequency * extrapolated
            };
            plain(theta).enumerate().map(scale).collect()
        }
        Some(RopeScaling::Llama3(scaling)) => plain(theta)
            .map(|frequency| llama3(frequency, scaling))
            .collect(),
        Some(RopeScaling::LongRope(long)) => {
            let factors = if length > long.original_max_position_embeddings {
                &long.long_factor
            } else {
                &long.short_factor
            };
            let scaled = plain(theta).zip(factors);
            scaled
                .map(|(frequency, factor)| frequency / *factor as f32)
                .collect()
        }
    }
}

/// The base for sequences of `length` tokens (`_compute_dynamic_ntk_parameters`).
fn dynamic_base(theta: f64, dim: usize, factor: f64, longest: usize, length: usize) -> f64 {
    let length = length.max(longest) as f64;
    let dim = dim as f64;
    let growth = factor * length / longest as f64 - (factor - 1.);
    // A head of two features has one frequency, 1, whatever the base.
    if dim > 2. {
        theta * growth.powf(dim / (dim - 2.))
    } else {
        theta
    }
}

/// The pairs of features between which `YaRN` goes over from the plain wavelengths to the scaled ones (`find_correction_range` and
/// `linear_ramp_factor` in `_compute_yarn_parameters`).
fn yarn_range(theta: f64, dim: usize, yarn: &YarnScaling) -> (f32, f32) {
    let original = yarn.original_max_position_embeddings as f64;
    let at = |rotations: f64| {
        dim as f64 * (original / (rotations * 2. * std::f64::consts::PI)).ln() / (2. * theta.ln())
    };
    let (low, high) = (at(yarn.beta_fast), at(yarn.beta_slow));
    let (low, high) = if yarn.truncate {
        (low.floor(), high.ceil())
    } else {
        (low, high)
    };
    let (low, high) = (low.max(0.), high.min(dim as f64 - 1.));
    // As there, so that nothing is divided by 0.
    let gap = if low.to_bits() == high.to_bits() {
        0.001
    } else {
        0.
    };
    (low as f32, (high + gap) as f32)
}

/// Llama 3's scaling of one frequency (`_compute_llama3_parameters`).
fn llama3(frequency: f32, scaling: &Llama3Scaling) -> f32 {
    let wave = 2. * PI / frequency;
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
