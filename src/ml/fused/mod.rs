//! The fast path of a causal language model: the forward and backward passes of each layer, written by hand once for all devices
//! ([`device::Device`]). On the processor they are made of [`pipeline_kernels`].
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
#[cfg(feature = "gpu")]
pub(super) mod cached;
mod cpu;
mod decode;
pub(super) mod device;
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

use candle_core::Result;
use pipeline_kernels::panels::{fill, panels, size};

use super::model::batch::{Batch, Target};
use super::model::head::Positions;
use super::model::linear::{BATCH_STRIDE, Pass};
use super::model::{self, CausalLm, Gradients, have_same_angles};
pub(super) use backend::Fused;
#[cfg(feature = "gpu")]
pub(super) use backend::unsupported_feature;
pub use backend::{Unsupported, pass_size_of};
pub(super) use cpu::Cpu;
use device::Device;
use head::Scored;
use layer::{LayerRef, Saved};
use layout::Layout;
pub use layout::Packing;
pub use memory::{PassLength, PassMemory, PassSizes};
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
struct Forward<'m, D: Device> {
    model: &'m CausalLm,
    device: &'m D,
    layout: Arc<Layout>,
    shape: Arc<Shape<D>>,
    pass: Pass,
    /// What was kept of the layers from number `lowest` on.
    saved: Vec<SavedLayer<D>>,
    lowest: usize,
    last: D::Buffer,
    inverse: D::Buffer,
    /// The final hidden states after the norm, in panels.
    hidden: D::Buffer,
}

/// What is kept of a layer for the backward pass.
enum SavedLayer<D: Device> {
    Input(D::Buffer),
    All(Box<Saved<D>>),
}

impl<'m, D: Device> Forward<'m, D> {
    /// Runs the model on several batches. With a tape the layers keep what [`Forward::backward`] needs, with `checkpointing` only their
    /// inputs. With `beside_base` the base alone runs on the same tokens, each layer right before the same layer with the adapter, and its
    /// pass is returned too. What no trained tensor can change, the layers below the lowest trained one, is then computed once for both.
    fn new(
        fused: &'m Fused<'_, D>,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
        beside_base: bool,
    ) -> Result<(Self, Option<Self>)> {
        let (model, device, states) = (fused.model, &fused.device, &fused.states);
        let mut packing = fused.packing(pass);
        if let Some((first, others)) = batches.split_first() {
            // A token of several micro-batches needs the same angles in all of them.
            packing.share_prompts &= others
                .iter()
                .all(|other| have_same_angles(&model.arch, first.length(), other.length()));
        }
        let mut layout = Layout::new(batches, packing);
        // What stands between them in the step is for other processes to compute.
        for index in &mut layout.padded_index {
            *index += *index / BATCH_STRIDE * (pass.stride as u64 - 1) * BATCH_STRIDE;
        }
        layout.add_windows(model.layers.iter().filter_map(|layer| layer.window));
        let shape = Shape::new(model, &layout, device)?;
        model.refresh()?;
        device.begin(model, panels(shape.tokens));
        let mut x = device.take(size(shape.hidden, shape.tokens));
        embed(model, &layout, batches, pass, device, &mut x)?;
        let mut saved = Vec::new();
        let mut base = None;
        let lowest = lowest(model);
        let known = match states.lock().map_err(|_| poisoned_error())?.as_ref() {
            Some(states) => match device.host(&mut x) {
                Some(x) => states.load(batches, &layout, x)?,
                None => false,
            },
            None => false,
        };
        let first = if known { lowest } else { 0 };
        let work = PassContext {
            shape: &shape,
            layout: &layout,
            device,
        };
        for (number, layer) in model.layers.iter().enumerate().skip(first) {
            if number == lowest
                && !known
                && let Some(states) = states.lock().map_err(|_| poisoned_error())?.as_mut()
                && let Some(x) = device.host(&mut x)
            {
                states.store(batches, &layout, x)?;
            }
            if beside_base && number >= lowest {
                let x = match base.take() {
                    Some(x) => x,
                    None => base_input(model, &layout, number, &x, device)?,
                };
                let layer = Layer::borrow(layer, Pass::BASE)?;
                let (layer_saved, out) = layer::forward(&layer, work, x, true)?;
                layer_saved.give_back(device);
                base = Some(out);
            }
            let layer = Layer::borrow(layer, pass)?;
            let tape = pass.tape && number >= lowest;
            if tape && checkpointing {
                let mut input = device.take(device.length(&x));
                device.copy(&x, &mut input);
                saved.push(SavedLayer::Input(input));
            }
            let (layer_saved, out) = layer::forward(&layer, work, x, true)?;
            x = out;
            if tape && !checkpointing {
                saved.push(SavedLayer::All(Box::new(layer_saved)));
            } else {
                layer_saved.give_back(device);
            }
        }
        let (layout, shape) = (Arc::new(layout), Arc::new(shape));
        let end = |pass: Pass, x: D::Buffer, saved: Vec<SavedLayer<D>>| -> Result<Self> {
            let norm = TensorView::weight(&model.norm.weight, pass)?;
            let mut hidden = device.take(device.length(&x));
            let mut inverse = device.take(size(1, shape.tokens));
            let eps = model.norm.eps as f32;
            device.rms_norm(&x, device.vector(&norm)?, eps, &mut hidden, &mut inverse);
            Ok(Self {
                model,
                device,
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
    fn score(&self, targets: &[Target], token_stats: bool, gradient: bool) -> Result<Scored<D>> {
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
        let sums = self.column_sums()?;
        let hidden = self.shape.hidden;
        let totals = self
            .device
            .token_dots(&self.hidden, hidden, tokens, &sums)?;
        let mean = |total: f64| total * arch.logit_scale / vocabulary;
        Ok(totals.into_iter().map(mean).collect())
    }

    /// The sum of the head's rows (hidden).
    fn column_sums(&self) -> Result<Vec<f64>> {
        let head = TensorView::weight(self.model.head(), self.pass)?;
        match self.device.held_column_sums(&head, self.shape.half)? {
            Some(sums) => Ok(sums),
            None => self.model.column_sum(self.pass)?.to_vec1(),
        }
    }

    /// See [`super::model::head::mean_logit`]; `from` counts the sequences of all batches. If padding is left out, the mean is taken over
    /// the remaining positions.
    fn mean_logit(&self, from: usize, count: usize, positions: Positions) -> Result<f64> {
        let sequences = self.layout.token_indices.iter().skip(from).take(count);
        let mut weights = vec![0f32; size(1, self.shape.tokens)];
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
        let sums = self.column_sums()?;
        let hidden = self.shape.hidden;
        let total = self
            .device
            .weighted_sum(&self.hidden, hidden, weights, &sums)?;
        Ok(total * self.model.arch.logit_scale / (self.model.arch.head_rows() * all) as f64)
    }

    /// Backpropagates `grad_logps`, the gradient with respect to the scored log-probabilities, and adds the gradients with respect to the
    /// parameters to `gradients`.
    fn backward(
        self,
        scored: Scored<D>,
        grad_logps: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, device) = (self.model, self.device);
        let mut trainable = Trainable::new(model, device, gradients);
        let mut grad_hidden = device.take(device.length(&self.hidden));
        scored.backward(&self, grad_logps, &mut grad_hidden, &mut trainable)?;
        self.backward_from(grad_hidden, trainable)
    }

    /// The same for `grad_scores`, the gradient with respect to the numbers that the head of a scoring model gives of `targets`.
    fn backward_scores(
        self,
        targets: &[Target],
        grad_scores: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, device) = (self.model, self.device);
        let mut trainable = Trainable::new(model, device, gradients);
        let grad_hidden = head::backward_scores(&self, targets, grad_scores, &mut trainable)?;
        self.backward_from(grad_hidden, trainable)
    }

    /// The backward pass from `grad_hidden`, the gradient with respect to the final hidden states (panels), on.
    fn backward_from(
        mut self,
        grad_hidden: D::Buffer,
        mut trainable: Trainable<'_, D>,
    ) -> Result<()> {
        let (model, device) = (self.model, self.device);
        let mut grad_x = device.take(device.length(&self.last));
        device.clear(&mut grad_x);
        let norm = TensorView::weight(&model.norm.weight, self.pass)?;
        let weight = device.vector(&norm)?;
        device.rms_norm_backward(&self.last, weight, &self.inverse, &grad_hidden, &mut grad_x);
        trainable.add(&model.norm.weight, |device, sum| {
            device.rms_norm_grad_weight(&self.last, &self.inverse, &grad_hidden, sum);
            Ok(())
        })?;
        drop(norm);
        device.give(grad_hidden);
        let trains_embed = model.embed.trained().is_some();
        while let Some(layer_saved) = self.saved.pop() {
            let number = self.lowest + self.saved.len();
            let Some(layer) = model.layers.get(number) else {
                continue;
            };
            let weights = Layer::borrow(layer, self.pass)?;
            let work = PassContext {
                shape: &self.shape,
                layout: &self.layout,
                device,
            };
            let saved = match layer_saved {
                SavedLayer::All(saved) => *saved,
                SavedLayer::Input(x) => {
                    let (saved, out) = layer::forward(&weights, work, x, false)?;
                    device.give(out);
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
        if trains_embed {
            device.scale(&mut grad_x, model.arch.embedding_scale as f32);
        }
        trainable.add(&model.embed, |device, sum| {
            // As in transformers (`padding_idx`), looking up the padding's embedding gives its row no gradient.
            let ids = self.layout.ids.iter().enumerate();
            let learnt = ids.filter(|(_, id)| Some(**id) != model.arch.pad_token_id);
            let learnt =
                learnt.filter_map(|(token, id)| Some((token, 1., model.embed.trained_row(*id)?)));
            let learnt: Vec<(usize, f32, usize)> = learnt.collect();
            device.add_to_rows(&grad_x, self.shape.hidden, &learnt, sum);
            Ok(())
        })?;
        trainable.finish()?;
        device.give(grad_x);
        Ok(())
    }
}

impl<D: Device> Drop for Forward<'_, D> {
    fn drop(&mut self) {
        let device = self.device;
        for buffer in [&mut self.last, &mut self.inverse, &mut self.hidden] {
            device.give(std::mem::take(buffer));
        }
        for layer_saved in self.saved.drain(..) {
            match layer_saved {
                SavedLayer::Input(x) => device.give(x),
                SavedLayer::All(saved) => saved.give_back(device),
            }
        }
    }
}

/// The hidden states with which the base alone goes into layer number `number`, the lowest trained one, panels of the hidden size: those of
/// the model with its adapter, `x`, unless they are embeddings, which may be trained.
fn base_input<D: Device>(
    model: &CausalLm,
    layout: &Layout,
    number: usize,
    x: &D::Buffer,
    device: &D,
) -> Result<D::Buffer> {
    let mut own = device.take(device.length(x));
    if number == 0 {
        embed(model, layout, &[], Pass::BASE, device, &mut own)?;
    } else {
        device.copy(x, &mut own);
    }
    Ok(own)
}

/// Writes the embeddings of the tokens to the panels `x`.
fn embed<D: Device>(
    model: &CausalLm,
    layout: &Layout,
    batches: &[&Batch],
    pass: Pass,
    device: &D,
    x: &mut D::Buffer,
) -> Result<()> {
    let factor = model.arch.embedding_scale;
    device.lookup(&model.embed, pass, &layout.ids, factor, x)?;
    if let Some(noise) = pass.noise {
        let (width, count) = (model.arch.hidden_size, layout.ids.len());
        let mut rows = vec![0f32; count * width];
        let lengths: Vec<usize> = batches.iter().map(|batch| batch.width).collect();
        let tokens = layout.padded_index.iter().copied();
        model::noise::add(noise, &mut rows, width, tokens, &lengths, pass.stride);
        let mut panels = vec![0f32; device.length(x)];
        fill(&mut panels, width, count, |token| {
            rows.get(token * width..(token + 1) * width)
                .unwrap_or_default()
        });
        device.add(x, &device.upload(panels), 1.);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
