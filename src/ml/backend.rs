//! What a way of running a model must be able to do. [`super::reference`] and [`super::fused`] are two of them,
//! and [`super::execution`] chooses.
//!
//! To add another kind of device: write a module with a type that holds `&Llama` and whatever it needs beside the weights, and
//! implement [`Backend`] for it; add a variant to [`super::execution::Kind`] and one arm to `Execution::new`. Nothing else asks which
//! backend runs. A backend must mean what the reference does: its tests compare every score and every gradient with it.

use std::path::Path;

use candle_core::Result;

use super::model::Gradients;
use super::model::batch::{Batch, Target};
use super::model::head::TokenStats;
use super::model::linear::Pass;

/// Targets' scores.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// The log-probability of each target, in nats.
    pub logps: Vec<f32>,
    /// Entropy and arg max at each, if asked for.
    pub token_stats: Option<Vec<TokenStats>>,
}

/// What goes through a model in one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassSize {
    /// How many micro-batches.
    pub micro_batches: usize,
    /// How many tokens are computed: with padding where it is not left out, and what sequences share only once.
    pub tokens: usize,
}

/// A token that follows what its text has so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// The text.
    pub text: usize,
    /// The id.
    pub id: u32,
}

/// A way of running one model, whose weights it reads anew in each pass: they may be trained in between.
pub trait Backend: Send + Sync {
    /// How many of the first of these micro-batches are best put through the model in one pass: at least one, if there are any.
    fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize;

    /// Runs the model on batches, no more than [`Backend::pass_size`] says, with the adapter or without it as `pass` says. With
    /// `pass.tape` it keeps what [`ForwardPass::backward`] needs; with `checkpointing` only the layers' inputs, from which the backward
    /// computes them again, with the same bits.
    ///
    /// # Errors
    /// An id outside the vocabulary, or more batches than one pass takes.
    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Box<dyn ForwardPass + 'a>>;

    /// Starts so many empty texts, none of which gets longer than `longest` tokens.
    fn decoder<'a>(
        &'a self,
        texts: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>>;

    /// From now on keeps what the layers below the lowest trained one give of each sequence, in a file in `folder`, and does not
    /// compute it a second time. Returns how many layers that are; none where it would save nothing, or this backend can't.
    fn keep_frozen_states(&self, _folder: &Path) -> std::io::Result<Option<usize>> {
        Ok(None)
    }
}

/// Batches that went through a model. Rows of targets and sequences count all batches' sequences, one batch behind the other.
pub trait ForwardPass {
    /// Scores targets; with `token_stats` it also gives these. Only the last call counts for the backward.
    ///
    /// # Errors
    /// A target outside its batch, or an id outside the vocabulary.
    fn score(&mut self, targets: &[Target], token_stats: bool) -> Result<Scores>;

    /// The mean over the vocabulary of the logits that each target is predicted from: (targets).
    ///
    /// # Errors
    /// A target outside its batch.
    fn target_mean_logits(&self, targets: &[Target]) -> Result<Vec<f64>>;

    /// The mean of all logits at all but the last position of the sequences `from..from + count`, see
    /// [`super::model::head::mean_logit`]. A NaN if there is none.
    fn mean_logit(&self, from: usize, count: usize) -> Result<f64>;

    /// Backpropagates `grad_logps`, the gradient of the loss by each scored log-probability (as many as targets), and adds the
    /// gradients of the trained tensors to `gradients`.
    ///
    /// # Errors
    /// Nothing was scored, or the pass has no tape.
    fn backward(self: Box<Self>, grad_logps: &[f32], gradients: &mut Gradients) -> Result<()>;
}

/// Texts that a model goes on with.
pub trait Decoder: Send {
    /// Appends tokens to their texts, in order. Returns the logits behind each of the tokens at the indices `wanted`, in
    /// ascending order: (wanted, vocabulary).
    ///
    /// # Errors
    /// A text that is not there or that would get too long, or an index outside `tokens`.
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>>;

    /// Forgets what a text has behind its first `length` tokens.
    ///
    /// # Errors
    /// A text that is not there or is shorter.
    fn truncate(&mut self, text: usize, length: usize) -> Result<()>;
}
