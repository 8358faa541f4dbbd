//! Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629, equation 9; TRL's `loss_type: dft`): each token's negative log-likelihood is weighted
//! by its probability, as a constant. So tokens that the model finds unlikely no longer have the largest gradients.

use super::sft::Sft;
use super::{Loss, Needs, Outcome, Scored};
use crate::ml::model::batch::{Batch, Row, Target};

/// The loss of dynamic fine-tuning: the mean over the targets of `-p log p`, whose factor `p` is a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dft(pub Sft);

impl Loss for Dft {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        self.0.batch(rows, pad)
    }

    fn targets(&self, batch: &Batch) -> Vec<Target> {
        self.0.targets(batch)
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    /// The number of targets, as in transformers.
    fn weight(&self, targets: usize) -> f64 {
        self.0.weight(targets)
    }

    fn metrics(&self) -> &'static [&'static str] {
        self.0.metrics()
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let count = scored.logps.len() as f64;
        let weighted = scored.logps.iter().map(|logp| logp.exp() * logp);
        let gradient = scored.logps.iter().map(|logp| -logp.exp() / count);
        Ok(Outcome {
            loss: -weighted.sum::<f64>() / count,
            gradient: gradient.map(|g| g as f32).collect(),
            ..self.0.loss(scored)?
        })
    }
}
