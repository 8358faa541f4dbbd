//! Runs one stale stage on its own thread: takes the lock, makes attempts, commits the result, and keeps the files of a failure.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::canonical::Digest;
use super::control::Control;
use super::event::{Event, send};
use super::executor::{TaskResult, execute_sharded};
use super::graph::Node;
use super::part::Part;
use super::plan::{Prepared, Session};
use super::reason::Reason;
use super::record::{FORMAT, Record};
use super::stage_events::StageEvents;
use super::stat::seconds_now;
use super::store::{Found, Miss};
use super::task::{Lasting, TASK_VERSION, Task, is_full, memory, unmarked};

/// The pause before the first retry; each further one is twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// The note of frozen stages that a result was made from.
const FROZEN: &str = "made_from_frozen";

/// One stage on its own thread.
pub(super) struct Worker<'a, 'b> {
    pub(super) session: &'a Session<'b>,
    pub(super) events: Sender<Event>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) index: usize,
    /// The ids of the devices it has to itself.
    pub(super) gpus: Vec<usize>,
    /// The frozen stages before it whose results are taken though something changed.
    pub(super) frozen: Vec<String>,
}

/// How the work on a stage ended.
pub(super) enum Outcome {
    /// Its result is in the store.
    Ready(Ready),
    /// A local file changed after the stage was inspected and before the stage read it, so that it has to be inspected again.
    InputChanged(PathBuf),
    /// It failed and reported the error.
    Failed,
}

/// A result in the store.
pub(super) struct Ready {
    pub(super) artifact: Digest,
    /// Whether the stage ran: another runner may have made the result meanwhile.
    pub(super) ran: bool,
}

struct Failed {
    error: anyhow::Error,
    /// Where its output and log are kept.
    kept: Option<PathBuf>,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self { error, kept: None }
    }
}

impl Worker<'_, '_> {
    /// Makes the result, or reports why that failed.
    pub(super) fn work(&self, prepared: &Prepared, reasons: Vec<Reason>) -> Outcome {
        match self.make(prepared, reasons) {
            Ok(work) => work,
            Err(Failed { error, kept }) => {
                let interrupted = self.cancel.load(Ordering::Relaxed);
                let error = if interrupted {
                    "interrupted".into()
                } else if is_full(&error) {
                    format!("{error:#}; `pipeline gc` removes results that no recipe needs")
                } else {
                    format!("{error:#}")
                };
                self.send(Event::StageFailed {
                    stage: self.node().name.clone(),
                    error,
                    kept: kept.map(|path| path.display().to_string()),
                    interrupted,
                });
                Outcome::Failed
            }
        }
    }

    fn node(&self) -> &Node {
        &self.session.graph.nodes[self.index]
    }

    fn send(&self, event: Event) {
        send(&self.events, event);
    }

    fn wait(&self, holder: &str) {
        self.send(Event::StageWaiting {
            stage: self.node().name.clone(),
            holder: holder.to_owned(),
        });
    }

    fn make(&self, prepared: &Prepared, reasons: Vec<Reason>) -> Result<Outcome, Failed> {
        let Session {
            store,
            recipe,
            verify,
            shared,
            ..
        } = self.session;
        let node = self.node();
        let mut waited = false;
        let miss = store.lock(&prepared.digest, &self.cancel, &mut |holder| {
            waited = true;
            self.wait(holder);
        })?;
        let there = || -> anyhow::Result<Option<(Record, bool)>> {
            if let Found::Hit(record, _) = store.find(&prepared.digest, *verify)? {
                return Ok(Some((*record, false)));
            }
            let events = (node.name.as_str(), &self.events);
            let restored = shared.restore(store, &prepared.digest, events, &self.cancel)?;
            Ok(restored.map(|record| (record, true)))
        };
        if (waited || !self.session.forced[self.index])
            && let Some((record, remote)) = there()?
        {
            if remote {
                self.session.keep_texts(node, prepared);
            }
            store.set_last(recipe, &node.name, &prepared.digest)?;
            self.session.accept(self.index, &record.artifact)?;
            self.send(Event::StageFresh {
                stage: node.name.clone(),
                artifact: record.artifact.clone(),
                restored: false,
                remote,
                saved: record.seconds,
                frozen: prepared.frozen.clone(),
            });
            return Ok(Outcome::Ready(Ready {
                artifact: record.artifact,
                ran: false,
            }));
        }
        if prepared.frozen.is_some() {
            let error =
                anyhow!("it is frozen, and the files of its last result could not be fetched");
            return Err(error.into());
        }
        // It may have waited long for its turn.
        if let Some(changed) = prepared.changed(node, false) {
            return Ok(Outcome::InputChanged(changed));
        }
        let previous = store
            .last(recipe, &node.name)
            .and_then(|last| store.record(&last));
        let expected = previous.as_ref().filter(|last| {
            // Another kind takes another time.
            last.fingerprint.kind == node.stage.kind()
        });
        self.send(Event::StageStarted {
            stage: node.name.clone(),
            kind: node.stage.kind().to_owned(),
            reasons,
            expected: expected.map(|last| last.seconds),
        });
        let started = seconds_now();
        let clock = Instant::now();
        let result = self.run_with_retries(prepared, &miss)?;
        let seconds = clock.elapsed().as_secs_f64();
        let mut notes = result.notes;
        if !self.frozen.is_empty() {
            notes.insert(FROZEN.to_owned(), self.frozen.clone().into());
        }
        let record = Record {
            format: FORMAT,
            stage: node.name.clone(),
            fingerprint: prepared.fingerprint.clone(),
            origins: prepared.origins.clone(),
            output: node.stage.output().to_owned(),
            artifact: String::new(),
            notes,
            params: (node.stage.params())
                .map(Arc::unwrap_or_clone)
                .map_err(anyhow::Error::from)?,
            started,
            seconds,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if let Some(family) = self.family(prepared) {
            // The result is worth more than what a later stage might start from.
            let _ = miss.keep_continuation(&family);
        }
        let waiting = &mut |holder: &str| self.wait(holder);
        let record = match result.content {
            Some(content) => miss.commit_artifact(record, content)?,
            None => {
                miss.commit(record, &result.written, &self.cancel, waiting)?
                    .0
            }
        };
        shared.made(store, &prepared.digest);
        self.session.keep_texts(node, prepared);
        store.set_last(recipe, &node.name, &prepared.digest)?;
        self.session.accept(self.index, &record.artifact)?;
        self.send(Event::StageDone {
            stage: node.name.clone(),
            artifact: record.artifact.clone(),
            same_bytes: previous.is_some_and(|last| last.artifact == record.artifact),
            seconds,
        });
        Ok(Outcome::Ready(Ready {
            artifact: record.artifact,
            ran: true,
        }))
    }

    /// Fails if the files that the stage read changed since it was inspected; its result would get a wrong fingerprint.
    fn check_what_was_read(&self, prepared: &Prepared) -> anyhow::Result<()> {
        if let Some(path) = prepared.changed(self.node(), true) {
            bail!(
                "`{}` changed while it was read, so that the result is not kept; run again when nothing writes there any more",
                path.display()
            );
        }
        for (input, content) in &prepared.inputs {
            if let Err(what) = self.session.store.still_holds(content) {
                bail!(
                    "the result of `{input}` changed while it was read ({what}), so that nothing made from it is kept; run again, and it \
                     is made again"
                );
            }
        }
        Ok(())
    }

    /// Runs the stage until it succeeds or has no attempts left.
    fn run_with_retries(&self, prepared: &Prepared, miss: &Miss<'_>) -> Result<TaskResult, Failed> {
        let node = self.node();
        let mut pause = PAUSE;
        let mut retries_left = node.handling.retries;
        loop {
            let task = self.task(prepared, miss.partial()?)?;
            let events = Arc::new(StageEvents::new(self.events.clone()));
            let control = Control::new(Arc::clone(&self.cancel), node.handling.timeout);
            let executors = self.session.executors;
            let execute = |task: &Task, events: &Arc<StageEvents>, control: &Control| {
                executors.execute(&node.handling, task, events, control)
            };
            let result = match node.handling.resources.shards {
                Some(shards) if shards.get() > 1 => {
                    execute_sharded(&execute, &task, shards, &events, &control)
                }
                _ => execute(&task, &events, &control),
            };
            let mut result = result.and_then(|result| control.check().map(|()| result));
            if self.cancel.load(Ordering::Relaxed)
                && let Err(error) = result
            {
                miss.discard()?;
                return Err(error.into());
            }
            if let Err(changed) = self.check_what_was_read(prepared) {
                // Another attempt would read the same.
                retries_left = 0;
                result = Err(match result {
                    Ok(_) => changed,
                    Err(error) => changed.context(format!("{error:#}")),
                });
            }
            let mut error = match result {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            if retries_left > 0 && (error.is::<Lasting>() || is_full(&error)) {
                retries_left = 0;
                error = error.context("not tried again, because it would fail in the same way");
            }
            if retries_left == 0 {
                let kept = keep_failure(miss, &node.name, &events, &error);
                return Err(Failed { error, kept });
            }
            retries_left -= 1;
            miss.discard()?;
            self.send(Event::StageRetried {
                stage: node.name.clone(),
                error: format!("{error:#}"),
                pause: pause.as_secs_f64(),
                left: retries_left,
            });
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.cancel.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn family(&self, prepared: &Prepared) -> Option<Digest> {
        prepared
            .fingerprint
            .family(self.node().stage.length_parameters())
    }

    /// The stage as a task that writes into `out`.
    fn task(&self, prepared: &Prepared, out: PathBuf) -> anyhow::Result<Task> {
        let node = self.node();
        let params = node
            .stage
            .params()
            .context("its parameters could not be handed on")?;
        let paths = |paths: &BTreeMap<String, PathBuf>| {
            let entries = paths.iter();
            entries
                .map(|(name, path)| (name.clone(), path.clone().into_os_string()))
                .collect()
        };
        let known = prepared.known.iter();
        let resources = &node.handling.resources;
        Ok(Task {
            version: TASK_VERSION,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
            stage: node.name.clone(),
            kind: node.stage.kind().to_owned(),
            params: unmarked(Arc::unwrap_or_clone(params)),
            exclusive: node.stage.exclusive(),
            offline: self.session.env.offline,
            cpus: resources.cpus,
            processes: resources.processes,
            part: Part::Whole,
            memory: memory(node.stage.bounded(), resources),
            gpus: self.gpus.clone(),
            device: node.handling.device,
            resources: resources.clone(),
            timeout: node.handling.timeout,
            variables: node.stage.variables(),
            inputs: paths(&self.session.input_folders(prepared)),
            sources: paths(&node.sources),
            outside: prepared.fingerprint.outside.clone(),
            out: out.into_os_string(),
            scratch: self
                .session
                .store
                .scratch(&prepared.digest)
                .into_os_string(),
            scratch_note: serde_json::to_vec(&prepared.fingerprint)?,
            // A forced stage is made from its inputs alone.
            continuations: (self.family(prepared))
                .filter(|_| !self.session.forced[self.index])
                .map(|family| self.session.store.continuations(&family).into_os_string()),
            known: known
                .map(|(path, entry)| (path.clone().into_os_string(), entry.clone()))
                .collect(),
            seen: prepared.stats(),
            warned: self.session.env.warnings(),
        })
    }
}

/// Keeps the output and the log of a failed stage, and gives the place if there is an output to look at. Where that is not possible nothing
/// is kept; on a full disk only the log is.
fn keep_failure(
    miss: &Miss<'_>,
    stage: &str,
    events: &StageEvents,
    error: &anyhow::Error,
) -> Option<PathBuf> {
    if is_full(error) {
        // Best done first: it makes room.
        let _ = miss.discard();
    }
    let kept = miss.keep_failure(&events.log(stage, error));
    if kept.is_err() {
        let _ = miss.discard();
    }
    kept.ok().filter(|kept| kept.join("output").is_dir())
}
