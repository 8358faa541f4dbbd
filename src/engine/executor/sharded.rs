//! Runs a stage's task in shards: each is a task of its own, all at once, and another one joins what they made.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow};

use super::super::control::Control;
use super::super::event::Event;
use super::super::part::{Part, Shard};
use super::super::stage_events::StageEvents;
use super::super::task::Task;
use super::TaskResult;
use super::slurm::{folder_of, store_of};

/// How a task is run.
type Execute<'a> =
    dyn Fn(&Task, &Arc<StageEvents>, &Control) -> anyhow::Result<TaskResult> + Sync + 'a;

/// Runs a task in so many shards, which share its threads. If some fail, the error is that of the first one in the order of rows, as it is
/// without shards.
pub(in crate::engine) fn execute(
    execute: &Execute<'_>,
    task: &Task,
    shards: NonZeroUsize,
    events: &Arc<StageEvents>,
    control: &Control,
) -> anyhow::Result<TaskResult> {
    let shards = shards.get();
    let folder = Path::new(&task.scratch).join("shards");
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = task.cpus.map_or(threads, NonZeroUsize::get) / shards;
    let mut tasks = Vec::with_capacity(shards);
    for number in 0..shards {
        let out = folder.join(format!("{number}-of-{shards}"));
        let shard = Task {
            part: Part::Shard(Shard { number, of: shards }),
            cpus: NonZeroUsize::new(threads).or(Some(NonZeroUsize::MIN)),
            out: out.clone().into_os_string(),
            scratch: folder
                .join(format!("{number}-of-{shards}-scratch"))
                .into_os_string(),
            scratch_note: Vec::new(),
            continuations: None,
            ..task.clone()
        };
        // A job of an earlier run may still work on it, and is joined then.
        if !folder_of(&shard).exists() {
            let made = if out.exists() {
                fs::remove_dir_all(&out)
            } else {
                Ok(())
            };
            made.and_then(|()| fs::create_dir_all(&out))
                .with_context(|| format!("could not make `{}`", out.display()))?;
        }
        tasks.push(shard);
    }
    let all = Shards {
        execute,
        stops: tasks.iter().map(|_| Arc::default()).collect(),
        progress: Mutex::new(vec![0; shards]),
        tasks,
        events,
        control,
    };
    let results: Vec<anyhow::Result<TaskResult>> = std::thread::scope(|scope| {
        let all = &all;
        let start =
            |number| std::thread::Builder::new().spawn_scoped(scope, move || all.run(number));
        let started: Vec<_> = (0..shards).map(start).collect();
        let ends = started.into_iter().map(|thread| {
            let ended = thread.context("could not start a thread")?.join();
            ended.map_err(|_| anyhow!("the thread of a shard stopped"))?
        });
        ends.collect()
    });
    let results = results.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    control.check()?;
    let artifacts = store_of(task).join("artifacts");
    let made = all.tasks.into_iter().zip(results);
    let folders = made.map(|(task, result)| match result.content {
        Some(content) => artifacts.join(content).into_os_string(),
        None => task.out,
    });
    let folders = folders.collect();
    let join = Task {
        part: Part::Joined(folders),
        ..task.clone()
    };
    execute(&join, events, control)
}

/// The shards of a stage.
struct Shards<'a> {
    execute: &'a Execute<'a>,
    tasks: Vec<Task>,
    /// Set to stop a shard.
    stops: Vec<Arc<AtomicBool>>,
    /// What each has done.
    progress: Mutex<Vec<u64>>,
    events: &'a StageEvents,
    control: &'a Control,
}

impl Shards<'_> {
    /// Runs a shard; if it fails, those behind it are stopped.
    fn run(&self, number: usize) -> anyhow::Result<TaskResult> {
        let (sender, received) = channel();
        let own = Arc::new(StageEvents::new(sender));
        let control = self.control.or(Arc::clone(&self.stops[number]));
        let done = std::thread::scope(|scope| {
            let (progress, events) = (&self.progress, self.events);
            let pass_on = move || pass_on(&received, number, progress, events);
            let teller = std::thread::Builder::new().spawn_scoped(scope, pass_on);
            teller.context("could not start a thread")?;
            let done = (self.execute)(&self.tasks[number], &own, &control);
            // With the last sender the events end.
            drop(own);
            done
        });
        if done.is_err() {
            // A shard before it may fail, too, and would be told instead.
            for later in &self.stops[number + 1..] {
                later.store(true, Ordering::Relaxed);
            }
        }
        done
    }
}

/// Hands on what a shard tells, with the progress of all of them in place of its own.
fn pass_on(
    received: &Receiver<Event>,
    number: usize,
    progress: &Mutex<Vec<u64>>,
    events: &StageEvents,
) {
    for event in received {
        match event {
            Event::Progress {
                stage,
                done,
                total,
                unit,
                memory,
            } => {
                let mut all = progress.lock().unwrap_or_else(PoisonError::into_inner);
                all[number] = done;
                let done = all.iter().sum();
                drop(all);
                events.send(Event::Progress {
                    stage,
                    done,
                    total,
                    unit,
                    memory,
                });
            }
            event => events.send(event),
        }
    }
}
