//! The training loop, from top to bottom.
//!
//! It knows no YAML, no store and no clock: it tells what it does by a callback, which may also stop it. With a folder for
//! checkpoints, a stopped or killed training goes on where it was and ends with the same bits.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;

use super::batch::Row;
use super::checkpoint::{self, State};
use super::evaluate;
use super::linear::mix;
use super::model::{Gradients, Llama};
use super::objective::Objective;
use super::optim::{self, Optimizer};
use super::sampler::{self, Sampling};
use super::schedule::{Schedule, Shape};

/// The settings of a training, by transformers' names.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What is minimised.
    pub objective: Objective,
    /// The id that fills batches up.
    pub pad: u32,
    /// Rows in a micro-batch.
    pub batch_size: usize,
    /// Rows in a batch of the evaluation.
    pub eval_batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// How often all rows are seen.
    pub epochs: f64,
    /// The number of steps, instead of `epochs`.
    pub max_steps: Option<u64>,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it changes.
    pub shape: Shape,
    /// Steps of warm-up; below 1, a share of all steps.
    pub warmup: f64,
    /// The optimiser.
    pub optimizer: optim::Settings,
    /// The largest norm of the gradient; 0 for no limit.
    pub max_grad_norm: f64,
    /// Whether layers are computed again in the backward.
    pub checkpointing: bool,
    /// Whether losses are scaled for f16 gradients.
    pub scaler: bool,
    /// Whether the adapter's dropout is at work.
    pub dropout: bool,
    /// The seed of everything random but the order.
    pub seed: u64,
    /// The seed of the order.
    pub data_seed: u64,
    /// The order.
    pub sampling: Sampling,
    /// Steps between evaluations; none for no evaluation.
    pub eval_every: Option<Every>,
    /// Steps between the logs that the callback gets.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// How many checkpoints are kept.
    pub keep: usize,
}

/// How often something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// After so many steps.
    Steps(u64),
    /// After each epoch.
    Epoch,
}

/// Numbers at a step, by TRL's names.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// Finished steps.
    pub step: u64,
    /// Epochs seen, with fraction.
    pub epoch: f64,
    /// The numbers.
    pub values: BTreeMap<String, f64>,
}

impl Log {
    /// One line of JSON, with the numbers to the last digit.
    pub fn line(&self) -> String {
        let mut line = format!("{{\"step\":{},\"epoch\":{:?}", self.step, self.epoch);
        for (name, value) in &self.values {
            line.push_str(",\"");
            line.push_str(name);
            line.push_str("\":");
            if value.is_finite() {
                line.push_str(&value.to_string());
            } else {
                line.push_str("null");
            }
        }
        line.push('}');
        line
    }
}

/// What the callback is told: after each micro-batch, and with logs after a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Finished steps.
    pub step: u64,
    /// All steps.
    pub total: u64,
    /// Finished micro-batches of the step in progress; 0 after a step.
    pub micro_batches: usize,
    /// Tokens of this micro-batch, without padding.
    pub tokens: usize,
    /// What is to be logged.
    pub logs: Vec<Log>,
}

/// How a training ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All steps are done; one line of JSON for each step and each evaluation.
    Finished {
        /// The lines.
        history: Vec<String>,
    },
    /// The callback stopped it after so many steps; a checkpoint was written if there is a folder for it.
    Interrupted {
        /// Finished steps.
        step: u64,
    },
}

/// A dynamic loss scale: halved on overflow, doubled after 2000 good steps (torch's `GradScaler`).
const FIRST_SCALE: f64 = 65_536.;
const GOOD_STEPS: u64 = 2_000;

/// Sums of numbers that are logged as means.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Window {
    /// By name: sum and count.
    pub(super) sums: BTreeMap<String, (f64, u64)>,
}

impl Window {
    fn add(&mut self, name: &str, value: f64) {
        let sum = self.sums.entry(name.to_owned()).or_default();
        *sum = (sum.0 + value, sum.1 + 1);
    }

    fn merge(&mut self, other: &Self) {
        for (name, (sum, count)) in &other.sums {
            let own = self.sums.entry(name.clone()).or_default();
            *own = (own.0 + sum, own.1 + count);
        }
    }

    fn means(&self) -> BTreeMap<String, f64> {
        let means = self.sums.iter();
        means
            .map(|(name, (sum, count))| (name.clone(), sum / *count as f64))
            .collect()
    }
}

/// How the rows fall into steps.
#[derive(Debug, Clone, Copy)]
struct Plan {
    rows: usize,
    batch: usize,
    group: usize,
}

impl Plan {
    fn micro_batches(self) -> usize {
        self.rows.div_ceil(self.batch)
    }

    /// The last group of an epoch may be smaller, and is a step all the same.
    fn steps(self) -> u64 {
        self.micro_batches().div_ceil(self.group) as u64
    }
}

impl Settings {
    fn plan(&self, rows: usize) -> Plan {
        Plan {
            rows,
            batch: self.batch_size.max(1),
            group: self.accumulation.max(1),
        }
    }

    /// The number of steps for so many rows.
    pub fn total_steps(&self, rows: usize) -> u64 {
        let steps = self.plan(rows).steps() as f64 * self.epochs;
        self.max_steps.unwrap_or(steps.ceil() as u64)
    }

    fn schedule(&self, total: u64) -> Schedule {
        let warmup = if self.warmup < 1. {
            (total as f64 * self.warmup).ceil()
        } else {
            self.warmup
        };
        Schedule {
            shape: self.shape,
            warmup: warmup as u64,
            total,
        }
    }
}

/// Trains `model` on `rows`, and evaluates on `eval_rows` if the settings say when.
pub fn train(
    model: &Llama,
    rows: &[Row],
    eval_rows: &[Row],
    settings: &Settings,
    scratch: Option<&Path>,
    tell: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> anyhow::Result<Ending> {
    ensure!(!rows.is_empty(), "there are no rows to train on");
    let plan = settings.plan(rows.len());
    let total = settings.total_steps(rows.len());
    let schedule = settings.schedule(total);
    let per_epoch = plan.steps();
    let mut optimizer = Optimizer::new(settings.optimizer, &model.parameters);
    let mut state = State {
        scale: if settings.scaler { FIRST_SCALE } else { 1. },
        ..State::default()
    };
    if let Some(scratch) = scratch
        && let Some(found) = checkpoint::resume(scratch, model, &mut optimizer)?
    {
        state = found;
    }

    while state.step < total {
        let epoch = state.step / per_epoch;
        let order = sampler::order(settings.sampling, rows.len(), settings.data_seed, epoch);
        let micro_batches: Vec<&[usize]> = order.chunks(plan.batch).collect();
        let first = (state.step % per_epoch) as usize * plan.group;
        for (number, group) in micro_batches.chunks(plan.group).enumerate() {
            if number * plan.group < first {
                continue; // done before the interruption
            }
            if state.step >= total {
                break;
            }

            // Forward and backward of each micro-batch.
            let mut gradients = Gradients::none(model);
            let mut window = Window::default();
            let batches = group.iter().map(|places| {
                let rows: Vec<&Row> = places.iter().filter_map(|&place| rows.get(place)).collect();
                settings.objective.batch(&rows, settings.pad)
            });
            let batches = batches.collect::<anyhow::Result<Vec<_>>>()?;
            let weight = |batch| {
                settings
                    .objective
                    .weight(&settings.objective.targets(batch))
            };
            let weights: f64 = batches.iter().map(weight).sum();
            let mut loss = 0.;
            for (micro, (batch, places)) in batches.iter().zip(group).enumerate() {
                let share = weight(batch) / weights;
                let dropout = settings
                    .dropout
                    .then(|| dropout_seed(settings.seed, state.step, micro));
                let outcome = settings
                    .objective
                    .differentiate(
                        model,
                        batch,
                        share * state.scale,
                        dropout,
                        settings.checkpointing,
                        &mut gradients,
                    )
                    .with_context(|| {
                        format!("step {}, rows {places:?} of `train`", state.step + 1)
                    })?;
                if !outcome.loss.is_finite() {
                    bail!(
                        "the loss became {} in step {} (rows {places:?}); try a lower learning_rate, or f32 instead of fp16",
                        outcome.loss,
                        state.step + 1,
                    );
                }
                loss += share * outcome.loss;
                for (name, value) in &outcome.metrics {
                    window.add(name, *value);
                }
                let told = Step {
                    step: state.step,
                    total,
                    micro_batches: micro + 1,
                    tokens: batch.tokens(),
                    logs: Vec::new(),
                };
                if tell(&told).is_break() {
                    return interrupted(scratch, model, &optimizer, &state, settings);
                }
            }

            // One step: unscale, clip, update.
            optim::scale(&mut gradients.0, 1. / state.scale)?;
            let norm = optim::clip(&mut gradients.0, settings.max_grad_norm)?;
            let rate = settings.learning_rate * schedule.factor(state.scheduled);
            if norm.is_finite() {
                optimizer.step(&model.parameters, &gradients.0, rate)?;
                state.scheduled += 1;
                state.good += 1;
                if settings.scaler && state.good == GOOD_STEPS {
                    (state.scale, state.good) = (state.scale * 2., 0);
                }
            } else if settings.scaler {
                (state.scale, state.good) = (state.scale / 2., 0);
            } else {
                bail!(
                    "the gradient's norm became {norm} in step {}",
                    state.step + 1
                );
            }
            state.step += 1;

            // Logs: every step for the record, a mean over some for the reader.
            window.add("loss", loss);
            state.window.merge(&window);
            let seen = (number * plan.group + group.len()) as f64;
            let epoch = epoch as f64 + seen / plan.micro_batches() as f64;
            let log = |window: &Window| {
                let mut values = window.means();
                values.insert("grad_norm".into(), norm);
                values.insert("learning_rate".into(), rate);
                Log {
                    step: state.step,
                    epoch,
                    values,
                }
            };
            let mut logs = Vec::new();
            let line = log(&window).line();
            if state.step.is_multiple_of(settings.log_every.max(1)) || state.step == total {
                logs.push(log(&state.window));
                state.window = Window::default();
            }
            state.history.push(line);
            let epoch_ends = number + 1 == per_epoch as usize;
            let due = match settings.eval_every {
                Some(Every::Steps(steps)) => state.step.is_multiple_of(steps.max(1)),
                Some(Every::Epoch) => epoch_ends,
                None => false,
            };
            if due && !eval_rows.is_empty() {
                let values = evaluate::metrics(model, eval_rows, settings)?;
                let values = values
                    .into_iter()
                    .map(|(name, value)| (format!("eval_{name}"), value));
                let log = Log {
                    step: state.step,
                    epoch,
                    values: values.collect(),
                };
                state.history.push(log.line());
                logs.push(log);
            }

            let told = Step {
                step: state.step,
                total,
                micro_batches: 0,
                tokens: 0,
                logs,
            };
            if tell(&told).is_break() {
                return interrupted(scratch, model, &optimizer, &state, settings);
            }
            if let Some(scratch) = scratch
                && state.step < total
                && state.step.is_multiple_of(settings.save_every.max(1))
            {
                checkpoint::save(scratch, model, &optimizer, &state, settings.keep)?;
            }
        }
    }
    Ok(Ending::Finished {
        history: state.history,
    })
}

fn interrupted(
    scratch: Option<&Path>,
    model: &Llama,
    optimizer: &Optimizer,
    state: &State,
    settings: &Settings,
) -> anyhow::Result<Ending> {
    if let Some(scratch) = scratch {
        checkpoint::save(scratch, model, optimizer, state, settings.keep)?;
    }
    Ok(Ending::Interrupted { step: state.step })
}

/// A seed for one micro-batch that does not depend on what ran before it.
fn dropout_seed(seed: u64, step: u64, micro: usize) -> u64 {
    let mut state = seed;
    let mut state = mix(&mut state) ^ step;
    let mut state = mix(&mut state) ^ micro as u64;
    mix(&mut state)
}

/// The dtype of products under transformers' `bf16` and `fp16`.
pub fn compute_dtype(bf16: bool, fp16: bool) -> DType {
    match (bf16, fp16) {
        (true, _) => DType::BF16,
        (_, true) => DType::F16,
        _ => DType::F32,
    }
}
