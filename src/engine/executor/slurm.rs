//! Runs a task as a job of Slurm: submits it, follows the events that it writes into its folder of the store, and takes its result.
//!
//! What counts is the job's own result, in the store that the nodes share, never what Slurm says of the job. Slurm is asked only to
//! tell a job that will leave no result from one that is still to come, and to say why. The runner holds the lock of the result all
//! the time; the job needs no lock. Where the runner goes away, the next one takes the lock, finds the job's folder, and joins the job
//! instead of submitting another.
//!
//! On nodes that don't see the store a job works in one of its own; what it reads, tells and makes goes through the remote (`away`), and is
//! brought into its folder here. Jobs that are alike and ready together are one array (`submit`).

mod away;
mod client;
mod explain;
mod follow;
mod gather;
mod queue;
mod script;
mod settings;
mod submit;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};

use super::super::control::Control;
use super::super::event::{Event, Level};
use super::super::job::{JobFolder, JobResult, Submitted};
use super::super::stage_events::StageEvents;
use super::super::task::Task;
use super::super::{Handling, RunEnv};
use super::{Executor, TaskResult};
pub use away::Away;
use away::Mirror;
use client::{Client, JobId, Trouble};
pub use explain::explain_to_slurm;
use gather::Gathering;
use queue::Queue;
use script::Location;
pub use settings::SlurmSettings;
use submit::Word;

/// The pause between two questions while no controller answers.
const PAUSE: Duration = Duration::from_secs(1);

/// The jobs of a run that are submitted, and what becomes of them when the run is interrupted.
#[derive(Debug, Default)]
pub struct Jobs {
    count: AtomicUsize,
    leave: AtomicBool,
}

impl Jobs {
    /// How many jobs are in a queue or running.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Leaves the jobs alone when the run is interrupted, instead of cancelling them.
    pub fn leave(&self) {
        self.leave.store(true, Ordering::Relaxed);
    }

    fn are_left(&self) -> bool {
        self.leave.load(Ordering::Relaxed)
    }
}

/// What jobs have in common that can be elements of one array: what they are called, the options of `sbatch`, and the environment that it
/// hands on.
type Like = (String, Vec<String>, BTreeMap<String, String>);

/// What came of a submission.
type Answer = Result<JobId, NotPlaced>;

/// A job to be submitted.
#[derive(Clone)]
struct Order {
    stage: String,
    folder: JobFolder,
    options: Vec<String>,
    location: Location,
    /// The environment that `sbatch` hands on, where no file can be read that has it.
    environment: Option<BTreeMap<String, String>>,
}

/// Why a job was not submitted.
#[derive(Debug, Clone)]
enum NotPlaced {
    /// The run was told to stop.
    Stopped,
    /// Slurm would not have it.
    Refused(String),
}

/// Everything about a cluster that does not depend on a stage.
pub struct Cluster {
    /// The name of the executor.
    pub name: String,
    /// What the project says of it.
    pub settings: SlurmSettings,
    /// This program, where the nodes find it.
    pub program: PathBuf,
    /// What the names of jobs begin with: the recipe's name.
    pub recipe: String,
    /// Variables to be kept from Slurm's programs.
    pub unset: Vec<OsString>,
    /// Variables of this process that are none of Slurm's settings.
    pub private: Vec<OsString>,
    /// The remote for nodes that don't see the store, if there is one.
    pub away: Option<Away>,
}

/// Runs tasks as jobs of a Slurm cluster.
pub(in crate::engine) struct Slurm {
    cluster: Cluster,
    env: Arc<RunEnv>,
    jobs: Arc<Jobs>,
    client: Client,
    queue: Queue,
    gathering: Gathering<Like, Order, Word>,
}

/// A job that was submitted.
struct Job {
    folder: JobFolder,
    id: JobId,
    /// What comes of it by the remote, if its node does not see its folder.
    mirror: Option<Mutex<Mirror>>,
}

impl Executor for Slurm {
    fn execute(
        &self,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        let folder = JobFolder::create(&folder_of(task))?;
        let submitted = self.submit(&folder, task, events, control);
        let job = submitted.and_then(|id| self.job(folder.clone(), id));
        let job = match job {
            Ok(job) => job,
            Err(error) => {
                // What is left of it is nobody's.
                if let Some(mirror) = self.mirror(&folder) {
                    mirror.clear();
                }
                let _ = folder.retire();
                folder.discard();
                return Err(error);
            }
        };
        self.follow(&job, task, events, control)
    }
}

impl Slurm {
    /// An executor for this cluster.
    pub(super) fn new(mut cluster: Cluster, env: Arc<RunEnv>, jobs: Arc<Jobs>) -> Self {
        let (unset, private) = (&mut cluster.unset, &mut cluster.private);
        let client = Client::new(std::mem::take(unset), std::mem::take(private));
        Self {
            cluster,
            env,
            jobs,
            client,
            queue: Queue::default(),
            gathering: Gathering::default(),
        }
    }

    /// The remote, if nodes don't see the store.
    fn away(&self) -> Option<&Away> {
        let away = self.cluster.away.as_ref();
        away.filter(|_| !self.cluster.settings.is_shared())
    }

    fn mirror(&self, folder: &JobFolder) -> Option<Mirror> {
        self.away()?.mirror(folder).ok()
    }

    fn job(&self, folder: JobFolder, id: JobId) -> anyhow::Result<Job> {
        let mirror = self.away().map(|away| away.mirror(&folder)).transpose()?;
        Ok(Job {
            folder,
            id,
            mirror: mirror.map(Mutex::new),
        })
    }

    /// The most jobs of a run that may be in the queue.
    pub(in crate::engine) fn most_jobs(&self) -> usize {
        self.cluster.settings.jobs()
    }

    /// An error if the cluster would never take the jobs of a stage that is handled like this. A controller that does not answer is none:
    /// the submission itself waits for it.
    pub(super) fn check(&self, stage: &str, handling: &Handling) -> anyhow::Result<()> {
        let name = &self.cluster.name;
        if !self.cluster.settings.is_shared() && !self.away().is_some_and(Away::is_of_use) {
            let without = if self.away().is_some() {
                "results are not both taken from the remote and given to it"
            } else {
                "there is no remote"
            };
            bail!(
                "the executor `{name}` is not `shared`, so that what `{stage}` reads and makes has to go through a remote, and {without}; \
                 hint: name one that can be read and written, by `--remote`, PIPELINE_REMOTE or `remote:` in pipeline.config.yaml, and \
                 leave out `--no-pull` and `--no-push`"
            );
        }
        let options = self.options_of(handling);
        let mut arguments: Vec<OsString> = options.into_iter().map(OsString::from).collect();
        arguments.extend(["--export=NIL", "--wrap=true"].map(OsString::from));
        match self.client.test(&arguments) {
            Err(Trouble::Refused(text)) => {
                let mut hint = format!("see `executors.{name}.slurm` in pipeline.config.yaml");
                let partitions = self.client.partitions();
                if text.contains("partition") && !partitions.is_empty() {
                    hint = format!("{hint}; its partitions are {}", partitions.join(", "));
                }
                bail!("the executor `{name}` can't take jobs of `{stage}`: {text}; hint: {hint}")
            }
            _ => Ok(()),
        }
    }

    /// The options of `sbatch` by which stages that are handled like this differ.
    pub(super) fn options_of(&self, handling: &Handling) -> Vec<String> {
        let settings = &self.cluster.settings;
        settings.options(&handling.resources, handling.timeout)
    }

    /// Brings what a job told and made, if its node does not see its folder. `over`: it may be all by now.
    fn bring(&self, job: &Job, task: &Task, control: &Control, over: bool) {
        if let (Some(away), Some(mirror)) = (self.away(), &job.mirror) {
            let mut mirror = mirror.lock().unwrap_or_else(PoisonError::into_inner);
            if over {
                mirror.hurry();
            }
            mirror.look(away, &job.folder, &task.stage, control);
        }
    }

    /// How a job ended, if it came to an end by itself.
    fn result(
        &self,
        job: &Job,
        task: &Task,
        control: &Control,
    ) -> anyhow::Result<Option<JobResult>> {
        self.bring(job, task, control, true);
        job.folder.result()
    }

    /// Joins the job of an earlier run that works on this task, or takes its result if it is done meanwhile. None if there is no such job
    /// any more; then what it left is where the next attempt finds it.
    pub(super) fn join(
        &self,
        folder: JobFolder,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<Option<TaskResult>> {
        let submitted = folder.submitted();
        let unknown = JobId {
            job: 0,
            element: None,
        };
        let mut job = self.job(folder, unknown)?;
        let Some(id) = self.id_of(submitted.as_ref(), &job, task, events, control)? else {
            let start = job.folder.last_start();
            Self::settle(&job, task, start, true);
            return Ok(None);
        };
        job.id = id;
        if !is_for(&job.folder, task) {
            tell(
                task,
                events,
                format!(
                    "job {id} of an earlier run is cancelled, because what it reads has changed since, or this run makes the result anew"
                ),
            );
            let stopped = Control::default();
            stopped.cancel();
            // Whatever it says, it is over.
            let _ = self.end(&job, task, &stopped);
            return Ok(None);
        }
        tell(
            task,
            events,
            format!("job {id} of an earlier run works on it; this run joins it"),
        );
        match self.follow(&job, task, events, control) {
            Err(error) if control.check().is_ok() => {
                let text = format!(
                    "job {id} of an earlier run failed, so the stage begins again: {error:#}"
                );
                tell(task, events, text);
                Ok(None)
            }
            result => result.map(Some),
        }
    }

    /// The number of the job of an earlier run, if it left a result or is not over yet.
    fn id_of(
        &self,
        submitted: Option<&Submitted>,
        job: &Job,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<Option<JobId>> {
        let Some(submitted) = submitted else {
            return Ok(None);
        };
        let mut told = false;
        loop {
            control.restart();
            control.check()?;
            let found = match submitted.id {
                Some(id) => Ok(Some(id)),
                None => self.client.find(&submitted.name),
            };
            let element = submitted.element;
            let id = |job| JobId { job, element };
            let state = found.and_then(|found| match found.map(id) {
                Some(id) => Ok(self.client.state(id)?.map(|state| (id, state))),
                None => Ok(None),
            });
            match state {
                Ok(state) => {
                    // Asked first: a job may end between the two questions.
                    if self.result(job, task, control)?.is_some() {
                        return Ok(Some(id(submitted.id.unwrap_or_default())));
                    }
                    return Ok(state
                        .filter(|(_, state)| !state.is_over())
                        .map(|(id, _)| id));
                }
                Err(trouble) if trouble.passes() => {
                    if !std::mem::replace(&mut told, true) {
                        let name = &self.cluster.name;
                        tell(task, events, format!("`{name}`: {trouble}; trying again"));
                    }
                    std::thread::sleep(PAUSE);
                }
                Err(trouble) => {
                    let name = &self.cluster.name;
                    return Err(anyhow!(trouble))
                        .with_context(|| format!("the executor `{name}` can't be asked"));
                }
            }
        }
    }

    /// Puts away what a job that is over left: its scratch folder where the next attempt looks for it.
    /// `alive`: processes of it may still write there, on a node that nobody hears of.
    fn settle(job: &Job, task: &Task, start: u32, alive: bool) {
        let folder = &job.folder;
        if let Some(mirror) = &job.mirror {
            let mirror = mirror.lock().unwrap_or_else(PoisonError::into_inner);
            mirror.clear();
        }
        // If one of these fails, the next attempt begins from nothing, which costs time only.
        let _ = folder.retire();
        let _ = folder.give_back_scratch(start, &task.scratch, alive);
        folder.discard();
    }
}

/// Tells a sentence about a stage.
fn tell(task: &Task, events: &Arc<StageEvents>, text: String) {
    events.send(Event::Message {
        stage: task.stage.clone(),
        level: Level::Info,
        text,
    });
}

/// The folder for jobs of a task: beside the one with scratch folders, under the same name.
pub(super) fn folder_of(task: &Task) -> PathBuf {
    let scratch = Path::new(&task.scratch);
    store_of(task)
        .join("jobs")
        .join(scratch.file_name().unwrap_or_default())
}

/// The folder of the store in which a task's scratch folder is.
pub(super) fn store_of(task: &Task) -> &Path {
    let scratch = Path::new(&task.scratch);
    scratch.parent().and_then(Path::parent).unwrap_or(scratch)
}

/// Whether the job of an earlier run does what this task asks for: it reads the same files, which were not touched meanwhile, and starts
/// from no more than this may.
fn is_for(folder: &JobFolder, task: &Task) -> bool {
    folder.task().is_ok_and(|left| {
        left.kind == task.kind
            && left.inputs == task.inputs
            && left.sources == task.sources
            && left.seen == task.seen
            && left.outside == task.outside
            && (left.continuations.is_none() || left.continuations == task.continuations)
    })
}
