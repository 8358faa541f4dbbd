//! Supervised fine-tuning: the negative log-likelihood of the answers, or of whole sequences.
//!
//! As in transformers (`ForCausalLMLoss` with `num_items_in_batch`), the mean is taken over all scored tokens of an accumulation
//! group, so micro-batches with more tokens weigh more.

use std::collections::{BTreeMap, VecDeque};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Loss, Metrics, Needs, Outcome, Scored};
use crate::ml::model::batch::{Batch, Row, Target};
use crate::ml::model::head::TokenStats;

/// The number of rows that TRL packs at a time: the batch size of `Dataset.map`.
const PACKED_AT_ONCE: usize = 1000;

/// Which answers are learnt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Answers {
    /// The preferred ones.
    #[default]
    Chosen,
    /// The rejected ones.
    Rejected,
    /// Both, each as a row of its own.
    Both,
}

impl Answers {
    /// The number of rows that one row becomes.
    pub fn each(self) -> usize {
        1 + usize::from(self == Self::Both)
    }
}

/// Splits rows into rows with one answer each, in the same order; with [`Answers::Both`] the preferred one comes first.
///
/// # Errors
/// A row lacks the rejected answer.
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
                anyhow::bail!("row {} has no rejected answer to learn", number + 1);
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

/// The loss of supervised fine-tuning: the mean negative log-likelihood of the targets, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sft {
    /// Whether the prompt's tokens are left out of the targets.
    pub completion_only: bool,
}

impl Loss for Sft {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::new(
            rows.iter().map(|row| row.chosen()).collect(),
            pad,
        )?)
    }

    fn targets(&self, batch: &Batch) -> Vec<Target> {
        (0..batch.sequences.len())
            .flat_map(|row| batch.targets(row, self.completion_only))
            .collect()
    }

    fn needs(&self) -> Needs {
        Needs {
            token_stats: true,
            ..Needs::default()
        }
    }

    /// The number of targets, as in transformers.
    fn weight(&self, targets: usize) -> f64 {
        targets as f64
    }

    fn metrics(&self) -> &'static [&'static str] {
        &["entropy", "mean_token_accuracy"]
    }

    /// The mean negative log-likelihood, with the mean entropy and the accuracy at the targets as metrics.
    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let count = scored.logps.len() as f64;
        let total: f64 = scored.logps.iter().sum();
        let mut metrics = Metrics::new();
        if let Some(stats) = scored.token_stats {
            metrics.insert("entropy", TokenStats::mean_entropy(stats));
            metrics.insert("mean_token_accuracy", TokenStats::accuracy(stats));
        }
        Ok(Outcome {
            loss: -total / count,
            gradient: vec![(-1. / count) as f32; scored.logps.len()],
            metrics,
        })
    }
}

/// Whether a row has an id that is scored, with `completion_only` in its answer.
pub fn has_target(row: &Row, completion_only: bool) -> bool {
    let all = row.prompt.len() + row.chosen.len();
    let first = if completion_only { row.prompt.len() } else { 0 };
    let mut scored = first.max(1)..all;
    match &row.mask {
        None => !scored.is_empty(),
        Some(mask) => scored.any(|at| mask.get(at).is_none_or(|scored| *scored)),
    }
}

/// Rows packed into fewer sequences.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packed {
    /// The sequences. Each is a row that holds the rows packed with it.
    pub rows: Vec<Row>,
    /// The number of rows that were truncated, or split.
    pub cut: usize,
    /// The number of rows that were dropped, because truncation left them without a target.
    pub dropped: usize,
}

/// What becomes of rows that are longer than a packed sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PackingStrategy {
    /// They are truncated at the end.
    #[default]
    Bfd,
    /// They are split, and each part is packed like a row of its own, so that no token is lost. A part sees nothing of the part before it.
    BfdSplit,
}

/// Packs rows into sequences of at most `length` ids by best fit decreasing, as TRL does (`trl/data_utils.py`, `_pack_bfd`): the longest row
/// first, and each into the fullest sequence that has room. Longer rows are truncated or split as `strategy` says. With `completion_only`,
/// truncated rows whose answer is cut off entirely are dropped, and so are sequences without a target.
pub fn pack(
    rows: Vec<Row>,
    length: usize,
    completion_only: bool,
    strategy: PackingStrategy,
) -> Packed {
    let mut packed = Packed::default();
    let mut chunks: Vec<Vec<Row>> = Vec::new();
    match strategy {
        PackingStrategy::Bfd => {
            let mut kept = Vec::with_capacity(rows.len());
            for mut row in rows {
                if row.prompt.len() + row.chosen.len() > length {
                    row.prompt.truncate(length);
                    row.chosen.truncate(length - row.prompt.len());
                    if let Some(mask) = &mut row.mask {
                        mask.truncate(length);
                    }
                    packed.cut += 1;
                }
                if has_target(&row, completion_only) {
                    kept.push(row);
                } else {
                    packed.dropped += 1;
                }
            }
            chunks.extend(kept.chunks(PACKED_AT_ONCE).map(<[Row]>::to_vec));
        }
        PackingStrategy::BfdSplit => {
            for rows in rows.chunks(PACKED_AT_ONCE) {
                let parts = rows.iter().map(|row| split(row, length));
                let mut all = Vec::with_capacity(rows.len());
                for parts in parts {
                    packed.cut += usize::from(parts.len() > 1);
                    all.extend(parts);
                }
                chunks.push(all);
            }
        }
    }
    for rows in &chunks {
        let lengths: Vec<usize> = rows
            .iter()
            .map(|row| row.prompt.len() + row.chosen.len())
            .collect();
        for bin in bins(&lengths, length) {
            let mut rows = bin.iter().filter_map(|&index| rows.get(index)).cloned();
            if let Some(mut first) = rows.next() {
                first.packed.extend(rows);
                // A sequence that is nothing but parts of prompts teaches nothing.
                let mut all = std::iter::once(&first).chain(&first.packed);
                if all.any(|row| has_target(row, completion_only)) {
                    packed.rows.push(first);
                }
            }
        }
    }
    packed
}

/// Splits a row into parts of `length` ids, of which the last may be shorter. A part that begins in the answer has no prompt.
fn split(row: &Row, length: usize) -> Vec<Row> {
    let (prompt, all) = (row.prompt.len(), row.prompt.len() + row.chosen.len());
    let starts = (0..all).step_by(length.max(1));
    let part = |start: usize| {
        let end = (start + length).min(all);
        let of_answer = start.max(prompt) - prompt..end.max(prompt) - prompt;
        Row {
            prompt: row.prompt[start.min(prompt)..end.min(prompt)].to_vec(),
            chosen: row.chosen[of_answer].to_vec(),
            mask: row.mask.as_ref().map(|mask| {
                let scored = (start..end).map(|at| mask.get(at).copied().unwrap_or(true));
                scored.collect()
            }),
            ..Row::default()
        }
    };
    starts.map(part).collect()
}

/// Packs items of the given lengths into bins of `size` by best fit decreasing. Returns the indices of the items in each bin. Empty
/// items are left out; none may be longer than a bin.
fn bins(lengths: &[usize], size: usize) -> Vec<Vec<usize>> {
    let mut indices: Vec<usize> = (0..lengths.len()).filter(|&at| lengths[at] > 0).collect();
    indices.sort_by_key(|&at| std::cmp::Reverse(lengths[at])); // stable
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut by_space = BTreeMap::<usize, VecDeque<usize>>::new();
    for index in indices {
        let length = lengths[index];
        let found = by_space.range(length..).next().map(|(space, _)| *space);
        let oldest = found.and_then(|space| {
            let queue = by_space.get_mut(&space)?;
            let bin = queue.pop_front();
            if queue.is_empty() {
                by_space.remove(&space);
            }
            Some((bin?, space))
        });
        let (bin, space) = oldest.unwrap_or_else(|| {
            bins.push(Vec::new());
            (bins.len() - 1, size)
        });
        bins[bin].push(index);
        if space > length {
            by_space.entry(space - length).or_default().push_back(bin);
        }
    }
    bins
}

#[cfg(test)]
mod tests;
