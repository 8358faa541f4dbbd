//! The interface of a backend, which runs a model. [`super::reference`] and [`super::fused`] are backends, and [`super::execution`]
//! chooses between them.
//!
//! To add another kind of device: write a module with a type that holds `&CausalLm` and whatever it needs beside the weights, and
//! implement [`Backend`] for it; add a variant to [`super::execution::Kind`] and one arm to `Execution::new`. Nothing else asks which
//! backend runs. A backend must compute what the reference computes: its tests compare every score and every gradient with it.

use std::path::Path;

use candle_core::Result;

use super::model::Gradients;
use super::model::batch::{Batch, Target};
use super::model::head::{Positions, TokenStats};
use super::model::linear::Pass;
use super::resident::{Resident, TrainedTensor};

/// The scores of targets. Vectors have one element for each target.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// The log-probability of each target, in nats.
    pub logps: Vec<f32>,
    /// The entropy and the arg max at each target, if requested.
    pub token_stats: Option<Vec<TokenStats>>,
}

/// The size of one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassSize {
    /// The number of micro-batches.
    pub micro_batches: usize,
    /// The number of tokens that are computed: padding counts where it is not left out, shared prefixes count once.
    pub tokens: usize,
}

/// Passes of the same batches with the adapter and without.
pub struct WithBase<'a> {
    /// That with the adapter, as it was asked for.
    pub adapted: Box<dyn ForwardPass + 'a>,
    /// That of the base alone, without a tape and without dropout ([`Pass::BASE`]).
    pub base: Box<dyn ForwardPass + 'a>,
}

/// A token that is appended to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// The index of the sequence.
    pub sequence: usize,
    /// The token's id.
    pub id: u32,
}

/// A way of running one model. Weights are read anew in each pass, because they may be trained in between.
pub trait Backend: Send + Sync {
    /// How many of these micro-batches, from the first on, are best run in one pass; at least one, if there are any. `checkpointing` is
    /// that of [`Backend::forward`].
    fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize;

    /// Says that passes of up to so many tokens are to come, so that buffers get their room at once: buffers that grow leave holes.
    fn expect(&self, _tokens: usize) {}

    /// Runs the model on `batches`, of which there may be no more than [`Backend::pass_size`] says, with or without the adapter as
    /// `pass` says. With `pass.tape` it keeps what [`ForwardPass::backward`] needs; with `checkpointing` only the layers' inputs, from
    /// which the backward pass recomputes the rest with the same bits (Chen et al. 2016, arXiv 1604.06174).
    ///
    /// # Errors
    /// A token id is outside the vocabulary, or there are more batches than one pass takes.
    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Box<dyn ForwardPass + 'a>>;

    /// The same as [`Backend::forward`] with `pass`, and with [`Pass::BASE`] on the same batches, in one pass over the weights: each layer
    /// computes both before the next one does. `None` if this backend can't, or if it would gain nothing; then two passes give the same.
    ///
    /// # Errors
    /// Those of [`Backend::forward`].
    fn forward_beside_base<'a>(
        &'a self,
        _batches: &[&Batch],
        _pass: Pass,
        _checkpointing: bool,
    ) -> Result<Option<WithBase<'a>>> {
        Ok(None)
    }

    /// Starts `sequences` empty sequences for generation, none of which may become longer than `longest` tokens.
    ///
    /// # Errors
    /// A weight can't be converted to the type that products need.
    fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>>;

    /// From now on keeps the output of the layers below the lowest trained one for each sequence, in a file in `folder`, and does not
    /// compute it a second time. Returns the number of these layers, or `None` if that would save nothing or this backend can't do it.
    ///
    /// # Errors
    /// The file can't be created.
    fn keep_frozen_states(&self, _folder: &Path) -> std::io::Result<Option<usize>> {
        Ok(None)
    }

    /// Takes all trained tensors of the model and `AdamW`'s moments into the memory of the device. As long as what is returned lives, passes use
    /// the tensors there, and backward passes add to the gradients there and to no others. `None` where the device's memory is the host's, or
    /// where a trained tensor is a part of one that is not trained.
    ///
    /// # Errors
    /// There is no room for them.
    fn hold(&self, _tensors: &[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>> {
        Ok(None)
    }
}

/// A pass of batches through a model. The rows of targets and the numbers of sequences count the sequences of all batches, one batch
/// after the other.
pub trait ForwardPass {
    /// Computes the log-probabilities of `targets`, and with `token_stats` also [`TokenStats`]. [`ForwardPass::backward`] goes through
    /// the last call only.
    ///
    /// # Errors
    /// A target is outside its batch, or its id is outside the vocabulary.
    fn score(&mut self, targets: &[Target], token_stats: bool) -> Result<Scores>;

    /// For each target, the mean over the vocabulary of the logits from which it is predicted.
    ///
    /// # Errors
    /// A target is outside its batch.
    fn target_mean_logits(&self, targets: &[Target]) -> Result<Vec<f64>>;

    /// The mean of all logits at these positions of the sequences `from..from + count`, see
    /// [`super::model::head::mean_logit`]; a NaN if there are no logits.
    ///
    /// # Errors
    /// The head's sum of rows can't be computed.
    fn mean_logit(&self, from: usize, count: usize, positions: Positions) -> Result<f64>;

    /// Backpropagates `grad_logps`, the gradient of the loss with respect to each scored log-probability (targets), and adds the
    /// gradients with respect to the trained tensors to `gradients`.
    ///
    /// # Errors
    /// Nothing was scored, or the pass has no tape.
    fn backward(self: Box<Self>, grad_logps: &[f32], gradients: &mut Gradients) -> Result<()>;

    /// The same for `grad_scores`, the gradient of the loss with respect to the number that the head of a model with
    /// [`super::model::arch::Arch::scores`] gives at each of `targets` (targets), which [`ForwardPass::target_mean_logits`] returns. Nothing
    /// has to be scored before.
    ///
    /// # Errors
    /// The pass has no tape, a target is outside its batch, or the backend can't do it.
    fn backward_scores(
        self: Box<Self>,
        _targets: &[Target],
        _grad_scores: &[f32],
        _gradients: &mut Gradients,
    ) -> Result<()> {
        candle_core::bail!("this backend does not train a head that gives one number")
    }
}

/// Sequences that a model continues, with their cached keys and values.
pub trait Decoder: Send {
    /// Appends tokens to their sequences, in order. Returns the logits after each of the tokens at the indices `wanted`, which must be
    /// ascending: (`wanted.len()`, vocabulary), row-major.
    ///
    /// # Errors
    /// A sequence does not exist or would become too long, or an index is outside `tokens`.
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>>;

    /// Forgets what a text has behind its first `length` tokens.
    ///
    /// # Errors
    /// A text that is not there or is shorter.
    fn truncate(&mut self, text: usize, length: usize) -> Result<()>;

    /// The number of tokens of prompts that best go through the model at a time.
    fn at_once(&self) -> usize {
        32
    }

    /// Makes the first `length` tokens of text `from` all that text `to` has, without computing anything. Gives `false`, and changes
    /// nothing, where the decoder can't do that without other roundings.
    ///
    /// # Errors
    /// A text that is not there, or `from` is shorter.
    fn copy_beginning(&mut self, _from: usize, _to: usize, _length: usize) -> Result<bool> {
        Ok(false)
    }
}
