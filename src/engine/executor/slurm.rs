//! Runs a task as a job of Slurm: submits it, follows the events that it writes into its folder of the store, and takes its result.
//!
//! What counts is the job's own result, in the store that the nodes share, never what Slurm says of the job. Slurm is asked only to
//! tell a job that will leave no result from one that is still to come, and to say why. The runner holds the lock of the result all
//! the time; the job needs no lock. Where the runner goes away, the next one takes the lock, finds the job's folder, and joins the job
//! instead of submitting another.

mod client;
mod follow;
mod queue;
mod script;
mod settings;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::super::control::Control;
use super::super::event::{Event, Level};
use super::super::files::write_atomically;
use super::super::job::{ENVIRONMENT, JobFolder, LOG, SCRIPT, Submitted};
use super::super::stage_events::StageEvents;
use super::super::task::Task;
use super::super::{Handling, RunEnv};
use super::{Executor, TaskResult};
use client::{Client, Trouble};
use queue::Queue;
pub use settings::SlurmSettings;

/// How long a submission is tried while no controller answers.
const LONGEST_SILENCE: Duration = Duration::from_mins(15);
/// The pause between two tries to submit; each is longer by half, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
}

/// Runs tasks as jobs of a Slurm cluster.
pub(in crate::engine) struct Slurm {
    cluster: Cluster,
    env: Arc<RunEnv>,
    jobs: Arc<Jobs>,
    client: Client,
    queue: Queue,
}

/// A job that was submitted.
struct Job {
    folder: JobFolder,
    id: u64,
}

impl Executor for Slurm {
    fn execute(
        &self,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        let folder = JobFolder::create(&folder_of(task))?;
        let job = match self.submit(folder.clone(), task, events, control) {
            Ok(job) => job,
            Err(error) => {
                // What is left of it is nobody's.
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
        let client = Client::new(std::mem::take(&mut cluster.unset));
        Self {
            cluster,
            env,
            jobs,
            client,
            queue: Queue::default(),
        }
    }

    /// The most jobs of a run that may be in the queue.
    pub(in crate::engine) fn most_jobs(&self) -> usize {
        self.cluster.settings.jobs()
    }

    /// An error if the cluster would never take the jobs of a stage that is handled like this. A controller that does not answer is none:
    /// the submission itself waits for it.
    pub(super) fn check(&self, stage: &str, handling: &Handling) -> anyhow::Result<()> {
        let options = self.options_of(handling);
        let mut arguments: Vec<OsString> = options.into_iter().map(OsString::from).collect();
        arguments.extend(["--export=NIL", "--wrap=true"].map(OsString::from));
        match self.client.test(&arguments) {
            Err(Trouble::Refused(text)) => {
                let name = &self.cluster.name;
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

    /// Submits a job, trying until Slurm takes it.
    fn submit(
        &self,
        folder: JobFolder,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<Job> {
        let name = self.job_name(task, &folder);
        let submitted = |id| Submitted {
            executor: self.cluster.name.clone(),
            id,
            name: name.clone(),
        };
        let path = folder.path();
        let environment = script::environment(task, &self.env, &self.cluster.settings.env);
        folder.write_private(ENVIRONMENT, &environment)?;
        let script = script::script(path, &self.cluster.program, &task.stage);
        folder.write_private(SCRIPT, &script)?;
        note_scratch(task);
        // From here on a runner that comes after this one looks for the job by its name.
        folder.write_submitted(&submitted(None))?;
        folder.write_task(task)?;
        let fixed = ["--parsable", "--export=NIL", "--open-mode=append"];
        let mut arguments: Vec<OsString> = fixed.map(OsString::from).into();
        arguments.push(format!("--job-name={name}").into());
        arguments.push(format!("--output={LOG}").into());
        let mut chdir = OsString::from("--chdir=");
        chdir.push(path);
        arguments.push(chdir);
        let options = (self.cluster.settings).options(&task.resources, task.timeout);
        arguments.extend(options.into_iter().map(OsString::from));
        arguments.push(path.join(SCRIPT).into_os_string());
        let mut silence: Option<Instant> = None;
        let mut told = false;
        let mut pause = PAUSE;
        let id = loop {
            // What waits to be submitted takes none of its time.
            control.restart();
            let trouble = match control.check() {
                Ok(()) => self.client.submit(&arguments, control),
                Err(_) => Err(Trouble::Stopped),
            };
            let trouble = match trouble {
                Ok(id) => break id,
                Err(Trouble::Stopped) => {
                    self.take_back(&name);
                    control.check()?;
                    bail!("interrupted");
                }
                Err(trouble) => trouble,
            };
            if !trouble.passes() {
                bail!(
                    "the executor `{}` did not take its job: {trouble}",
                    self.cluster.name
                );
            }
            if matches!(trouble, Trouble::Away(_)) {
                let since = *silence.get_or_insert_with(Instant::now);
                if since.elapsed() > LONGEST_SILENCE {
                    bail!(
                        "the executor `{}` did not take its job: {trouble}",
                        self.cluster.name
                    );
                }
            } else {
                silence = None;
            }
            if !std::mem::replace(&mut told, true) {
                let name = &self.cluster.name;
                tell(task, events, format!("`{name}`: {trouble}; trying again"));
            }
            let until = Instant::now() + pause;
            while Instant::now() < until && control.check().is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
            // The answer may have been lost, and not the question.
            if let Ok(Some(id)) = self.client.find(&name) {
                break id;
            }
        };
        folder.write_submitted(&submitted(Some(id)))?;
        Ok(Job { folder, id })
    }

    /// Cancels a job that may have been submitted, or not.
    fn take_back(&self, name: &str) {
        if let Ok(Some(id)) = self.client.find(name) {
            // Without its task it would do nothing.
            let _ = self.client.cancel(id);
        }
    }

    /// The name in Slurm's lists: recipe, stage, and what no other job has.
    fn job_name(&self, task: &Task, folder: &JobFolder) -> String {
        let plain = |text: &str| -> String {
            let safe = |c: char| {
                if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '=') {
                    c
                } else {
                    '_'
                }
            };
            text.chars().take(60).map(safe).collect()
        };
        let (recipe, stage) = (plain(&self.cluster.recipe), plain(&task.stage));
        format!("{recipe}.{stage}.{}", folder.name())
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
        let Some(id) = self.id_of(submitted.as_ref(), &folder, task, events, control)? else {
            Self::settle(&folder, task, folder.last_start(), true);
            return Ok(None);
        };
        let job = Job { folder, id };
        if !is_for(&job.folder, task) {
            tell(
                task,
                events,
                format!(
                    "job {id} of an earlier run is cancelled, because what it reads was changed meanwhile, or it was to be made anew"
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
                    "job {id} of an earlier run failed, so that it begins again: {error:#}"
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
        folder: &JobFolder,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<Option<u64>> {
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
            let state = found.and_then(|id| match id {
                Some(id) => Ok(self.client.states(&[id])?.pop()),
                None => Ok(None),
            });
            match state {
                Ok(state) => {
                    // Asked first: a job may end between the two questions.
                    if folder.result()?.is_some() {
                        return Ok(Some(submitted.id.unwrap_or_default()));
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
    fn settle(folder: &JobFolder, task: &Task, start: u32, alive: bool) {
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
    let store = scratch.parent().and_then(Path::parent).unwrap_or(scratch);
    store
        .join("jobs")
        .join(scratch.file_name().unwrap_or_default())
}

/// Writes beside the scratch folder whose it is, for `gc`.
fn note_scratch(task: &Task) {
    let note = Path::new(&task.scratch).with_extension("json");
    if !task.scratch_note.is_empty() && !note.exists() {
        let _ = write_atomically(&note, &task.scratch_note);
    }
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
