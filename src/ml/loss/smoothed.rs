//! Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7; transformers' `label_smoothing_factor`): a part of each target's probability is
//! spread over the whole vocabulary.

use super::sft::Sft;
use super::{Loss, Needs, Outcome, Scored};
use crate::ml::model::batch::{Batch, Row, Target};

/// Supervised fine-tuning with label smoothing: the mean over the targets of `-(1 - e) log p - e mean(log p of all ids)`.
///
/// Scores are then what takes the place of `log p` in it ([`Loss::label_smoothing`]), so this is [`Sft`] in all else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Smoothed {
    /// The loss without label smoothing.
    pub sft: Sft,
    /// The part e of each target's probability that is spread, from 0 to 1.
    pub label_smoothing_factor: f64,
}

impl Loss for Smoothed {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        self.sft.batch(rows, pad)
    }

    fn targets(&self, batch: &Batch) -> Vec<Target> {
        self.sft.targets(batch)
    }

    fn needs(&self) -> Needs {
        self.sft.needs()
    }

    fn label_smoothing(&self) -> f64 {
        self.label_smoothing_factor
    }

    /// The number of targets, as in transformers.
    fn weight(&self, targets: usize) -> f64 {
        self.sft.weight(targets)
    }

    fn metrics(&self) -> &'static [&'static str] {
        self.sft.metrics()
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        self.sft.loss(scored)
    }
}
