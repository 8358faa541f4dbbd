//! A process that runs one task, for an executor that started it.

use std::io::{BufRead, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow};
use nix::sys::resource::{Resource, setrlimit};
use rayon::ThreadPoolBuilder;

use super::control::{Control, is_ended_from_outside};
use super::event::{EVENT_VERSION, Event};
pub use super::executor::prefix;
use super::executor::{CANCEL, ChildProcess, Executor as _, TaskResult, launched, run_task};
use super::job::JobFolder;
use super::stage_events::StageEvents;
use super::task::{Lasting, Task, causes, is_full, short};
use super::threads;
use super::watch::look_on;
use super::{Kind, RunEnv};

/// The stack size of each computing thread. Only deeply nested data uses it up.
const STACK: usize = 16 << 20;

/// The message and the place of the last panic.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// The output of a process for its events. The process ends after its last event.
type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// Keeps the message of a panic for the error of the stage. Called before a task is run.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(|place| (place.file(), place.line()));
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(in_words(text, place));
    }));
}

/// The error of the last panic, and of a stage that panicked.
pub fn panicked() -> anyhow::Error {
    let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    anyhow!(panic.unwrap_or_else(|| in_words("no message", None)))
}

/// The line that tells an executor how a task failed, behind the end of whatever line another process is in the middle of.
pub fn failure(error: &anyhow::Error) -> Vec<u8> {
    let mut line = vec![b'\n'];
    failed(error).write_line(&mut line);
    line
}

fn failed(error: &anyhow::Error) -> Event {
    Event::WorkFailed {
        causes: causes(error),
        disk_full: is_full(error),
        lasting: error.is::<Lasting>(),
    }
}

/// The command that starts the processes of a task whose file is at `path`, and the program that it is; `None` for a task of one process.
/// `lookup` reads the environment.
pub fn launcher(
    task: &Task,
    path: &Path,
    program: &Path,
    lookup: fn(&str) -> Option<String>,
) -> Option<(&'static str, Command)> {
    let processes = task.processes.map_or(1, NonZeroUsize::get);
    (processes > 1).then(|| {
        let (launcher, mut command) = launched(program, processes, Some(lookup));
        command.args(["work", "--member"]).arg(path);
        (launcher, command)
    })
}

/// Makes this process end with the one that started it. Called before anything else.
pub fn end_with_parent() {
    // If the parent dies, this process must not continue to write, since the parent's lock is gone. Where the system has no such call,
    // the end of standard input serves the same purpose.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
}

/// Lets the system choose this process, and not the one that started it, where it has to end one for want of memory: the other one takes
/// little, and has to tell what happened. Called at the beginning.
pub fn give_way() {
    #[cfg(target_os = "linux")]
    {
        // Between -1000, never, and 1000, first; without a privilege it can only be raised.
        const FIRST: i32 = 500;
        const FILE: &str = "/proc/self/oom_score_adj";
        let is_lower = std::fs::read_to_string(FILE)
            .is_ok_and(|now| now.trim().parse().is_ok_and(|now: i32| now < FIRST));
        if is_lower {
            let _ = std::fs::write(FILE, FIRST.to_string());
        }
    }
}

/// The input with the orders of the parent process. Its end means that the parent is gone.
pub type Orders = Box<dyn BufRead + Send>;

/// A process that runs one task.
pub struct Work {
    /// The kinds of stages that can be run.
    pub kinds: &'static [Kind],
    /// The settings of the run, whether it is offline or not.
    pub env: fn(bool) -> RunEnv,
    /// Set to stop the stage.
    pub cancel: Arc<AtomicBool>,
    /// Ends the process.
    pub exit: fn() -> !,
}

/// Reads the text of a task: the first line of `orders`, whose other lines are orders.
pub fn text_of_orders(orders: &mut dyn BufRead) -> anyhow::Result<Vec<u8>> {
    let mut line = String::new();
    let read = orders.read_line(&mut line);
    read.context("could not read the task")?;
    Ok(line.into_bytes())
}

/// Reads a task: from the first line of `orders`, whose other lines are orders, or from a file.
pub fn read_task(orders: &mut dyn BufRead) -> anyhow::Result<Task> {
    Task::read(&text_of_orders(orders)?)
}

/// Reads a task from a file.
pub fn read_task_file(path: &Path) -> anyhow::Result<Task> {
    let read = || Task::read(&std::fs::read(path)?);
    read().with_context(|| format!("could not read the task `{}`", path.display()))
}

/// Runs the task in the folder of a job by another process of `program`, with so many threads if the task doesn't say; `lookup`
/// reads the environment. Its events and
/// its result are written into the folder. Returns whether the stage succeeded. Fails if the task could not begin.
#[allow(
    clippy::needless_pass_by_value,
    reason = "the flag belongs to the job, as that of `Work` does"
)]
pub fn run_job(
    folder: &Path,
    program: PathBuf,
    cpus: Option<NonZeroUsize>,
    lookup: fn(&str) -> Option<String>,
    cancel: &Arc<AtomicBool>,
) -> anyhow::Result<bool> {
    let mut start = JobFolder::new(folder.to_owned()).start()?;
    // Several processes look at the nodes where each of them is.
    if start
        .task
        .processes
        .is_none_or(|processes| processes.get() == 1)
    {
        start.task.cpus = start.task.cpus.or(cpus);
    }
    let mut file = start.events()?;
    file.write(&Event::WorkStarted {
        version: EVENT_VERSION,
        pipeline: env!("CARGO_PKG_VERSION").to_owned(),
    });
    let (sender, received) = channel();
    let writer = std::thread::Builder::new().name("events".to_owned());
    let writer = writer.spawn(move || {
        for event in received {
            file.write(&event);
        }
    })?;
    let events = Arc::new(StageEvents::new(sender));
    // The runner enforces the time limit, and the scheduler does.
    let control = Control::new(Arc::clone(cancel), None);
    let result = ChildProcess::new(program, Some(lookup)).execute(&start.task, &events, &control);
    // With the last sender the events end.
    drop(events);
    writer.join().map_err(|_| panicked())?;
    let succeeded = result.is_ok();
    if !succeeded && is_ended_from_outside(cancel) {
        start.stop()?;
    } else {
        start.finish(last_event(result))?;
    }
    Ok(succeeded)
}

/// The event that tells how a task ended.
pub(super) fn last_event(result: anyhow::Result<TaskResult>) -> Event {
    match result {
        Ok(TaskResult { notes, written, .. }) => Event::WorkDone { notes, written },
        Err(error) => failed(&error),
    }
}

impl Work {
    /// Runs a task and writes its events to `output`, one line of JSON each; the last event says how the task ended. Returns whether the
    /// stage succeeded. Fails if the task could not begin.
    pub fn serve(
        self,
        task: &Task,
        orders: Option<Orders>,
        output: impl Write + Send + 'static,
    ) -> anyhow::Result<bool> {
        let output: Output = Arc::new(Mutex::new(Box::new(output)));
        let started = Event::WorkStarted {
            version: EVENT_VERSION,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
        };
        write(&output, &started);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = task.cpus.map_or(threads, usize::from);
        if let Some(memory) = task.memory {
            let stacks = (threads as u64 + 8) * STACK as u64;
            let memory = memory.saturating_add(stacks);
            // If the system refuses the limit, the stage's own checks still hold.
            let _ = setrlimit(Resource::RLIMIT_DATA, memory, memory);
        }
        let exit = self.exit;
        let start = |name: &str| std::thread::Builder::new().name(name.to_owned());
        if let Some(orders) = orders {
            let cancel = Arc::clone(&self.cancel);
            start("orders").spawn(move || {
                for line in orders.lines().map_while(Result::ok) {
                    if line == CANCEL {
                        cancel.store(true, Ordering::Relaxed);
                    }
                }
                // The other process is gone.
                exit();
            })?;
        }
        let last = Arc::clone(&output);
        start("watch").spawn(move || {
            look_on(|text| {
                let failed = Event::WorkFailed {
                    causes: vec![text],
                    disk_full: false,
                    lasting: true,
                };
                write(&last, &failed);
                exit();
            });
        })?;
        // A stage may have started the pool already; then its threads are as they are.
        let pool = ThreadPoolBuilder::new().num_threads(threads);
        threads::start(pool.stack_size(STACK))?;
        let (sender, received) = channel();
        let events = Arc::new(StageEvents::new(sender));
        let voice = Arc::clone(&output);
        let writer = start("events").spawn(move || {
            for event in received {
                write(&voice, &shortened(event));
            }
        })?;
        let mut env = (self.env)(task.offline);
        env.cancel = Arc::clone(&self.cancel);
        env.warned = Arc::new(Mutex::new(task.warned.clone()));
        let env = Arc::new(env);
        // The parent process enforces the time limit.
        let control = Control::new(self.cancel, None);
        let result = std::thread::scope(|scope| {
            let stage = start("stage").stack_size(STACK);
            let run = || run_task(task, self.kinds, &env, &events, &control);
            let stage = stage.spawn_scoped(scope, run)?;
            stage.join().unwrap_or_else(|_| Err(panicked()))
        });
        // With the last sender the events end.
        drop(events);
        writer.join().map_err(|_| panicked())?;
        let succeeded = result.is_ok();
        write(&output, &last_event(result));
        Ok(succeeded)
    }
}

/// The event with its texts limited in length.
fn shortened(event: Event) -> Event {
    match event {
        Event::Message { stage, level, text } => Event::Message {
            stage,
            level,
            text: short(text),
        },
        event => event,
    }
}

fn write(output: &Output, event: &Event) {
    let mut line = Vec::new();
    event.write_line(&mut line);
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    // Without a listener this process is about to end.
    let _ = output.write_all(&line).and_then(|()| output.flush());
}

/// The error message for a panic. A panic in a library is blamed on its input, a panic in this program on a bug.
fn in_words(text: &str, place: Option<(&str, u32)>) -> String {
    let text: String = text.chars().take(300).collect();
    let Some((file, line)) = place else {
        return format!("the stage panicked, which is a bug in pipeline: {text}");
    };
    let short = |file: &str| {
        let parts: Vec<&str> = file.split('/').collect();
        let source = parts.iter().rposition(|part| *part == "src").unwrap_or(1);
        parts
            .get(source.saturating_sub(1)..)
            .unwrap_or_default()
            .join("/")
    };
    let ours = !file.starts_with('/') || file.contains("/pipeline");
    if ours {
        format!("the stage panicked, which is a bug in pipeline: {text} ({file}:{line})")
    } else {
        format!(
            "a library could not deal with its input and gave up: {text} ({}:{line}); hint: a file that it reads may be damaged",
            short(file)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_as_whose_it_is() {
        let theirs = "/home/x/.cargo/registry/src/index-1/tokenizers-0.1.0/src/models/a.rs";
        let text = in_words("index out of range", Some((theirs, 7)));
        assert!(text.starts_with("a library could not"), "{text}");
        assert!(
            text.contains("(tokenizers-0.1.0/src/models/a.rs:7)"),
            "{text}"
        );
        let text = in_words("no", Some(("src/ml/a.rs", 7)));
        assert!(
            text.contains("bug in pipeline: no (src/ml/a.rs:7)"),
            "{text}"
        );
    }
}
