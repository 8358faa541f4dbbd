//! The fast path of a causal language model on the CPU: the forward and backward passes of each layer, written by hand on top of
//! [`pipeline_kernels`].
//!
//! It computes the same as the reference path in [`super::model`], against which every result is tested. It saves the tokens that need not
//! be computed (padding, prompts that two answers share), the gradients of frozen weights, most intermediate values, and every pass over
//! memory that can be fused with another one. Activations live in panels of 32 tokens, with all sequences of all batches of a pass one after
//! the other.
//!
//! A layer maps hidden states to hidden states. It keeps what its backward pass can't recompute cheaply ([`layer::Saved`]), or with
//! checkpointing only its input. Below the lowest layer with a trained tensor nothing is kept, and the backward pass ends there.

mod backend;
mod block;
mod decode;
mod head;
mod layer;
pub(super) mod layerwise;
mod layout;
mod memory;
mod pool;
mod projection;
mod shape;
mod states;
mod trainable;
pub(super) mod weights;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use pipeline_kernels::elementwise::{rms_norm, rms_norm_backward, rms_norm_grad_weight, scale};
use pipeline_kernels::panels::{LANES, column, fill, panels, size};

use super::model::autograd::scaled;
use super::model::batch::{Batch, Target};
use super::model::head::Positions;
use super::model::linear::Pass;
use super::model::{self, CausalLm, Gradients, have_same_angles};
pub use backend::{Fused, Unsupported, pass_size_of};
use head::Scored;
use layer::{LayerRef, Saved};
use layout::Layout;
pub use layout::Packing;
pub use memory::{PassLength, PassMemory, PassSizes};
use pool::Pool;
use shape::{PassContext, Shape};
use trainable::Trainable;
use weights::{Layer, TensorView};

/// The number of the lowest layer that the backward pass goes through, below which nothing is trained.
fn lowest(model: &CausalLm) -> usize {
    if model.embed.trained().is_some() {
        return 0;
    }
    let trained = model.layers.iter().position(model::Layer::is_trained);
    trained.unwrap_or(model.layers.len())
}

fn poisoned_error() -> candle_core::Error {
    candle_core::Error::Msg("a thread that kept hidden states has panicked".into())
}

/// A forward pass.
struct Forward<'m> {
    model: &'m CausalLm,
    pool: &'m Pool,
    layout: Arc<Layout>,
    shape: Arc<Shape>,
    pass: Pass,
    /// What was kept of the layers from number `lowest` on.
    saved: Vec<SavedLayer>,
    lowest: usize,
    last: Vec<f32>,
    inverse: Vec<f32>,
    /// The final hidden states after the norm, in panels.
    hidden: Vec<f32>,
}

/// What is kept of a layer for the backward pass.
enum SavedLayer {
    Input(Vec<f32>),
    All(Box<Saved>),
}

impl<'m> Forward<'m> {
    /// Runs the model on several batches. With a tape the layers keep what [`Forward::backward`] needs, with `checkpointing` only their
    /// inputs. With `beside_base` the base alone runs on the same tokens, each layer right before the same layer with the adapter, and its
    /// pass is returned too. What no trained tensor can change, the layers below the lowest trained one, is then computed once for both.
    fn new(
        fused: &'m Fused<'_>,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
        beside_base: bool,
    ) -> Result<(Self, Option<Self>)> {
        let (model, pool, states) = (fused.model, &fused.pool, &fused.states);
        let mut packing = fused.packing(pass);
        if let Some((first, others)) = batches.split_first() {
            // A token of several micro-batches needs the same angles in all of them.
            packing.share_prompts &= others
                .iter()
                .all(|other| have_same_angles(&model.arch, first.length(), other.length()));
        }
        let mut layout = Layout::new(batches, packing);
        layout.add_windows(model.layers.iter().filter_map(|layer| layer.window));
        let shape = Shape::new(model, &layout)?;
        pool.begin(panels(shape.tokens));
        let mut x = pool.take(size(shape.hidden, shape.tokens));
        model.refresh()?;
        embed(model, &layout, batches, pass, &mut x)?;
        let mut saved = Vec::new();
        let mut base = None;
        let lowest = lowest(model);
        let known = match states.lock().map_err(|_| poisoned_error())?.as_ref() {
            Some(states) => states.load(batches, &layout, &mut x)?,
            None => false,
        };
        let first = if known { lowest } else { 0 };
        let work = PassContext {
            shape: &shape,
            layout: &layout,
            pool,
        };
        for (number, layer) in model.layers.iter().enumerate().skip(first) {
            if number == lowest
                && !known
                && let Some(states) = states.lock().map_err(|_| poisoned_error())?.as_mut()
            {
                states.store(batches, &layout, &x)?;
            }
            if beside_base && number >= lowest {
                let x = match base.take() {
                    Some(x) => x,
                    None => base_input(model, &layout, number, &x, pool)?,
                };
                let layer = Layer::borrow(layer, Pass::BASE)?;
                let (layer_saved, out) = layer::forward(&layer, work, x, true)?;
                layer_saved.give_back(pool);
                base = Some(out);
            }
            let layer = Layer::borrow(layer, pass)?;
            let tape = pass.tape && number >= lowest;
            if tape && checkpointing {
                let mut input = pool.take(x.len());
                input.copy_from_slice(&x);
                saved.push(SavedLayer::Input(input));
            }
            let (layer_saved, out) = layer::forward(&layer, work, x, true)?;
            x = out;
            if tape && !checkpointing {
                saved.push(SavedLayer::All(Box::new(layer_saved)));
            } else {
                layer_saved.give_back(pool);
            }
        }
        let (layout, shape) = (Arc::new(layout), Arc::new(shape));
        let end = |pass: Pass, x: Vec<f32>, saved: Vec<SavedLayer>| -> Result<Self> {
            let norm = TensorView::weight(&model.norm.weight, pass)?;
            let mut hidden = pool.take(x.len());
            let mut inverse = pool.take(size(1, shape.tokens));
            let eps = model.norm.eps as f32;
            rms_norm(&x, norm.floats()?, eps, &mut hidden, &mut inverse);
            Ok(Self {
                model,
                pool,
                layout: Arc::clone(&layout),
                shape: Arc::clone(&shape),
                pass,
                saved,
                lowest,
                last: x,
                inverse,
                hidden,
            })
        };
        let base = base.map(|x| end(Pass::BASE, x, Vec::new()));
        Ok((end(pass, x, saved)?, base.transpose()?))
    }

    /// Computes the log-probabilities of targets. With `gradient` it keeps what [`Forward::backward`] needs.
    fn score(&self, targets: &[Target], token_stats: bool, gradient: bool) -> Result<Scored> {
        head::score(self, targets, token_stats, gradient)
    }

    /// See [`super::backend::ForwardPass::target_mean_logits`].
    fn target_mean_logits(&self, targets: &[Target]) -> Result<Vec<f64>> {
        let tokens = targets.iter();
        let tokens = tokens.map(|target| head::token(&self.layout, target));
        self.mean_logits(&tokens.collect::<Result<Vec<_>>>()?)
    }

    /// The mean over the vocabulary of each of these tokens' logits. Without a soft-cap, logits are linear in the head's rows, and only the
    /// sum of these is multiplied.
    fn mean_logits(&self, tokens: &[usize]) -> Result<Vec<f64>> {
        let arch = &self.model.arch;
        let vocabulary = arch.head_rows() as f64;
        if let Some(cap) = arch.logit_softcap {
            let sums = head::capped_sums(self, tokens, cap as f32)?;
            return Ok(sums.into_iter().map(|sum| sum / vocabulary).collect());
        }
        let sums = self.model.column_sum(self.pass)?.to_vec1::<f64>()?;
        let mean = |&token: &usize| {
            let column = column(&self.hidden, self.shape.hidden, token);
            let total: f64 = column.zip(&sums).map(|(x, sum)| f64::from(x) * sum).sum();
            total * arch.logit_scale / vocabulary
        };
        Ok(tokens.iter().map(mean).collect())
    }

    /// See [`super::model::head::mean_logit`]; `from` counts the sequences of all batches. If padding is left out, the mean is taken over
    /// the remaining positions.
    fn mean_logit(&self, from: usize, count: usize, positions: Positions) -> Result<f64> {
        let sequences = self.layout.token_indices.iter().skip(from).take(count);
        let mut weights = vec![0f32; self.hidden.len() / self.shape.hidden];
        let mut all = 0usize;
        for token_indices in sequences {
            let counted = positions.count(token_indices.len());
            for &token in token_indices.iter().take(counted) {
                weights[token] += 1.;
                all += 1;
            }
        }
        if all == 0 {
            return Ok(f64::NAN);
        }
        if self.model.arch.logit_softcap.is_some() {
            let tokens = weights.iter().enumerate();
            let tokens = tokens.filter_map(|(token, weight)| (*weight > 0.).then_some(token));
            let tokens: Vec<usize> = tokens.collect();
            let means = self.mean_logits(&tokens)?;
            let means = tokens.iter().zip(means);
            let total: f64 = { means }
                .map(|(token, mean)| f64::from(weights[*token]) * mean)
                .sum();
            return Ok(total / all as f64);
        }
        let sums = self.model.column_sum(self.pass)?.to_vec1::<f64>()?;
        let mut total = 0f64;
        let panels = self.hidden.chunks_exact(self.shape.hidden * LANES);
        for (panel, weights) in panels.zip(weights.chunks_exact(LANES)) {
            for (row, sum) in panel.chunks_exact(LANES).zip(&sums) {
                let row = row.iter().zip(weights).map(|(x, w)| x * w);
                total += f64::from(row.sum::<f32>()) * sum;
            }
        }
        Ok(total * self.model.arch.logit_scale / (self.model.arch.head_rows() * all) as f64)
    }

    /// Backpropagates `grad_logps`, the gradient with respect to the scored log-probabilities, and adds the gradients with respect to the
    /// parameters to `gradients`.
    fn backward(self, scored: Scored, grad_logps: &[f32], gradients: &mut Gradients) -> Result<()> {
        let mut grad_hidden = self.pool.take(self.hidden.len());
        scored.backward(&self, grad_logps, &mut grad_hidden, gradients)?;
        self.backward_from(grad_hidden, gradients)
    }

    /// The same for `grad_scores`, the gradient with respect to the numbers that the head of a scoring model gives of `targets`.
    fn backward_scores(
        self,
        targets: &[Target],
        grad_scores: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let mut grad_hidden = self.pool.take(self.hidden.len());
        head::backward_scores(&self, targets, grad_scores, &mut grad_hidden, gradients)?;
        self.backward_from(grad_hidden, gradients)
    }

    /// The backward pass from `grad_hidden`, the gradient with respect to the final hidden states (panels), on.
    fn backward_from(mut self, grad_hidden: Vec<f32>, gradients: &mut Gradients) -> Result<()> {
        let (model, pool) = (self.model, self.pool);
        let mut grad_x = pool.take(self.last.len());
        grad_x.fill(0.);
        let norm = TensorView::weight(&model.norm.weight, self.pass)?;
        let weight = norm.floats()?;
        rms_norm_backward(&self.last, weight, &self.inverse, &grad_hidden, &mut grad_x);
        if let Some(var) = model.norm.weight.trained() {
            let mut grad_weight = vec![0.; weight.len()];
            rms_norm_grad_weight(&self.last, &self.inverse, &grad_hidden, &mut grad_weight);
            gradients.add_values(model, var, grad_weight)?;
        }
        pool.give(grad_hidden);
        let trains_embed = model.embed.trained().is_some();
        let mut trainable = Trainable {
            model,
            pool,
            gradients,
        };
        while let Some(layer_saved) = self.saved.pop() {
            let number = self.lowest + self.saved.len();
            let Some(layer) = model.layers.get(number) else {
                continue;
            };
            let weights = Layer::borrow(layer, self.pass)?;
            let work = PassContext {
                shape: &self.shape,
                layout: &self.layout,
                pool,
            };
            let saved = match layer_saved {
                SavedLayer::All(saved) => *saved,
                SavedLayer::Input(x) => {
                    let (saved, out) = layer::forward(&weights, work, x, false)?;
                    pool.give(out);
                    saved
                }
            };
            let wanted = number > self.lowest || trains_embed;
            layer::backward(
                LayerRef {
                    weights: &weights,
                    layer,
                },
                work,
                saved,
                &mut grad_x,
                wanted,
                &mut trainable,
            )?;
        }
        if let Some(var) = model.embed.trained() {
            let width = self.shape.hidden;
            scale(&mut grad_x, model.arch.embedding_scale as f32);
            let mut grad_embed = vec![0f32; var.elem_count()];
            // As in transformers (`padding_idx`), looking up the padding's embedding gives its row no gradient.
            let ids = self.layout.ids.iter().enumerate();
            let learnt = ids.filter(|(_, id)| Some(**id) != model.arch.pad_token_id);
            for (token, &id) in learnt {
                let Some(row) = model.embed.trained_row(id) else {
                    continue;
                };
                let row = &mut grad_embed[row * width..][..width];
                let column = pipeline_kernels::panels::column(&grad_x, width, token);
                for (sum, g) in row.iter_mut().zip(column) {
                    *sum += g;
                }
            }
            gradients.add_values(model, var, grad_embed)?;
        }
        pool.give(grad_x);
        Ok(())
    }
}

impl Drop for Forward<'_> {
    fn drop(&mut self) {
        let pool = self.pool;
        for buffer in [&mut self.last, &mut self.inverse, &mut self.hidden] {
            pool.give(std::mem::take(buffer));
        }
        for layer_saved in self.saved.drain(..) {
            match layer_saved {
                SavedLayer::Input(x) => pool.give(x),
                SavedLayer::All(saved) => saved.give_back(pool),
            }
        }
    }
}

/// The hidden states with which the base alone goes into layer number `number`, the lowest trained one, panels of the hidden size: those of
/// the model with its adapter, `x`, unless they are embeddings, which may be trained.
fn base_input(
    model: &CausalLm,
    layout: &Layout,
    number: usize,
    x: &[f32],
    pool: &Pool,
) -> Result<Vec<f32>> {
    let mut own = pool.take(x.len());
    if number == 0 {
        embed(model, layout, &[], Pass::BASE, &mut own)?;
    } else {
        own.copy_from_slice(x);
    }
    Ok(own)
}

/// Writes the embeddings of the tokens to the panels `x`.
fn embed(
    model: &CausalLm,
    layout: &Layout,
    batches: &[&Batch],
    pass: Pass,
    x: &mut [f32],
) -> Result<()> {
    let width = model.arch.hidden_size;
    let ids = Tensor::from_slice(&layout.ids, layout.ids.len(), &model.device)?;
    let rows = model.embed.value(pass).index_select(&ids, 0)?;
    let rows = scaled(rows.to_dtype(DType::F32)?, model.arch.embedding_scale)?;
    let mut rows = rows.flatten_all()?.to_vec1::<f32>()?;
    if let Some(noise) = pass.noise {
        let lengths: Vec<usize> = batches.iter().map(|batch| batch.width).collect();
        let tokens = layout.padded_index.iter().copied();
        model::noise::add(noise, &mut rows, width, tokens, &lengths);
    }
    fill(x, width, layout.ids.len(), |token| {
        rows.get(token * width..(token + 1) * width)
            .unwrap_or_default()
    });
    Ok(())
}

#[cfg(test)]
mod tests;
