//! Makes stale stages fresh: starts what is ready, one exclusive stage at a time, and commits each result by itself.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;

use super::canonical::Digest;
use super::fingerprint::Origin;
use super::history::{Outcome, Run, stages};
use super::plan::{Prepared, Situation, Verdict};
use super::reason::Reason;
use super::record::{FORMAT, Record};
use super::sources::Sources;
use super::store::Found;
use super::{Context, Event};

/// How a run went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    /// Stages whose result was there.
    pub fresh: usize,
    /// Stages that ran.
    pub ran: usize,
    /// Stages that failed.
    pub failed: usize,
    /// Stages that were not started.
    pub skipped: usize,
    /// Whether the run was interrupted.
    pub interrupted: bool,
    /// The content digest of each stage's artifact, where there is one; in the order of the recipe.
    pub artifacts: Vec<Option<Digest>>,
    /// Seconds that the fresh stages took when they ran.
    pub saved: f64,
}

/// What the store says of a stage whose inputs are known.
enum Lookup {
    Fresh(Digest),
    Stale(Box<Prepared>, Vec<Reason>),
    Failed,
}

/// What a worker sends back: the stage's index and its result, or `None` when it failed (and said so).
type Done = (usize, Option<(Digest, bool)>);

/// Runs what `targets` need (everything when empty). Errors of stages are events and counts; an `Err` is an error of the
/// runner itself.
pub fn run(
    situation: &Situation<'_>,
    targets: &[usize],
    jobs: usize,
    events: &Sender<Event>,
    cancel: &Arc<AtomicBool>,
) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let _in_use = situation.store.use_results()?;
    situation.store.sweep();
    let needed = situation.graph.needed(targets);
    let stages = needed.iter().filter(|needed| **needed).count();
    send(
        events,
        Event::RunStarted {
            recipe: situation.recipe.to_owned(),
            stages,
        },
    );
    let (shared, queued) = situation.shared.open(situation.store, events);
    situation.fetch(&needed, targets, events, cancel)?;
    let (summary, _shared) = std::thread::scope(|scope| {
        // Moved here, so that a panic ends the sender, too.
        let shared = shared;
        let (done, results) = channel();
        let Situation {
            store,
            shared: sender,
            ..
        } = *situation;
        scope.spawn(move || sender.send_all(store, &queued, events, cancel));
        let summary = Runner {
            situation,
            events,
            cancel,
            jobs: jobs.max(1),
            done,
            running: Vec::new(),
            started: (seconds_now(), started),
            fingerprints: vec![None; situation.graph.nodes.len()],
            ran: vec![false; situation.graph.nodes.len()],
            summary: Summary::default(),
        }
        .drive(scope, &needed, &results);
        shared.close();
        anyhow::Ok((summary?, shared))
    })?;
    let Summary {
        fresh,
        ran,
        failed,
        skipped,
        saved,
        ..
    } = summary;
    send(
        events,
        Event::RunFinished {
            fresh,
            ran,
            failed,
            skipped,
            seconds: started.elapsed().as_secs_f64(),
            saved,
        },
    );
    situation.shared.check()?;
    Ok(summary)
}

struct Runner<'a, 'b> {
    situation: &'a Situation<'b>,
    events: &'a Sender<Event>,
    cancel: &'a Arc<AtomicBool>,
    jobs: usize,
    done: Sender<Done>,
    running: Vec<usize>,
    /// When the run began, in seconds since 1970 and by the clock that only goes forward.
    started: (u64, Instant),
    fingerprints: Vec<Option<Digest>>,
    ran: Vec<bool>,
    summary: Summary,
}

impl<'a> Runner<'a, '_> {
    fn drive<'scope>(
        mut self,
        scope: &'scope Scope<'scope, 'a>,
        needed: &[bool],
        results: &Receiver<Done>,
    ) -> anyhow::Result<Summary>
    where
        'a: 'scope,
    {
        let graph = self.situation.graph;
        let readers = graph.readers();
        let mut sources = Sources::open(self.situation.store);
        let mut contents: Vec<Option<Digest>> = vec![None; graph.nodes.len()];
        let mut open: Vec<usize> = graph.inputs.iter().map(Vec::len).collect();
        let mut rank = vec![0; graph.nodes.len()];
        for (position, &index) in graph.order.iter().enumerate() {
            rank[index] = position;
        }
        // Ready stages by their place in the graph's order; stale ones wait in `stale` for a free place.
        let mut ready: BTreeMap<usize, usize> = graph
            .order
            .iter()
            .filter(|&&index| needed[index] && open[index] == 0)
            .map(|&index| (rank[index], index))
            .collect();
        let mut stale: BTreeMap<usize, (usize, Prepared, Vec<Reason>)> = BTreeMap::new();
        let mut finished = Vec::new();
        loop {
            let stopped = self.cancel.load(Ordering::Relaxed) || self.summary.failed > 0;
            if !stopped {
                while let Some((_, index)) = ready.pop_first() {
                    match self.look_up(index, &contents, &mut sources) {
                        Lookup::Fresh(content) => finished.push((index, content)),
                        Lookup::Failed => {}
                        Lookup::Stale(prepared, reasons) => {
                            stale.insert(rank[index], (index, *prepared, reasons));
                        }
                    }
                    for (index, content) in finished.drain(..) {
                        contents[index] = Some(content);
                        release(&readers[index], needed, &mut open, &rank, &mut ready);
                    }
                }
                self.start(scope, &mut stale);
            }
            if self.running.is_empty() {
                break;
            }
            let Ok((index, result)) = results.recv() else {
                break;
            };
            self.running.retain(|&running| running != index);
            match result {
                None => self.summary.failed += 1,
                Some((content, ran)) => {
                    self.ran[index] = ran;
                    if ran {
                        self.summary.ran += 1;
                    } else {
                        self.summary.fresh += 1;
                    }
                    contents[index] = Some(content);
                    release(&readers[index], needed, &mut open, &rank, &mut ready);
                }
            }
        }
        sources.save()?;
        self.summary.interrupted = self.cancel.load(Ordering::Relaxed);
        if self.summary.interrupted {
            // A stage that stops because it was told to has not failed.
            self.summary.failed = 0;
        }
        let left = needed.iter().filter(|needed| **needed).count()
            - self.summary.fresh
            - self.summary.ran
            - self.summary.failed;
        self.summary.skipped = left;
        self.remember(&contents);
        self.summary.artifacts = contents;
        Ok(self.summary)
    }

    /// Keeps what was run, for `history` and `diff`. A store that can't be written has no history, and still serves.
    fn remember(&self, contents: &[Option<Digest>]) {
        let Situation {
            graph,
            store,
            recipe,
            ..
        } = self.situation;
        let outcome = match &self.summary {
            Summary {
                interrupted: true, ..
            } => Outcome::Interrupted,
            Summary { failed: 1.., .. } => Outcome::Failed,
            _ => Outcome::Done,
        };
        let run = Run {
            format: FORMAT,
            number: 0,
            started: self.started.0,
            seconds: self.started.1.elapsed().as_secs_f64(),
            outcome,
            stages: stages(graph, &self.fingerprints, contents, &self.ran),
        };
        let _ = store.remember(recipe, run);
    }

    /// Asks the store about a stage whose inputs are known.
    fn look_up(
        &mut self,
        index: usize,
        contents: &[Option<Digest>],
        sources: &mut Sources,
    ) -> Lookup {
        let name = &self.situation.graph.nodes[index].name;
        let prepared = match self.situation.prepare(index, contents, sources) {
            Ok(prepared) => prepared,
            Err(error) => {
                send(
                    self.events,
                    Event::StageFailed {
                        stage: name.clone(),
                        error: format!("{error:#}"),
                    },
                );
                self.summary.failed += 1;
                return Lookup::Failed;
            }
        };
        self.fingerprints[index] = Some(prepared.digest.clone());
        match self.situation.judge(index, &prepared) {
            Verdict::Stale(reasons) => Lookup::Stale(Box::new(prepared), reasons),
            Verdict::Away {
                record, restored, ..
            } if self.situation.shared.is_left_out(&prepared.digest) => {
                let Situation { store, recipe, .. } = self.situation;
                // Both only spare work next time, as below.
                let _ = store.leave(&prepared.digest, &record);
                let _ = store.set_last(recipe, name, &prepared.digest);
                self.summary.fresh += 1;
                self.summary.saved += record.seconds;
                let artifact = record.artifact;
                send(
                    self.events,
                    Event::StageFresh {
                        stage: name.clone(),
                        artifact: artifact.clone(),
                        restored,
                        remote: true,
                        saved: record.seconds,
                    },
                );
                Lookup::Fresh(artifact)
            }
            // Its files may be needed: a worker fetches them, or runs the stage.
            Verdict::Away { reasons, .. } => Lookup::Stale(Box::new(prepared), reasons),
            Verdict::Fresh {
                record,
                restored,
                last,
                touched,
            } => {
                let Situation { store, recipe, .. } = self.situation;
                // Both only spare work next time: a store that can't be written still serves.
                if let Some(manifest) = touched {
                    let _ = store.write_manifest(&record.artifact, &manifest);
                }
                if !last {
                    let _ = store.set_last(recipe, name, &prepared.digest);
                }
                self.summary.fresh += 1;
                self.summary.saved += record.seconds;
                let artifact = record.artifact;
                send(
                    self.events,
                    Event::StageFresh {
                        stage: name.clone(),
                        artifact: artifact.clone(),
                        restored,
                        remote: false,
                        saved: record.seconds,
                    },
                );
                Lookup::Fresh(artifact)
            }
        }
    }

    /// Starts stale stages while there is a free place. Exclusive ones go one at a time.
    fn start<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, 'a>,
        stale: &mut BTreeMap<usize, (usize, Prepared, Vec<Reason>)>,
    ) where
        'a: 'scope,
    {
        let graph = self.situation.graph;
        let ranks: Vec<usize> = stale.keys().copied().collect();
        for rank in ranks {
            if self.running.len() >= self.jobs {
                return;
            }
            let Some((index, ..)) = stale.get(&rank) else {
                continue;
            };
            let exclusive = |index: usize| graph.nodes[index].stage.exclusive();
            if exclusive(*index) && self.running.iter().any(|&running| exclusive(running)) {
                continue;
            }
            let Some((index, prepared, reasons)) = stale.remove(&rank) else {
                continue;
            };
            self.running.push(index);
            let worker = Worker {
                situation: self.situation,
                events: self.events.clone(),
                cancel: Arc::clone(self.cancel),
                index,
            };
            let done = self.done.clone();
            scope.spawn(move || {
                let result = worker.work(&prepared, reasons);
                // The runner outlives its workers.
                let _ = done.send((index, result));
            });
        }
    }
}

fn release(
    readers: &[usize],
    needed: &[bool],
    open: &mut [usize],
    rank: &[usize],
    ready: &mut BTreeMap<usize, usize>,
) {
    for &reader in readers {
        open[reader] -= 1;
        if open[reader] == 0 && needed[reader] {
            ready.insert(rank[reader], reader);
        }
    }
}

/// One stage on its own thread.
struct Worker<'a, 'b> {
    situation: &'a Situation<'b>,
    events: Sender<Event>,
    cancel: Arc<AtomicBool>,
    index: usize,
}

impl Worker<'_, '_> {
    /// The content and whether the stage ran (another runner may have made the result meanwhile).
    fn work(&self, prepared: &Prepared, reasons: Vec<Reason>) -> Option<(Digest, bool)> {
        let name = &self.situation.graph.nodes[self.index].name;
        match self.make(name, prepared, reasons) {
            Ok(result) => Some(result),
            Err(error) => {
                let error = if self.cancel.load(Ordering::Relaxed) {
                    "interrupted".into()
                } else {
                    format!("{error:#}")
                };
                send(
                    &self.events,
                    Event::StageFailed {
                        stage: name.clone(),
                        error,
                    },
                );
                None
            }
        }
    }

    fn make(
        &self,
        name: &str,
        prepared: &Prepared,
        reasons: Vec<Reason>,
    ) -> anyhow::Result<(Digest, bool)> {
        let Situation {
            graph,
            store,
            recipe,
            verify,
            shared,
            ..
        } = self.situation;
        let node = &graph.nodes[self.index];
        let mut waited = false;
        let miss = store.lock(&prepared.digest, &mut |holder| {
            waited = true;
            send(
                &self.events,
                Event::StageWaiting {
                    stage: name.to_owned(),
                    holder: holder.to_owned(),
                },
            );
        })?;
        let there = || match store.find(&prepared.digest, *verify) {
            Found::Hit(record, _) => Some((*record, false)),
            _ => shared
                .restore(store, &prepared.digest, (name, &self.events), &self.cancel)
                .map(|record| (record, true)),
        };
        if (waited || !self.situation.forced[self.index])
            && let Some((record, remote)) = there()
        {
            store.set_last(recipe, name, &prepared.digest)?;
            let artifact = record.artifact;
            let saved = record.seconds;
            send(
                &self.events,
                Event::StageFresh {
                    stage: name.to_owned(),
                    artifact: artifact.clone(),
                    restored: false,
                    remote,
                    saved,
                },
            );
            return Ok((artifact, false));
        }
        send(
            &self.events,
            Event::StageStarted {
                stage: name.to_owned(),
                kind: node.stage.kind().to_owned(),
                reasons,
            },
        );
        let started = seconds_now();
        let clock = Instant::now();
        let context = Context {
            stage: name.to_owned(),
            inputs: self.situation.input_folders(prepared),
            sources: node.sources.clone(),
            outside: prepared.fingerprint.outside.clone(),
            out: miss.partial()?,
            scratch: store.scratch(&prepared.digest),
            world: Arc::clone(&self.situation.world),
            events: self.events.clone(),
            cancel: Arc::clone(&self.cancel),
            notes: Mutex::default(),
        };
        let result = catch_unwind(AssertUnwindSafe(|| node.stage.run(&context)))
            .unwrap_or_else(|panic| Err(panicked(&*panic)));
        if let Err(error) = result.and_then(|()| context.check_cancelled()) {
            miss.discard()?;
            return Err(error);
        }
        let seconds = clock.elapsed().as_secs_f64();
        let previous = store
            .last(recipe, name)
            .and_then(|last| store.record(&last))
            .map(|record| record.artifact);
        let record = Record {
            format: FORMAT,
            stage: name.to_owned(),
            fingerprint: prepared.fingerprint.clone(),
            origins: prepared.origins.clone(),
            output: node.stage.output().to_owned(),
            artifact: String::new(),
            notes: context
                .notes
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
            params: node.stage.params()?,
            started,
            seconds,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let (record, _) = miss.commit(record)?;
        shared.made(store, &prepared.digest);
        for (parameter, origin) in &record.origins {
            let leaf = record.fingerprint.leaves().get(parameter).cloned();
            let content = leaf.as_ref().and_then(super::fingerprint::content);
            if let (Origin::File(written), Some(content)) = (origin, content)
                && let Some(file) = node.sources.get(written)
            {
                // Only for telling a later change by its lines.
                let _ = store.keep_text(file, content);
            }
        }
        store.set_last(recipe, name, &prepared.digest)?;
        let same_bytes = previous.as_ref() == Some(&record.artifact);
        let artifact = record.artifact;
        send(
            &self.events,
            Event::StageDone {
                stage: name.to_owned(),
                artifact: artifact.clone(),
                same_bytes,
                seconds,
            },
        );
        Ok((artifact, true))
    }
}

/// Seconds since 1970.
fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs())
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

fn send(events: &Sender<Event>, event: Event) {
    // Nobody listening is no reason to stop.
    let _ = events.send(event);
}
