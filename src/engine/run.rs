//! Makes stale stages fresh: starts what is ready, one exclusive stage at a time, and commits each result by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;

use super::Event;
use super::canonical::Digest;
use super::handling::{Free, Machine};
use super::history::{Outcome, Run, stages};
use super::lasts::Lasts;
use super::plan::{Prepared, Situation, Verdict};
use super::reason::Reason;
use super::record::FORMAT;
use super::sources::Sources;
use super::worker::{Work, Worker};

/// How to go about a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Stages that may run at a time.
    pub jobs: usize,
    /// What they may take together.
    pub machine: Machine,
    /// After a failure, goes on with what does not need the failed stage.
    pub keep_going: bool,
}

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

/// What a worker sends back: the stage's index and what became of it.
type Done = (usize, Work);

/// How often a stage is looked at again because a local file changed before it was read.
const LOOKS: usize = 3;

/// Runs what `targets` need (everything when empty). Errors of stages are events and counts; an `Err` is an error of the
/// runner itself.
pub fn run(
    situation: &Situation<'_>,
    targets: &[usize],
    options: &Options,
    events: &Sender<Event>,
    cancel: &Arc<AtomicBool>,
) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let needed = situation.graph.needed(targets);
    for (node, _) in situation
        .graph
        .nodes
        .iter()
        .zip(&needed)
        .filter(|(_, needed)| **needed)
    {
        options
            .machine
            .check(&node.name, &node.handling.resources)?;
    }
    let _in_use = situation.store.use_results(cancel, &mut |holder| {
        let holder = holder.to_owned();
        send(events, Event::RunWaiting { holder });
    })?;
    situation.store.sweep();
    let stages = needed.iter().filter(|needed| **needed).count();
    send(
        events,
        Event::RunStarted {
            recipe: situation.recipe.to_owned(),
            stages,
        },
    );
    let (shared, queued) = situation.shared.open(situation.store, events);
    let mut sources = situation.sources();
    situation.fetch(&needed, targets, &mut sources, events, cancel)?;
    let (summary, _shared) = std::thread::scope(|scope| {
        // Moved here, so that a panic ends the sender, too.
        let shared = shared;
        let (done, results) = channel();
        let Situation {
            store,
            shared: sender,
            ..
        } = *situation;
        std::thread::Builder::new()
            .spawn_scoped(scope, move || {
                sender.send_all(store, &queued, events, cancel);
            })
            .context("could not start a thread")?;
        let summary = Runner {
            situation,
            events,
            cancel,
            options,
            lasts: Lasts::open(situation.store, situation.recipe),
            free: Free::all(&options.machine),
            done,
            running: BTreeMap::new(),
            started: (seconds_now(), started),
            fingerprints: vec![None; situation.graph.nodes.len()],
            ran: vec![false; situation.graph.nodes.len()],
            looks: vec![0; situation.graph.nodes.len()],
            summary: Summary::default(),
        }
        .drive(scope, &needed, &mut sources, &results);
        shared.close();
        anyhow::Ok((summary, shared))
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
    options: &'a Options,
    lasts: Lasts,
    free: Free,
    done: Sender<Done>,
    /// The running stages with the ids of their devices.
    running: BTreeMap<usize, Vec<usize>>,
    /// When the run began, in seconds since 1970 and by the clock that only goes forward.
    started: (u64, Instant),
    fingerprints: Vec<Option<Digest>>,
    ran: Vec<bool>,
    /// How often each stage was looked at again.
    looks: Vec<usize>,
    summary: Summary,
}

impl<'a> Runner<'a, '_> {
    fn drive<'scope>(
        mut self,
        scope: &'scope Scope<'scope, 'a>,
        needed: &[bool],
        sources: &mut Sources,
        results: &Receiver<Done>,
    ) -> Summary
    where
        'a: 'scope,
    {
        let graph = self.situation.graph;
        let readers = graph.readers();
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
            let stopped = self.cancel.load(Ordering::Relaxed)
                || (self.summary.failed > 0 && !self.options.keep_going);
            if !stopped {
                while let Some((_, index)) = ready.pop_first() {
                    match self.look_up(index, &contents, sources) {
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
            if let Some(gpus) = self.running.remove(&index) {
                let handling = &graph.nodes[index].handling;
                self.free.give(&handling.resources, &gpus);
            }
            match result {
                Work::Failed => self.summary.failed += 1,
                Work::Again(path) => {
                    self.looks[index] += 1;
                    if self.looks[index] > LOOKS {
                        self.fail(
                            &graph.nodes[index].name,
                            format!(
                                "`{}` changes all the time: {LOOKS} times it was looked at, and it was another before it could be \
                                 read; run again when nothing writes there any more",
                                path.display()
                            ),
                        );
                    } else {
                        sources.look_again();
                        ready.insert(rank[index], index);
                    }
                }
                Work::Made(made) => {
                    self.ran[index] = made.ran;
                    if made.ran {
                        self.summary.ran += 1;
                    } else {
                        self.summary.fresh += 1;
                    }
                    contents[index] = Some(made.artifact);
                    release(&readers[index], needed, &mut open, &rank, &mut ready);
                }
            }
        }
        // Both only spare work next time.
        let _ = sources.save();
        let _ = self
            .lasts
            .save(graph.nodes.iter().map(|node| node.name.as_str()));
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
        self.summary
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

    /// Tells that a stage failed before it ran.
    fn fail(&mut self, stage: &str, error: String) {
        let failed = Event::StageFailed {
            stage: stage.to_owned(),
            error,
            kept: None,
        };
        send(self.events, failed);
        self.summary.failed += 1;
    }

    /// Asks the store about a stage whose inputs are known.
    fn look_up(
        &mut self,
        index: usize,
        contents: &[Option<Digest>],
        sources: &mut Sources,
    ) -> Lookup {
        let node = &self.situation.graph.nodes[index];
        let name = &node.name;
        let mut prepared = match self.situation.prepare(index, contents, sources) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.fail(name, format!("{error:#}"));
                return Lookup::Failed;
            }
        };
        self.fingerprints[index] = Some(prepared.digest.clone());
        let Situation {
            store,
            recipe,
            shared,
            ..
        } = self.situation;
        let verdict = match self.situation.judge(index, &prepared, &self.lasts) {
            Ok(verdict) => verdict,
            Err(error) => {
                self.fail(name, format!("{error:#}"));
                return Lookup::Failed;
            }
        };
        let (record, restored, remote) = match verdict {
            Verdict::Fresh {
                record,
                restored,
                last,
                touched,
            } => {
                // Both only spare work next time: a store that can't be written still serves.
                if let Some(manifest) = touched {
                    let _ = store.write_manifest(&record.artifact, &manifest);
                }
                if !last {
                    self.situation.keep_texts(node, &prepared);
                    let _ = store.set_last(recipe, name, &prepared.digest);
                }
                (record, restored, false)
            }
            Verdict::Away {
                record, restored, ..
            } if shared.is_left_out(&prepared.digest) => {
                // So do these.
                self.situation.keep_texts(node, &prepared);
                let _ = store.leave(&prepared.digest, &record);
                let _ = store.set_last(recipe, name, &prepared.digest);
                (record, restored, true)
            }
            // The files of what is away may be needed: a worker fetches them, or runs the stage.
            Verdict::Stale(reasons) | Verdict::Away { reasons, .. } => {
                let files = node.sources.values();
                prepared.known = files.flat_map(|path| sources.known(path)).collect();
                return Lookup::Stale(Box::new(prepared), reasons);
            }
        };
        self.summary.fresh += 1;
        self.summary.saved += record.seconds;
        let artifact = record.artifact;
        send(
            self.events,
            Event::StageFresh {
                stage: name.clone(),
                artifact: artifact.clone(),
                restored,
                remote,
                saved: record.seconds,
            },
        );
        Lookup::Fresh(artifact)
    }

    /// Starts stale stages while there is a free place and what they take is free. Exclusive ones go one at a time.
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
            if self.running.len() >= self.options.jobs.max(1) {
                return;
            }
            let Some(&(index, ..)) = stale.get(&rank) else {
                continue;
            };
            let exclusive = |index: usize| graph.nodes[index].stage.exclusive();
            if exclusive(index) && self.running.keys().any(|&running| exclusive(running)) {
                continue;
            }
            let Some(gpus) = self.free.take(&graph.nodes[index].handling.resources) else {
                continue;
            };
            let Some((_, prepared, reasons)) = stale.remove(&rank) else {
                continue;
            };
            self.running.insert(index, gpus.clone());
            let worker = Worker {
                situation: self.situation,
                events: self.events.clone(),
                cancel: Arc::clone(self.cancel),
                index,
                gpus,
            };
            let done = self.done.clone();
            let started = std::thread::Builder::new().spawn_scoped(scope, move || {
                let result = worker.work(&prepared, reasons);
                // The runner outlives its workers.
                let _ = done.send((index, result));
            });
            if let Err(error) = started {
                let failed = Event::StageFailed {
                    stage: graph.nodes[index].name.clone(),
                    error: format!("could not start a thread: {error}"),
                    kept: None,
                };
                send(self.events, failed);
                let _ = self.done.send((index, Work::Failed));
            }
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

/// Seconds since 1970.
pub(super) fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs())
}

pub(super) fn send(events: &Sender<Event>, event: Event) {
    // Nobody listening is no reason to stop.
    let _ = events.send(event);
}
