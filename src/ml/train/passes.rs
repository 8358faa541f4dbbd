//! Passes of micro-batches through the trained model and, for a loss that needs one, through a reference model.

use anyhow::{Context as _, ensure};

use super::process_group::{ProcessGroup, dealt};
use crate::ml::backend::{ForwardPass, WithBase};
use crate::ml::execution::Execution;
use crate::ml::loss::{Loss, Needs, Outcome, Scored};
use crate::ml::model::Gradients;
use crate::ml::model::batch::{Batch, ReferenceLogps, Row, Target};
use crate::ml::model::head::TokenStats;
use crate::ml::model::linear::Pass;
use crate::ml::threads::in_pool;

/// The source of the log-probabilities under the reference model.
#[derive(Debug, Clone, Copy)]
pub enum ReferenceModel<'a> {
    /// There is no reference model.
    None,
    /// The trained model without its adapter.
    Base,
    /// Another model, with its adapter if it has one, which is not trained.
    Frozen(&'a Execution<'a>),
    /// The rows have them ([`crate::ml::model::batch::Row::reference_logps`]).
    Rows,
}

/// The models and the loss of passes.
#[derive(Clone, Copy)]
pub struct Passes<'a> {
    /// The trained model, with its backend.
    pub execution: &'a Execution<'a>,
    /// The loss.
    pub loss: &'a dyn Loss,
    /// The reference model.
    pub reference: ReferenceModel<'a>,
}

/// The scores of a micro-batch's targets.
#[derive(Debug, Clone)]
pub(super) struct TargetScores {
    pub(super) logps: Vec<f64>,
    pub(super) reference: Option<Vec<f64>>,
    pub(super) token_stats: Option<Vec<TokenStats>>,
}

/// A micro-batch of a pass.
struct Part<'a> {
    batch: &'a Batch,
    targets: Vec<Target>,
    /// The index of its first sequence among those of the pass.
    first: usize,
}

/// The targets of several micro-batches, whose rows count the sequences of all of them.
struct Targets<'a> {
    parts: Vec<Part<'a>>,
    all: Vec<Target>,
}

/// A pass through the trained model, and the log-probabilities of its targets under the reference model, in nats, if the loss needs them.
type Compared<'a> = (Box<dyn ForwardPass + 'a>, Option<Vec<f64>>);

impl<'a> Targets<'a> {
    /// The tokens of all answers.
    fn of_answers(batches: &[&'a Batch]) -> Self {
        Self::of(batches, Batch::answer_targets)
    }

    fn new(loss: &dyn Loss, batches: &[&'a Batch]) -> anyhow::Result<Self> {
        let targets = Self::of(batches, |batch| loss.targets(batch));
        let parts = &mut targets.parts.iter();
        ensure!(
            parts.all(|part| !part.targets.is_empty()),
            "the batch has no token to learn"
        );
        Ok(targets)
    }

    fn of(batches: &[&'a Batch], targets: impl Fn(&Batch) -> Vec<Target>) -> Self {
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        let mut first = 0;
        for &batch in batches {
            let targets = targets(batch);
            all.extend(targets.iter().map(|target| Target {
                row: first + target.row,
                ..*target
            }));
            parts.push(Part {
                batch,
                targets,
                first,
            });
            first += batch.sequences.len();
        }
        Self { parts, all }
    }
}

impl Passes<'_> {
    /// Computes the loss of a micro-batch, without a gradient.
    ///
    /// # Errors
    /// The loss is undefined, or the pass fails.
    pub(in crate::ml) fn evaluate(&self, batch: &Batch) -> anyhow::Result<Outcome> {
        in_pool(|| {
            let targets = Targets::new(self.loss, &[batch])?;
            // This comes before the other pass, so that the buffers of both are never needed at the same time.
            let mismatched = self.mismatched(&[batch], Pass::INFER)?;
            let pass = self.smoothed(Pass::INFER);
            let (mut forward, reference) = self.forward(&[batch], pass, false, &targets)?;
            let outcomes =
                self.outcomes(&mut *forward, &targets, reference.as_deref(), &mismatched)?;
            outcomes.into_iter().next().context("no outcome")
        })
    }

    /// Computes the losses of several micro-batches in one pass, no more than [`Execution::pass_size`] says. Each has a scale: the gradient of
    /// its loss with respect to the parameters, multiplied by it, is added to `gradients`, unless a loss is not finite. `pass` has a tape; see
    /// [`Execution::forward`] for `checkpointing`.
    ///
    /// # Errors
    /// A loss is undefined, or the pass fails.
    pub(in crate::ml) fn differentiate(
        &self,
        batches: &[(&Batch, f64)],
        pass: Pass,
        checkpointing: bool,
        gradients: &mut Gradients,
    ) -> anyhow::Result<Vec<Outcome>> {
        in_pool(|| {
            let (batches, scales): (Vec<&Batch>, Vec<f64>) = batches.iter().copied().unzip();
            let targets = Targets::new(self.loss, &batches)?;
            // This comes before the other pass, so that the buffers of both are never needed at the same time.
            let mismatched = self.mismatched(&batches, Pass::INFER)?;
            let pass = self.smoothed(pass);
            let (mut forward, reference) = self.forward(&batches, pass, checkpointing, &targets)?;
            let outcomes =
                self.outcomes(&mut *forward, &targets, reference.as_deref(), &mismatched)?;
            if outcomes.iter().all(|outcome| outcome.loss.is_finite()) {
                let scaled = outcomes.iter().zip(scales).flat_map(|(outcome, scale)| {
                    let gradient = outcome.gradient.iter();
                    gradient.map(move |g| (f64::from(*g) * scale) as f32)
                });
                let scaled: Vec<f32> = scaled.collect();
                if self.loss.needs().scores {
                    forward.backward_scores(&targets.all, &scaled, gradients)?;
                } else {
                    forward.backward(&scaled, gradients)?;
                }
            }
            Ok(outcomes)
        })
    }

    /// Computes the log-probabilities of the rows' answers under the reference model, `batch_size` rows at a time, and stores them in the
    /// rows, for [`ReferenceModel::Rows`]. Rows that have those of their own answers keep them. The processes share the work, and all get all of
    /// it. `report` is called with the number of finished rows, and may stop with an error.
    ///
    /// # Errors
    /// A row lacks what the loss needs, the pass fails, or `report` returns an error.
    pub fn precompute_reference(
        &self,
        rows: &mut [Row],
        batch_size: usize,
        pad: u32,
        processes: &dyn ProcessGroup,
        report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut done = 0;
        let total = rows.len();
        let mut chunks: Vec<&mut [Row]> = rows.chunks_mut(batch_size.max(1)).collect();
        for number in dealt(processes, chunks.len()) {
            let rows = &mut *chunks[number];
            let references: Vec<&Row> = rows.iter().collect();
            let batch = self.loss.batch(&references, pad)?;
            let count = rows.len();
            if let Some(other) = batch.mismatched() {
                let targets = Targets::of_answers(&[other]);
                let logps = in_pool(|| self.reference_logps(&targets))?.unwrap_or_default();
                for (target, logp) in targets.all.iter().zip(logps) {
                    let known = rows[target.row].mismatched.as_mut();
                    let known = known.context("a row has no answer of another row")?;
                    let known = known.reference_logps.get_or_insert_default();
                    known.push(logp as f32);
                }
            }
            if rows.iter().any(|row| row.reference_logps.is_none()) {
                let targets = Targets::of_answers(&[&batch]);
                let logps = in_pool(|| self.reference_logps(&targets))?;
                let logps = logps.context("the loss needs no reference model")?;
                let mut known = vec![ReferenceLogps::default(); count];
                for (target, logp) in targets.all.iter().zip(logps) {
                    let known = &mut known[target.row % count];
                    if target.row < count {
                        known.chosen.push(logp as f32);
                    } else {
                        known.rejected.push(logp as f32);
                    }
                }
                for (row, known) in rows.iter_mut().zip(known) {
                    row.reference_logps = Some(known);
                }
            }
            done += count * processes.size();
            report(done.min(total))?;
        }
        share_reference(&mut chunks, processes)
    }

    /// A pass with the loss's label smoothing.
    fn smoothed(&self, pass: Pass) -> Pass {
        Pass {
            label_smoothing: self.loss.label_smoothing(),
            ..pass
        }
    }

    /// The scores of `targets` in a batch, with or without the adapter as `pass` says.
    pub(super) fn score(
        &self,
        batch: &Batch,
        targets: &[Target],
        pass: Pass,
    ) -> anyhow::Result<TargetScores> {
        in_pool(|| {
            let all = Targets::new(self.loss, &[batch])?;
            let needs = self.loss.needs();
            let is_reference = self.is_reference(pass);
            let (mut forward, mut reference) = if is_reference {
                (self.execution.forward(&[batch], pass, false)?, None)
            } else {
                self.forward(&[batch], pass, false, &all)?
            };
            let (logps, token_stats) = scores(&mut *forward, targets, needs)?;
            if is_reference && needs.reference {
                reference = Some(logps.clone());
            }
            Ok(TargetScores {
                logps,
                reference,
                token_stats,
            })
        })
    }

    /// The mean difference between the log-probabilities of a batch's mismatched answers, with or without the adapter as `pass` says, and those
    /// under the reference model, in nats; `None` if it has no such answers.
    pub(super) fn mismatched_mean(&self, batch: &Batch, pass: Pass) -> anyhow::Result<Option<f64>> {
        let mut means = in_pool(|| self.mismatched(&[batch], pass))?;
        Ok(means.pop().flatten())
    }

    /// Whether such a pass of the model is one of the reference model.
    fn is_reference(&self, pass: Pass) -> bool {
        pass == Pass::BASE && matches!(self.reference, ReferenceModel::Base)
    }

    /// The pass of these batches through the trained model, and the log-probabilities of `targets` under the reference model, in nats, if the
    /// loss needs them. Where the reference is the model without its adapter, both come from one pass over the weights.
    fn forward(
        &self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
        targets: &Targets<'_>,
    ) -> anyhow::Result<Compared<'_>> {
        let execution = self.execution;
        if self.loss.needs().reference
            && matches!(self.reference, ReferenceModel::Base)
            && let Some(both) = execution.forward_beside_base(batches, pass, checkpointing)?
        {
            let WithBase { adapted, mut base } = both;
            let logps = wide(&base.score(&targets.all, false)?.logps);
            return Ok((adapted, Some(logps)));
        }
        // This comes before the other pass, so that the buffers of both are never needed at the same time.
        let reference = self.reference_logps(targets)?;
        Ok((execution.forward(batches, pass, checkpointing)?, reference))
    }

    /// The log-probabilities of all targets under the reference model, in nats, if the loss needs them.
    fn reference_logps(&self, targets: &Targets<'_>) -> anyhow::Result<Option<Vec<f64>>> {
        if !self.loss.needs().reference {
            return Ok(None);
        }
        let (execution, pass) = match self.reference {
            ReferenceModel::Base => (self.execution, Pass::BASE),
            ReferenceModel::Frozen(execution) => (execution, Pass::INFER),
            ReferenceModel::Rows => {
                let parts = targets.parts.iter();
                let known = parts.map(|part| part.batch.reference_logps(&part.targets));
                let known: Option<Vec<Vec<f64>>> = known.collect();
                let known = known.context("rows lack log-probabilities by the reference model")?;
                return Ok(Some(known.concat()));
            }
            ReferenceModel::None => anyhow::bail!("the loss needs a reference model"),
        };
        Ok(Some(logps(execution, pass, targets)?))
    }

    /// The log-probabilities of all targets by the trained model, with or without its adapter as `pass` says, and under the reference model, in nats, in as many passes as it takes. Where the
    /// reference is the model without its adapter, both come from the same passes over the weights.
    fn both_logps(
        &self,
        targets: &Targets<'_>,
        pass: Pass,
    ) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
        let execution = self.execution;
        if self.is_reference(pass) {
            let both = logps(execution, pass, targets)?;
            return Ok((both.clone(), both));
        }
        let is_base = matches!(self.reference, ReferenceModel::Base);
        let (mut policy, mut reference) = (Vec::new(), Vec::new());
        by_passes(execution, pass, targets, |batches, own| {
            if is_base && let Some(both) = execution.forward_beside_base(batches, pass, false)? {
                let WithBase {
                    mut adapted,
                    mut base,
                } = both;
                reference.extend(wide(&base.score(own, false)?.logps));
                policy.extend(wide(&adapted.score(own, false)?.logps));
            } else {
                let mut forward = execution.forward(batches, pass, false)?;
                policy.extend(wide(&forward.score(own, false)?.logps));
            }
            Ok(())
        })?;
        // A backend goes beside the base in all passes or in none.
        if reference.is_empty() {
            let found = self.reference_logps(targets)?;
            reference = found.context("the loss needs no reference model")?;
        }
        Ok((policy, reference))
    }

    /// For each batch that has sequences with the answers of other rows, the mean over these of the difference between an answer's
    /// log-probability and that under the reference model.
    fn mismatched(&self, batches: &[&Batch], pass: Pass) -> anyhow::Result<Vec<Option<f64>>> {
        let others: Vec<&Batch> = batches
            .iter()
            .filter_map(|batch| batch.mismatched())
            .collect();
        if others.is_empty() {
            return Ok(vec![None; batches.len()]);
        }
        let targets = Targets::of_answers(&others);
        let (policy, reference) = self.both_logps(&targets, pass)?;
        let mut ratios = policy.iter().zip(&reference).map(|(p, r)| p - r);
        let mut means = targets.parts.iter().map(|part| {
            let sum: f64 = ratios.by_ref().take(part.targets.len()).sum();
            sum / part.batch.sequences.len() as f64
        });
        let means = batches
            .iter()
            .map(|batch| batch.mismatched().and_then(|_| means.next()));
        Ok(means.collect())
    }

    /// The outcome of the loss for each micro-batch of a pass.
    fn outcomes(
        &self,
        forward: &mut dyn ForwardPass,
        targets: &Targets<'_>,
        reference: Option<&[f64]>,
        mismatched: &[Option<f64>],
    ) -> anyhow::Result<Vec<Outcome>> {
        let needs = self.loss.needs();
        let (logps, token_stats) = scores(forward, &targets.all, needs)?;
        let logits = if needs.target_logits {
            Some(forward.target_mean_logits(&targets.all)?)
        } else {
            None
        };
        let mut start = 0;
        let mut outcomes = Vec::with_capacity(targets.parts.len());
        for (part, mismatched) in targets.parts.iter().zip(mismatched) {
            let span = start..start + part.targets.len();
            start = span.end;
            let sequence_logits = if let Some(positions) = needs.sequence_logits {
                let half = part.batch.sequences.len() / 2;
                Some([
                    forward.mean_logit(part.first, half, positions)?,
                    forward.mean_logit(part.first + half, half, positions)?,
                ])
            } else {
                None
            };
            outcomes.push(self.loss.loss(&Scored {
                batch: part.batch,
                targets: &part.targets,
                logps: &logps[span.clone()],
                reference_logps: reference.map(|all| &all[span.clone()]),
                token_stats: token_stats.as_ref().map(|all| &all[span.clone()]),
                target_logits: logits.as_ref().map(|all| &all[span.clone()]),
                sequence_logits,
                mismatched: *mismatched,
            })?);
        }
        Ok(outcomes)
    }
}

/// The log-probabilities of targets, or their scores, and the statistics that a loss needs.
fn scores(
    forward: &mut dyn ForwardPass,
    targets: &[Target],
    needs: Needs,
) -> anyhow::Result<(Vec<f64>, Option<Vec<TokenStats>>)> {
    if needs.scores {
        // The mean over the one row of the head.
        return Ok((forward.target_mean_logits(targets)?, None));
    }
    let scores = forward.score(targets, needs.token_stats)?;
    Ok((wide(&scores.logps), scores.token_stats))
}

/// Gives each process the log-probabilities under the reference model that the others computed, of the chunks of rows that they were dealt.
fn share_reference(chunks: &mut [&mut [Row]], processes: &dyn ProcessGroup) -> anyhow::Result<()> {
    if processes.size() == 1 {
        return Ok(());
    }
    let mut own = Vec::new();
    for number in dealt(processes, chunks.len()) {
        for row in &*chunks[number] {
            let answers = row.reference_logps.as_ref();
            let answers = answers.map(|known| [&known.chosen[..], &known.rejected[..]]);
            let answers = answers.context("a row has no log-probabilities")?;
            let mismatched = row.mismatched.as_ref();
            let mismatched = mismatched.map(|m| m.reference_logps.as_deref().unwrap_or_default());
            for logps in answers.into_iter().chain(mismatched) {
                own.extend((logps.len() as u64).to_le_bytes());
                own.extend(logps.iter().flat_map(|logp| logp.to_le_bytes()));
            }
        }
    }
    let all = processes.gather(&own);
    let mut all: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    for (number, rows) in chunks.iter_mut().enumerate() {
        let from = &mut all[number % processes.size()];
        for row in rows.iter_mut() {
            row.reference_logps = Some(ReferenceLogps {
                chosen: received(from)?,
                rejected: received(from)?,
            });
            if let Some(mismatched) = &mut row.mismatched {
                mismatched.reference_logps = Some(received(from)?);
            }
        }
    }
    Ok(())
}

/// Takes the next values off what a process sent.
fn received(from: &mut &[u8]) -> anyhow::Result<Vec<f32>> {
    let mut take = |count: usize| {
        let (taken, rest) = from.split_at_checked(count)?;
        *from = rest;
        Some(taken)
    };
    let values = take(8).and_then(|bytes| {
        let count = u64::from_le_bytes(bytes.try_into().ok()?);
        take(usize::try_from(count).ok()?.checked_mul(4)?)
    });
    let values = values.context("another process has other rows")?;
    let values = values.chunks_exact(4);
    Ok(values
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect())
}

/// The log-probabilities of all targets by this model, in nats, in as many passes as it takes.
fn logps(execution: &Execution<'_>, pass: Pass, targets: &Targets<'_>) -> anyhow::Result<Vec<f64>> {
    let mut all = Vec::with_capacity(targets.all.len());
    by_passes(execution, pass, targets, |batches, own| {
        let mut forward = execution.forward(batches, pass, false)?;
        all.extend(wide(&forward.score(own, false)?.logps));
        Ok(())
    })?;
    Ok(all)
}

/// Calls `run` for as many micro-batches at a time as are best run in one pass, with these and their targets, whose rows count the sequences of
/// the pass.
fn by_passes(
    execution: &Execution<'_>,
    pass: Pass,
    targets: &Targets<'_>,
    mut run: impl FnMut(&[&Batch], &[Target]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut rest = &targets.parts[..];
    while !rest.is_empty() {
        let batches: Vec<&Batch> = rest.iter().map(|part| part.batch).collect();
        let size = execution.pass_size(&batches, pass, false).micro_batches;
        let (now, later) = rest.split_at(size.clamp(1, rest.len()));
        let first = now.first().map_or(0, |part| part.first);
        let own = now.iter().flat_map(|part| {
            part.targets.iter().map(|target| Target {
                row: part.first - first + target.row,
                ..*target
            })
        });
        let own: Vec<Target> = own.collect();
        run(&batches[..now.len()], &own)?;
        rest = later;
    }
    Ok(())
}

fn wide(logps: &[f32]) -> Vec<f64> {
    logps.iter().map(|&logp| f64::from(logp)).collect()
}
