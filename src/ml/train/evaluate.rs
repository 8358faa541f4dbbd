//! The metrics of a model on rows on which it is not trained.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use super::bootstrap::{RowScore, RowScores};
use super::passes::Passes;
use super::process_group::{ProcessGroup, dealt, exchange};
use crate::ml::execution::Execution;
use crate::ml::loss::{Metrics, Outcome, Preferences, Scored};
use crate::ml::model::batch::{Batch, Row, Target};
use crate::ml::model::head::TokenStats;
use crate::ml::model::linear::Pass;
use crate::ml::threads::in_pool;

/// What a batch of an evaluation gave. Floats travel between processes as their bits.
#[derive(Serialize, Deserialize)]
struct Evaluated {
    /// The number of the batch.
    number: usize,
    loss: u64,
    metrics: Vec<(String, u64)>,
}

/// TRL's evaluation during a training: each metric is the mean of the means of those batches that have it, and the loss is weighted by rows. `rows` are taken
/// `batch_size` at a time and padded with the id `pad`. Returns the metrics by name, with the loss as `loss`: in each of `processes`, which
/// share the batches, the same.
///
/// # Errors
/// There are no rows, or the loss of a batch is undefined.
pub(super) fn metrics(
    passes: &Passes<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    processes: &dyn ProcessGroup,
) -> anyhow::Result<BTreeMap<String, f64>> {
    ensure!(!rows.is_empty(), "there are no rows to evaluate");
    let batches: Vec<&[Row]> = rows.chunks(batch_size.max(1)).collect();
    let mut own = Vec::new();
    for number in dealt(processes, batches.len()) {
        let references: Vec<&Row> = batches[number].iter().collect();
        let batch = passes.loss.batch(&references, pad)?;
        let outcome = passes.evaluate(&batch)?;
        let metrics = outcome.metrics.into_iter();
        own.push(Evaluated {
            number,
            loss: outcome.loss.to_bits(),
            metrics: metrics
                .map(|(name, value)| (name.to_owned(), value.to_bits()))
                .collect(),
        });
    }
    let mut all: Vec<Evaluated> = exchange(processes, own)?.into_iter().flatten().collect();
    all.sort_by_key(|one| one.number);
    let mut sums = BTreeMap::<String, (f64, usize)>::new();
    let mut loss = 0.;
    for one in all {
        loss += f64::from_bits(one.loss) * batches[one.number].len() as f64;
        for (name, value) in one.metrics {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + f64::from_bits(value), sum.1 + 1);
        }
    }
    let mut means: BTreeMap<_, _> = sums
        .into_iter()
        .map(|(name, (sum, batches))| (name, sum / batches as f64))
        .collect();
    means.insert("loss".into(), loss / rows.len() as f64);
    Ok(means)
}

/// The error of rows whose scores are not finite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFinite {
    /// The numbers of the rows, from 1.
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

/// Scores preference rows, `batch_size` at a time, padded with the id `pad`. Returns the metrics of the loss, and its value as `loss`, as if
/// all rows were one micro-batch; also `margin`, the mean difference between the mean log-probabilities of the preferred and the rejected
/// answer in nats, and `perplexity`, that of the preferred answers. `logits/*` are left out.
///
/// `report` is called with the number of finished rows, and may stop with an error.
///
/// # Errors
/// [`NotFinite`] with the rows of a batch in which a score is a NaN or infinite (a NaN would count as an answer that is not preferred), an
/// undefined loss, or the error of `report`.
pub fn preferences(
    passes: &Passes<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Metrics, RowScores)> {
    let make = |rows: &[&Row]| Ok(Batch::pairs(rows, pad)?);
    let (rows, all) = by_sequence(passes, rows, 2, batch_size, pass, &make, report)?;
    let count = rows.len();
    let batch = Batch::pairs(&rows, pad)?;
    let targets = passes.loss.targets(&batch);
    let (outcome, logps) = outcome(passes, &batch, &targets, &all)?;
    let mut metrics = outcome.metrics;
    let preferences = Preferences::new(&batch, &targets, &logps)?;
    let (chosen, _) = preferences.answers.split_at(count);
    let (sum, tokens) = chosen
        .iter()
        .fold((0f64, 0usize), |(sum, tokens), (logp, count)| {
            (sum - logp, tokens + count)
        });
    metrics.insert("loss", outcome.loss);
    metrics.insert("perplexity", (sum / tokens as f64).exp());
    metrics.insert("margin", preferences.margin());
    let scores = by_row(passes, &rows, &all, pad, &metrics)?;
    Ok((metrics, scores))
}

/// The scores of rows with `sides` sequences each, `batch_size` rows at a time; `make` makes a batch of some. Rows of similar length go together,
/// which leaves little padding and changes no metric. Returns the rows in that order, and the scores of their first sequences, then of their
/// second ones.
fn by_sequence<'r>(
    passes: &Passes<'_>,
    rows: &'r [Row],
    sides: usize,
    batch_size: usize,
    pass: Pass,
    make: &dyn Fn(&[&Row]) -> anyhow::Result<Batch>,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Vec<&'r Row>, Vec<BySequence>)> {
    ensure!(!rows.is_empty(), "there are no rows to evaluate");
    let mut sorted: Vec<(usize, &Row)> = rows.iter().enumerate().collect();
    sorted.sort_by_key(|(_, row)| {
        let rejected = row.rejected.as_ref().map_or(0, Vec::len);
        row.prompt.len() + row.chosen.len().max(rejected)
    });
    let count = rows.len();
    let mut all = vec![BySequence::default(); sides * count];
    let mut done = 0;
    for numbered in sorted.chunks(batch_size.max(1)) {
        let rows: Vec<&Row> = numbered.iter().map(|(_, row)| *row).collect();
        let batch = make(&rows)?;
        let targets = passes.loss.targets(&batch);
        let scores = passes.score(&batch, &targets, pass)?;
        let mut odd = BTreeSet::new();
        for (index, target) in targets.iter().enumerate() {
            let (side, row) = (target.row / rows.len(), target.row % rows.len());
            let logp = scores.logps[index];
            if !logp.is_finite() {
                odd.extend(numbered.get(row).map(|(number, _)| number + 1));
            }
            let sequence = &mut all[side * count + done + row];
            sequence.logps.push(logp);
            if let Some(reference) = &scores.reference {
                sequence.reference.push(reference[index]);
            }
            if let Some(stats) = &scores.token_stats {
                sequence.stats.push(stats[index]);
            }
        }
        if !odd.is_empty() {
            bail!(NotFinite {
                rows: odd.into_iter().collect()
            });
        }
        done += rows.len();
        report(done)?;
    }
    Ok((sorted.into_iter().map(|(_, row)| row).collect(), all))
}

/// The loss and metrics of a batch whose sequences were scored, and the log-probabilities of its targets.
fn outcome(
    passes: &Passes<'_>,
    batch: &Batch,
    targets: &[Target],
    sequences: &[BySequence],
) -> anyhow::Result<(Outcome, Vec<f64>)> {
    outcome_beside(passes, batch, targets, sequences, None)
}

/// The same for a loss that takes a mean of mismatched answers ([`Scored::mismatched`]).
fn outcome_beside(
    passes: &Passes<'_>,
    batch: &Batch,
    targets: &[Target],
    sequences: &[BySequence],
    mismatched: Option<f64>,
) -> anyhow::Result<(Outcome, Vec<f64>)> {
    let logps = joined(sequences, |sequence| &sequence.logps);
    let reference = joined(sequences, |sequence| &sequence.reference);
    let stats = joined(sequences, |sequence| &sequence.stats);
    let needs = passes.loss.needs();
    let outcome = passes.loss.loss(&Scored {
        batch,
        targets,
        logps: &logps,
        reference_logps: needs.reference.then_some(&reference[..]),
        token_stats: needs.token_stats.then_some(&stats[..]),
        target_logits: None,
        sequence_logits: None,
        mismatched,
    })?;
    Ok((outcome, logps))
}

/// The metrics of preference rows by row, for intervals: those that are means over the rows, or over the tokens that are scored of the
/// preferred sequences, and `perplexity`. `all` has the scores of the preferred sequences, then of the others.
fn by_row(
    passes: &Passes<'_>,
    rows: &[&Row],
    all: &[BySequence],
    pad: u32,
    metrics: &Metrics,
) -> anyhow::Result<RowScores> {
    let mut values: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    let mut tokens = Vec::with_capacity(rows.len());
    let mut perplexity = RowScore {
        numerators: Vec::with_capacity(rows.len()),
        denominators: Vec::with_capacity(rows.len()),
        exponential: true,
        minus: None,
    };
    let (chosen, rejected) = all.split_at(rows.len());
    for ((row, chosen), rejected) in rows.iter().zip(chosen).zip(rejected) {
        let batch = Batch::pairs(&[*row], pad)?;
        let targets = passes.loss.targets(&batch);
        let pair = [chosen.clone(), rejected.clone()];
        let (outcome, logps) = outcome(passes, &batch, &targets, &pair)?;
        let preferences = Preferences::new(&batch, &targets, &logps)?;
        for (name, value) in outcome.metrics {
            values.entry(name).or_default().push(value);
        }
        values
            .entry("margin")
            .or_default()
            .push(preferences.margin());
        tokens.push(targets.iter().filter(|target| target.row == 0).count() as f64);
        let (sum, count) = preferences.answers[0];
        perplexity.numerators.push(-sum);
        perplexity.denominators.push(count as f64);
    }
    let mut scores = with_spread(values, Some(&tokens), metrics);
    scores.insert("perplexity", perplexity);
    Ok(scores)
}

/// Of metrics by row, those that are the mean of the rows' values, or else with `tokens` the mean weighted by these, as `metrics` has them of
/// all rows: what is put together in another way has no interval.
fn with_spread(
    values: BTreeMap<&'static str, Vec<f64>>,
    tokens: Option<&[f64]>,
    metrics: &Metrics,
) -> RowScores {
    let mut scores = RowScores::new();
    for (name, values) in values {
        let Some(&whole) = metrics.get(name) else {
            continue;
        };
        let rows = values.len();
        let by_token = tokens.map(|tokens| RowScore {
            numerators: values.iter().zip(tokens).map(|(x, n)| x * n).collect(),
            denominators: tokens.to_vec(),
            ..RowScore::default()
        });
        let made_so = |score: &RowScore| {
            let value = score.value(0..rows);
            (value - whole).abs() <= 1e-6 * value.abs().max(whole.abs()) + 1e-12
        };
        let mut found = std::iter::once(RowScore::mean(values)).chain(by_token);
        scores.extend(found.find(made_so).map(|score| (name, score)));
    }
    scores
}

/// Scores preference rows with a reward model, `batch_size` at a time, padded with the id `pad`. Returns the metrics of the loss
/// ([`crate::ml::loss::reward::Reward`]), and its value as `loss`, as if all rows were one micro-batch, and those of them by row that are means.
///
/// `report` is called with the number of finished rows, and may stop with an error.
///
/// # Errors
/// [`NotFinite`] with the rows of a batch in which a score is a NaN or infinite, or the error of `report`.
pub fn rewards(
    passes: &Passes<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Metrics, RowScores)> {
    let make = |rows: &[&Row]| Ok(Batch::pairs(rows, pad)?);
    let (rows, all) = by_sequence(passes, rows, 2, batch_size, pass, &make, report)?;
    let batch = Batch::pairs(&rows, pad)?;
    let targets = passes.loss.targets(&batch);
    let (whole, _) = outcome(passes, &batch, &targets, &all)?;
    let mut metrics = whole.metrics;
    metrics.insert("loss", whole.loss);
    let mut values: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    let (chosen, rejected) = all.split_at(rows.len());
    for ((row, chosen), rejected) in rows.iter().zip(chosen).zip(rejected) {
        let batch = Batch::pairs(&[*row], pad)?;
        let targets = passes.loss.targets(&batch);
        let pair = [chosen.clone(), rejected.clone()];
        let (own, _) = outcome(passes, &batch, &targets, &pair)?;
        for (name, value) in own.metrics.into_iter().chain([("loss", own.loss)]) {
            values.entry(name).or_default().push(value);
        }
    }
    let scores = with_spread(values, None, &metrics);
    Ok((metrics, scores))
}

/// Scores labelled rows as TRL's `KTOTrainer` evaluates them: `batch_size` at a time in their order, each metric as the mean of the means of those
/// batches that have it, and the loss weighted by rows. `kl` is estimated in each batch, as in a training. Where no batch has both good and bad
/// answers, and so none a margin, `rewards/margins` is the difference of both means. The second value has the metrics by row, for intervals.
/// Batches are padded with the id `pad`.
///
/// `report` is called with the number of finished rows, and may stop with an error.
///
/// # Errors
/// [`NotFinite`] with the rows of a batch in which a score is a NaN or infinite, an undefined loss, or the error of `report`.
pub fn labelled(
    passes: &Passes<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Metrics, RowScores)> {
    ensure!(!rows.is_empty(), "there are no rows to evaluate");
    let mut sums = Sums::new(rows.len());
    let size = batch_size.max(1);
    for (first, rows) in (0..).step_by(size).zip(rows.chunks(size)) {
        let references: Vec<&Row> = rows.iter().collect();
        let batch = passes.loss.batch(&references, pad)?;
        let targets = passes.loss.targets(&batch);
        let mismatched = passes.mismatched_mean(&batch, pass)?;
        let scores = passes.score(&batch, &targets, pass)?;
        let mut sequences = vec![BySequence::default(); rows.len()];
        for (index, target) in targets.iter().enumerate() {
            let own = &mut sequences[target.row];
            own.logps.push(scores.logps[index]);
            let reference = scores.reference.as_ref();
            own.reference.extend(reference.map(|all| all[index]));
            let stats = scores.token_stats.as_ref();
            own.stats.extend(stats.map(|all| all[index]));
        }
        let odd = (0..rows.len()).filter(|&row| {
            let own = &sequences[row];
            let mut all = own.logps.iter().chain(&own.reference);
            !all.all(|logp| logp.is_finite())
        });
        let mut odd: Vec<usize> = odd.map(|row| first + row + 1).collect();
        if odd.is_empty() && mismatched.is_some_and(|mean| !mean.is_finite()) {
            odd = (first + 1..=first + rows.len()).collect();
        }
        if !odd.is_empty() {
            bail!(NotFinite { rows: odd });
        }
        let mut outcomes = Vec::with_capacity(rows.len());
        for (row, own) in rows.iter().zip(&sequences) {
            let batch = passes.loss.batch(&[row], pad)?;
            let targets = passes.loss.targets(&batch);
            let own = std::slice::from_ref(own);
            let (outcome, _) = outcome_beside(passes, &batch, &targets, own, mismatched)?;
            outcomes.push((outcome, targets.len() as f64));
        }
        sums.add(first, &outcomes);
        report(first + rows.len())?;
    }
    Ok(sums.end())
}

/// What the metrics of labelled rows are made of.
struct Sums {
    rows: usize,
    scores: RowScores,
}

impl Sums {
    fn new(rows: usize) -> Self {
        Self {
            rows,
            scores: RowScores::new(),
        }
    }

    /// Adds to the metric `name` a value with a weight of some rows of a batch, such that it weighs `all` in all.
    fn insert(&mut self, name: &'static str, values: &[(usize, f64, f64)], all: f64) {
        let score = self.scores.entry(name).or_default();
        add_weighted(score, self.rows, values, all);
    }

    /// Adds a batch whose first row is `first`: of each row the outcome by itself, and the number of its targets.
    fn add(&mut self, first: usize, outcomes: &[(Outcome, f64)]) {
        let of = |name: &str, by_tokens: bool| -> Vec<(usize, f64, f64)> {
            let all = (first..).zip(outcomes);
            let all = all.filter_map(|(row, (outcome, tokens))| {
                let value = outcome.metrics.get(name)?;
                Some((row, *value, if by_tokens { *tokens } else { 1. }))
            });
            all.collect()
        };
        let losses = (first..).zip(outcomes);
        let losses: Vec<_> = losses.map(|(row, (one, _))| (row, one.loss, 1.)).collect();
        self.insert("loss", &losses, outcomes.len() as f64);
        self.insert("entropy", &of("entropy", true), 1.);
        let single = [
            "kl",
            "rewards/chosen",
            "rewards/rejected",
            "logps/chosen",
            "logps/rejected",
        ];
        for name in single {
            self.insert(name, &of(name, false), 1.);
        }
        let (good, bad) = (of("rewards/chosen", false), of("rewards/rejected", false));
        if !good.is_empty() && !bad.is_empty() {
            let rows = self.rows;
            let margin = self.scores.entry("rewards/margins").or_default();
            add_weighted(margin, rows, &good, 1.);
            add_weighted(margin.minus.get_or_insert_default(), rows, &bad, 1.);
        }
    }

    fn end(self) -> (Metrics, RowScores) {
        let mut scores = self.scores;
        scores.retain(|_, score| score.denominators.iter().any(|weight| *weight > 0.));
        if !scores.contains_key("rewards/margins")
            && let Some(chosen) = scores.get("rewards/chosen").cloned()
            && let Some(rejected) = scores.get("rewards/rejected").cloned()
        {
            let minus = Some(Box::new(rejected));
            scores.insert("rewards/margins", RowScore { minus, ..chosen });
        }
        let metrics = scores.iter();
        let metrics = metrics.map(|(name, score)| (*name, score.value(0..self.rows)));
        (metrics.collect(), scores)
    }
}

/// Adds values with weights to some of a score's `rows` rows, such that they weigh `all` in all.
fn add_weighted(score: &mut RowScore, rows: usize, values: &[(usize, f64, f64)], all: f64) {
    score.numerators.resize(rows, 0.);
    score.denominators.resize(rows, 0.);
    let total: f64 = values.iter().map(|(_, _, weight)| weight).sum();
    for &(row, value, weight) in values {
        let weight = all * weight / total;
        score.numerators[row] += value * weight;
        score.denominators[row] += weight;
    }
}

/// Scores rows of one answer each, `batch_size` at a time, as if all rows were one micro-batch of the loss ([`crate::ml::loss::sft::Sft`]):
/// its metrics, and its value, the mean negative log-likelihood of all counted tokens in nats, as `loss`; beside them `perplexity`. The second
/// value has them by row, for intervals.
///
/// `report` is called with the number of rows done, and may stop with an error.
///
/// # Errors
/// A [`NotFinite`] with the rows of a batch where a score is NaN or infinite.
pub fn completions(
    passes: &Passes<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<(Metrics, RowScores)> {
    let make = |rows: &[&Row]| passes.loss.batch(rows, pad);
    let (rows, all) = by_sequence(passes, rows, 1, batch_size, pass, &make, report)?;
    let tokens: Vec<f64> = all.iter().map(|one| one.logps.len() as f64).collect();
    let by_token = |sums: Vec<f64>, exponential| RowScore {
        numerators: sums,
        denominators: tokens.clone(),
        exponential,
        minus: None,
    };
    let nll: Vec<f64> = all
        .iter()
        .map(|one| -one.logps.iter().sum::<f64>())
        .collect();
    let mut scores = RowScores::from([
        ("loss", by_token(nll.clone(), false)),
        ("perplexity", by_token(nll, true)),
    ]);
    if all.iter().all(|one| !one.stats.is_empty()) {
        let sums = |mean: fn(&[TokenStats]) -> f64| -> Vec<f64> {
            let pairs = all.iter().zip(&tokens);
            pairs
                .map(|(one, tokens)| mean(&one.stats) * tokens)
                .collect()
        };
        let entropy = by_token(sums(TokenStats::mean_entropy), false);
        let accuracy = by_token(sums(TokenStats::accuracy), false);
        scores.extend([("entropy", entropy), ("mean_token_accuracy", accuracy)]);
    }
    let metrics = scores
        .iter()
        .map(|(name, score)| (*name, score.value(0..rows.len())))
        .collect();
    Ok((metrics, scores))
}

/// The log-likelihood of each row's (preferred) answer after its prompt, in nats: the sum over its tokens, in f64. `batch_size` rows are
/// computed at a time, padded with the id `pad`; rows of similar length go together. The values are in the order of `rows`.
///
/// `report` is called with the number of finished rows, and may stop with an error.
///
/// # Errors
/// A row without an id, [`NotFinite`] with the rows of a batch whose value is a NaN or infinite, or the error of `report`.
pub fn log_likelihoods(
    execution: &Execution<'_>,
    rows: &[Row],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| rows[row].prompt.len() + rows[row].chosen.len());
    let mut sums = vec![0.; rows.len()];
    let mut done = 0;
    for numbers in order.chunks(batch_size.max(1)) {
        let sequences = numbers.iter().map(|&row| rows[row].chosen()).collect();
        let batch = Batch::new(sequences, pad)?;
        let targets = batch.answer_targets();
        let scores = in_pool(|| {
            let mut forward = execution.forward(&[&batch], pass, false)?;
            forward.score(&targets, false)
        })?;
        for (target, logp) in targets.iter().zip(&scores.logps) {
            sums[numbers[target.row]] += f64::from(*logp);
        }
        let odd = numbers.iter().filter(|&&row| !sums[row].is_finite());
        let odd: Vec<usize> = odd.map(|row| row + 1).collect();
        if !odd.is_empty() {
            bail!(NotFinite { rows: odd });
        }
        done += numbers.len();
        report(done)?;
    }
    Ok(sums)
}

/// The scores of one sequence, by its targets.
#[derive(Debug, Clone, Default)]
struct BySequence {
    logps: Vec<f64>,
    reference: Vec<f64>,
    stats: Vec<TokenStats>,
}

fn joined<T: Copy>(all: &[BySequence], part: impl Fn(&BySequence) -> &Vec<T>) -> Vec<T> {
    all.iter()
        .flat_map(|sequence| part(sequence).iter().copied())
        .collect()
}
