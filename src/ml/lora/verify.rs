//! The verification of a merge: compares the logits of the merged model with those of its base with the adapter on a few prompts, in
//! f32, with one layer in memory at a time.

use std::path::Path;

use anyhow::{Context as _, ensure};
use candle_core::Tensor;
use pipeline_kernels::panels::{column, size};
use pipeline_kernels::product::{Factor, Onto, Product, Term, products};
use rayon::prelude::*;

use crate::ml::adapter::Adapter;
use crate::ml::fused::layerwise::MappedModel;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::{logits_by_layer, tied};

/// The rows of the head whose logits are computed at a time; they stay in the cache.
const HEAD_ROWS: usize = 1 << 11;

/// The result of a comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeCheck {
    /// The number of compared positions: the tokens of all prompts.
    pub positions: usize,
    /// The largest difference between two logits.
    pub largest: f64,
    /// The norm of the difference of the logits, relative to the norm of the logits. The mean of each position is subtracted from both,
    /// because it does not change the probabilities; not of scores.
    pub relative: f64,
    /// The effect of the adapter, measured in the same way: the difference of the base's logits with it and without it.
    pub effect: f64,
    /// The largest `relative` that the rounding of the merged weights can cause.
    pub bound: f64,
}

impl MergeCheck {
    /// The fraction of the adapter's effect that was lost in rounding: `relative / effect`.
    pub fn fraction_lost(&self) -> f64 {
        if self.effect > 0. {
            self.relative / self.effect
        } else {
            0.
        }
    }
}

/// The largest relative difference that rounding can cause. Each weight is rounded once, with a relative error of at most 2^-9 in bf16
/// and 2^-12 in f16, and in a product of many the error is a fraction of that. The bounds leave room for the layers of a deep model.
fn bound(float: Float) -> f64 {
    match float {
        Float::F32 => 1e-4,
        Float::F16 => 1e-2,
        Float::BF16 => 5e-2,
    }
}

/// Compares the model in `merged` with the model in `base` with `adapter` on `prompts`, which are sequences of token ids. `progress` is
/// called with the number of finished layers and their total, and may stop with an error.
///
/// # Errors
/// The models differ by more than rounding can explain, they don't fit each other, or a file can't be read.
pub fn verify_merge(
    base: &Path,
    adapter: &Adapter,
    merged: &Path,
    prompts: &[Vec<u32>],
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<MergeCheck> {
    let sequences = prompts.iter().map(|ids| Sequence::new(ids.clone(), 0));
    let batch = Batch::new(sequences.collect(), 0)?;
    let (arch, weights) = tied::open(base)?;
    let base = MappedModel {
        arch: &arch,
        weights: &weights,
        adapter: Some(adapter),
    };
    let scores = base.arch.scores;
    let (arch, weights) = tied::open(merged)?;
    let merged = MappedModel {
        arch: &arch,
        weights: &weights,
        adapter: None,
    };
    let positions = if base.is_supported() && merged.is_supported() {
        by_kernels(base, merged, &batch, progress)?
    } else {
        by_reference(base, merged, &batch, progress)?
    };

    // Of a score nothing may be subtracted.
    let norm = |of: &Moments, count: usize| {
        if scores { of.squares } else { of.spread(count) }
    };
    let length: f64 = positions.iter().map(|p| norm(&p.with, p.count)).sum();
    let apart: f64 = positions.iter().map(|p| norm(&p.apart, p.count)).sum();
    let effect: f64 = positions.iter().map(|p| norm(&p.effect, p.count)).sum();
    ensure!(
        length.is_finite() && length > 0.,
        "the base with the adapter gives no finite logits; the adapter may have diverged in its training"
    );
    let check = MergeCheck {
        positions: positions.len(),
        largest: positions.iter().fold(0., |most, p| larger(most, p.largest)),
        relative: (apart / length).sqrt(),
        effect: (effect / length).sqrt(),
        bound: bound(coarsest(&weights)?),
    };
    ensure!(
        check.relative <= check.bound,
        "the merged model is not the base with the adapter: its logits differ by {:.1e} of their size (at most {:.1e} in one \
         logit), and rounding its weights explains no more than {:.0e}; the adapter changes them by {:.1e}. This is a bug in \
         pipeline, or the base changed while it was read",
        check.relative,
        check.largest,
        check.bound,
        check.effect
    );
    Ok(check)
}

/// The larger of two differences; a NaN if one of them is.
fn larger(most: f64, far: f64) -> f64 {
    if most.is_nan() || far <= most {
        most
    } else {
        far
    }
}

/// The sums over the logits of one position.
#[derive(Default)]
struct Position {
    count: usize,
    with: Moments,
    apart: Moments,
    effect: Moments,
    largest: f64,
}

impl Position {
    /// Adds logits, each of the base without the adapter, of the base with it, and of the merged model.
    fn add(&mut self, logits: impl Iterator<Item = ((f32, f32), f32)>) {
        for ((without, with), merged) in logits {
            let (with, apart) = (f64::from(with), f64::from(merged) - f64::from(with));
            self.count += 1;
            self.with.add(with);
            self.apart.add(apart);
            self.effect.add(f64::from(without) - with);
            self.largest = larger(self.largest, apart.abs());
        }
    }
}

/// The sum of values and the sum of their squares.
#[derive(Default)]
struct Moments {
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.squares += value * value;
    }

    /// The sum of the squared distances of `count` values from their mean.
    fn spread(&self, count: usize) -> f64 {
        let spread = self.squares - self.sum * self.sum / count.max(1) as f64;
        // Rounding may leave a little less than 0 for equal values; a NaN is kept.
        if spread < 0. { 0. } else { spread }
    }
}

/// The comparison on the fast path: tokens with the adapter and tokens without it go through the base together, and logits are computed
/// in blocks.
fn by_kernels(
    base: MappedModel<'_>,
    merged: MappedModel<'_>,
    batch: &Batch,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Position>> {
    let tokens = batch.tokens();
    let layers = base.arch.num_hidden_layers();
    let mut done = |number: usize| progress(number as u64, 2 * layers as u64);
    let both = base.hidden(&[batch, batch], tokens, &mut done)?;
    let own = merged.hidden(&[batch], tokens, &mut |number| done(layers + number))?;
    let (both, own) = (Factor::F32(&both), Factor::F32(&own));
    let mut positions: Vec<Position> = (0..tokens).map(|_| Position::default()).collect();
    let vocabulary = base.arch.head_rows();
    let packed = (base.head_in_4_bits()?, merged.head_in_4_bits()?);
    let (mut of_both, mut of_own) = (Vec::new(), Vec::new());
    for start in (0..vocabulary).step_by(HEAD_ROWS) {
        let rows = start..(start + HEAD_ROWS).min(vocabulary);
        let count = rows.len();
        let heads = (
            base.head(packed.0.as_ref(), rows.clone())?,
            merged.head(packed.1.as_ref(), rows)?,
        );
        of_both.resize(size(count, 2 * tokens), 0f32);
        of_own.resize(size(count, tokens), 0f32);
        let product = |out, weight, x| Product {
            out,
            terms: vec![Term { weight, x }],
            onto: Onto::Zero,
            bias: None,
        };
        products(vec![
            product(&mut of_both[..], heads.0.matrix()?, &both),
            product(&mut of_own[..], heads.1.matrix()?, &own),
        ]);
        base.finish_logits(&mut of_both);
        merged.finish_logits(&mut of_own);
        let all = positions.par_iter_mut().enumerate();
        all.for_each(|(token, position)| {
            let with = column(&of_both, count, token);
            let without = column(&of_both, count, tokens + token);
            position.add(without.zip(with).zip(column(&of_own, count, token)));
        });
    }
    Ok(positions)
}

/// The comparison on the reference path, for what the kernels don't support.
fn by_reference(
    base: MappedModel<'_>,
    merged: MappedModel<'_>,
    batch: &Batch,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Position>> {
    let layers = base.arch.num_hidden_layers();
    let mut done = |number: usize| progress(number as u64, 2 * layers as u64);
    let MappedModel {
        arch,
        weights,
        adapter,
    } = base;
    let passes = [Pass::BASE, Pass::INFER];
    let logits = logits_by_layer(arch, weights, adapter, batch, &passes, &mut done)?;
    let [without, with] = &logits[..] else {
        anyhow::bail!("there are not two passes");
    };
    let MappedModel { arch, weights, .. } = merged;
    let mut done = |number| done(layers + number);
    let logits = logits_by_layer(arch, weights, None, batch, &[Pass::BASE], &mut done)?;
    let merged = logits.first().context("there is no pass")?;
    let mut positions = Vec::with_capacity(batch.tokens());
    for (row, sequence) in batch.sequences.iter().enumerate() {
        for index in 0..sequence.ids.len() {
            let read = |logits: &Tensor| logits.get(row)?.get(index)?.to_vec1::<f32>();
            let (without, with) = (read(without)?, read(with)?);
            let mut position = Position::default();
            position.add(without.into_iter().zip(with).zip(read(merged)?));
            positions.push(position);
        }
    }
    Ok(positions)
}

/// The least precise type among a model's weights.
fn coarsest(weights: &Weights) -> anyhow::Result<Float> {
    let mut coarsest = Float::F32;
    for name in weights.names() {
        let float = Float::from_safetensors(weights.raw(name)?.dtype);
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
