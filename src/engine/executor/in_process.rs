//! Runs a task in this process. What ends the process (a crash, memory that runs out) ends everything, and the limit of memory does
//! not hold; a panic is an error of the stage.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

use anyhow::{Context as _, anyhow};
use rayon::ThreadPoolBuilder;

use super::super::context::Context;
use super::super::control::Control;
use super::super::stage_events::StageEvents;
use super::super::task::{Task, lasting};
use super::super::{Kind, RunEnv, threads};
use super::{Executor, TaskResult};

/// Runs tasks in this process.
pub struct InProcess {
    kinds: &'static [Kind],
    env: Arc<RunEnv>,
}

impl InProcess {
    /// An executor of stages of these kinds.
    pub fn new(kinds: &'static [Kind], env: Arc<RunEnv>) -> Self {
        Self { kinds, env }
    }
}

impl Executor for InProcess {
    fn execute(
        &self,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        let run = || run_task(task, self.kinds, &self.env, events, control);
        let run =
            || catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked(&*panic)));
        let Some(cpus) = task.cpus else {
            threads::start(ThreadPoolBuilder::new())?;
            return run();
        };
        let pool = ThreadPoolBuilder::new().num_threads(cpus.get());
        let pool = pool.build().context("could not start threads")?;
        pool.install(run)
    }
}

/// Runs a task on this thread, with the threads of the pool that it is in.
pub(in crate::engine) fn run_task(
    task: &Task,
    kinds: &[Kind],
    env: &Arc<RunEnv>,
    events: &Arc<StageEvents>,
    control: &Control,
) -> anyhow::Result<TaskResult> {
    let kind = kinds.iter().find(|kind| kind.name == task.kind);
    let kind = kind.with_context(|| format!("there is no kind `{}`", task.kind))?;
    let stage =
        (kind.parse)(task.params.clone()).map_err(|error| anyhow!("`{}`: {error}", task.kind))?;
    let context = Context::new(task, Arc::clone(env), Arc::clone(events), control.clone());
    stage.run(&context).map_err(|error| {
        if context.cancelled() {
            error
        } else {
            lasting(error)
        }
    })?;
    Ok(TaskResult {
        notes: context
            .notes
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner),
        written: context
            .written
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner),
        content: None,
    })
}

/// The error of a stage that panicked.
fn panicked(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    anyhow!(
        "the stage panicked, which is a bug in pipeline: {}",
        text.unwrap_or("no message")
    )
}
