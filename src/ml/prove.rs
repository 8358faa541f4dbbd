//! Whether a merged model says what its base says with the adapter: the logits of some prompts, in f32, with one layer in
//! memory at a time.

use std::path::Path;

use anyhow::{Context as _, ensure};
use candle_core::Tensor;

use super::adapter::Adapter;
use super::batch::{Batch, Sequence};
use super::config::LlamaConfig;
use super::float::Float;
use super::linear::Pass;
use super::model::logits_by_layer;
use super::weights::Weights;

/// How near the merged model is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proof {
    /// Positions that were compared: the tokens of all prompts.
    pub positions: usize,
    /// The largest difference of two logits.
    pub largest: f64,
    /// The difference's length by that of the logits, each position's mean taken off: the mean of all logits of a position
    /// changes no probability.
    pub relative: f64,
    /// The same for what the adapter changes: the base's logits with it and without.
    pub effect: f64,
    /// The largest `relative` that the rounding of the merged weights explains.
    pub bound: f64,
}

impl Proof {
    /// The share of what the adapter changes that got lost in rounding.
    pub fn lost(&self) -> f64 {
        if self.effect > 0. {
            self.relative / self.effect
        } else {
            0.
        }
    }
}

/// What rounding explains. It was made once, of each weight: 2^-9 in bf16 and 2^-12 in f16 at most, and a fraction of that in
/// a product of many; the bounds leave room for all layers of a deep model.
fn bound(float: Float) -> f64 {
    match float {
        Float::F32 => 1e-4,
        Float::F16 => 1e-2,
        Float::BF16 => 5e-2,
    }
}

/// Compares the folder `merged` with the folder `base` and `adapter` on `prompts`, and fails if they are further apart than
/// rounding explains. `progress` is told the layers done, of all that there are, and may stop.
pub fn prove(
    base: &Path,
    adapter: &Adapter,
    merged: &Path,
    prompts: &[Vec<u32>],
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Proof> {
    let sequences = prompts.iter().map(|ids| Sequence::new(ids.clone(), 0));
    let batch = Batch::new(sequences.collect(), 0)?;
    let config = LlamaConfig::read(base)?;
    let layers = config.num_hidden_layers;
    let mut done = |number: usize| progress(number as u64, 2 * layers as u64);

    let weights = Weights::open(base)?;
    let passes = [Pass::BASE, Pass::INFER];
    let adapter = Some(adapter);
    let logits = logits_by_layer(&config, &weights, adapter, &batch, &passes, &mut done)?;
    let [without, with] = &logits[..] else {
        anyhow::bail!("there are not two passes");
    };
    let weights = Weights::open(merged)?;
    let config = LlamaConfig::read(merged)?;
    let mut done = |number| done(layers + number);
    let logits = logits_by_layer(&config, &weights, None, &batch, &[Pass::BASE], &mut done)?;
    let merged = logits.first().context("there is no pass")?;

    let mut proof = Proof {
        positions: batch.tokens(),
        largest: 0.,
        relative: 0.,
        effect: 0.,
        bound: bound(coarsest(&weights)?),
    };
    let (mut length, mut apart, mut effect) = (0f64, 0f64, 0f64);
    for (row, prompt) in prompts.iter().enumerate() {
        for position in 0..prompt.len() {
            let read = |logits: &Tensor| logits.get(row)?.get(position)?.to_vec1::<f32>();
            let (without, with, merged) = (read(without)?, read(with)?, read(merged)?);
            for (a, b) in merged.iter().zip(&with) {
                let far = (f64::from(*a) - f64::from(*b)).abs();
                // Not `max`, which drops a NaN.
                let within = far <= proof.largest;
                if !within {
                    proof.largest = far;
                }
            }
            length += spread(with.iter().map(|&x| f64::from(x)));
            let between = |other: &[f32]| {
                let pairs = other.iter().zip(&with);
                spread(pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)))
            };
            apart += between(&merged);
            effect += between(&without);
        }
    }
    ensure!(
        length.is_finite() && length > 0.,
        "the base with the adapter gives no finite logits; the adapter may have diverged in its training"
    );
    proof.relative = (apart / length).sqrt();
    proof.effect = (effect / length).sqrt();
    ensure!(
        proof.relative <= proof.bound,
        "the merged model is not the base with the adapter: its logits differ by {:.1e} of their size (at most {:.1e} in one \
         logit), and rounding its weights explains no more than {:.0e}; the adapter changes them by {:.1e}. This is a bug in \
         pipeline, or the base changed while it was read",
        proof.relative,
        proof.largest,
        proof.bound,
        proof.effect
    );
    Ok(proof)
}

/// The squared distance of all values from their mean.
fn spread(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / count;
    values.map(|value| (value - mean).powi(2)).sum()
}

/// The least precise type of a model's weights.
fn coarsest(weights: &Weights) -> anyhow::Result<Float> {
    let mut coarsest = Float::F32;
    for name in weights.names() {
        let float = Float::of(weights.raw(name)?.dtype);
        if let Some(float) = float
            && bound(float) > bound(coarsest)
        {
            coarsest = float;
        }
    }
    Ok(coarsest)
}

#[cfg(test)]
mod tests;
