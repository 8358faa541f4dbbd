//! Batches through a model, by the plain path or by the fast one: what losses need, and the way back.

use candle_core::Result;

use super::fused::{self, Packing};
use super::model::batch::{Batch, Target};
use super::model::head::{self, Certainty};
use super::model::linear::Pass;
use super::model::{Gradients, Llama, Tape};

/// Which way passes of a model go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// On candle's operations, over padded batches: written for reading, and the measure of the other.
    Plain,
    /// By [`super::fused`].
    Fused(Packing),
}

/// Targets' scores.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    /// The log-probability of each target.
    pub logps: Vec<f32>,
    /// How sure the model is of each, if asked for.
    pub certainty: Option<Vec<Certainty>>,
}

/// Micro-batches that go through a model in one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Together {
    /// How many.
    pub count: usize,
    /// How many tokens are computed: with padding where it is not left out, and what sequences share only once.
    pub tokens: usize,
}

/// How many of the first of these micro-batches are best put through the model in one pass, at least one.
pub fn together(model: &Llama, batches: &[&Batch], pass: Pass, checkpointing: bool) -> Together {
    match model.path {
        Path::Fused(packing) if fused::supports(model) => {
            fused::together(model, batches, packing, pass, checkpointing)
        }
        _ => Together {
            count: 1,
            tokens: batches
                .first()
                .map_or(0, |batch| batch.sequences.len() * batch.width),
        },
    }
}

/// Batches that went through a model.
pub struct Forward<'m> {
    model: &'m Llama,
    pass: Pass,
    way: Way<'m>,
}

enum Way<'m> {
    Plain {
        hidden: candle_core::Tensor,
        tape: Option<Tape>,
        scored: Option<Box<head::Scored>>,
    },
    Fused {
        pass: Box<fused::Forward<'m>>,
        scored: Option<fused::Scored>,
    },
}

impl<'m> Forward<'m> {
    /// Runs the model on batches, no more than [`together`] says. With a tape, [`Forward::backward`] is possible; with
    /// `checkpointing` it computes the layers again.
    pub fn new(
        model: &'m Llama,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Self> {
        let only = || match batches {
            [batch] => Ok(*batch),
            _ => candle_core::bail!("{} batches at once", batches.len()),
        };
        let way = match model.path {
            Path::Fused(packing) if fused::supports(model) => Way::Fused {
                pass: Box::new(fused::Forward::new(
                    model,
                    batches,
                    packing,
                    pass,
                    checkpointing,
                )?),
                scored: None,
            },
            _ if pass.tape => {
                let tape = model.record(only()?, pass.dropout, checkpointing)?;
                Way::Plain {
                    hidden: tape.hidden(),
                    tape: Some(tape),
                    scored: None,
                }
            }
            _ => Way::Plain {
                hidden: model.hidden(only()?, pass)?,
                tape: None,
                scored: None,
            },
        };
        Ok(Self { model, pass, way })
    }

    /// Scores targets, whose rows count all batches' sequences; with `certainty` it also tells how sure the model is.
    pub fn score(&mut self, targets: &[Target], certainty: bool) -> Result<Scores> {
        match &mut self.way {
            Way::Plain { hidden, scored, .. } => {
                let head = self.model.head_matrix(self.pass)?;
                let mut new = head::score(hidden, &head, targets, certainty)?;
                let scores = Scores {
                    logps: new.logps.clone(),
                    certainty: new.certainty.take(),
                };
                *scored = Some(Box::new(new));
                Ok(scores)
            }
            Way::Fused { pass, scored } => {
                let mut new = pass.score(targets, certainty, self.pass.tape)?;
                let scores = Scores {
                    logps: new.logps.clone(),
                    certainty: new.certainty.take(),
                };
                *scored = Some(new);
                Ok(scores)
            }
        }
    }

    /// The mean of all logits of some sequences, see [`head::mean_logit`].
    pub fn mean_logit(&self, from: usize, count: usize) -> Result<f64> {
        match &self.way {
            Way::Plain { hidden, .. } => {
                let sum = self.model.column_sum(self.pass)?;
                head::mean_logit(hidden, &sum, self.model.arch.vocab_size, from, count)
            }
            Way::Fused { pass, .. } => pass.mean_logit(from, count),
        }
    }

    /// Adds to `gradients` what the gradients of the scored log-probabilities bring.
    pub fn backward(self, of_logps: &[f32], gradients: &mut Gradients) -> Result<()> {
        match self.way {
            Way::Plain {
                hidden,
                tape: Some(tape),
                scored: Some(scored),
            } => {
                let (model, head) = (self.model, self.model.head_matrix(self.pass)?);
                let (of_hidden, of_head) = scored.backward(of_logps, &head, &hidden)?;
                model.backward(tape, &of_hidden, &of_head, gradients)
            }
            Way::Fused {
                pass,
                scored: Some(scored),
            } => pass.backward(scored, of_logps, gradients),
            _ => candle_core::bail!("there is no way back: nothing was recorded or scored"),
        }
    }
}
