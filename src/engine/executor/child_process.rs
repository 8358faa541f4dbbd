//! Runs a task in its own process: starts it, reads its events, stops it, and explains why it ended. If a library crashes on a file
//! (stack overflow, out of memory, a mapped file that shrinks), only that process ends.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::num::NonZeroUsize;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::super::Bytes;
use super::super::control::Control;
use super::super::event::{Event, Level, check_version};
use super::super::stage_events::StageEvents;
use super::super::task::{Task, error};
use super::launch::{self, Lookup};
use super::{Executor, TaskResult};

/// The interval at which a running stage is checked.
const TICK: Duration = Duration::from_millis(50);
/// How long a stage may take to stop before its process is killed. Trainings and evaluations have no limit, so that they can save
/// their state.
const PATIENCE: Duration = Duration::from_millis(500);
/// The number of bytes that are kept of the end of the process's standard error.
const LAST_WORDS: usize = 16 << 10;
/// The line on standard input that tells the process to stop.
pub(in crate::engine) const CANCEL: &str = "cancel";

/// The process, which is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// glibc's setting for the size from which an allocation gets pages of its own, which go back to the system as soon as it is freed.
/// Left alone, glibc raises that size to 32 MiB while a model is loaded; what is freed afterwards then stays in the process, between
/// allocations that live on. A training of SmolLM2-135M's shape held 1.6 GB in that way of which it used 1.1 GB. Other allocators ignore
/// the variable.
const MMAP_THRESHOLD: &str = "MALLOC_MMAP_THRESHOLD_";
/// That size for trainings and evaluations, in bytes. Their large buffers come from a pool, so that few allocations are mapped.
const LARGE_ALLOCATION: usize = 1 << 20;
/// glibc's setting for how much free memory may stay at the end of a heap. Whoever sets the size above has it stay at 128 KiB, and then a training of
/// all weights gives memory back thousands of times a second, only to take it again page by page: a quarter of the CPU time of the quickstart's
/// `base` stage.
const TRIM_THRESHOLD: &str = "MALLOC_TRIM_THRESHOLD_";
/// That much for trainings and evaluations, in bytes, of each heap.
const LARGEST_REST: usize = 16 << 20;

/// Whether the user set one of these variables.
#[expect(
    clippy::disallowed_methods,
    reason = "a setting of the allocator, which changes no result"
)]
fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some()
}

/// Those settings for the process of a stage, without what the user has set.
pub(super) fn allocator(exclusive: bool) -> impl Iterator<Item = (&'static str, String)> {
    let settings = [
        (MMAP_THRESHOLD, LARGE_ALLOCATION),
        (TRIM_THRESHOLD, LARGEST_REST),
    ];
    settings
        .into_iter()
        .filter(move |(variable, _)| exclusive && !is_set(variable))
        .map(|(variable, bytes)| (variable, bytes.to_string()))
}

/// `program work`, for a stage that runs alone on the machine or not.
fn command(program: &Path, exclusive: bool) -> Command {
    let mut command = Command::new(program);
    command.arg0("pipeline").arg("work");
    prepared(command, exclusive)
}

/// With pipes, and the allocator's settings for a stage that runs alone on the machine.
fn prepared(mut command: Command, exclusive: bool) -> Command {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.envs(allocator(exclusive));
    command
}

/// Runs tasks each in a process of its own, `program work`: the task goes in on standard input, events come out on standard output. A task for
/// several processes is run by `mpirun program work --member` in the same way.
pub struct ChildProcess {
    program: PathBuf,
    lookup: Lookup,
}

impl ChildProcess {
    /// Starts this program for each task; `lookup` reads the environment.
    pub fn new(program: PathBuf, lookup: Option<fn(&str) -> Option<String>>) -> Self {
        Self { program, lookup }
    }

    /// Starts the process of a task, or the one that starts its processes.
    fn start(&self, task: &Task) -> anyhow::Result<Child> {
        let processes = task.processes.map_or(1, NonZeroUsize::get);
        if processes == 1 {
            let child = command(&self.program, task.exclusive).spawn();
            return child.context("could not start a process for the stage");
        }
        let (launcher, mut command) = launch::command(&self.program, processes, self.lookup);
        // Ctrl-C at a terminal goes to all processes of its group, and would have the launcher end them.
        command.args(["work", "--member"]).process_group(0);
        let child = prepared(command, task.exclusive).spawn();
        child.with_context(|| {
            format!(
                "could not start `{launcher}`, which starts the stage's {processes} processes; hint: install an MPI (Open MPI's package of \
                 Debian is openmpi-bin)"
            )
        })
    }
}

impl Executor for ChildProcess {
    fn execute(
        &self,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<TaskResult> {
        let before = kills_for_memory();
        let mut running = Running(self.start(task)?);
        let child = &mut running.0;
        let (Some(mut input), Some(output), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            bail!("the process of the stage has no pipes");
        };
        let (sender, received) = channel();
        let start = |name: &str| std::thread::Builder::new().name(name.to_owned());
        start("listener").spawn(move || {
            // A line that is not an event was printed by a library.
            let lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
            for event in lines.filter_map(|line| serde_json::from_slice::<Event>(&line).ok()) {
                if sender.send(event).is_err() {
                    break;
                }
            }
        })?;
        let errors = start("errors").spawn(move || last_words(errors))?;
        let mut line = serde_json::to_vec(task)?;
        line.push(b'\n');
        // If the process has already ended, its exit status says why.
        let _ = input.write_all(&line);
        let mut stopping: Option<Instant> = None;
        let mut killed = false;
        let mut outcome = None;
        let mut told = BTreeSet::new();
        loop {
            match received.recv_timeout(TICK) {
                Ok(Event::WorkStarted { version, pipeline }) => check_version(version, &pipeline)?,
                Ok(Event::WorkDone { notes, written }) => {
                    outcome = Some(Ok(TaskResult {
                        notes,
                        written,
                        content: None,
                    }));
                }
                // Of several processes the first one that failed says why.
                Ok(Event::WorkFailed { .. }) if outcome.is_some() => {}
                Ok(Event::WorkFailed {
                    causes,
                    disk_full,
                    lasting,
                }) => outcome = Some(Err(error(causes, disk_full, lasting))),
                Ok(event) => {
                    if let Event::Message { text, .. } = &event {
                        told.insert(text.replace('\n', " "));
                    }
                    events.send(event);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if control.check().is_ok() {
                continue;
            }
            match stopping {
                None => {
                    stopping = Some(Instant::now());
                    let _ = writeln!(input, "{CANCEL}");
                }
                Some(since) if !task.exclusive && !killed && since.elapsed() >= PATIENCE => {
                    killed = true;
                    let _ = running.0.kill();
                }
                Some(_) => {}
            }
        }
        let status = running
            .0
            .wait()
            .context("could not wait for the process of the stage")?;
        let words = errors
            .join()
            .map_err(|_| anyhow!("the process of the stage could not be read"))?;
        let processes = task.processes.map_or(1, NonZeroUsize::get);
        for (line, said) in launch::of_others(&words, processes) {
            if !told.contains(said) {
                events.send(Event::Message {
                    stage: task.stage.clone(),
                    level: Level::Warning,
                    text: line.to_owned(),
                });
            }
        }
        if stopping.is_some() {
            control.check()?;
        }
        if let Some(outcome) = outcome {
            return outcome;
        }
        let starved = kills_for_memory() > before;
        if processes > 1
            && let Some(line) = launch::culprit(&words)
        {
            let memory = if starved {
                ", while the system ran out of memory and killed something"
            } else {
                ""
            };
            bail!("one of its {processes} processes ended without a result{memory}: {line}");
        }
        Err(ended(status, &words, task.memory, starved))
    }
}

/// The end of what a process wrote to its standard error.
fn last_words(mut errors: impl Read) -> String {
    let mut words = Vec::new();
    let mut piece = vec![0; LAST_WORDS];
    while let Ok(count @ 1..) = errors.read(&mut piece) {
        words.extend_from_slice(piece.get(..count).unwrap_or_default());
        let more = words.len().saturating_sub(LAST_WORDS);
        words.drain(..more);
    }
    String::from_utf8_lossy(&words).into_owned()
}

/// How many processes of the machine Linux has killed because memory ran out.
fn kills_for_memory() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/vmstat").ok()?;
    let count = counts
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))?;
    count.trim().parse().ok()
}

/// The error for a process that ended without reporting one. `starved`: the system killed something meanwhile because memory ran out.
fn ended(status: ExitStatus, words: &str, memory: Option<u64>, starved: bool) -> anyhow::Error {
    let limit = || memory.map_or_else(String::new, |memory| format!(" of {}", Bytes(memory)));
    if words.contains("has overflowed its stack") {
        return anyhow!(
            "something in its input is nested too deeply: the stage's process used up its stack and ended; other stages go on \
             untouched; hint: look at the template, tokenizer.json or rows that it reads"
        );
    }
    if words.contains("memory allocation of") || words.contains("out of memory") {
        let hint = match memory {
            Some(_) => {
                "hint: something in its input (a template, a tokenizer.json, a row) asks for far more than it holds; \
                 `resources: { memory: .. }` beside the stage raises the limit"
            }
            None => "hint: free memory, or give it fewer or smaller inputs",
        };
        return anyhow!("it needed more memory than its limit{}; {hint}", limit());
    }
    let last = words.trim().lines().last().unwrap_or_default();
    let last = if last.is_empty() {
        String::new()
    } else {
        format!(", and wrote: {last}")
    };
    match status.signal() {
        Some(9) if starved => anyhow!(
            "the system ran out of memory and killed its process (SIGKILL); hint: smaller batches, shorter rows or a smaller model need \
             less, and so do fewer stages and other programs at the same time{last}"
        ),
        Some(9) => anyhow!(
            "its process was killed from outside (SIGKILL), as the system does when memory runs out{last}"
        ),
        Some(7) => anyhow!(
            "a file that it was reading became shorter under it (SIGBUS); hint: let nothing write to its inputs while it runs{last}"
        ),
        Some(signal) => anyhow!(
            "its process ended by signal {signal}, which is a bug in pipeline or a library{last}"
        ),
        None => anyhow!(
            "its process ended without a result (exit code {}), which is a bug in pipeline{last}",
            status.code().unwrap_or(-1)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trainings_give_freed_memory_back_to_the_system() {
        let set = |exclusive, variable: &str, value: &str| {
            let command = command(Path::new("pipeline"), exclusive);
            let mut variables = command.get_envs();
            variables.any(|(name, given)| name == variable && given.is_some_and(|v| v == value))
        };
        for (variable, value) in [(MMAP_THRESHOLD, "1048576"), (TRIM_THRESHOLD, "16777216")] {
            assert!(set(true, variable, value) || is_set(variable));
            assert!(!set(false, variable, value));
        }
    }

    #[test]
    fn every_end_has_words() {
        let killed = ExitStatus::from_raw;
        let memory = Some(4 << 30);
        let text = |status, words: &str| ended(killed(status), words, memory, false).to_string();
        let overflow = "thread 'x' has overflowed its stack\nfatal runtime error";
        assert!(text(6, overflow).contains("nested too deeply"));
        assert!(text(6, "memory allocation of 99 bytes failed").contains("limit of 4.3 GB"));
        assert!(text(9, "").contains("from outside (SIGKILL)"));
        let starved = ended(killed(9), "", memory, true).to_string();
        assert!(starved.contains("out of memory"));
        assert!(text(7, "").contains("became shorter"));
        assert!(text(11, "a\nlast").ends_with("wrote: last"));
        assert!(text(3 << 8, "").contains("exit code 3"));
    }

    #[test]
    fn only_the_end_of_long_complaints_is_kept() {
        let words = [vec![b'a'; 3 * LAST_WORDS], b"end".to_vec()].concat();
        let kept = last_words(words.as_slice());
        assert_eq!((kept.len(), kept.ends_with("aend")), (LAST_WORDS, true));
    }
}
