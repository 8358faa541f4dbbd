//! Calls Slurm's own programs and interprets their output.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display};
use std::io::{BufRead as _, BufReader, ErrorKind, Read};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::super::super::Control;

/// How long one of Slurm's programs may take. They give up after some ten seconds when no controller answers.
const PATIENCE: Duration = Duration::from_secs(30);
/// What `sbatch` says when the queue is full. It would try again for two minutes; the runner does that itself, and takes fewer jobs at a time.
const RETRIES: &str = "sleeping and retrying";
/// The interval at which a running program is checked.
const TICK: Duration = Duration::from_millis(10);
/// How many bytes of a program's output are read.
const LONGEST: u64 = 64 << 20;

/// The largest array if `scontrol` does not say it: Slurm's default, `MaxArraySize=1001`.
const LARGEST_ARRAY: usize = 1001;

/// The ID of a job, or of one element of an array of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct JobId {
    /// The number of the job, or of the array.
    pub(super) job: u64,
    /// The element of the array.
    pub(super) element: Option<u32>,
}

impl Display for JobId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.element {
            Some(element) => write!(formatter, "{}_{element}", self.job),
            None => write!(formatter, "{}", self.job),
        }
    }
}

impl JobId {
    /// Parses an ID as Slurm's programs print it.
    fn parse(text: &str) -> Option<Self> {
        let (job, element) = match text.split_once('_') {
            Some((job, element)) => (job, Some(element.parse().ok()?)),
            None => (text, None),
        };
        let job = job.parse().ok()?;
        Some(Self { job, element })
    }
}

/// Why one of Slurm's programs failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    /// No controller answers.
    #[error("the controller does not answer: {0}")]
    Away(String),
    /// The queue takes no more jobs at present.
    #[error("the queue takes no more jobs now: {0}")]
    Full(String),
    /// The request will never succeed.
    #[error("{0}")]
    Refused(String),
    /// The run was interrupted.
    #[error("interrupted")]
    Stopped,
}

impl Trouble {
    /// Whether the same request may succeed later.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Self::Away(_) | Self::Full(_))
    }
}

/// What Slurm says of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobState {
    /// The state, such as `RUNNING`.
    pub(super) state: String,
    /// Why it is in this state, such as `Resources`; empty where there is nothing to say.
    pub(super) reason: String,
    /// The nodes that it runs or ran on.
    pub(super) nodes: String,
    /// Its comment. A job that shares no folder with the runner says here why it did not start its stage.
    pub(super) comment: String,
}

impl JobState {
    /// Whether the job is over.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.state.as_str(),
            "BOOT_FAIL"
                | "CANCELLED"
                | "COMPLETED"
                | "DEADLINE"
                | "FAILED"
                | "NODE_FAIL"
                | "OUT_OF_MEMORY"
                | "PREEMPTED"
                | "REVOKED"
                | "TIMEOUT"
        )
    }

    /// Whether the job waits to be started.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(
            self.state.as_str(),
            "PENDING"
                | "CONFIGURING"
                | "REQUEUED"
                | "REQUEUE_HOLD"
                | "REQUEUE_FED"
                | "SPECIAL_EXIT"
        )
    }
}

/// Calls Slurm's programs.
pub(super) struct Client {
    /// Environment variables of the job that the runner itself may run in. Slurm would take them for settings of new jobs.
    unset: Vec<OsString>,
    /// Environment variables that `sbatch` does not pass on to jobs that get its environment.
    private: Vec<OsString>,
    largest_array: OnceLock<usize>,
}

/// The environment of one of Slurm's programs.
enum Surroundings<'a> {
    /// That of the runner, without the variables of the job that it may run in.
    Own,
    /// Slurm's settings and these variables, and nothing else.
    Job(&'a BTreeMap<String, String>),
}

impl Client {
    /// A client that removes the variables in `unset` from the environment of every program, and those in `private` where jobs get the
    /// environment of `sbatch`.
    pub(super) fn new(unset: Vec<OsString>, private: Vec<OsString>) -> Self {
        Self {
            unset,
            private,
            largest_array: OnceLock::new(),
        }
    }

    /// Submits a script, and returns the number of the job, or of the array. With `environment`, the job gets those variables from `sbatch`
    /// itself.
    pub(super) fn submit(
        &self,
        arguments: &[OsString],
        environment: Option<&BTreeMap<String, String>>,
        control: &Control,
    ) -> Result<u64, Trouble> {
        let surroundings = environment.map_or(Surroundings::Own, Surroundings::Job);
        let answer = self.call_in(&surroundings, "sbatch", arguments, Some(control))?;
        // With several clusters the name of one stands behind it.
        let number = answer.trim().split(';').next().unwrap_or_default();
        number.parse().map_err(|_| {
            Trouble::Refused(format!(
                "sbatch answered `{}`, no number of a job",
                answer.trim()
            ))
        })
    }

    /// Checks whether Slurm would accept a job with these arguments, without submitting one.
    pub(super) fn test(&self, arguments: &[OsString]) -> Result<(), Trouble> {
        let mut all = vec![OsString::from("--test-only")];
        all.extend_from_slice(arguments);
        self.call("sbatch", &all, None).map(drop)
    }

    /// The names of all partitions, sorted.
    pub(super) fn partitions(&self) -> Vec<String> {
        let arguments = ["--noheader", "--format=%R"].map(OsString::from);
        let answer = self.call("sinfo", &arguments, None).unwrap_or_default();
        let mut names: Vec<String> = answer.split_whitespace().map(str::to_owned).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The largest number of elements that an array of jobs may have.
    pub(super) fn largest_array(&self) -> usize {
        *self.largest_array.get_or_init(|| {
            let told = self.call("scontrol", &["show", "config"], None);
            let told = told.unwrap_or_default();
            let line = told.lines().find(|line| line.starts_with("MaxArraySize"));
            let size = line.and_then(|line| line.split_once('=')?.1.trim().parse().ok());
            // It is one more than the largest number of an element. 0 means that there are no arrays.
            size.unwrap_or(LARGEST_ARRAY).max(1)
        })
    }

    /// What Slurm says of a job.
    pub(super) fn state(&self, id: JobId) -> Result<Option<JobState>, Trouble> {
        let found = self.list(&format!("--jobs={id}"))?;
        let own = found.into_iter().find(|(found, _)| *found == id);
        Ok(own.map(|(_, state)| state))
    }

    /// What Slurm says of these jobs. Jobs that it does not know are left out, and other elements of their arrays may be among the results.
    pub(super) fn states(&self, jobs: &BTreeSet<JobId>) -> Result<Vec<(JobId, JobState)>, Trouble> {
        // Of an array all at once: a thousand elements are more than a command line should have.
        let jobs: BTreeSet<u64> = jobs.iter().map(|id| id.job).collect();
        let jobs: Vec<String> = jobs.iter().map(u64::to_string).collect();
        self.list(&format!("--jobs={}", jobs.join(",")))
    }

    /// The number of the job or the array with this name, if Slurm knows one.
    pub(super) fn find(&self, name: &str) -> Result<Option<u64>, Trouble> {
        let found = self.list(&format!("--name={name}"))?;
        Ok(found.into_iter().map(|(id, _)| id.job).max())
    }

    fn list(&self, which: &str) -> Result<Vec<(JobId, JobState)>, Trouble> {
        let arguments = [
            "--noheader",
            "--array",
            "--states=all",
            "--format=%i|%T|%r|%N|%k",
            which,
        ]
        .map(OsString::from);
        match self.call("squeue", &arguments, None) {
            Ok(answer) => Ok(answer.lines().filter_map(job).collect()),
            // It says so of a single job, and leaves an unknown one out of several.
            Err(Trouble::Refused(text)) if text.contains("Invalid job id") => Ok(Vec::new()),
            Err(trouble) => Err(trouble),
        }
    }

    /// Cancels a job, or all elements of an array if given its number.
    pub(super) fn cancel(&self, job: impl Display) -> Result<(), Trouble> {
        match self.call("scancel", &[job.to_string()], None) {
            // It is over already.
            Err(Trouble::Refused(text)) if text.contains("Invalid job id") => Ok(()),
            answer => answer.map(drop),
        }
    }

    fn call(
        &self,
        program: &str,
        arguments: &[impl AsRef<OsStr>],
        control: Option<&Control>,
    ) -> Result<String, Trouble> {
        self.call_in(&Surroundings::Own, program, arguments, control)
    }

    /// Runs a program to its end, and returns its standard output.
    fn call_in(
        &self,
        surroundings: &Surroundings<'_>,
        program: &str,
        arguments: &[impl AsRef<OsStr>],
        control: Option<&Control>,
    ) -> Result<String, Trouble> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for variable in &self.unset {
            command.env_remove(variable);
        }
        if let Surroundings::Job(variables) = surroundings {
            for variable in &self.private {
                command.env_remove(variable);
            }
            command.envs(variables.iter());
        }
        let mut child = command.spawn().map_err(|error| {
            Trouble::Refused(match error.kind() {
                ErrorKind::NotFound => {
                    format!(
                        "there is no `{program}` on this machine, which is needed to submit jobs"
                    )
                }
                _ => format!("could not start `{program}`: {error}"),
            })
        })?;
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let retries = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // They end with the program.
            let output = scope.spawn(|| text(output));
            let errors = scope.spawn(|| complaints(errors, &retries));
            let ended = wait(&mut child, control, &retries);
            let output = output.join().unwrap_or_default();
            let errors = errors.join().unwrap_or_default();
            match ended? {
                Some(true) => Ok(output),
                Some(false) => Err(trouble(program, &errors)),
                None => Err(match trouble(program, &errors) {
                    Trouble::Refused(_) => Trouble::Away(format!(
                        "`{program}` took longer than {} s",
                        PATIENCE.as_secs()
                    )),
                    trouble => trouble,
                }),
            }
        })
    }
}

/// Waits for a program to end. Returns whether it succeeded, or `None` if it took too long or `retries` what it did.
fn wait(
    child: &mut Child,
    control: Option<&Control>,
    retries: &AtomicBool,
) -> Result<Option<bool>, Trouble> {
    let start = Instant::now();
    let stop = |child: &mut Child| {
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    };
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(Some(status.success())),
            Ok(None) => {}
            Err(error) => {
                stop(child);
                return Err(Trouble::Refused(error.to_string()));
            }
        }
        if control.is_some_and(|control| control.check().is_err()) {
            stop(child);
            return Err(Trouble::Stopped);
        }
        if start.elapsed() > PATIENCE || retries.load(Ordering::Relaxed) {
            stop(child);
            return Ok(None);
        }
        std::thread::sleep(TICK);
    }
}

/// Reads everything that a program writes into a pipe.
fn text(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(LONGEST).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads all that a program complains of; sets `retries` as soon as it says that it tries again.
fn complaints(pipe: Option<impl Read>, retries: &AtomicBool) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let mut lines = BufReader::new(pipe.take(LONGEST));
        let mut start = 0;
        while lines
            .read_until(b'\n', &mut bytes)
            .is_ok_and(|read| read > 0)
        {
            let line = String::from_utf8_lossy(&bytes[start..]);
            if line.contains(RETRIES) {
                retries.store(true, Ordering::Relaxed);
            }
            start = bytes.len();
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Parses a line of `squeue`.
fn job(line: &str) -> Option<(JobId, JobState)> {
    // The last one may have anything in it.
    let mut parts = line.trim().splitn(5, '|');
    let id = JobId::parse(parts.next()?)?;
    let mut next = || {
        let part = parts.next().unwrap_or_default().trim();
        let nothing = matches!(part, "None" | "(null)");
        if nothing { "" } else { part }.to_owned()
    };
    let (state, reason, nodes, comment) = (next(), next(), next(), next());
    Some((
        id,
        JobState {
            state,
            reason,
            nodes,
            comment,
        },
    ))
}

/// Classifies what one of Slurm's programs wrote to standard error.
fn trouble(program: &str, errors: &str) -> Trouble {
    const AWAY: [&str; 8] = [
        "Unable to contact slurm controller",
        "Unable to establish controller machine",
        "Connection refused",
        "Socket timed out",
        "Communication connection failure",
        "Zero Bytes were transmitted",
        "Slurm backup controller",
        "Slurm controller not responding",
    ];
    const FULL: [&str; 5] = [
        "temporarily unable to accept job",
        "job queue full",
        "Resource temporarily unavailable",
        "MaxSubmitJob",
        "Unable to accept new jobs",
    ];
    let about = |words: &[&str]| words.iter().any(|words| errors.contains(words));
    // The last line sums up; those before may say which limit it was.
    let mut lines: Vec<&str> = errors
        .lines()
        .map(|line| {
            let line = line.trim();
            let line = line.strip_prefix(program).unwrap_or(line);
            let line = line.strip_prefix(": ").unwrap_or(line);
            line.strip_prefix("error: ").unwrap_or(line)
        })
        .filter(|line| !line.is_empty())
        .collect();
    lines.dedup();
    let text = match lines[..] {
        [] => format!("`{program}` failed and said nothing"),
        _ => lines[lines.len().saturating_sub(3)..].join("; "),
    };
    if about(&AWAY) {
        Trouble::Away(text)
    } else if about(&FULL) {
        Trouble::Full(text)
    } else {
        Trouble::Refused(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_apart() {
        let away = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n";
        assert_eq!(
            trouble("sbatch", away),
            Trouble::Away(
                "Batch job submission failed: Unable to contact slurm controller (connect failure)"
                    .into()
            )
        );
        let full = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates \
                    accounting/QOS policy (job submit limit, user's size and/or time limits)\n";
        assert!(trouble("sbatch", full).passes());
        let full = "sbatch: error: Slurm job queue full, sleeping and retrying\n";
        assert!(matches!(trouble("sbatch", full), Trouble::Full(_)));
        let wrong = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition name specified\n";
        let wrong = trouble("sbatch", wrong);
        assert!(!wrong.passes() && wrong.to_string().starts_with("invalid partition"));
        assert!(trouble("sbatch", "").to_string().contains("said nothing"));
    }

    #[test]
    fn a_program_that_says_that_it_tries_again_is_not_waited_for() {
        let client = Client::new(Vec::new(), Vec::new());
        let script = "echo Slurm temporarily unable to accept job, sleeping and retrying >&2; sleep 20 >/dev/null 2>&1; echo 7";
        let answer = client.call("sh", &["-c", script], None);
        assert!(matches!(answer, Err(Trouble::Full(_))), "{answer:?}");
    }

    #[test]
    fn lines_of_the_queue_are_read() {
        let (id, state) = job("17|PENDING|Resources||(null)\n").unwrap();
        assert_eq!(id.to_string(), "17");
        assert!(state.is_waiting() && !state.is_over() && state.comment.is_empty());
        assert_eq!(state.reason, "Resources");
        let (id, state) = job("18_3|NODE_FAIL|None|n2|a|b").unwrap();
        assert_eq!((id.job, id.element), (18, Some(3)));
        assert!(state.is_over() && state.reason.is_empty() && state.nodes == "n2");
        assert_eq!(state.comment, "a|b");
        assert_eq!(job("18_[3-5]|PENDING|None||"), None);
        assert_eq!(job("slurm_load_jobs error"), None);
    }
}
