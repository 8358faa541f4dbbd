//! Follows a job to its end, and explains why it has none.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::super::super::control::Control;
use super::super::super::event::{Event, check_version};
use super::super::super::job::{EventReader, JobFolder, JobResult};
use super::super::super::stage_events::StageEvents;
use super::super::super::task::{Task, error};
use super::super::TaskResult;
use super::client::{JobId, JobState, Trouble};
use super::explain::SAYS;
use super::queue::Look;
use super::{Job, Slurm, tell};

/// The first pause between two reads of the job's folder. Each next one is longer by a quarter, up to [`LONGEST_TICK`], until there is news.
const TICK: Duration = Duration::from_millis(50);
const LONGEST_TICK: Duration = Duration::from_secs(1);
/// How long the result of a job that is over may take to appear here, since file servers have caches.
const LATENCY: Duration = Duration::from_secs(5);
const LATENCY_OF_SUCCESS: Duration = Duration::from_mins(1);
/// How long to wait for a remote that does not answer, once the job is over and its result may be there.
const LONGEST_SILENCE: Duration = Duration::from_mins(15);
/// After this time in the queue a stage says that it waits.
const QUIET: Duration = Duration::from_secs(15);
/// How long a cancelled job may take to end. Slurm kills jobs that don't stop by themselves.
const LONGEST_END: Duration = Duration::from_mins(3);

/// How a job ended.
enum End {
    /// By itself.
    Result(Box<JobResult>),
    /// The script did not start the stage.
    Refused(String),
    /// Without a result, in this state; `None` if Slurm no longer knows the job.
    Lost(Option<JobState>),
}

/// Counts a job as submitted for as long as it lives.
struct Counted<'a>(&'a Slurm, JobId);

impl<'a> Counted<'a> {
    fn new(slurm: &'a Slurm, id: JobId) -> Self {
        slurm.queue.add(id);
        slurm.jobs.count.fetch_add(1, Ordering::Relaxed);
        Self(slurm, id)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.queue.remove(self.1);
        self.0.jobs.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Slurm {
    /// Follows a job to its end, passes its events on, and takes its result.
    pub(super) fn follow(
        &self,
        job: &Job,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        let _counted = Counted::new(self, job.id);
        let mut reader = EventReader::default();
        let mut version = Ok(());
        let mut read = |reader: &mut EventReader| {
            reader.read(&job.folder, &mut |event| match event {
                Event::WorkStarted {
                    version: of,
                    pipeline,
                } if version.is_ok() => {
                    version = check_version(of, &pipeline);
                }
                Event::WorkStarted { .. } | Event::WorkDone { .. } | Event::WorkFailed { .. } => {}
                event => events.send(event),
            })
        };
        let mut tick = TICK;
        let mut seen = Seen::new();
        let end = loop {
            std::thread::sleep(tick);
            self.bring(job, task, control, seen.over.is_some());
            seen.silence(job, task, events);
            tick = if read(&mut reader) {
                TICK
            } else {
                (tick * 5 / 4).min(LONGEST_TICK)
            };
            if let Some(result) = job.folder.result()? {
                // What came between the two looks.
                read(&mut reader);
                break End::Result(Box::new(result));
            }
            if let Some(why) = job.folder.refused() {
                break End::Refused(why);
            }
            if let Err(stopped) = control.check() {
                if control.is_cancelled() && self.jobs.are_left() {
                    let text = format!(
                        "job {} goes on by itself; the same command comes back to it",
                        job.id
                    );
                    tell(task, events, text);
                    return Err(stopped);
                }
                let done = self.end(job, task, control);
                read(&mut reader);
                return done.unwrap_or(Err(stopped));
            }
            if job.folder.last_start() == 0 {
                // What waits in the queue takes none of its time.
                control.restart();
            }
            match self.queue.look(&self.client, job.id) {
                Look::Nothing => {}
                Look::Trouble(trouble) => seen.trouble(self, task, events, &trouble),
                Look::Unknown => {
                    if seen.is_over_for(LATENCY) && !may_come(job) {
                        break End::Lost(None);
                    }
                }
                Look::State(state) if state.is_over() => {
                    let said = state.comment.strip_prefix(SAYS);
                    if let Some(said) = said.filter(|_| seen.is_over_for(LATENCY)) {
                        break End::Refused(said.to_owned());
                    }
                    let latency = if state.state == "COMPLETED" {
                        LATENCY_OF_SUCCESS
                    } else {
                        LATENCY
                    };
                    if seen.is_over_for(latency) && !may_come(job) {
                        break End::Lost(Some(state));
                    }
                }
                Look::State(state) => seen.state(job, task, events, &state),
            }
        };
        if let (End::Result(_), Err(other)) = (&end, version) {
            Self::settle(job, task, 0, false);
            return Err(other);
        }
        Self::take(job, task, end)
    }

    /// Takes the result of a job that is over, or returns why it has none.
    fn take(job: &Job, task: &Task, end: End) -> anyhow::Result<TaskResult> {
        let folder = &job.folder;
        let result = match end {
            End::Refused(why) => {
                Self::settle(job, task, 0, false);
                return Err(anyhow!(why));
            }
            End::Lost(state) => {
                let why = lost(job, state.as_ref());
                let alive = state.is_none_or(|state| state.state.ends_with("NODE_FAIL"));
                Self::settle(job, task, folder.last_start(), alive);
                return Err(why);
            }
            End::Result(result) => *result,
        };
        let JobResult {
            start,
            event,
            content,
        } = result;
        let taken =
            match event {
                Event::WorkDone { notes, written } => folder
                    .give_back_output(start, &task.out)
                    .map(|()| TaskResult {
                        notes,
                        written,
                        content,
                    }),
                Event::WorkFailed {
                    causes,
                    disk_full,
                    lasting,
                } => {
                    // For people to look at.
                    let _ = folder.give_back_output(start, &task.out);
                    Err(error(causes, disk_full, lasting))
                }
                _ => Err(anyhow!("the result of job {} is none", job.id)),
            };
        Self::settle(job, task, start, false);
        taken
    }

    /// Cancels a job and waits for its end. Returns its result if it was done before that. What it saved stays for the next attempt.
    pub(super) fn end(
        &self,
        job: &Job,
        task: &Task,
        control: &Control,
    ) -> Option<anyhow::Result<TaskResult>> {
        let start = Instant::now();
        let mut asked = false;
        loop {
            if let Ok(Some(result)) = self.result(job, task, control) {
                let taken = Self::take(job, task, End::Result(Box::new(result)));
                return (!control.is_cancelled()).then_some(taken);
            }
            asked = asked || self.client.cancel(job.id).is_ok();
            let over = match self.client.state(job.id) {
                Ok(state) => state.is_none_or(|state| state.is_over()),
                Err(_) => false,
            };
            if asked && over && matches!(job.folder.result(), Ok(None)) {
                Self::settle(job, task, job.folder.last_start(), false);
                return None;
            }
            if start.elapsed() > LONGEST_END {
                // The next run finds it where it is.
                return Some(Err(anyhow!(
                    "job {} could not be cancelled; the same command comes back to it",
                    job.id
                )));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Why the remote could not be read, and since when, if the job's events come through a remote.
fn silence(job: &Job) -> Option<(Instant, String)> {
    let mirror = job.mirror.as_ref()?.lock();
    let mirror = mirror.unwrap_or_else(PoisonError::into_inner);
    mirror.trouble().cloned()
}

/// Whether the result of a job that is over may still come through a remote that does not answer at the moment.
fn may_come(job: &Job) -> bool {
    silence(job).is_some_and(|(since, _)| since.elapsed() < LONGEST_SILENCE)
}

/// What has been seen of a job, and which messages about it were sent.
struct Seen {
    start: Instant,
    over: Option<Instant>,
    waits: bool,
    nodes: String,
    trouble: bool,
    /// Whether a message said that the remote does not answer.
    silent: bool,
}

impl Seen {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            over: None,
            waits: false,
            nodes: String::new(),
            trouble: false,
            silent: false,
        }
    }

    /// Whether the job has been over for that long.
    fn is_over_for(&mut self, latency: Duration) -> bool {
        self.over.get_or_insert_with(Instant::now).elapsed() >= latency
    }

    /// Sends one message if the remote does not answer.
    fn silence(&mut self, job: &Job, task: &Task, events: &Arc<StageEvents>) {
        match silence(job) {
            None => self.silent = false,
            Some((since, why)) => {
                if since.elapsed() > QUIET && !std::mem::replace(&mut self.silent, true) {
                    let id = job.id;
                    let text = format!(
                        "nothing comes from job {id} through the remote: {why}; the job goes on"
                    );
                    tell(task, events, text);
                }
            }
        }
    }

    /// Sends one message if the controller does not answer.
    fn trouble(
        &mut self,
        slurm: &Slurm,
        task: &Task,
        events: &Arc<StageEvents>,
        trouble: &Trouble,
    ) {
        if !std::mem::replace(&mut self.trouble, true) {
            let name = &slurm.cluster.name;
            tell(task, events, format!("`{name}`: {trouble}; its jobs go on"));
        }
    }

    /// Sends one message about why the job waits, and one about where it runs.
    fn state(&mut self, job: &Job, task: &Task, events: &Arc<StageEvents>, state: &JobState) {
        self.over = None;
        self.trouble = false;
        if state.is_waiting() {
            if self.start.elapsed() > QUIET && !std::mem::replace(&mut self.waits, true) {
                let text = format!("job {} waits in the queue ({})", job.id, state.reason);
                tell(task, events, text);
            }
        } else if !state.nodes.is_empty() && self.nodes != state.nodes {
            self.nodes.clone_from(&state.nodes);
            tell(
                task,
                events,
                format!("job {} runs on {}", job.id, state.nodes),
            );
        }
    }
}

/// The error of a job that left no result.
fn lost(job: &Job, state: Option<&JobState>) -> anyhow::Error {
    let id = job.id;
    let far = job.mirror.is_some();
    if let Some((_, why)) = silence(job) {
        return anyhow!(
            "its job {id} is over, and its result could not be fetched from the remote: {why}"
        );
    }
    let words = |folder: &JobFolder| {
        let words = folder.last_words();
        words.map_or_else(String::new, |words| format!(", and wrote: {words}"))
    };
    let Some(JobState {
        state,
        reason,
        nodes,
        ..
    }) = state
    else {
        return anyhow!(
            "its job {id} is gone and left no result{}",
            words(&job.folder)
        );
    };
    // Where Slurm itself looks at what jobs take (`OverMemoryKill`), it ends them as failed, and says why in their log alone.
    let starved = job.folder.last_words();
    let starved = starved.is_some_and(|words| words.contains("Exceeded job memory limit"));
    match state.as_str() {
        "TIMEOUT" => anyhow!(
            "its job {id} reached its time limit and was ended; hint: `timeout` beside the stage, or `time` of the executor, asks for more"
        ),
        state if state == "OUT_OF_MEMORY" || starved => anyhow!(
            "its job {id} used more memory than it was given and was ended; hint: `resources: {{ memory: .. }}` beside the stage asks \
             for more"
        ),
        "NODE_FAIL" | "BOOT_FAIL" => anyhow!(
            "the node `{nodes}` of its job {id} was lost ({state}); hint: `retries` beside the stage tries again elsewhere"
        ),
        "PREEMPTED" => anyhow!(
            "its job {id} had to make way for another one (PREEMPTED); hint: `retries` beside the stage tries again"
        ),
        "CANCELLED" => anyhow!("its job {id} was cancelled by somebody else"),
        "COMPLETED" if far => {
            anyhow!("its job {id} ended well, but its result is not in the remote")
        }
        "COMPLETED" => anyhow!(
            "its job {id} ended well, but its result is not to be seen in `{}`; hint: the folder of results has to be on a file system \
             that this machine shares with the nodes",
            job.folder.path().display()
        ),
        _ if far && job.folder.last_start() == 0 => anyhow!(
            "its job {id} on `{nodes}` could not start ({state}, {reason}); hint: its nodes have to reach the remote, with the \
             credentials of this machine or their own"
        ),
        _ if job.folder.last_start() == 0 && job.folder.last_words().is_none() => anyhow!(
            "its job {id} on `{nodes}` could not start ({state}, {reason}); hint: the folder of results, `{}`, has to be on a file system \
             that this machine shares with the nodes",
            job.folder.path().display()
        ),
        _ => anyhow!(
            "its job {id} on `{nodes}` ended without a result ({state}, {reason}){}",
            words(&job.folder)
        ),
    }
}
