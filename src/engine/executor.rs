//! Executors decide where and how a [`Task`] runs. An executor takes a task, passes its events on, and returns what the stage noted;
//! the engine knows nothing else about it. [`Executors::for_stage`] is the only place where an executor is chosen.

mod child_process;
mod in_process;
mod launch;
mod sharded;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::control::Control;
use super::manifest::Entry;
use super::stage_events::StageEvents;
use super::task::Task;
use super::{Kind, Resources, RunEnv};
pub(super) use child_process::CANCEL;
pub use child_process::ChildProcess;
pub use in_process::InProcess;
pub(super) use in_process::run_task;
pub(super) use launch::command as launched;
pub use launch::prefix;
pub(super) use sharded::execute as execute_sharded;

/// What a successful stage returns besides the files in its output folder.
#[derive(Debug, Default)]
pub struct TaskResult {
    /// Facts for its record.
    pub notes: BTreeMap<String, Value>,
    /// Digests of files of the output that are known already, by name.
    pub written: BTreeMap<String, Entry>,
}

/// Runs tasks.
pub trait Executor: Send + Sync {
    /// Runs a task to its end, or until `control` stops it, and passes its events on. Anything that ends the stage early, a crash of
    /// its process included, is returned as an error.
    fn execute(
        &self,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult>;
}

/// The executors of a run.
pub struct Executors {
    in_process: InProcess,
    /// `None` if there is no program to start for a task, as in tests.
    child_process: Option<ChildProcess>,
}

impl Executors {
    /// Executors of stages of these kinds. `program` is this program, to be started as `program work`; without it all stages run in
    /// this process.
    pub fn new(kinds: &'static [Kind], env: Arc<RunEnv>, program: Option<PathBuf>) -> Self {
        let lookup = env.lookup;
        Self {
            in_process: InProcess::new(kinds, env),
            child_process: program.map(|program| ChildProcess::new(program, lookup)),
        }
    }

    /// The executor of a stage.
    pub fn for_stage(&self, resources: &Resources) -> &dyn Executor {
        match &self.child_process {
            Some(child_process) if resources.isolated => child_process,
            _ => &self.in_process,
        }
    }
}
