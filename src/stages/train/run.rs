//! From the folders of the inputs to a trained artifact.

use std::fs;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use candle_core::Device;

use super::arguments::TrainingArguments;
use super::estimate;
use super::first_steps::FirstSteps;
use super::inputs::Inputs;
use super::method::Method;
use super::on_gpu::place_that_fits;
use super::process::Resident;
use super::reference::Loaded;
use crate::engine::Context;
use crate::ml::adapter::FILE;
use crate::ml::execution::Execution;
use crate::ml::io::folder::{METRICS, TRAINER_STATE};
use crate::ml::model::CausalLm;
use crate::ml::model::batch::Row;
use crate::ml::place::{Place, Work};
use crate::ml::train::save::{save_adapter, save_model};
use crate::ml::train::{
    Ending, Job, Log, Origin, Passes, ReferenceModel, Start, Step, continue_from, process_group,
    train_together, trainer_state,
};
use crate::stages::model_input::{execution_on, note_work, place};
use crate::stages::text::chat_template;

/// Says where the training starts, and puts it into the record.
fn report_start(cx: &Context, start: &Start, done: u64, total: u64) {
    if let Start::After(step) = start
        && done >= *step
    {
        cx.note("continued_after_step", step);
    }
    cx.info(match (start, done) {
        (Start::After(step), done) if done == *step => format!(
            "goes on after step {done} of {total}, where an earlier training ended that differs in nothing but its length; \
             its steps are the same"
        ),
        (_, done) if done > 0 => format!("goes on after step {done} of {total}, from a checkpoint"),
        (Start::Beginning(step, why), _) => {
            cx.note("not_continued", why);
            format!(
                "starts at the beginning, {total} steps to go; the earlier training of {step} steps can't be gone on from: {why}"
            )
        }
        _ => format!("starts at the beginning, {total} steps to go"),
    });
}

/// Keeps what the frozen layers below the adapter give, and tells what that takes.
fn cache_frozen_layers(
    cx: &Context,
    execution: &Execution<'_>,
    rows: &[&[Row]],
) -> anyhow::Result<()> {
    let Some(frozen) = execution.keep_frozen_states(cx.scratch()?)? else {
        cx.warn(
            "`cache_frozen_layers` does nothing here: the lowest layer is trained, or something in the model or adapter is not computed \
             the fast way; hint: `layers_to_transform` of `attach_lora` puts an adapter on upper layers alone",
        );
        return Ok(());
    };
    let rows = rows.iter().flat_map(|rows| rows.iter());
    let tokens = rows.map(|row| {
        let rejected = row.rejected().map_or(0, |sequence| sequence.ids.len());
        row.chosen().ids.len() + rejected
    });
    let bytes = tokens.sum::<usize>() * execution.model().arch.hidden_size * size_of::<f32>();
    cx.note("cached_frozen_layers", frozen);
    cx.info(format!(
        "keeps what the lowest {frozen} layers give of each sequence for its next epoch: up to {} MB on disk",
        bytes.div_ceil(1_000_000)
    ));
    Ok(())
}

/// Computes the log-probabilities of all rows by the reference model, once.
fn precompute_reference(
    cx: &Context,
    passes: &Passes<'_>,
    splits: [&mut [Row]; 2],
    batch_size: usize,
    pad: u32,
) -> anyhow::Result<()> {
    let total = splits.iter().map(|rows| rows.len()).sum::<usize>() as u64;
    let mut before = 0;
    let processes = process_group::of_this_process();
    for rows in splits {
        passes.precompute_reference(rows, batch_size, pad, processes, &mut |done| {
            let done = (before + done) as u64;
            cx.progress(done, Some(total), "rows by the reference model");
            cx.check_cancelled()
        })?;
        before += rows.len();
    }
    Ok(())
}

/// Trains by a method, and fills the stage's output folder.
pub(super) fn run<M: Method>(
    cx: &Context,
    method: &M,
    reference: &M::Reference,
    common: &M::Common,
    arguments: &TrainingArguments,
) -> anyhow::Result<()> {
    let inputs = Inputs::read(cx, method, reference, common, arguments)?;
    let estimate = &estimate::estimate(method, &inputs)?;
    estimate::tell(cx, estimate, &inputs)?;
    let place = place_that_fits(cx, estimate, &inputs, place(cx)?)?;
    let trained = inputs.trained();
    let Inputs {
        folder,
        arch,
        weights,
        adapter,
        adapter_folder,
        dataset,
        train: mut train_rows,
        mut eval_rows,
        settings,
        packing,
        compute,
        pad,
        reference,
        precomputes,
    } = inputs;
    let origin = Origin {
        split: arguments.train_split.clone(),
        rows_each: train_rows.rows_each,
        weights: std::iter::once(("model", folder.clone()))
            .chain(adapter_folder.map(|folder| ("adapter", folder.join(FILE))))
            .collect(),
    };
    let train_rows = &mut train_rows.rows;
    let device = Device::Cpu;
    let mut model = CausalLm::load(&arch, &weights, adapter.as_ref(), trained, compute, &device)?;
    drop(weights);
    Execution::move_weights(&mut model, &place)?;
    let loss = method.loss();
    let execution = execution_on(cx, &model, packing, &place)?;
    let longest = estimate.counts.get("longest_pass").copied();
    execution.expect(usize::try_from(longest.unwrap_or(0))?);
    if *arguments.cache_frozen_layers && settings.neftune_noise_alpha.is_some() {
        cx.warn(
            "`cache_frozen_layers` does nothing here: with `neftune_noise_alpha` the lowest layers give something else each time",
        );
    } else if *arguments.cache_frozen_layers {
        cache_frozen_layers(cx, &execution, &[train_rows, &eval_rows])?;
    }
    let mut loaded = Loaded::new(cx, &reference.0, reference.1, compute, &place)?;
    if precomputes {
        let own = loaded.execution(packing, &place)?;
        let passes = Passes {
            execution: &execution,
            loss: &*loss,
            reference: loaded.model(own.as_ref()),
        };
        let size = arguments.eval_batch_size();
        precompute_reference(cx, &passes, [train_rows, &mut eval_rows], size, pad)?;
        drop(own);
        loaded = Loaded::None;
    }
    let own = loaded.execution(packing, &place)?;
    let reference = if precomputes {
        ReferenceModel::Rows
    } else {
        loaded.model(own.as_ref())
    };
    cx.note("rows", train_rows.len());
    let count = model.parameters.iter().map(|p| p.var.elem_count());
    cx.note("trained_parameters", count.sum::<usize>());
    let total = settings.total_steps(train_rows.len());
    cx.note("steps", total);

    let processes = process_group::of_this_process();
    let is_first = processes.rank() == 0;
    let (scratch, continuation) = (cx.scratch()?, cx.continuation()?);
    let start = if is_first {
        continue_from(scratch, &cx.continuations()?, &settings, train_rows.len())?
    } else {
        Start::Alone
    };
    let job = Job {
        execution: &execution,
        loss: &*loss,
        reference,
        rows: train_rows,
        eval_rows: &eval_rows,
        pad,
        origin: &origin,
        scratch: Some(scratch),
        continuation: Some(&continuation),
    };
    let mut reporter = StepReporter::default();
    let ending = train_together(&job, &settings, processes, &mut |step| {
        if is_first {
            reporter.work.see(&place, step);
            reporter.step(cx, &start, step)
        } else if cx.cancelled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    cx.note("tokens", reporter.tokens);
    cx.note("computed_tokens", reporter.computed);
    note_work(cx, &place);
    if let Some(work) = reporter.work.last_step {
        cx.note("gpu_work_of_last_step", work);
    }
    if let Some(resident) = Resident::of_this_process() {
        cx.note("peak_memory", resident.peak);
    }
    if !reporter.alarms.is_empty() {
        cx.note("alarms", &reporter.alarms);
    }
    let Ending::Finished {
        history,
        step,
        skipped,
        best,
    } = &ending
    else {
        cx.check_cancelled()?;
        return Err(anyhow!("interrupted"));
    };
    if !is_first {
        return Ok(());
    }
    cx.note("skipped_nan_steps", skipped);
    if let Some(watch) = &settings.watch {
        cx.note("finished_steps", step);
        cx.note("best_step", best.step);
        cx.note("best_metric", best.metric);
        if *step < total {
            cx.info(format!(
                "stopped early after step {step} of {total}: `{}` has not become better for {} evaluations",
                watch.metric, best.worse
            ));
        }
    }
    if let Some(adapter) = adapter {
        save_adapter(&model, adapter, cx.out())?;
        chat_template::carry(&dataset, cx.out())?;
    } else {
        save_model(&model, &folder, cx.out())?;
        if let Some(template) = chat_template::read(&dataset)? {
            chat_template::install(cx, &template)?;
        }
    }
    let metrics: String = history.iter().map(|log| log.line() + "\n").collect();
    let state = trainer_state(&ending, &settings, train_rows.len())?;
    for (name, text) in [(METRICS, metrics), (TRAINER_STATE, state)] {
        fs::write(cx.out().join(name), text)
            .with_context(|| format!("could not write `{name}`"))?;
    }
    Ok(())
}

/// Passes the progress, metrics and warnings of a training's steps on to the stage's context.
#[derive(Debug, Default)]
struct StepReporter {
    began: bool,
    tokens: u64,
    computed: u64,
    alarms: Vec<String>,
    first_steps: FirstSteps,
    throughput: Throughput,
    pace: Pace,
    work: StepWork,
}

/// What a GPU was made to do in a step.
#[derive(Debug, Default)]
struct StepWork {
    /// All that it did until the last step ended.
    before: Option<Work>,
    /// What it did in the last step before the very last one in which nothing was evaluated, and for the checkpoint before it, if one was
    /// written. The very last one copies all back, for the result and for a longer training.
    last_step: Option<Work>,
}

impl StepWork {
    fn see(&mut self, place: &Place, step: &Step) {
        if step.micro_batches > 0 {
            return;
        }
        let Some(now) = place.work() else { return };
        if let Some(before) = self.before.replace(now)
            && step.step < step.total
            && !step.logs.iter().any(is_evaluation)
        {
            self.last_step = Some(now.since(before));
        }
    }
}

/// Measures the seconds per step, for the estimate of the time left if the training is stopped and resumed.
#[derive(Debug, Default)]
struct Pace {
    /// The time and the number of the first step.
    first: Option<(Instant, u64)>,
    kept: Option<Instant>,
}

impl Pace {
    /// The time between two updates of the file.
    const PAUSE: Duration = Duration::from_secs(5);

    fn add(&mut self, cx: &Context, step: &Step, now: Instant) {
        let (began, first) = *self.first.get_or_insert((now, step.step));
        let is_due = self.kept.is_none_or(|kept| now - kept >= Self::PAUSE);
        if is_due && step.step > first {
            self.kept = Some(now);
            let steps = (step.step - first) as f64;
            cx.keep_pace(step.total, (now - began).as_secs_f64() / steps);
        }
    }
}

/// Measures tokens per second between two logs of a training.
#[derive(Debug, Default)]
struct Throughput {
    /// The time of the last step.
    last: Option<Instant>,
    tokens: u64,
    time: Duration,
}

impl Throughput {
    /// Adds the tokens of `step` and the time since the last step, unless it includes an evaluation.
    fn add(&mut self, step: &Step, now: Instant) {
        let evaluated = step.logs.iter().any(is_evaluation);
        if let Some(last) = self.last.replace(now)
            && !evaluated
        {
            self.time += now - last;
        }
        self.tokens += step.tokens as u64;
    }

    /// The tokens per second since the last call.
    fn take(&mut self) -> Option<f64> {
        let (tokens, time) = (
            std::mem::take(&mut self.tokens),
            std::mem::take(&mut self.time),
        );
        (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
    }
}

fn is_evaluation(log: &Log) -> bool {
    log.values.contains_key("eval_loss")
}

impl StepReporter {
    /// Reports a step, and ends the training if the stage is cancelled.
    fn step(&mut self, cx: &Context, start: &Start, step: &Step) -> ControlFlow<()> {
        for passed_over in &step.passed_over {
            cx.warn(passed_over);
        }
        if !self.began {
            self.began = true;
            report_start(cx, start, step.step, step.total);
        }
        if let Some(fault) = &step.skipped {
            cx.warn(format!("left out an update: {fault}"));
        }
        if let Some(alarm) = &step.alarm {
            cx.warn(alarm.to_string());
            self.alarms.push(alarm.to_string());
        }
        self.tokens += step.tokens as u64;
        self.computed += step.computed as u64;
        if step.micro_batches == 0 {
            self.first_steps.step(cx, step);
        }
        self.throughput.add(step, Instant::now());
        self.pace.add(cx, step, Instant::now());
        cx.progress(step.step, Some(step.total), "steps");
        for log in &step.logs {
            let mut values = log.values.clone();
            values.insert("epoch".into(), log.epoch);
            if !is_evaluation(log)
                && let Some(tokens_per_second) = self.throughput.take()
            {
                values.insert("tokens_per_second".into(), tokens_per_second);
            }
            cx.metrics(log.step, Some(step.total), values);
        }
        if cx.cancelled() {
            cx.progress_now(step.step, Some(step.total), "steps");
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
