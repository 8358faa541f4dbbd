//! Slurm's own programs: how they are called, and what their answers mean.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::super::Control;

/// How long one of Slurm's programs may take. They give up by themselves after some ten seconds when no controller answers; `sbatch` waits
/// minutes when the queue is full.
const PATIENCE: Duration = Duration::from_secs(30);
/// The interval at which a running program is checked.
const TICK: Duration = Duration::from_millis(10);
/// The most bytes of an answer.
const LONGEST: u64 = 64 << 20;

/// Why Slurm did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    /// No controller answers.
    #[error("the controller does not answer: {0}")]
    Away(String),
    /// No more jobs are taken now.
    #[error("the queue takes no more jobs now: {0}")]
    Full(String),
    /// It will never do it.
    #[error("{0}")]
    Refused(String),
    /// The run was told to stop meanwhile.
    #[error("interrupted")]
    Stopped,
}

impl Trouble {
    /// Whether the same may go well later.
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
    /// The nodes it has, or had.
    pub(super) nodes: String,
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
    /// Variables of the job that the runner itself may be in, which would be taken for settings of new jobs.
    unset: Vec<OsString>,
}

impl Client {
    /// Without these variables of the environment.
    pub(super) fn new(unset: Vec<OsString>) -> Self {
        Self { unset }
    }

    /// Submits a script, and gives the job's number.
    pub(super) fn submit(&self, arguments: &[OsString], control: &Control) -> Result<u64, Trouble> {
        let answer = self.call("sbatch", arguments, Some(control))?;
        // With several clusters the name of one stands behind it.
        let number = answer.trim().split(';').next().unwrap_or_default();
        number.parse().map_err(|_| {
            Trouble::Refused(format!(
                "sbatch answered `{}`, no number of a job",
                answer.trim()
            ))
        })
    }

    /// Whether a job like this would be taken. Nothing is submitted.
    pub(super) fn test(&self, arguments: &[OsString]) -> Result<(), Trouble> {
        let mut all = vec![OsString::from("--test-only")];
        all.extend_from_slice(arguments);
        self.call("sbatch", &all, None).map(drop)
    }

    /// The partitions that there are.
    pub(super) fn partitions(&self) -> Vec<String> {
        let arguments = ["--noheader", "--format=%R"].map(OsString::from);
        let answer = self.call("sinfo", &arguments, None).unwrap_or_default();
        let mut names: Vec<String> = answer.split_whitespace().map(str::to_owned).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What Slurm says of these jobs; those that it knows nothing of are left out.
    pub(super) fn states(&self, jobs: &[u64]) -> Result<Vec<(u64, JobState)>, Trouble> {
        let jobs: Vec<String> = jobs.iter().map(u64::to_string).collect();
        self.list(&format!("--jobs={}", jobs.join(",")))
    }

    /// The number of the job with this name, if Slurm knows one.
    pub(super) fn find(&self, name: &str) -> Result<Option<u64>, Trouble> {
        let found = self.list(&format!("--name={name}"))?;
        Ok(found.into_iter().map(|(id, _)| id).max())
    }

    fn list(&self, which: &str) -> Result<Vec<(u64, JobState)>, Trouble> {
        let arguments =
            ["--noheader", "--states=all", "--format=%i|%T|%r|%N", which].map(OsString::from);
        match self.call("squeue", &arguments, None) {
            Ok(answer) => Ok(answer.lines().filter_map(job).collect()),
            // It says so of a single job, and leaves an unknown one out of several.
            Err(Trouble::Refused(text)) if text.contains("Invalid job id") => Ok(Vec::new()),
            Err(trouble) => Err(trouble),
        }
    }

    /// Ends a job.
    pub(super) fn cancel(&self, job: u64) -> Result<(), Trouble> {
        match self.call("scancel", &[job.to_string()], None) {
            // It is over already.
            Err(Trouble::Refused(text)) if text.contains("Invalid job id") => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Runs a program to its end, and gives what it wrote to standard output.
    fn call(
        &self,
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
        std::thread::scope(|scope| {
            // They end with the program.
            let output = scope.spawn(|| text(output));
            let errors = scope.spawn(|| text(errors));
            let ended = wait(&mut child, control);
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

/// Waits for a program: whether it succeeded, or nothing if it took too long.
fn wait(child: &mut Child, control: Option<&Control>) -> Result<Option<bool>, Trouble> {
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
        if start.elapsed() > PATIENCE {
            stop(child);
            return Ok(None);
        }
        std::thread::sleep(TICK);
    }
}

/// All that a program writes.
fn text(pipe: Option<impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(LONGEST).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A line of `squeue`.
fn job(line: &str) -> Option<(u64, JobState)> {
    let mut parts = line.trim().split('|');
    let id = parts.next()?.parse().ok()?;
    let mut next = || parts.next().unwrap_or_default().trim().to_owned();
    let (state, reason, nodes) = (next(), next(), next());
    let reason = if reason == "None" {
        String::new()
    } else {
        reason
    };
    Some((
        id,
        JobState {
            state,
            reason,
            nodes,
        },
    ))
}

/// What the complaints of one of Slurm's programs mean.
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
    const FULL: [&str; 4] = [
        "temporarily unable to accept job",
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
        let wrong = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition name specified\n";
        let wrong = trouble("sbatch", wrong);
        assert!(!wrong.passes() && wrong.to_string().starts_with("invalid partition"));
        assert!(trouble("sbatch", "").to_string().contains("said nothing"));
    }

    #[test]
    fn lines_of_the_queue_are_read() {
        let (id, state) = job("17|PENDING|Resources|\n").unwrap();
        assert!(id == 17 && state.is_waiting() && !state.is_over());
        assert_eq!(state.reason, "Resources");
        let (_, state) = job("18|NODE_FAIL|None|n2").unwrap();
        assert!(state.is_over() && state.reason.is_empty() && state.nodes == "n2");
        assert_eq!(job("slurm_load_jobs error"), None);
    }
}
