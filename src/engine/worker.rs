//! One stale stage on its own thread: lock, tries, commit; what a failure leaves is set aside.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rayon::ThreadPoolBuilder;

use super::canonical::Digest;
use super::child;
use super::event::{Event, send};
use super::graph::Node;
use super::plan::{Prepared, Session};
use super::reason::Reason;
use super::record::{FORMAT, Record};
use super::stat::seconds_now;
use super::store::{Found, Miss};
use super::task::is_full;
use super::{Context, threads};

/// The pause before the first retry; each further one is twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// One stage on its own thread.
pub(super) struct Worker<'a, 'b> {
    pub(super) session: &'a Session<'b>,
    pub(super) events: Sender<Event>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) index: usize,
    /// The ids of the devices it has to itself.
    pub(super) gpus: Vec<usize>,
}

/// What became of a stage.
pub(super) enum Outcome {
    /// Its result is there.
    Ready(Ready),
    /// A local file is not as it was when the stage was looked at, and nothing has read it yet: the stage has to be looked at again.
    InputChanged(PathBuf),
    /// It failed, and said so.
    Failed,
}

/// A result that is there.
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
    /// Makes the result, or tells why not.
    pub(super) fn work(&self, prepared: &Prepared, reasons: Vec<Reason>) -> Outcome {
        match self.make(prepared, reasons) {
            Ok(work) => work,
            Err(Failed { error, kept }) => {
                let error = if self.cancel.load(Ordering::Relaxed) {
                    "interrupted".into()
                } else {
                    format!("{error:#}")
                };
                self.send(Event::StageFailed {
                    stage: self.node().name.clone(),
                    error,
                    kept: kept.map(|path| path.display().to_string()),
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
            self.send(Event::StageFresh {
                stage: node.name.clone(),
                artifact: record.artifact.clone(),
                restored: false,
                remote,
                saved: record.seconds,
            });
            return Ok(Outcome::Ready(Ready {
                artifact: record.artifact,
                ran: false,
            }));
        }
        // It may have waited long for its turn.
        if let Some(changed) = prepared.changed(node, false) {
            return Ok(Outcome::InputChanged(changed));
        }
        self.send(Event::StageStarted {
            stage: node.name.clone(),
            kind: node.stage.kind().to_owned(),
            reasons,
        });
        let started = seconds_now();
        let clock = Instant::now();
        let context = self.run_with_retries(prepared, &miss)?;
        let seconds = clock.elapsed().as_secs_f64();
        let previous = store
            .last(recipe, &node.name)
            .and_then(|last| store.record(&last))
            .map(|record| record.artifact);
        let record = Record {
            format: FORMAT,
            stage: node.name.clone(),
            fingerprint: prepared.fingerprint.clone(),
            origins: prepared.origins.clone(),
            output: node.stage.output().to_owned(),
            artifact: String::new(),
            notes: context
                .notes
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
            params: node.stage.params().map_err(anyhow::Error::from)?,
            started,
            seconds,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if let Some(family) = self.family(prepared) {
            // The result is worth more than what a later stage might start from.
            let _ = miss.keep_continuation(&family);
        }
        let written = context.written.into_inner();
        let written = written.unwrap_or_else(PoisonError::into_inner);
        let waiting = &mut |holder: &str| self.wait(holder);
        let (record, _) = miss.commit(record, &written, &self.cancel, waiting)?;
        shared.made(store, &prepared.digest);
        self.session.keep_texts(node, prepared);
        store.set_last(recipe, &node.name, &prepared.digest)?;
        self.send(Event::StageDone {
            stage: node.name.clone(),
            artifact: record.artifact.clone(),
            same_bytes: previous.as_ref() == Some(&record.artifact),
            seconds,
        });
        Ok(Outcome::Ready(Ready {
            artifact: record.artifact,
            ran: true,
        }))
    }

    /// Makes sure that what the stage read is still what it was looked at for: else its result would go under a wrong fingerprint.
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
                    "the result of `{input}` changed while it was read ({what}), so that nothing made of it is kept; run again, and it \
                     is made anew"
                );
            }
        }
        Ok(())
    }

    /// Runs the stage until it succeeds or has failed as often as it may.
    fn run_with_retries(&self, prepared: &Prepared, miss: &Miss<'_>) -> Result<Context, Failed> {
        let node = self.node();
        let mut pause = PAUSE;
        let mut retries_left = node.handling.retries;
        loop {
            let context = self.context(prepared, miss)?;
            let result = catch_unwind(AssertUnwindSafe(|| run_stage(node, &context)))
                .unwrap_or_else(|panic| Err(panicked(&*panic)));
            let mut result = result.and_then(|()| context.check_cancelled());
            if self.cancel.load(Ordering::Relaxed)
                && let Err(error) = result
            {
                miss.discard()?;
                return Err(error.into());
            }
            if let Err(changed) = self.check_what_was_read(prepared) {
                // Another try would read the same.
                retries_left = 0;
                result = Err(match result {
                    Ok(()) => changed,
                    Err(error) => changed.context(format!("{error:#}")),
                });
            }
            let Err(error) = result else {
                return Ok(context);
            };
            if retries_left == 0 {
                let kept = keep_failure(miss, &context, &error);
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

    fn context(&self, prepared: &Prepared, miss: &Miss<'_>) -> anyhow::Result<Context> {
        let node = self.node();
        let timeout = node.handling.timeout;
        Ok(Context {
            stage: node.name.clone(),
            inputs: self.session.input_folders(prepared),
            sources: node.sources.clone(),
            outside: prepared.fingerprint.outside.clone(),
            out: miss.partial()?,
            scratch: self.session.store.scratch(&prepared.digest),
            scratch_note: serde_json::to_vec(&prepared.fingerprint)?,
            // Who forces a stage wants it made from its inputs alone.
            continuations: (self.family(prepared))
                .filter(|_| !self.session.forced[self.index])
                .map(|family| self.session.store.continuations(&family)),
            env: Arc::clone(&self.session.env),
            events: self.events.clone(),
            cancel: Arc::clone(&self.cancel),
            deadline: timeout.and_then(|span| Some((Instant::now().checked_add(span.0)?, span))),
            gpus: self.gpus.clone(),
            notes: Mutex::default(),
            told: Mutex::default(),
            known: prepared.known.clone(),
            written: Mutex::default(),
        })
    }
}

/// Runs a stage with as many threads as it declares: in a process of its own where there is a program for that.
fn run_stage(node: &Node, context: &Context) -> anyhow::Result<()> {
    if let Some(program) = &context.env.program {
        return child::run(node, context, program);
    }
    let Some(cpus) = node.handling.resources.cpus else {
        threads::start(ThreadPoolBuilder::new())?;
        return node.stage.run(context);
    };
    let pool = ThreadPoolBuilder::new().num_threads(cpus.get());
    let pool = pool.build().context("could not start threads")?;
    pool.install(|| node.stage.run(context))
}

/// Keeps what a failed stage wrote and told. Where that is not possible nothing is kept; on a full disk only the log is.
fn keep_failure(miss: &Miss<'_>, context: &Context, error: &anyhow::Error) -> Option<PathBuf> {
    if is_full(error) {
        // Best done first: it makes room.
        let _ = miss.discard();
    }
    let kept = miss.keep_failure(&context.log(error));
    if kept.is_err() {
        let _ = miss.discard();
    }
    kept.ok()
}

fn panicked(panic: &(dyn Any + Send)) -> anyhow::Error {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    anyhow!(
        "the stage panicked, which is a bug in pipeline: {}",
        text.unwrap_or("no message")
    )
}
