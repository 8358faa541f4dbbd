//! A differentiable causal language model of the families in [`families`], on candle's tensors.
//!
//! The graph is cut at every layer: a layer's input is a fresh variable, and the backward pass goes from layer to layer by
//! vector-Jacobian products, `d/dx sum(layer(x) * g)`. Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) is then the same
//! procedure with the layers' graphs recomputed, and gives the same bits.
//!
//! A layer maps hidden states (batch, length, hidden), with the rotary angles and the mask, to hidden states of the same shape. It
//! keeps its graph, or with checkpointing only its input, from which everything is recomputed.

pub mod arch;
pub mod autograd;
pub mod batch;
pub mod compare;
pub mod create;
mod ends;
pub mod families;
pub mod head;
mod layer;
mod layerwise;
pub mod linear;
mod load;
mod masks;
pub(in crate::ml) mod noise;
mod overflow;
pub mod resize;
mod rope;
pub mod tensors;
pub mod tied;

use std::sync::OnceLock;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Tensor, Var};

use self::arch::Arch;
use self::autograd::scaled;
use self::batch::Batch;
use self::head::HeadGradients;
use self::linear::{Linear, Lora, Pass, Weight};
use ends::embedding_rows;
pub(super) use layer::{GateUp, Layer, Norm, Qkv};
use layer::{KeysAndValues, Shared};
pub use layerwise::logits_by_layer;
use masks::Masks;
use rope::{all_angles, batch_angles, is_outdated};
pub(super) use rope::{angles, have_same_angles};

/// Which tensors are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trained {
    /// None: inference.
    Nothing,
    /// Those of the adapter.
    Adapter,
    /// All weights.
    Everything,
}

/// A trained tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name: that of the tensor in a model file, or `<module path>.lora_A.weight`.
    pub name: String,
    /// The tensor, in f32.
    pub var: Var,
    /// Whether weight decay applies to it; by transformers' rule (`get_decay_parameter_names`) not to norms and biases.
    pub decays: bool,
    /// Whether it is 1 more than the tensor in files ([`Arch::norm_adds_one`]).
    pub adds_one: bool,
}

impl Parameter {
    /// The tensor as files have it, in f32 and outside any graph.
    ///
    /// # Errors
    /// The device fails.
    pub fn stored(&self) -> Result<Tensor> {
        let tensor = self.var.as_detached_tensor();
        if self.adds_one {
            tensor - 1.
        } else {
            Ok(tensor)
        }
    }
}

/// A causal language model with an optional adapter.
pub struct CausalLm {
    /// The architecture.
    pub arch: Arch,
    /// The trained tensors, in the order of the modules.
    pub parameters: Vec<Parameter>,
    /// The device of all tensors.
    pub device: Device,
    pub(super) embed: Weight,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    pub(super) head: Option<Weight>,
    /// The pairs of the embeddings and of the head, which never have `DoRA`.
    pub(super) embed_lora: Option<Lora>,
    pub(super) head_lora: Option<Lora>,
    pub(super) compute: DType,
    /// The sum of the head's rows, if that never changes, once it was asked for.
    frozen_column_sum: OnceLock<Tensor>,
    /// The copies that a device has of frozen weights, whose values the host has given up.
    #[cfg(feature = "gpu")]
    pub(super) on_device: Option<std::sync::Arc<dyn std::any::Any + Send + Sync>>,
}

/// The cached keys and values of all layers, for text generation.
#[derive(Default)]
pub struct Cache {
    layers: Vec<KeysAndValues>,
    length: usize,
    ids: Vec<u32>,
    /// The length of the sequence when the last keys were rotated.
    rotated_for: usize,
}

impl Cache {
    /// Forgets what is behind the first `length` tokens, of at least so many.
    pub(super) fn truncate(&mut self, length: usize) -> Result<()> {
        for layer in &mut self.layers {
            let kept = layer.take().filter(|_| length > 0);
            if let Some((keys, values)) = kept {
                *layer = Some((keys.narrow(2, 0, length)?, values.narrow(2, 0, length)?));
            }
        }
        self.length = length;
        self.ids.truncate(length);
        Ok(())
    }
}

/// What a forward pass keeps for its backward pass.
pub struct Tape {
    ids: Tensor,
    shared: Shared,
    /// The input of each layer, and its output unless it will be recomputed.
    segments: Vec<(Tensor, Option<Tensor>)>,
    last: Var,
    normed: Tensor,
}

impl Tape {
    /// The final hidden states, after the norm: (batch, length, hidden).
    pub fn hidden(&self) -> Tensor {
        self.normed.detach()
    }
}

/// The gradients with respect to a model's parameters, in their order and of their shapes; `None` is a gradient of zeros.
#[derive(Debug, Clone)]
pub struct Gradients(pub Vec<Option<Tensor>>);

impl Gradients {
    /// Gradients of zeros for all parameters of a model.
    pub fn none(model: &CausalLm) -> Self {
        Self(vec![None; model.parameters.len()])
    }

    fn add(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        if let Some(slot) = self.0.get_mut(index) {
            let gradient = gradient.detach();
            *slot = Some(match slot.take() {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
        }
        Ok(())
    }

    /// Adds values (as many as `var` has elements, row-major) to the gradient with respect to a parameter of the model.
    pub(super) fn add_values(
        &mut self,
        model: &CausalLm,
        var: &Var,
        values: Vec<f32>,
    ) -> Result<()> {
        let same = |p: &Parameter| p.var.as_tensor().id() == var.as_tensor().id();
        match model.parameters.iter().position(same) {
            Some(index) => {
                let gradient = Tensor::from_vec(values, var.shape(), var.device())?;
                self.add(index, &gradient)
            }
            None => candle_core::bail!("a trained tensor is no parameter of its model"),
        }
    }

    fn collect(&mut self, model: &CausalLm, store: &mut GradStore) -> Result<()> {
        for (index, parameter) in model.parameters.iter().enumerate() {
            if let Some(gradient) = store.remove(parameter.var.as_tensor()) {
                self.add(index, &gradient)?;
            }
        }
        Ok(())
    }
}

impl CausalLm {
    /// Whether it is a frozen base with at most LoRA pairs: no biases, no `DoRA`, and no base tensor that is trained or replaced.
    pub fn is_lora_only(&self) -> bool {
        let norms = self.layers.iter().flat_map(Layer::norms);
        !self.has_pairs_at_ends()
            && self.embed.is_frozen()
            && self.head().is_frozen()
            && norms
                .chain([&self.norm])
                .all(|norm| norm.weight.is_frozen())
            && self
                .layers
                .iter()
                .all(|layer| layer.linears().into_iter().all(Linear::is_lora_only))
    }

    /// The sliding window of each layer.
    fn windows(&self) -> impl Iterator<Item = Option<usize>> {
        self.layers.iter().map(|layer| layer.window)
    }

    /// The rotary angles and masks of a batch.
    fn shared(&self, batch: &Batch, pass: Pass) -> Result<Shared> {
        self.refresh()?;
        Ok(Shared {
            angles: batch_angles(&self.arch, batch, &self.device)?,
            masks: Masks::new(self.windows(), |window| batch.mask(window, &self.device))?,
            pass,
        })
    }

    pub(in crate::ml) fn embed(&self, ids: &Tensor, pass: Pass) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let ids = ids.flatten_all()?;
        let rows = embedding_rows(&self.embed, self.embed_lora.as_ref(), &ids, pass)?;
        scaled(rows, self.arch.embedding_scale)?.reshape((batch, length, ()))
    }

    /// The hidden states (batch, length, hidden) as transformers returns them in `hidden_states`: the embeddings, the output of each layer
    /// but the last, and the final hidden states after the norm.
    ///
    /// # Errors
    /// An id is outside the vocabulary.
    pub fn hidden_states(&self, batch: &Batch, pass: Pass) -> Result<Vec<Tensor>> {
        let pass = Pass {
            tape: false,
            ..pass
        };
        let shared = self.shared(batch, pass)?;
        let mut states = vec![self.embed(&batch.ids(&self.device)?, pass)?];
        let mut x = states[0].clone();
        for layer in &self.layers {
            x = layer.forward(&x, &shared, &mut None)?;
            states.push(x.clone());
        }
        states.pop();
        states.push(self.norm.forward(&x, pass)?);
        Ok(states)
    }

    /// The final hidden states in the form that [`CausalLm::head_matrix`] takes: (batch, length, hidden), or (batch, length, hidden + r)
    /// if the head has a pair of rank r.
    ///
    /// # Errors
    /// An id is outside the vocabulary.
    pub fn hidden(&self, batch: &Batch, pass: Pass) -> Result<Tensor> {
        let pass = Pass {
            tape: false,
            ..pass
        };
        let shared = self.shared(batch, pass)?;
        let mut x = self.embed(&batch.ids(&self.device)?, pass)?;
        for layer in &self.layers {
            x = layer.forward(&x, &shared, &mut None)?;
        }
        self.append_lora_inputs(self.norm.forward(&x, pass)?, pass)
    }

    /// Appends `ids` to the sequence in `cache`, and returns the logits (vocabulary) of the token after them.
    ///
    /// # Errors
    /// `ids` is empty, or an id is outside the vocabulary.
    pub fn next_logits(&self, ids: &[u32], cache: &mut Cache, pass: Pass) -> Result<Vec<f32>> {
        let pass = Pass {
            tape: false,
            ..pass
        };
        let length = ids.len();
        if length == 0 {
            candle_core::bail!("there are no ids to go on from");
        }
        let keys = cache.length + length;
        let mut ropes = self.arch.ropes.iter();
        if cache.length > 0 && ropes.any(|rope| is_outdated(rope, cache.rotated_for, keys)) {
            let all = [&cache.ids, ids].concat();
            *cache = Cache::default();
            return self.next_logits(&all, cache, pass);
        }
        let masks = Masks::new(self.windows(), |window| {
            let rows = (cache.length..keys).flat_map(|last| {
                let first = window.map_or(0, |window| (last + 1).saturating_sub(window));
                let seen = move |to| first <= to && to <= last;
                (0..keys).map(move |to| if seen(to) { 0f32 } else { f32::NEG_INFINITY })
            });
            Tensor::from_vec(rows.collect(), (1, 1, length, keys), &self.device)
        })?;
        let shared = Shared {
            angles: all_angles(&self.arch, || cache.length..keys, keys, &self.device)?,
            masks,
            pass,
        };
        let mut x = self.embed(&Tensor::new(ids, &self.device)?.unsqueeze(0)?, pass)?;
        cache.layers.resize(self.layers.len(), None);
        for (layer, keys_and_values) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(&x, &shared, keys_and_values)?;
        }
        cache.length = keys;
        cache.ids.extend(ids);
        cache.rotated_for = keys;
        let last = x.narrow(1, length - 1, 1)?.squeeze(1)?;
        let last = self.append_lora_inputs(self.norm.forward(&last, pass)?, pass)?;
        let logits = self.head_matrix(pass)?.logits(&last)?;
        logits.squeeze(0)?.to_vec1()
    }

    /// A forward pass for [`CausalLm::backward`]. With `checkpointing` only the layers' inputs are kept.
    ///
    /// # Errors
    /// An id is outside the vocabulary.
    pub fn record(&self, batch: &Batch, pass: Pass, checkpointing: bool) -> Result<Tape> {
        let pass = Pass { tape: true, ..pass };
        let shared = self.shared(batch, pass)?;
        let without = Shared {
            pass: Pass {
                tape: false,
                ..pass
            },
            ..shared.clone()
        };
        let ids = batch.ids(&self.device)?;
        let mut x = self.embed(&ids, pass)?;
        if let Some(noise) = pass.noise {
            let (rows, length, width) = x.dims3()?;
            let mut values = x.flatten_all()?.to_vec1::<f32>()?;
            let tokens = 0..(rows * length) as u64;
            noise::add(noise, &mut values, width, tokens, &[length], 1);
            x = Tensor::from_vec(values, (rows, length, width), &self.device)?;
        }
        let mut segments = Vec::with_capacity(self.layers.len());
        for (number, layer) in self.layers.iter().enumerate() {
            // With LoRA nothing below the first layer is trained, so its input needs no gradient.
            let needed = number > 0 || self.trains_embeddings();
            let input = if needed {
                Var::from_tensor(&x)?.into_inner()
            } else {
                x
            };
            if checkpointing {
                x = layer.forward(&input.detach(), &without, &mut None)?;
                segments.push((input, None));
            } else {
                let output = layer.forward(&input, &shared, &mut None)?;
                x = output.detach();
                segments.push((input, Some(output)));
            }
        }
        let last = Var::from_tensor(&x)?;
        let normed = self.append_lora_inputs(self.norm.forward(&last, pass)?, pass)?;
        Ok(Tape {
            ids,
            shared,
            segments,
            last,
            normed,
        })
    }

    /// Backpropagates `grad_hidden`, the gradient with respect to the tape's final hidden states (of their shape), through norm and
    /// layers, and adds the gradients with respect to the parameters to `gradients`, those of the head from `grad_head` included.
    ///
    /// # Errors
    /// A shape does not fit the tape.
    pub fn backward(
        &self,
        tape: Tape,
        grad_hidden: &Tensor,
        grad_head: &HeadGradients,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if let (Some(lora), Some(of_low)) = (&self.head_lora, &grad_head.low)
            && let Some(var) = lora.b.trained()
        {
            gradients.add(self.parameter_index(var), of_low)?;
        }
        if let Some(grad_head) = &grad_head.weight
            && let Some(var) = self.head().trained()
        {
            let grad_head = self.head().trained_rows(grad_head)?;
            gradients.add(self.parameter_index(var), &grad_head)?;
        }
        let mut store = vjp(&tape.normed, grad_hidden)?;
        gradients.collect(self, &mut store)?;
        let mut gradient = take(&mut store, tape.last.as_tensor())?;
        let layers = self.layers.iter().zip(tape.segments).rev();
        for (number, (layer, (input, output))) in layers.enumerate() {
            let output = match output {
                Some(output) => output,
                None => layer.forward(&input, &tape.shared, &mut None)?,
            };
            if !output.track_op() {
                return Ok(()); // nothing trained from here down
            }
            let mut store = vjp(&output, &gradient)?;
            drop(output);
            gradients.collect(self, &mut store)?;
            if number + 1 < self.layers.len() || input.track_op() {
                gradient = take(&mut store, &input)?;
            }
        }
        if !self.trains_embeddings() {
            return Ok(());
        }
        let rows = gradient.reshape(((), gradient.dim(D::Minus1)?))?;
        let rows = scaled(rows, self.arch.embedding_scale)?;
        let ids = tape.ids.flatten_all()?;
        // As in transformers (`padding_idx`), looking up the padding's embedding gives its row no gradient.
        let learnt = |rows: &Tensor| match self.arch.pad_token_id {
            Some(pad) => rows.broadcast_mul(&ids.ne(pad)?.to_dtype(DType::F32)?.unsqueeze(1)?),
            None => Ok(rows.clone()),
        };
        if let Some(lora) = &self.embed_lora
            && let (Some(a), Some(b)) = (lora.a.trained(), lora.b.trained())
        {
            let scaled = (&rows * lora.scaling)?;
            let low = b.as_detached_tensor().index_select(&ids, 0)?;
            gradients.add(self.parameter_index(a), &low.t()?.matmul(&scaled)?)?;
            let of_low = scaled.matmul(&a.as_detached_tensor().t()?)?;
            let zeros = b.as_detached_tensor().zeros_like()?;
            gradients.add(
                self.parameter_index(b),
                &zeros.index_add(&ids, &learnt(&of_low)?, 0)?,
            )?;
        }
        if let Some(var) = self.embed.trained() {
            let (vocabulary, hidden) = self.embed.stored(Pass::INFER).dims2()?;
            let zeros = Tensor::zeros((vocabulary, hidden), DType::F32, &self.device)?;
            let grad_embed = zeros.index_add(&ids, &learnt(&rows)?, 0)?;
            let grad_embed = self.embed.trained_rows(&grad_embed)?;
            gradients.add(self.parameter_index(var), &grad_embed)?;
        }
        Ok(())
    }

    fn parameter_index(&self, var: &Var) -> usize {
        let id = var.as_tensor().id();
        let mut parameters = self.parameters.iter();
        let index = parameters.position(|p| p.var.as_tensor().id() == id);
        index.unwrap_or(usize::MAX)
    }
}

/// The vector-Jacobian product: the gradients of `sum(output * gradient)` with respect to all variables.
fn vjp(output: &Tensor, gradient: &Tensor) -> Result<GradStore> {
    (output * gradient.detach())?.sum_all()?.backward()
}

fn take(store: &mut GradStore, input: &Tensor) -> Result<Tensor> {
    match store.remove(input) {
        Some(gradient) => Ok(gradient),
        None => candle_core::bail!("a layer's graph was cut: its input has no gradient"),
    }
}

#[cfg(test)]
mod tests;
