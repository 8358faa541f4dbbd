//! The verification of an export: the file is read back as a model folder by the way of an import, and compared with the model.
//!
//! Each tensor must differ from the model's exactly by what rounding to its type changed when it was made, so every value is in its place. Then
//! the logits of a few prompts are compared, which also proves what the file says of the architecture. Their difference may be what the
//! measured rounding of the weights explains.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;

use super::export::Rounding;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::{logits_by_layer, tied};

/// The values that are compared at once.
const PIECE: usize = 1 << 20;
/// How much the sums of two comparisons of the same values may differ, because the values come in another order.
const ORDER: f64 = 1e-6;
/// The share of a tensor's length that conversions between f32 and f32 may add.
const NOISE: f64 = 1e-7;
/// Differences of logits by rounding in f32, relative to their size.
const FLOAT_NOISE: f64 = 1e-4;
/// How much larger than the mean a difference of logits may be.
const ROOM: f64 = 4.;

/// The result of a comparison.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExportCheck {
    /// What rounding changed in a tensor, as the norm of the change relative to that of the tensor: the root mean square over the tensors
    /// that it changed. Tensors that the file holds as they are don't count, however large they are (Gemma's norms).
    pub weights: f64,
    /// The number of compared positions: the tokens of all prompts.
    pub positions: usize,
    /// The largest difference between two logits.
    pub largest: f64,
    /// The norm of the difference of the logits relative to the norm of the logits, after the mean of each position is subtracted from both.
    pub relative: f64,
    /// The largest `relative` that rounding can explain.
    pub bound: f64,
    /// The mean Kullback-Leibler divergence of the file's next-token probabilities from the model's, in nats.
    pub divergence: f64,
}

/// Compares the model in the folder `source` with the one in `restored`, which was made of the file. `roundings` is what the export
/// measured, by transformers' names of the tensors, and `prompts` are sequences of token ids. `progress` is called with the number of
/// finished steps and their total, and may stop with an error.
///
/// # Errors
/// A tensor or the logits differ by more than rounding explains, or a file can't be read.
pub fn verify_export(
    source: &Path,
    restored: &Path,
    roundings: &BTreeMap<String, Rounding>,
    prompts: &[Vec<u32>],
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<ExportCheck> {
    let (arch, weights) = tied::open(source)?;
    let (own_arch, own_weights) = tied::open(restored)?;
    let layers = arch.num_hidden_layers();
    let total = (roundings.len() + 2 * layers) as u64;
    let mut rounded = Vec::new();
    for (number, (name, rounding)) in roundings.iter().enumerate() {
        let found = difference(&weights, &own_weights, name)?;
        let apart = (found.apart - rounding.apart).abs();
        ensure!(
            apart <= ORDER * rounding.apart + NOISE * NOISE * found.length,
            "the tensor `{name}` was read back with other values than were written: it differs from the model's by {:.3e} of its size, \
             and rounding it changed {:.3e}. This is a bug in pipeline, or the model changed while it was read",
            found.relative(),
            rounding.relative()
        );
        if rounding.apart > 0. {
            rounded.push(rounding.relative());
        }
        progress(number as u64 + 1, total)?;
    }
    let sequences = prompts.iter().map(|ids| Sequence::new(ids.clone(), 0));
    let batch = Batch::new(sequences.collect(), 0)?;
    let mut logits = Vec::new();
    for (number, (arch, weights)) in [(&arch, &weights), (&own_arch, &own_weights)]
        .into_iter()
        .enumerate()
    {
        let before = (roundings.len() + number * layers) as u64;
        let mut done = |layers: usize| progress(before + layers as u64, total);
        let made = logits_by_layer(arch, weights, None, &batch, &[Pass::BASE], &mut done)?;
        logits.push(made.into_iter().next().context("there is no pass")?);
    }
    let [wanted, found] = &logits[..] else {
        anyhow::bail!("there are not two models");
    };
    let mut sums = Sums::default();
    for (row, sequence) in batch.sequences.iter().enumerate() {
        for index in 0..sequence.ids.len() {
            let wanted = wanted.get(row)?.get(index)?.to_vec1::<f32>()?;
            let found = found.get(row)?.get(index)?.to_vec1::<f32>()?;
            sums.add(&wanted, &found);
        }
    }
    ensure!(
        sums.length.is_finite() && sums.length > 0. && sums.apart.is_finite(),
        "the model gives no finite logits; it may have diverged in its training"
    );
    let squares = rounded.iter().map(|relative| relative * relative);
    let rounded = (squares.sum::<f64>() / rounded.len().max(1) as f64).sqrt();
    let check = ExportCheck {
        weights: rounded,
        positions: sums.positions,
        largest: sums.largest,
        relative: (sums.apart / sums.length).sqrt(),
        bound: FLOAT_NOISE + ROOM * rounded * ((2 * layers + 1) as f64).sqrt(),
        divergence: sums.divergence / sums.positions.max(1) as f64,
    };
    ensure!(
        check.relative <= check.bound,
        "the file is not the model: its logits differ by {:.1e} of their size (at most {:.1e} in one logit), and rounding its weights, \
         which changed each by {:.1e} on average, explains no more than {:.1e}. This is a bug in pipeline, or the model's weights are so uneven \
         that this type can't hold them; hint: take a type of more bits",
        check.relative,
        check.largest,
        check.weights,
        check.bound
    );
    Ok(check)
}

/// The difference of a tensor of two models.
fn difference(wanted: &Weights, found: &Weights, name: &str) -> anyhow::Result<Rounding> {
    let (wanted, found) = (wanted.raw(name)?, found.raw(name)?);
    ensure!(
        wanted.shape == found.shape,
        "the tensor `{name}` was read back with the shape {:?}, expected {:?}",
        found.shape,
        wanted.shape
    );
    let float = |dtype| {
        Float::from_safetensors(dtype).with_context(|| format!("`{name}` is no tensor of floats"))
    };
    let (own, other) = (float(wanted.dtype)?, float(found.dtype)?);
    let all = wanted.size() / own.size();
    let mut sums = Rounding::default();
    let (mut bytes, mut a, mut b) = (Vec::new(), Vec::new(), Vec::new());
    for first in (0..all).step_by(PIECE) {
        let count = PIECE.min(all - first);
        let mut read = |raw: &crate::ml::io::weights::RawTensor<'_>,
                        float: Float,
                        out: &mut Vec<f32>|
         -> anyhow::Result<()> {
            bytes.resize(count * float.size(), 0);
            raw.read(first * float.size(), &mut bytes)?;
            out.resize(count, 0.);
            let spans = out.par_chunks_mut(1 << 14);
            spans
                .zip(bytes.par_chunks(float.size() << 14))
                .for_each(|(out, bytes)| float.read(bytes, out));
            Ok(())
        };
        read(&wanted, own, &mut a)?;
        read(&found, other, &mut b)?;
        sums.add(Rounding::of(&a, &b));
    }
    Ok(sums)
}

/// Sums over the logits of all positions.
#[derive(Default)]
struct Sums {
    positions: usize,
    length: f64,
    apart: f64,
    largest: f64,
    divergence: f64,
}

impl Sums {
    /// Adds the logits of a position, the model's and the file's.
    fn add(&mut self, wanted: &[f32], found: &[f32]) {
        let count = wanted.len().max(1) as f64;
        let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let (of_wanted, of_found) = (mean(wanted), mean(found));
        let normalizer = |values: &[f32]| {
            let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = values.iter().map(|v| f64::from(v - most).exp()).sum();
            f64::from(most) + sum.ln()
        };
        let (log_wanted, log_found) = (normalizer(wanted), normalizer(found));
        self.positions += 1;
        for (wanted, found) in wanted.iter().zip(found) {
            let (wanted, found) = (f64::from(*wanted), f64::from(*found));
            let apart = (found - of_found) - (wanted - of_wanted);
            self.length += (wanted - of_wanted) * (wanted - of_wanted);
            self.apart += apart * apart;
            let far = (found - wanted).abs();
            if far > self.largest || far.is_nan() {
                self.largest = far;
            }
            let (log_p, log_q) = (wanted - log_wanted, found - log_found);
            self.divergence += log_p.exp() * (log_p - log_q);
        }
    }
}
