//! The reference backend: candle's operations over padded batches, written for reading. It shows what is right; every other backend
//! is tested against it.

use candle_core::{Result, Tensor, bail};

use super::backend::{Backend, Decoder, ForwardPass, PassSize, Scores, Token};
use super::model::batch::{Batch, Target};
use super::model::head::{self, Scored};
use super::model::linear::Pass;
use super::model::{Cache, Gradients, Llama, Tape};

/// See the module.
pub struct Reference<'m> {
    model: &'m Llama,
}

impl<'m> Reference<'m> {
    /// Any model goes this way.
    pub fn new(model: &'m Llama) -> Self {
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
            let tape = self.model.record(batch, pass.dropout, checkpointing)?;
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
        texts: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>> {
        Ok(Box::new(Texts::new(self.model, texts, longest, pass)))
    }
}

/// One batch that went through the model.
struct Forward<'m> {
    model: &'m Llama,
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
        let sum = self.model.column_sum(self.pass)?;
        let vocabulary = self.model.arch.vocab_size;
        head::target_mean_logits(&self.hidden, &sum, vocabulary, targets)
    }

    fn mean_logit(&self, from: usize, count: usize) -> Result<f64> {
        let sum = self.model.column_sum(self.pass)?;
        let vocabulary = self.model.arch.vocab_size;
        head::mean_logit(&self.hidden, &sum, vocabulary, from, count)
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
}

/// Texts with their keys and values, each on its own.
pub struct Texts<'m> {
    model: &'m Llama,
    pass: Pass,
    longest: usize,
    /// Of each text, how many tokens it has, and their keys and values.
    caches: Vec<(usize, Cache)>,
}

impl<'m> Texts<'m> {
    /// So many empty texts, none of which gets longer than `longest` tokens.
    pub fn new(model: &'m Llama, texts: usize, longest: usize, pass: Pass) -> Self {
        let text = || (0, Cache::default());
        Self {
            model,
            pass,
            longest,
            caches: std::iter::repeat_with(text).take(texts).collect(),
        }
    }
}

impl Decoder for Texts<'_> {
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>> {
        if let Some(index) = wanted.iter().find(|index| **index >= tokens.len()) {
            bail!("token {index} of {} is wanted", tokens.len())
        }
        let mut logits: Vec<Option<Vec<f32>>> = vec![None; tokens.len()];
        for (number, (length, cache)) in self.caches.iter_mut().enumerate() {
            let own = tokens.iter().enumerate();
            let own: Vec<usize> = own
                .filter(|(_, token)| token.text == number)
                .map(|(index, _)| index)
                .collect();
            *length += own.len();
            if *length > self.longest {
                bail!("text {number} would get longer than {}", self.longest)
            }
            // The logits behind a run of tokens are those of its last one.
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
                None => bail!("there is no text {}", tokens[index].text),
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
