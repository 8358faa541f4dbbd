//! The forward and backward passes of a step's micro-batches, by all processes of the training.
//!
//! Each process computes the micro-batches that it is dealt. What they gave is then put together in each process as if it had computed all
//! of them one after the other; only the gradients are added process by process.

use anyhow::Context as _;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::log::{Step, Window};
use super::process_group::{dealt, exchange, sum_gradients};
use super::sampler::Group;
use super::{Accumulated, Report, Trainer, dropout_seed};
use crate::ml::model::Gradients;
use crate::ml::model::batch::{Batch, Row};
use crate::ml::model::linear::{DropoutSeed, EmbeddingNoise, Pass};

/// What a micro-batch gave. Floats travel as their bits.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Done {
    /// The number of the micro-batch in the step.
    number: usize,
    loss: u64,
    metrics: Vec<(String, u64)>,
    tokens: usize,
    computed: usize,
}

/// What a process did of a step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Share {
    done: Vec<Done>,
    /// Whether it was told to stop.
    stops: bool,
    /// For each parameter, whether there is a gradient.
    has: Vec<bool>,
}

impl Trainer<'_> {
    /// The forward and backward passes of a step's micro-batches, as many of them in one pass as fit. `None` if the callback of a process
    /// stops the training in between.
    pub(super) fn accumulate(
        &mut self,
        group: &Group,
        report: &mut Report<'_>,
    ) -> anyhow::Result<Option<Accumulated>> {
        let job = self.job;
        let rows = group.micro_batches.iter().map(|indices| {
            let rows = indices.iter().filter_map(|&index| job.rows.get(index));
            rows.collect::<Vec<&Row>>()
        });
        let batches = rows.map(|rows| job.loss.batch(&rows, job.pad));
        let batches = batches.collect::<anyhow::Result<Vec<Batch>>>()?;
        let weights = batches
            .iter()
            .map(|batch| job.loss.weight(job.loss.targets(batch).len()));
        let weights: Vec<f64> = weights.collect();
        let all: f64 = weights.iter().sum();
        let parts: Vec<f64> = weights.iter().map(|weight| weight / all).collect();

        let mut gradients = Gradients::none(self.model);
        let own = self.compute(group, &batches, &parts, &mut gradients, report)?;
        let (rank, shares) = (self.processes.rank(), exchange(self.processes, own)?);
        if shares.iter().any(|share| share.stops) {
            return Ok(None);
        }
        let mut accumulated = Accumulated {
            loss: 0.,
            gradients,
            metrics: Window::default(),
            tokens: 0,
            by_others: (0, 0),
            fault: None,
        };
        for (_, share) in shares.iter().enumerate().filter(|(of, _)| *of != rank) {
            for done in &share.done {
                accumulated.by_others.0 += done.tokens;
                accumulated.by_others.1 += done.computed;
            }
        }
        let mut done: Vec<&Done> = shares.iter().flat_map(|share| &share.done).collect();
        done.sort_by_key(|done| done.number);
        for done in done {
            let loss = f64::from_bits(done.loss);
            accumulated.loss += parts[done.number] * loss;
            for (name, value) in &done.metrics {
                accumulated.metrics.add(name, f64::from_bits(*value));
            }
            if !loss.is_finite() {
                let rows = &group.micro_batches[done.number];
                accumulated.fault = Some(self.fault("loss", loss, rows)?);
                return Ok(Some(accumulated));
            }
            accumulated.tokens += done.tokens;
        }
        let has: Vec<Vec<bool>> = shares.into_iter().map(|share| share.has).collect();
        let parameters = self.model.parameters.iter();
        let parameters: Vec<Tensor> = parameters.map(|p| p.var.as_detached_tensor()).collect();
        sum_gradients(
            self.processes,
            &parameters,
            &mut accumulated.gradients.0,
            &has,
        )?;
        Ok(Some(accumulated))
    }

    /// The passes of this process's micro-batches, until one has a loss that is not finite or the callback stops them. `parts` says for each
    /// micro-batch how much of the step's loss it is; the gradients of these parts are added to `gradients`.
    fn compute(
        &self,
        group: &Group,
        batches: &[Batch],
        parts: &[f64],
        gradients: &mut Gradients,
        report: &mut Report<'_>,
    ) -> anyhow::Result<Share> {
        let (job, settings) = (self.job, self.settings);
        let passes = job.passes();
        let numbers: Vec<usize> = dealt(self.processes, batches.len()).collect();
        let mut share = Share::default();
        'passes: while let Some(rest) = numbers.get(share.done.len()..)
            && let Some(first) = rest.first()
        {
            let seed = DropoutSeed {
                seed: dropout_seed(settings.seed, self.state.step),
                batch: *first,
            };
            let noise = settings.neftune_noise_alpha;
            let pass = Pass {
                noise: noise.map(|alpha| EmbeddingNoise { alpha, seed }),
                stride: self.processes.size(),
                ..Pass::train(settings.dropout.then_some(seed))
            };
            let left: Vec<&Batch> = rest.iter().map(|&number| &batches[number]).collect();
            let size = job.execution.pass_size(&left, pass, settings.checkpointing);
            let now = &rest[..size.micro_batches.clamp(1, rest.len())];
            let scaled = now
                .iter()
                .map(|&number| (&batches[number], parts[number] * self.state.scaler.scale));
            let outcomes = passes
                .differentiate(
                    &scaled.collect::<Vec<_>>(),
                    pass,
                    settings.checkpointing,
                    gradients,
                )
                .with_context(|| {
                    let (step, split) = (self.state.step + 1, &job.origin.split);
                    let rows = now.iter().map(|&number| &group.micro_batches[number][..]);
                    let rows = self.search.rows(&rows.collect::<Vec<_>>().concat());
                    format!("step {step}, rows {rows:?} of `{split}`")
                })?;
            for (index, (&number, outcome)) in now.iter().zip(outcomes).enumerate() {
                let metrics = outcome.metrics.iter();
                let tokens = batches[number].tokens();
                let computed = if index == 0 { size.tokens } else { 0 };
                share.done.push(Done {
                    number,
                    loss: outcome.loss.to_bits(),
                    metrics: metrics
                        .map(|(name, value)| ((*name).to_owned(), value.to_bits()))
                        .collect(),
                    tokens,
                    computed,
                });
                if !outcome.loss.is_finite() {
                    break 'passes;
                }
                let step = Step {
                    micro_batches: share.done.len(),
                    tokens,
                    computed,
                    ..self.step()
                };
                if report(&step).is_break() {
                    share.stops = true;
                    break 'passes;
                }
            }
        }
        share.has = gradients.0.iter().map(Option::is_some).collect();
        Ok(share)
    }
}
