//! The reference backend: candle's operations over padded batches, written to be read. It defines the right results; every other
//! backend is tested against it.

use candle_core::{Result, Tensor, bail};

use super::backend::{Backend, Decoder, ForwardPass, PassSize, Scores, Token};
use super::model::batch::{Batch, Target};
use super::model::head::{self, Positions, Scored};
use super::model::linear::Pass;
use super::model::{Cache, CausalLm, Gradients, Tape};

/// A model on the reference backend.
pub struct Reference<'m> {
    model: &'m CausalLm,
}

impl<'m> Reference<'m> {
    /// Every model is supported.
    pub fn new(model: &'m CausalLm) -> Self {
        Self { model }
    }
}

impl Backend for Reference<'_> {
    fn pass_size(&self, batches: &[&Batch], _: Pass, _: bool) -> PassSize {
        let first = batches.first();
        PassSize {
            micro_batches: first.iter().count(),
            tokens: first.map_or(0, |batch| batch.sequences.len() * batch.width),
        }
    }

    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Box<dyn ForwardPass + 'a>> {
        let [batch] = batches else {
            bail!(
                "the reference backend takes one batch at a time, not {}",
                batches.len()
            )
        };
        let (hidden, tape) = if pass.tape {
            let tape = self.model.record(batch, pass, checkpointing)?;
            (tape.hidden(), Some(tape))
        } else {
            (self.model.hidden(batch, pass)?, None)
        };
        Ok(Box::new(Forward {
            model: self.model,
            pass,
            hidden,
            tape,
            scored: None,
        }))
    }

    fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>> {
        Ok(Box::new(CachedSequences::new(
            self.model, sequences, longest, pass,
        )))
    }
}

/// One batch that went through the model.
struct Forward<'m> {
    model: &'m CausalLm,
    pass: Pass,
    hidden: Tensor, // (batch, length, hidden), after the norm
    tape: Option<Tape>,
    scored: Option<Scored>,
}

impl ForwardPass for Forward<'_> {
    fn score(&mut self, targets: &[Target], token_stats: bool) -> Result<Scores> {
        let head = self.model.head_matrix(self.pass)?;
        let mut scored = head::score(&self.hidden, &head, targets, token_stats)?;
        let scores = Scores {
            logps: scored.logps.clone(),
            token_stats: scored.token_stats.take(),
        };
        self.scored = Some(scored);
        Ok(scores)
    }

    fn target_mean_logits(&self, targets: &[Target]) -> Result<Vec<f64>> {
        let head = self.model.head_matrix(self.pass)?;
        let sum = || self.model.column_sum(self.pass);
        head::target_mean_logits(&self.hidden, &head, sum, targets)
    }

    fn mean_logit(&self, from: usize, count: usize, positions: Positions) -> Result<f64> {
        let head = self.model.head_matrix(self.pass)?;
        let sum = || self.model.column_sum(self.pass);
        head::mean_logit(&self.hidden, &head, sum, (from, count), positions)
    }

    fn backward(self: Box<Self>, grad_logps: &[f32], gradients: &mut Gradients) -> Result<()> {
        let (Some(tape), Some(scored)) = (self.tape, &self.scored) else {
            bail!("there is no way back: nothing was recorded or scored")
        };
        let head = self.model.head_matrix(self.pass)?;
        let (grad_hidden, grad_head) = scored.backward(grad_logps, &head, &self.hidden)?;
        self.model
            .backward(tape, &grad_hidden, &grad_head, gradients)
    }

    fn backward_scores(
        self: Box<Self>,
        targets: &[Target],
        grad_scores: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Some(tape) = self.tape else {
            bail!("there is no way back: nothing was recorded")
        };
        let head = self.model.head_matrix(self.pass)?;
        let (grad_hidden, grad_head) =
            head::backward_scores(&self.hidden, &head, targets, grad_scores)?;
        self.model
            .backward(tape, &grad_hidden, &grad_head, gradients)
    }
}

/// Sequences with their keys and values, each computed by itself.
pub struct CachedSequences<'m> {
    model: &'m CausalLm,
    pass: Pass,
    longest: usize,
    /// For each sequence, the number of its tokens, and their keys and values.
    caches: Vec<(usize, Cache)>,
}

impl<'m> CachedSequences<'m> {
    /// `sequences` empty sequences, none of which may become longer than `longest` tokens.
    pub fn new(model: &'m CausalLm, sequences: usize, longest: usize, pass: Pass) -> Self {
        let sequence = || (0, Cache::default());
        Self {
            model,
            pass,
            longest,
            caches: std::iter::repeat_with(sequence).take(sequences).collect(),
        }
    }
}

impl Decoder for CachedSequences<'_> {
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>> {
        if let Some(index) = wanted.iter().find(|index| **index >= tokens.len()) {
            bail!("token {index} of {} is wanted", tokens.len())
        }
        let mut logits: Vec<Option<Vec<f32>>> = vec![None; tokens.len()];
        for (number, (length, cache)) in self.caches.iter_mut().enumerate() {
            let own = tokens.iter().enumerate();
            let own: Vec<usize> = own
                .filter(|(_, token)| token.sequence == number)
                .map(|(index, _)| index)
                .collect();
            *length += own.len();
            if *length > self.longest {
                bail!("sequence {number} would get longer than {}", self.longest)
            }
            // A run of tokens gives the logits after its last one.
            for run in own.split_inclusive(|index| wanted.contains(index)) {
                let ids: Vec<u32> = run.iter().map(|&index| tokens[index].id).collect();
                let last = self.model.next_logits(&ids, cache, self.pass)?;
                if let Some(&index) = run.last() {
                    logits[index] = Some(last);
                }
            }
        }
        let mut all = Vec::with_capacity(wanted.len() * self.model.arch.vocab_size);
        for &index in wanted {
            match &logits[index] {
                Some(logits) => all.extend(logits),
                None => bail!("there is no sequence {}", tokens[index].sequence),
            }
        }
        Ok(all)
    }

    fn truncate(&mut self, text: usize, length: usize) -> Result<()> {
        match self.caches.get_mut(text) {
            Some((has, cache)) if *has >= length => {
                *has = length;
                cache.truncate(length)
            }
            _ => bail!("there are no {length} tokens of text {text} to keep"),
        }
    }
}
