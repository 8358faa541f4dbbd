//! The training loop, from top to bottom.
//!
//! It knows no YAML, no store and no clock: it tells what it does by a callback, which may also stop it. With a folder for
//! checkpoints, a stopped or killed training goes on where it was and ends with the same bits.

pub(super) mod best;
pub(in crate::ml) mod checkpoint;
pub mod evaluate;
mod fault;
pub(super) mod log;
pub mod optim;
mod resume;
pub mod sampler;
pub mod save;
pub(super) mod scaler;
pub mod schedule;
mod settings;
mod trainer_state;

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::DType;
use pipeline_kernels::dropout::mix;

use self::checkpoint::{Resumed, State};
use self::optim::Optimizer;
use super::execution::{Execution, PassSize};
use super::model::batch::{Batch, Row};
use super::model::linear::{Drops, Pass};
use super::model::{Gradients, Llama};
pub use best::{Best, Watch};
pub use fault::Fault;
pub use log::{Ending, Log, Step};
pub use resume::{Start, take_up};
pub use settings::{Every, Settings};
pub use trainer_state::trainer_state;

use log::Window;
use scaler::Scaler;

/// Trains a model on `rows`, and evaluates on `eval_rows` if the settings say when.
pub fn train(
    execution: &Execution<'_>,
    rows: &[Row],
    eval_rows: &[Row],
    settings: &Settings,
    scratch: Option<&Path>,
    tell: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> anyhow::Result<Ending> {
    let model = execution.model();
    ensure!(!rows.is_empty(), "there are no rows to train on");
    let watch = settings.watch.as_ref();
    if let Some(watch) = watch {
        can_be_watched(execution, eval_rows, settings, watch, scratch)?;
    }
    let plan = settings.plan(rows.len());
    let total = settings.total_steps(rows.len());
    let schedule = settings.schedule(total);
    let per_epoch = plan.steps();
    let mut optimizer = Optimizer::new(settings.optimizer, &model.parameters);
    let mut state = State {
        scaler: Scaler::new(settings.scaler),
        ..State::default()
    };
    let mut resumed = Resumed::default();
    if let Some(scratch) = scratch {
        resumed = checkpoint::resume(scratch, model, &mut optimizer)?;
    }
    if let Some(found) = resumed.state {
        state = found;
    }
    let told = Step {
        step: state.step,
        total,
        passed_over: resumed.passed_over,
        ..Step::default()
    };
    if tell(&told).is_break() {
        return interrupted(scratch, model, &optimizer, &state, settings);
    }

    let search = fault::Search::default();
    let stops = |state: &State| watch.is_some_and(|watch| watch.stops(&state.best));
    while state.step < total && !stops(&state) {
        let epoch = state.step / per_epoch;
        let order = sampler::order(settings.sampling, rows.len(), settings.data_seed, epoch);
        let micro_batches: Vec<&[usize]> = order.chunks(plan.batch).collect();
        let first = (state.step % per_epoch) as usize * plan.group;
        for (number, group) in micro_batches.chunks(plan.group).enumerate() {
            if number * plan.group < first {
                continue; // done before the interruption
            }
            if state.step >= total || stops(&state) {
                break;
            }
            let fault = |what, value, places: &[usize]| -> anyhow::Result<Fault> {
                let each = settings.rows_each.max(1);
                let mut rows: Vec<usize> = places.iter().map(|place| place / each).collect();
                rows.dedup();
                Ok(Fault {
                    step: state.step + 1,
                    what,
                    value,
                    rows,
                    split: settings.split.clone(),
                    cause: search.cause(model, &optimizer, settings, state.step)?,
                })
            };

            // Forward and backward of each micro-batch.
            let mut gradients = Gradients::none(model);
            let mut window = Window::default();
            let batches = group.iter().map(|places| {
                let rows: Vec<&Row> = places.iter().filter_map(|&place| rows.get(place)).collect();
                settings.objective.batch(&rows, settings.pad)
            });
            let batches = batches.collect::<anyhow::Result<Vec<_>>>()?;
            let weight = |batch: &Batch| {
                settings
                    .objective
                    .weight(&settings.objective.targets(batch))
            };
            let weights: Vec<f64> = batches.iter().map(weight).collect();
            let all: f64 = weights.iter().sum();
            let shares: Vec<f64> = weights.iter().map(|weight| weight / all).collect();
            let mut loss = 0.;
            let mut found = None;
            let mut first = 0;
            while first < batches.len() && found.is_none() {
                let rest: Vec<&Batch> = batches[first..].iter().collect();
                let dropout = settings.dropout.then(|| Drops {
                    seed: dropout_seed(settings.seed, state.step),
                    batch: first,
                });
                let PassSize {
                    micro_batches: count,
                    tokens,
                } = execution.pass_size(&rest, Pass::learn(dropout), settings.checkpointing);
                let mut computed = Some(tokens);
                let scaled = rest.iter().zip(&shares[first..]).take(count);
                let scaled = scaled.map(|(batch, share)| (*batch, share * state.scaler.scale));
                let outcomes = settings
                    .objective
                    .differentiate(
                        execution,
                        &scaled.collect::<Vec<_>>(),
                        dropout,
                        settings.checkpointing,
                        &mut gradients,
                    )
                    .with_context(|| {
                        let (step, split) = (state.step + 1, &settings.split);
                        let places = group[first..first + count].concat();
                        format!("step {step}, rows {places:?} of `{split}`")
                    })?;
                for ((batch, places), outcome) in rest.iter().zip(&group[first..]).zip(outcomes) {
                    loss += shares[first] * outcome.loss;
                    first += 1;
                    for (name, value) in &outcome.metrics {
                        window.add(name, *value);
                    }
                    if !outcome.loss.is_finite() {
                        found = Some(fault("loss", outcome.loss, places)?);
                        break;
                    }
                    let told = Step {
                        step: state.step,
                        total,
                        micro_batches: first,
                        tokens: batch.tokens(),
                        computed: computed.take().unwrap_or(0),
                        ..Step::default()
                    };
                    if tell(&told).is_break() {
                        return interrupted(scratch, model, &optimizer, &state, settings);
                    }
                }
            }

            // One step: unscale, clip, update. What is not finite changes neither weights nor moments nor the schedule.
            optim::scale(&mut gradients.0, 1. / state.scaler.scale)?;
            let norm = optim::clip(&mut gradients.0, settings.max_grad_norm)?;
            let rate = settings.learning_rate * schedule.factor(state.scheduled);
            if !norm.is_finite() && found.is_none() && (!settings.scaler || state.scaler.scale < 1.)
            {
                // A scale below 1 means that it is not the scale that makes the gradients overflow.
                found = Some(fault("gradient's norm", norm, &group.concat())?);
            }
            if let Some(fault) = &found {
                if state.skipped >= settings.skip_nan_steps {
                    bail!(fault.clone());
                }
                state.skipped += 1;
            }
            let good = found.is_none() && norm.is_finite();
            if good {
                optimizer.step(&model.parameters, &gradients.0, rate)?;
                state.scheduled += 1;
            }
            if settings.scaler {
                state.scaler.update(!good);
            }
            state.step += 1;

            // Logs: every step for the record, a mean over some for the reader.
            window.add("loss", loss);
            if found.is_none() {
                state.window.merge(&window);
            }
            let seen = (number * plan.group + group.len()) as f64;
            let epoch = epoch as f64 + seen / plan.micro_batches() as f64;
            let log = |window: &Window| {
                let mut values = window.means();
                values.insert(
                    "grad_norm".into(),
                    if found.is_some() { f64::NAN } else { norm },
                );
                values.insert("learning_rate".into(), rate);
                Log {
                    step: state.step,
                    epoch,
                    values,
                }
            };
            let mut logs = Vec::new();
            let entry = log(&window);
            if state.step.is_multiple_of(settings.log_every.max(1)) || state.step == total {
                logs.push(log(&state.window));
                state.window = Window::default();
            }
            state.history.push(entry);
            let is_last = state.step == total;
            let due = match settings.eval_every {
                Some(Every::Steps(steps)) => state.step.is_multiple_of(steps.max(1)),
                Some(Every::Epoch) => number + 1 == per_epoch as usize,
                None => false,
            };
            if is_last && !due {
                resume::leave(model, &optimizer, &state, settings, total)?;
            }
            if (due || is_last && settings.eval_every.is_some()) && !eval_rows.is_empty() {
                let metrics = evaluate::metrics(execution, eval_rows, settings)?;
                if let Some(watch) = watch
                    && let Some(value) = metrics.get(&watch.metric)
                    && state.best.judge(watch, *value, state.step)
                    && watch.load
                    && let Some(scratch) = scratch
                {
                    state.best.digest = Some(best::keep(scratch, model, state.step)?);
                }
                let values = metrics
                    .into_iter()
                    .map(|(name, value)| (format!("eval_{name}"), value));
                let log = Log {
                    step: state.step,
                    epoch,
                    values: values.collect(),
                };
                state.history.push(log.clone());
                logs.push(log);
            }
            if is_last && due {
                resume::leave(model, &optimizer, &state, settings, total)?;
            }

            let told = Step {
                step: state.step,
                total,
                logs,
                skipped: found,
                ..Step::default()
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
    if state.step < total {
        resume::leave_stopped(settings, state.step, total)?;
    }
    if let (Some(Watch { load: true, .. }), Some(scratch)) = (watch, scratch) {
        best::restore(scratch, model, &state.best)?;
    }
    search.check_end(model, settings, state.step)?;
    Ok(Ending::Finished {
        history: state.history,
        step: state.step,
        skipped: state.skipped,
        best: state.best,
    })
}

/// Refuses at once what would fail at the first evaluation.
fn can_be_watched(
    execution: &Execution<'_>,
    eval_rows: &[Row],
    settings: &Settings,
    watch: &Watch,
    scratch: Option<&Path>,
) -> anyhow::Result<()> {
    ensure!(
        settings.eval_every.is_some() && !eval_rows.is_empty(),
        "the best step is found by evaluations, but there are none"
    );
    ensure!(
        scratch.is_some() || !watch.load,
        "the best weights need a folder"
    );
    let first = eval_rows
        .get(..settings.eval_batch_size.clamp(1, eval_rows.len()))
        .unwrap_or_default();
    let metrics = evaluate::metrics(execution, first, settings)?;
    let names: Vec<&str> = metrics.keys().map(String::as_str).collect();
    ensure!(
        names.contains(&watch.metric.as_str()),
        "`metric_for_best_model` is `{}`, but the evaluation gives {}",
        watch.metric,
        names.join(", ")
    );
    Ok(())
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

/// A seed for one step that does not depend on what ran before it.
fn dropout_seed(seed: u64, step: u64) -> u64 {
    let mut state = seed;
    let mut state = mix(&mut state) ^ step;
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

#[cfg(test)]
mod tests;
