//! Numbers of a model on rows it is not trained on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{bail, ensure};

use super::Settings;
use crate::ml::execution::Execution;
use crate::ml::loss::{Objective, in_pool};
use crate::ml::model::batch::{Batch, Row};
use crate::ml::model::linear::Pass;

/// TRL's evaluation during training: metrics are the mean of the batches' means, the loss is weighted by rows.
pub fn metrics(
    execution: &Execution<'_>,
    rows: &[Row],
    settings: &Settings,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut sums = BTreeMap::<String, f64>::new();
    let mut loss = 0.;
    let mut batches = 0usize;
    for rows in rows.chunks(settings.eval_batch_size.max(1)) {
        let references: Vec<&Row> = rows.iter().collect();
        let batch = settings.objective.batch(&references, settings.pad)?;
        let outcome = settings
            .objective
            .evaluate(execution, &batch, Pass::INFER)?;
        loss += outcome.loss * rows.len() as f64;
        batches += 1;
        for (name, value) in outcome.metrics {
            *sums.entry(name.to_owned()).or_default() += value;
        }
    }
    let mut means: BTreeMap<_, _> = sums
        .into_iter()
        .map(|(name, sum)| (name, sum / batches as f64))
        .collect();
    means.insert("loss".into(), loss / rows.len() as f64);
    Ok(means)
}

/// What [`preferences`] counts up, over all rows alike.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scores {
    /// Rows.
    pub rows: usize,
    /// The share of rows whose chosen answer has the higher mean log-probability.
    pub accuracy: f64,
    /// The mean difference of the two mean log-probabilities.
    pub margin: f64,
    /// The mean of the chosen answers' mean log-probabilities.
    pub logps_chosen: f64,
    /// The same of the rejected ones.
    pub logps_rejected: f64,
    /// Of the chosen answers' tokens: exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// TRL's `nll_loss` over all tokens of the chosen sequences, prompts included.
    pub nll: f64,
    /// The mean of the log odds ratios.
    pub log_odds_chosen: f64,
    /// The mean of their log sigmoids.
    pub log_odds_ratio: f64,
}

/// Rows whose scores are no numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFinite {
    /// Their numbers, from 0.
    pub rows: Vec<usize>,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the log-probabilities of the rows {:?} are not finite",
            self.rows
        )
    }
}

impl std::error::Error for NotFinite {}

/// Scores preference rows, `batch_size` at a time. Where a score is a NaN or infinite the error is a [`NotFinite`] with the rows
/// of that batch: compared with anything, a NaN would count as a chosen answer that is not preferred. `tell` is called with the number of rows done, and may stop with an
/// error.
pub fn preferences(
    execution: &Execution<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    tell: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Scores> {
    ensure!(!rows.is_empty(), "there are no rows to evaluate");
    let mut total = Scores {
        rows: rows.len(),
        ..Scores::default()
    };
    let (mut all_nll, mut all_count, mut answer_nll, mut answer_count) = (0f64, 0u64, 0f64, 0u64);
    let mut done = 0;
    // The numbers don't depend on the order: rows of like length go together, so that little is padding.
    let mut sorted: Vec<(usize, &Row)> = rows.iter().enumerate().collect();
    sorted.sort_by_key(|(_, row)| {
        let rejected = row.rejected.as_ref().map_or(0, Vec::len);
        row.prompt.len() + row.chosen.len().max(rejected)
    });
    for numbered in sorted.chunks(batch_size.max(1)) {
        let rows: Vec<&Row> = numbered.iter().map(|(_, row)| *row).collect();
        let batch = Batch::pairs(&rows, pad)?;
        let objective = Objective::Orpo { beta: 0. };
        let targets = objective.targets(&batch);
        let scored = in_pool(|| {
            execution
                .forward(&[&batch], pass, false)?
                .score(&targets, false)
        })?;
        let mut sums = vec![(0f64, 0u64); 2 * rows.len()];
        let mut odd = BTreeSet::new();
        for (target, logp) in targets.iter().zip(&scored.logps) {
            if !logp.is_finite() {
                let row = numbered.get(target.row % rows.len());
                odd.extend(row.map(|(number, _)| *number));
            }
            let logp = f64::from(*logp);
            let prompt = batch.sequences.get(target.row).map_or(0, |s| s.prompt);
            if target.row < rows.len() {
                (all_nll, all_count) = (all_nll - logp, all_count + 1);
            }
            if target.position >= prompt
                && let Some(sum) = sums.get_mut(target.row)
            {
                *sum = (sum.0 + logp, sum.1 + 1);
            }
        }
        if !odd.is_empty() {
            bail!(NotFinite {
                rows: odd.into_iter().collect()
            });
        }
        ensure!(
            sums.iter().all(|(_, count)| *count > 0),
            "an answer has no token, so its log-probability is undefined"
        );
        let (chosen, rejected) = sums.split_at(rows.len());
        for (c, r) in chosen.iter().zip(rejected) {
            (answer_nll, answer_count) = (answer_nll - c.0, answer_count + c.1);
            let mean = |(sum, count): &(f64, u64)| f64::from((sum / *count as f64) as f32);
            let (c, r) = (mean(c), mean(r));
            let odds = crate::ml::loss::orpo::odds(c, r);
            total.accuracy += f64::from(u8::from(c > r));
            total.margin += c - r;
            total.logps_chosen += c;
            total.logps_rejected += r;
            total.log_odds_chosen += odds.log_odds;
            total.log_odds_ratio += odds.ratio;
        }
        done += rows.len();
        tell(done)?;
    }
    let count = rows.len() as f64;
    for sum in [
        &mut total.accuracy,
        &mut total.margin,
        &mut total.logps_chosen,
        &mut total.logps_rejected,
        &mut total.log_odds_chosen,
        &mut total.log_odds_ratio,
    ] {
        *sum /= count;
    }
    total.nll = all_nll / all_count as f64;
    total.perplexity = (answer_nll / answer_count as f64).exp();
    Ok(total)
}
