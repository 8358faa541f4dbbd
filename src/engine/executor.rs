//! Executors decide where and how a [`Task`] runs. An executor takes a task, passes its events on, and returns what the stage noted;
//! the engine knows nothing else about it. [`Executors::execute`] is the only place where an executor is chosen.

mod child_process;
mod in_process;
mod launch;
mod sharded;
mod slurm;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::canonical::Digest;
use super::control::Control;
use super::event::{Event, Level};
use super::job::JobFolder;
use super::manifest::Entry;
use super::stage_events::StageEvents;
use super::task::Task;
use super::{Handling, Kind, Resources, RunEnv};
pub(super) use child_process::CANCEL;
pub use child_process::ChildProcess;
use child_process::allocator;
pub use in_process::InProcess;
pub(super) use in_process::run_task;
pub(super) use launch::command as launched;
pub use launch::prefix;
pub(super) use sharded::execute as execute_sharded;
pub(super) use slurm::Slurm;
pub use slurm::{Away, Cluster, Jobs, SlurmSettings, explain_to_slurm};

/// What a successful stage returns besides the files in its output folder.
#[derive(Debug, Default)]
pub struct TaskResult {
    /// Facts for its record.
    pub notes: BTreeMap<String, Value>,
    /// Digests of files of the output that are known already, by name.
    pub written: BTreeMap<String, Entry>,
    /// What the stage made, if it is an artifact of the store already: then there is nothing in the output folder.
    pub content: Option<Digest>,
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

/// The name of the executor that runs stages on this machine.
pub const LOCAL: &str = "local";

/// The executors of a run.
pub struct Executors {
    in_process: InProcess,
    /// `None` if there is no program to start for a task, as in tests.
    child_process: Option<ChildProcess>,
    /// Those that a project has, by name.
    clusters: BTreeMap<String, Slurm>,
    env: Arc<RunEnv>,
    jobs: Arc<Jobs>,
}

impl Executors {
    /// Executors of stages of these kinds. `program` is this program, to be started as `program work`; without it all stages run in
    /// this process.
    pub fn new(kinds: &'static [Kind], env: Arc<RunEnv>, program: Option<PathBuf>) -> Self {
        let lookup = env.lookup;
        Self {
            in_process: InProcess::new(kinds, Arc::clone(&env)),
            child_process: program.map(|program| ChildProcess::new(program, lookup)),
            clusters: BTreeMap::new(),
            env,
            jobs: Arc::default(),
        }
    }

    /// Adds a cluster.
    pub fn add(&mut self, cluster: Cluster) {
        let name = cluster.name.clone();
        let slurm = Slurm::new(cluster, Arc::clone(&self.env), Arc::clone(&self.jobs));
        self.clusters.insert(name, slurm);
    }

    /// The jobs that are submitted now.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    /// The executor on this machine.
    pub fn for_stage(&self, resources: &Resources) -> &dyn Executor {
        match &self.child_process {
            Some(child_process) if resources.isolated => child_process,
            _ => &self.in_process,
        }
    }

    /// The cluster that a stage runs on; none if it runs on this machine.
    pub(super) fn cluster(&self, handling: &Handling) -> Option<&Slurm> {
        self.clusters.get(handling.executor.as_deref()?)
    }

    /// An error if the cluster of one of these stages would never take its jobs.
    pub(super) fn check<'a>(
        &self,
        stages: impl Iterator<Item = (&'a str, &'a Handling)>,
    ) -> anyhow::Result<()> {
        let mut asked = BTreeSet::new();
        for (stage, handling) in stages {
            if let Some(cluster) = self.cluster(handling)
                && asked.insert((handling.executor.as_deref(), cluster.options_of(handling)))
            {
                cluster.check(stage, handling)?;
            }
        }
        Ok(())
    }

    /// Runs a task where it belongs. If the job of an earlier run still works on it, that one is joined, wherever it would run now.
    pub(super) fn execute(
        &self,
        handling: &Handling,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        for job in JobFolder::wanted(&slurm::folder_of(task))? {
            let executor = job.submitted().map(|submitted| submitted.executor);
            let cluster = executor.as_ref().and_then(|name| self.clusters.get(name));
            if let Some(cluster) = cluster {
                if let Some(result) = cluster.join(job, task, events, control)? {
                    return Ok(result);
                }
                continue;
            }
            job.retire()?;
            events.send(Event::Message {
                stage: task.stage.clone(),
                level: Level::Warning,
                text: format!(
                    "a job of an earlier run may still work on this stage, but its executor `{}` is no longer configured",
                    executor.unwrap_or_default()
                ),
            });
        }
        let executor = match self.cluster(handling) {
            Some(cluster) => cluster,
            None => self.for_stage(&handling.resources),
        };
        executor.execute(task, events, control)
    }
}
