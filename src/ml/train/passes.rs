//! Passes of micro-batches through the trained model and, for a loss that needs one, through a reference model.

use anyhow::{Context as _, ensure};

use crate::ml::backend::{ForwardPass, WithBase};
use crate::ml::execution::Execution;
use crate::ml::loss::{Loss, Outcome, Scored};
use crate::ml::model::Gradients;
use crate::ml::model::batch::{Batch, ReferenceLogps, Row, Target};
use crate::ml::model::head::TokenStats;
use crate::ml::model::linear::{DropoutSeed, Pass};
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

impl<'a> Targets<'a> {
    fn new(loss: &dyn Loss, batches: &[&'a Batch]) -> anyhow::Result<Self> {
        let (mut parts, mut all) = (Vec::new(), Vec::new());
        let mut first = 0;
        for &batch in batches {
            let targets = loss.targets(batch);
            ensure!(!targets.is_empty(), "the batch has no token to learn");
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
        Ok(Self { parts, all })
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
            let (mut forward, reference) = self.forward(&[batch], Pass::INFER, false, &targets)?;
            let outcomes = self.outcomes(&mut *forward, &targets, reference.as_deref())?;
            outcomes.into_iter().next().context("no outcome")
        })
    }

    /// Computes the losses of several micro-batches in one pass, no more than [`Execution::pass_size`] says. Each has a scale: the gradient of
    /// its loss with respect to the parameters, multiplied by it, is added to `gradients`, unless a loss is not finite. See
    /// [`Execution::forward`] for `checkpointing`.
    ///
    /// # Errors
    /// A loss is undefined, or the pass fails.
    pub(in crate::ml) fn differentiate(
        &self,
        batches: &[(&Batch, f64)],
        dropout: Option<DropoutSeed>,
        checkpointing: bool,
        gradients: &mut Gradients,
    ) -> anyhow::Result<Vec<Outcome>> {
        let pass = Pass::train(dropout);
        in_pool(|| {
            let (batches, scales): (Vec<&Batch>, Vec<f64>) = batches.iter().copied().unzip();
            let targets = Targets::new(self.loss, &batches)?;
            let (mut forward, reference) = self.forward(&batches, pass, checkpointing, &targets)?;
            let outcomes = self.outcomes(&mut *forward, &targets, reference.as_deref())?;
            if outcomes.iter().all(|outcome| outcome.loss.is_finite()) {
                let scaled = outcomes.iter().zip(scales).flat_map(|(outcome, scale)| {
                    let gradient = outcome.gradient.iter();
                    gradient.map(move |g| (f64::from(*g) * scale) as f32)
                });
                forward.backward(&scaled.collect::<Vec<f32>>(), gradients)?;
            }
            Ok(outcomes)
        })
    }

    /// Computes the log-probabilities of the rows' answers under the reference model, `batch_size` rows at a time, and stores them in the
    /// rows, for [`ReferenceModel::Rows`]. `report` is called with the number of finished rows, and may stop with an error.
    ///
    /// # Errors
    /// A row is not a pair, the pass fails, or `report` returns an error.
    pub fn precompute_reference(
        &self,
        rows: &mut [Row],
        batch_size: usize,
        pad: u32,
        report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut done = 0;
        for rows in rows.chunks_mut(batch_size.max(1)) {
            let pairs: Vec<&Row> = rows.iter().collect();
            let batch = Batch::pairs(&pairs, pad)?;
            let answers = batch.answer_targets();
            let targets = Targets {
                parts: vec![Part {
                    batch: &batch,
                    targets: answers.clone(),
                    first: 0,
                }],
                all: answers,
            };
            let logps = in_pool(|| self.reference_logps(&targets))?;
            let logps = logps.context("the loss needs no reference model")?;
            let count = rows.len();
            for row in rows.iter_mut() {
                row.reference_logps = Some(ReferenceLogps::default());
            }
            for (target, logp) in targets.all.iter().zip(logps) {
                let known = rows[target.row % count].reference_logps.as_mut();
                let known = known.context("a row has no place for them")?;
                if target.row < count {
                    known.chosen.push(logp as f32);
                } else {
                    known.rejected.push(logp as f32);
                }
            }
            done += count;
            report(done)?;
        }
        Ok(())
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
            let reference = self.reference_logps(&all)?;
            let needs = self.loss.needs();
            let mut forward = self.execution.forward(&[batch], pass, false)?;
            let scores = forward.score(targets, needs.token_stats)?;
            Ok(TargetScores {
                logps: wide(&scores.logps),
                reference,
                token_stats: scores.token_stats,
            })
        })
    }

    /// The pass of these batches through the trained model, and the log-probabilities of `targets` under the reference model, in nats, if the
    /// loss needs them. Where the reference is the model without its adapter, both come from one pass over the weights.
    fn forward(
        &self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
        targets: &Targets<'_>,
    ) -> anyhow::Result<(Box<dyn ForwardPass + '_>, Option<Vec<f64>>)> {
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
        let mut all = Vec::with_capacity(targets.all.len());
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
            let mut forward = execution.forward(&batches[..now.len()], pass, false)?;
            all.extend(wide(&forward.score(&own, false)?.logps));
            rest = later;
        }
        Ok(Some(all))
    }

    /// The outcome of the loss for each micro-batch of a pass.
    fn outcomes(
        &self,
        forward: &mut dyn ForwardPass,
        targets: &Targets<'_>,
        reference: Option<&[f64]>,
    ) -> anyhow::Result<Vec<Outcome>> {
        let needs = self.loss.needs();
        let scores = forward.score(&targets.all, needs.token_stats)?;
        let logps = wide(&scores.logps);
        let logits = if needs.target_logits {
            Some(forward.target_mean_logits(&targets.all)?)
        } else {
            None
        };
        let mut start = 0;
        let mut outcomes = Vec::with_capacity(targets.parts.len());
        for part in &targets.parts {
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
                token_stats: scores.token_stats.as_ref().map(|all| &all[span.clone()]),
                target_logits: logits.as_ref().map(|all| &all[span.clone()]),
                sequence_logits,
            })?);
        }
        Ok(outcomes)
    }
}

fn wide(logps: &[f32]) -> Vec<f64> {
    logps.iter().map(|&logp| f64::from(logp)).collect()
}
