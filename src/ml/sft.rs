//! Supervised fine-tuning: the negative log-likelihood of the answers, or of whole sequences.
//!
//! As in transformers, the mean goes over all counted tokens of an accumulation group, so that micro-batches with more
//! tokens weigh more.

use super::batch::{Batch, Row, Target};
use super::objective::{Metrics, Outcome};

/// Which answers are learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// The preferred ones.
    Chosen,
    /// The others.
    Rejected,
    /// Both, each as a row of its own.
    Both,
}

/// Rows with one answer each.
pub fn rows(rows: &[Row], answers: Answers) -> anyhow::Result<Vec<Row>> {
    let mut single = Vec::new();
    for (number, row) in rows.iter().enumerate() {
        if answers != Answers::Rejected {
            single.push(Row {
                rejected: None,
                rejected_prompt: None,
                ..row.clone()
            });
        }
        if answers != Answers::Chosen {
            let Some(rejected) = &row.rejected else {
                anyhow::bail!("row {number} has no rejected answer to learn");
            };
            single.push(Row {
                prompt: row.rejected_prompt.clone().unwrap_or(row.prompt.clone()),
                chosen: rejected.clone(),
                ..Row::default()
            });
        }
    }
    Ok(single)
}

/// What is scored.
pub fn targets(batch: &Batch, completion_only: bool) -> Vec<Target> {
    (0..batch.sequences.len())
        .flat_map(|row| batch.targets(row, completion_only))
        .collect()
}

/// The mean negative log-likelihood.
pub fn loss(logps: &[f32]) -> Outcome {
    let count = logps.len() as f64;
    let total: f64 = logps.iter().map(|&logp| f64::from(logp)).sum();
    Outcome {
        loss: -total / count,
        gradient: vec![(-1. / count) as f32; logps.len()],
        metrics: Metrics::new(),
    }
}
