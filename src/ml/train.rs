//! The training loop, from top to bottom.
//!
//! It knows no YAML, no store and no clock. It reports what it does to a callback, which may also stop it. With a folder for checkpoints, a
//! stopped or killed training is resumed where it was and ends with the same bits.

mod accumulate;
pub(in crate::ml) mod adaptive;
pub(super) mod best;
pub mod bootstrap;
pub(in crate::ml) mod checkpoint;
pub mod estimate;
pub mod evaluate;
mod fault;
mod job;
pub(super) mod log;
pub mod optim;
mod passes;
pub mod process_group;
mod resume;
pub mod sampler;
pub mod save;
pub(super) mod scaler;
pub mod schedule;
mod settings;
pub(in crate::ml) mod state;
mod trainer_state;
mod watchdog;

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::bail;
use candle_core::DType;
use pipeline_kernels::random::splitmix64;

use self::adaptive::Adaptive;
use self::checkpoint::Resumed;
use self::fault::Search;
use self::log::Window;
use self::optim::Optimizer;
use self::process_group::{Alone, ProcessGroup, any, exchange, is_first};
use self::sampler::{Group, Grouping, Sampler};
use self::scaler::Scaler;
use self::schedule::Schedule;
use self::state::State;
use self::watchdog::Watchdog;
use super::model::{CausalLm, Gradients};
pub use best::{Best, Watch};
pub use checkpoint::newest_checkpoint;
pub use fault::{Fault, Origin};
pub use job::Job;
pub use log::{Ending, Log, Step};
pub use passes::{Passes, ReferenceModel};
pub use resume::{Start, continue_from};
pub use settings::{EvalStrategy, Every, Settings};
pub use trainer_state::trainer_state;
pub use watchdog::{Alarm, LossLimit};

/// A callback that is called after each micro-batch and each step, and decides whether the training continues.
pub type Report<'a> = dyn FnMut(&Step) -> ControlFlow<()> + 'a;

/// Trains the job's model on its rows, and evaluates it on its evaluation rows as often as the settings say. The trained tensors are those of
/// the model; `report` is called after each micro-batch and step.
///
/// # Errors
/// A loss or a gradient is not finite ([`Fault`]), a loss is undefined, or a file can't be read or written.
pub fn train(
    job: &Job<'_>,
    settings: &Settings,
    report: &mut Report<'_>,
) -> anyhow::Result<Ending> {
    train_together(job, settings, &Alone, report)
}

/// The same by several processes, each of which calls this with the same job and settings. Every step has the rows and the loss that it has
/// in one process; its micro-batches are dealt among the processes ([`process_group::dealt`]). With the same number of processes a training
/// has the same bits each time, and with another one it differs by the order in which gradients are added. The first process alone writes
/// files; the report of any process may stop all. In a process that returns an error the others wait: it has to end them.
///
/// # Errors
/// As of [`train`].
pub fn train_together(
    job: &Job<'_>,
    settings: &Settings,
    processes: &dyn ProcessGroup,
    report: &mut Report<'_>,
) -> anyhow::Result<Ending> {
    job.check(settings)?;
    let mut trainer = Trainer::new(job, settings, processes);
    let passed_over = trainer.resume()?;
    // Gradients of several processes are added here.
    if processes.size() == 1 {
        trainer
            .optimizer
            .hold(&trainer.model.parameters, |tensors| {
                job.execution.hold(tensors)
            })?;
    }
    let beginning = Step {
        passed_over,
        ..trainer.step()
    };
    if any(processes, report(&beginning).is_break()) {
        return trainer.interrupted();
    }
    let mut sampler = Sampler::new(settings.sampling, settings.data_seed, trainer.grouping);
    while !trainer.is_done() {
        let group = sampler.group(trainer.state.step);
        let Some(accumulated) = trainer.accumulate(&group, report)? else {
            return trainer.interrupted();
        };
        let (tokens, computed) = accumulated.by_others;
        let update = trainer.update(&group, accumulated)?;
        let mut logs = trainer.log(&group, &update);
        let alarm = trainer.watch();
        logs.extend(trainer.evaluate(&group)?);
        let step = Step {
            tokens,
            computed,
            logs,
            alarm,
            skipped: update.fault,
            ..trainer.step()
        };
        if any(processes, report(&step).is_break()) {
            return trainer.interrupted();
        }
        if let Some(why) = trainer.watchdog.stop() {
            trainer.save_checkpoint()?;
            bail!(why);
        }
        trainer.save_checkpoint_if_due()?;
    }
    trainer.finish()
}

/// A running training.
struct Trainer<'a> {
    job: &'a Job<'a>,
    settings: &'a Settings,
    processes: &'a dyn ProcessGroup,
    model: &'a CausalLm,
    grouping: Grouping,
    /// The number of all steps.
    total: u64,
    schedule: Schedule,
    optimizer: Optimizer,
    state: State,
    search: Search<'a>,
    watchdog: Watchdog,
}

/// The sums over the micro-batches of a step.
struct Accumulated {
    /// The mean loss, weighted by [`Loss::weight`].
    loss: f64,
    /// The gradient of the mean loss, multiplied by the loss scale.
    gradients: Gradients,
    metrics: Window,
    /// The number of tokens in the micro-batches, without padding.
    tokens: usize,
    /// The tokens without padding of other processes' micro-batches, and the tokens that these processes computed.
    by_others: (usize, usize),
    /// The fault, if a loss is not finite.
    fault: Option<Fault>,
}

/// The result of an update.
struct Update {
    metrics: Window,
    /// The norm of the gradient before clipping.
    grad_norm: f64,
    learning_rate: f64,
    /// The fault for which the update was skipped, if something was not finite.
    fault: Option<Fault>,
}

impl<'a> Trainer<'a> {
    fn new(job: &'a Job<'a>, settings: &'a Settings, processes: &'a dyn ProcessGroup) -> Self {
        let model = job.execution.model();
        let total = settings.total_steps(job.rows.len());
        let schedule = settings.schedule(total);
        Self {
            job,
            settings,
            processes,
            model,
            grouping: settings.grouping(job.rows.len()),
            total,
            schedule,
            optimizer: Optimizer::new(settings.optimizer, &model.parameters),
            state: State {
                scaler: Scaler::new(settings.loss_scaling),
                adaptive: Adaptive::new(&schedule),
                ..State::default()
            },
            search: Search::new(job.origin),
            watchdog: Watchdog::new(settings.loss_limit, settings.learning_rate),
        }
    }

    /// Resumes the training from the newest sound checkpoint, if there is one. Returns a sentence for each newer one that could not be used.
    fn resume(&mut self) -> anyhow::Result<Vec<String>> {
        let Some(scratch) = self.job.scratch else {
            return Ok(Vec::new());
        };
        let (model, optimizer) = (self.model, &mut self.optimizer);
        let mut resumed = Resumed::default();
        if is_first(self.processes) {
            resumed = checkpoint::resume(scratch, model, optimizer)?;
        }
        let step = resumed.state.as_ref().map(|state| state.step);
        let of_first = exchange(self.processes, step)?.first().copied().flatten();
        if let Some(step) = of_first
            && !is_first(self.processes)
        {
            resumed.state = Some(checkpoint::resume_at(scratch, step, model, optimizer)?);
        }
        let Resumed { state, passed_over } = resumed;
        if let Some(state) = state {
            self.state = state;
            for log in &self.state.history {
                self.watchdog.step(log.step, &log.values);
            }
            self.watchdog.forgive();
        }
        Ok(passed_over)
    }

    fn is_done(&self) -> bool {
        let watch = self.settings.watch.as_ref();
        self.state.step >= self.total || watch.is_some_and(|watch| watch.stops(&self.state.best))
    }

    /// A report of the current state, without logs.
    fn step(&self) -> Step {
        Step {
            step: self.state.step,
            total: self.total,
            ..Step::default()
        }
    }

    /// One step of the optimiser: unscale, clip, update. If something is not finite, neither weights nor moments nor the schedule change.
    fn update(&mut self, group: &Group, accumulated: Accumulated) -> anyhow::Result<Update> {
        let settings = self.settings;
        let Accumulated {
            loss,
            mut gradients,
            mut metrics,
            tokens,
            mut fault,
            ..
        } = accumulated;
        let unscale = 1. / self.state.scaler.scale;
        let grad_norm = if self.optimizer.is_held() {
            self.optimizer.held_norm(unscale, settings.max_grad_norm)?
        } else {
            optim::scale(&mut gradients.0, unscale)?;
            optim::clip(&mut gradients.0, settings.max_grad_norm)?
        };
        let learning_rate = match &self.state.adaptive {
            Some(adaptive) => adaptive.rate(),
            None => settings.learning_rate * self.schedule.factor(self.state.scheduled),
        };
        // If the scale is below 1 already, it is not the reason for which gradients overflow.
        let may_overflow = settings.loss_scaling && self.state.scaler.scale >= 1.;
        if fault.is_none() && !grad_norm.is_finite() && !may_overflow {
            let rows = group.micro_batches.concat();
            fault = Some(self.fault("gradient's norm", grad_norm, &rows)?);
        }
        if let Some(fault) = &fault {
            if self.state.skipped >= settings.skip_nan_steps {
                bail!(fault.clone());
            }
            self.state.skipped += 1;
        }
        let is_finite = fault.is_none() && grad_norm.is_finite();
        if is_finite {
            self.optimizer
                .step(&self.model.parameters, &gradients.0, learning_rate)?;
            self.state.scheduled += 1;
        } else {
            self.optimizer.clear_held_gradients();
        }
        if settings.loss_scaling {
            self.state.scaler.update(!is_finite);
        }
        self.state.step += 1;
        self.state.tokens += tokens as u64;
        metrics.add("loss", loss);
        Ok(Update {
            metrics,
            grad_norm: if fault.is_some() { f64::NAN } else { grad_norm },
            learning_rate,
            fault,
        })
    }

    /// Adds the step's metrics to the history, and returns those to show: every few steps, their means over the last steps.
    fn log(&mut self, group: &Group, update: &Update) -> Vec<Log> {
        if update.fault.is_none() {
            self.state.window.merge(&update.metrics);
        }
        let entry = self.entry(group, update, &update.metrics);
        self.state.history.push(entry);
        let is_due = self
            .state
            .step
            .is_multiple_of(self.settings.log_every.max(1));
        if !is_due && self.state.step < self.total {
            return Vec::new();
        }
        let window = std::mem::take(&mut self.state.window);
        vec![self.entry(group, update, &window)]
    }

    /// What the watchdog has to say of the step that was logged last.
    fn watch(&mut self) -> Option<Alarm> {
        let log = self.state.history.last()?;
        self.watchdog.step(log.step, &log.values)
    }

    fn entry(&self, group: &Group, update: &Update, metrics: &Window) -> Log {
        let mut values = metrics.means();
        values.insert("grad_norm".into(), update.grad_norm);
        values.insert("learning_rate".into(), update.learning_rate);
        if self.job.loss.logs_num_tokens() {
            values.insert("num_tokens".into(), self.state.tokens as f64);
        }
        Log {
            step: self.state.step,
            epoch: self.epochs_seen(group),
            values,
        }
    }

    /// The number of epochs seen at the end of a group, with its fraction.
    fn epochs_seen(&self, group: &Group) -> f64 {
        let before = group.number as usize * self.grouping.accumulation;
        let seen = (before + group.micro_batches.len()) as f64;
        group.epoch as f64 + seen / self.grouping.micro_batches() as f64
    }

    /// Evaluates if that is due after this step, and keeps the weights if they are the best so far. After the last step the state is kept for
    /// a longer training, as that training would have it: with this evaluation only if it is due there too.
    fn evaluate(&mut self, group: &Group) -> anyhow::Result<Option<Log>> {
        let (job, settings) = (self.job, self.settings);
        let is_last = self.state.step == self.total;
        let is_due = match settings.eval_every {
            Some(Every::Steps(steps)) => self.state.step.is_multiple_of(steps.max(1)),
            Some(Every::Epoch) => group.number + 1 == self.grouping.steps(),
            None => false,
        };
        if is_last && !is_due {
            self.keep_continuation()?;
        }
        let mut evaluated = None;
        let wanted = is_due || is_last && settings.eval_every.is_some();
        if wanted && !job.eval_rows.is_empty() {
            let (size, pad) = (settings.eval_batch_size, job.pad);
            let mut metrics =
                evaluate::metrics(&job.passes(), job.eval_rows, size, pad, self.processes)?;
            if job.loss.logs_num_tokens() {
                metrics.insert("num_tokens".into(), self.state.tokens as f64);
            }
            if let Some(adaptive) = &mut self.state.adaptive
                && let Some(value) = metrics.get(&settings.scheduler_metric)
            {
                adaptive.follow(&self.schedule, *value);
            }
            if let Some(watch) = &settings.watch
                && let Some(value) = metrics.get(&watch.metric)
                && self.state.best.judge(watch, *value, self.state.step)
                && watch.load
                && let Some(scratch) = self.writes_to(job.scratch)
            {
                self.optimizer.copy_back(&self.model.parameters)?;
                let digest = best::keep(scratch, self.model, self.state.step)?;
                self.state.best.digest = Some(digest);
            }
            let values = metrics
                .into_iter()
                .map(|(name, value)| (format!("eval_{name}"), value));
            let log = Log {
                step: self.state.step,
                epoch: self.epochs_seen(group),
                values: values.collect(),
            };
            self.state.history.push(log.clone());
            evaluated = Some(log);
        }
        if is_last && is_due {
            self.keep_continuation()?;
        }
        Ok(evaluated)
    }

    fn keep_continuation(&mut self) -> anyhow::Result<()> {
        let Some(folder) = self.writes_to(self.job.continuation) else {
            return Ok(());
        };
        self.optimizer.copy_back(&self.model.parameters)?;
        resume::keep_continuation(
            folder,
            self.model,
            &self.optimizer,
            &self.state,
            self.settings,
            self.total,
        )
    }

    /// The folder, if it is this process that writes to it.
    fn writes_to(&self, folder: Option<&'a Path>) -> Option<&'a Path> {
        folder.filter(|_| is_first(self.processes))
    }

    fn save_checkpoint(&mut self) -> anyhow::Result<()> {
        let Some(scratch) = self.writes_to(self.job.scratch) else {
            return Ok(());
        };
        self.optimizer.copy_back(&self.model.parameters)?;
        checkpoint::save(
            scratch,
            self.model,
            &self.optimizer,
            &self.state,
            self.settings.keep,
        )
    }

    fn save_checkpoint_if_due(&mut self) -> anyhow::Result<()> {
        let is_due = self
            .state
            .step
            .is_multiple_of(self.settings.save_every.max(1));
        if is_due && self.state.step < self.total {
            self.save_checkpoint()?;
        }
        Ok(())
    }

    fn interrupted(&mut self) -> anyhow::Result<Ending> {
        self.save_checkpoint()?;
        Ok(Ending::Interrupted {
            step: self.state.step,
        })
    }

    fn finish(mut self) -> anyhow::Result<Ending> {
        self.optimizer.release(&self.model.parameters)?;
        let (step, settings) = (self.state.step, self.settings);
        if let Some(folder) = self.writes_to(self.job.continuation)
            && step < self.total
        {
            resume::note_early_stop(folder, step, self.total)?;
        }
        let loads_best = settings.watch.as_ref().is_some_and(|watch| watch.load);
        if let Some(scratch) = self.writes_to(self.job.scratch)
            && loads_best
        {
            best::restore(scratch, self.model, &self.state.best)?;
        }
        self.search.check_end(self.model, settings, step)?;
        Ok(Ending::Finished {
            history: self.state.history,
            step,
            skipped: self.state.skipped,
            best: self.state.best,
        })
    }

    fn fault(&mut self, what: &'static str, value: f64, rows: &[usize]) -> anyhow::Result<Fault> {
        self.optimizer.copy_back(&self.model.parameters)?;
        let (search, done) = (&self.search, self.state.step);
        Ok(Fault {
            step: done + 1,
            what,
            value,
            rows: search.rows(rows),
            split: self.job.origin.split.clone(),
            cause: search.cause(self.model, &self.optimizer, self.settings, done)?,
        })
    }
}

/// The seed of dropout for one step, which does not depend on the steps before it.
fn dropout_seed(seed: u64, step: u64) -> u64 {
    let mut state = seed;
    let mut state = splitmix64(&mut state) ^ step;
    splitmix64(&mut state)
}

/// The compute dtype for transformers' `bf16` and `fp16`: bf16, f16, or f32 if neither is set.
pub fn compute_dtype(bf16: bool, fp16: bool) -> DType {
    match (bf16, fp16) {
        (true, _) => DType::BF16,
        (_, true) => DType::F16,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests;
