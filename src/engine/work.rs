//! The other end of `engine::child`: a process that runs one stage.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow};
use nix::sys::resource::{Resource, setrlimit};
use rayon::ThreadPoolBuilder;

use super::child::CANCEL;
use super::context::Context;
use super::task::{Said, Task, causes, is_full, path, short};
use super::threads;
use super::watch::look_on;
use super::{Event, Kind, RunEnv};

/// The stack of each thread that computes. It is not used up but by what is nested deeply.
const STACK: usize = 16 << 20;

/// What the last panic said, and where.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Where a process speaks; it ends after its last word.
type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// Ties this process to the one that started it. Called first of all.
pub fn begin() {
    // Whatever happens to the other process, this one must not go on writing: its right to do so ends with that one. Where the
    // system has no such call, the end of standard input says the same.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(|place| (place.file(), place.line()));
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(in_words(text, place));
    }));
}

/// Reads a task from `input`, runs it, and says on `output` how it goes. `env` gives the settings of the run, whether it is
/// offline or not; `stop` ends the process.
pub fn serve(
    mut input: impl BufRead + Send + 'static,
    output: impl Write + Send + 'static,
    kinds: &'static [Kind],
    env: impl FnOnce(bool) -> RunEnv,
    stop: fn() -> !,
) -> anyhow::Result<()> {
    let mut line = String::new();
    input
        .read_line(&mut line)
        .context("could not read the task")?;
    let task: Task = serde_json::from_str(&line).context("this is no task")?;
    let output: Output = Arc::new(Mutex::new(Box::new(output)));
    let cancel = Arc::new(AtomicBool::new(false));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = task.cpus.map_or(threads, usize::from);
    if let Some(memory) = task.memory {
        let stacks = (threads as u64 + 8) * STACK as u64;
        let memory = memory.saturating_add(stacks);
        // Where the system refuses, the stage's own bounds are left.
        let _ = setrlimit(Resource::RLIMIT_DATA, memory, memory);
    }
    let flag = Arc::clone(&cancel);
    let start = |name: &str| std::thread::Builder::new().name(name.to_owned());
    start("orders").spawn(move || {
        for line in input.lines().map_while(Result::ok) {
            if line == CANCEL {
                flag.store(true, Ordering::Relaxed);
            }
        }
        // The other process is gone.
        stop();
    })?;
    let last = Arc::clone(&output);
    start("watch").spawn(move || {
        look_on(|text| {
            say(
                &last,
                &Said::Failed {
                    causes: vec![text],
                    full: false,
                },
            );
            stop();
        });
    })?;
    // A stage may have started the pool already; then its threads are as they are.
    let how = ThreadPoolBuilder::new().num_threads(threads);
    threads::start(how.stack_size(STACK))?;
    let kind = kinds.iter().find(|kind| kind.name == task.kind);
    let kind = kind.with_context(|| format!("there is no kind `{}`", task.kind))?;
    let params = serde_yaml::to_value(&task.params)?;
    let stage = (kind.parse)(params).map_err(|error| anyhow!("`{}`: {error}", task.kind))?;
    let (events, received) = channel();
    let voice = Arc::clone(&output);
    let speaker = start("voice").spawn(move || hand_on(&received, &voice))?;
    let mut env = env(task.offline);
    env.cancel = Arc::clone(&cancel);
    env.warned = Arc::new(Mutex::new(task.warned.clone()));
    let context = context(&task, env, events, cancel);
    let worker = start("stage").stack_size(STACK).spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(|| stage.run(&context)));
        let result = result.unwrap_or_else(|_| Err(panicked()));
        (result, context.notes, context.written)
        // The context ends here, and with it the events.
    })?;
    let (result, notes, written) = worker.join().map_err(|_| panicked())?;
    speaker.join().map_err(|_| panicked())?;
    let last = match result {
        Ok(()) => Said::Done {
            notes: notes.into_inner().unwrap_or_else(PoisonError::into_inner),
            written: written.into_inner().unwrap_or_else(PoisonError::into_inner),
        },
        Err(error) => Said::Failed {
            causes: causes(&error),
            full: is_full(&error),
        },
    };
    say(&output, &last);
    Ok(())
}

/// What the stage is given.
fn context(
    task: &Task,
    env: RunEnv,
    events: std::sync::mpsc::Sender<Event>,
    cancel: Arc<AtomicBool>,
) -> Context {
    let paths = |paths: &BTreeMap<String, OsString>| {
        let entries = paths.iter();
        entries
            .map(|(name, found)| (name.clone(), path(found)))
            .collect()
    };
    Context {
        stage: task.stage.clone(),
        inputs: paths(&task.inputs),
        sources: paths(&task.sources),
        outside: task.outside.clone(),
        out: path(&task.out),
        scratch: path(&task.scratch),
        scratch_note: task.scratch_note.clone(),
        continuations: task.continuations.as_ref().map(path),
        env: Arc::new(env),
        events,
        cancel,
        // The other process has the clock, and tells this one to stop.
        deadline: None,
        gpus: task.gpus.clone(),
        notes: Mutex::default(),
        known: task
            .known
            .iter()
            .map(|(of, entry)| (path(of), entry.clone()))
            .collect(),
        written: Mutex::default(),
        told: Mutex::default(),
    }
}

/// Says what the stage tells, until it is done.
fn hand_on(events: &Receiver<Event>, output: &Output) {
    for event in events {
        let said = match event {
            Event::Progress {
                done, total, unit, ..
            } => Said::Progress {
                done,
                total,
                unit: unit.to_owned(),
            },
            Event::Metrics { step, values, .. } => {
                let values = values.into_iter();
                let values = values.map(|(name, value)| (name, value.to_bits()));
                Said::Metrics {
                    step,
                    values: values.collect(),
                }
            }
            Event::Message { level, text, .. } => Said::Message {
                level,
                text: short(text),
            },
            // A stage tells nothing else.
            _ => continue,
        };
        say(output, &said);
    }
}

fn say(output: &Output, said: &Said) {
    let Ok(mut line) = serde_json::to_vec(said) else {
        return;
    };
    line.push(b'\n');
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    // Without a listener this process is about to end.
    let _ = output.write_all(&line).and_then(|()| output.flush());
}

/// The error of a stage that panicked.
fn panicked() -> anyhow::Error {
    let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    anyhow!(panic.unwrap_or_else(|| in_words("no message", None)))
}

/// A panic as a sentence. A library's own panic comes from what it was given; ours is a mistake of ours.
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
