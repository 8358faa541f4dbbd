//! Runs stale stages: starts those that are ready, at most one exclusive stage at a time, and commits each result separately.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::canonical::Digest;
use super::event::{EVENT_VERSION, Event, send};
use super::handling::Free;
use super::history::{Outcome, Run, RunInProgress, RunLabel, stages};
use super::known_results::KnownResults;
use super::last_results::LastResults;
use super::plan::{Prepared, Session, Verdict};
use super::reason::Reason;
use super::record::FORMAT;
use super::sources::Sources;
use super::stat::seconds_now;
use super::summary::{Options, Summary};
use super::worker::{self, Worker};

/// What the store says of a stage whose inputs are known.
enum Lookup {
    Fresh(Digest),
    Stale(Box<Prepared>, Vec<Reason>),
    Failed,
}

/// What a running stage takes.
#[derive(Clone)]
enum Allocation {
    /// On this machine, with these devices.
    ThisMachine(Vec<usize>),
    /// On a cluster: it takes nothing of this machine.
    Cluster,
}

/// What a worker sends back: the stage's index and what became of it.
type Done = (usize, worker::Outcome);

/// The shortest time between two updates of the record of a run in progress.
const BETWEEN_RECORDS: Duration = Duration::from_secs(1);

/// The number of times that a stage is inspected again because a local file changed before the stage read it.
const MAX_INSPECTIONS: usize = 3;

/// Runs what `targets` need (everything when empty). Errors of stages are events and counts; an `Err` is an error of the
/// runner itself.
pub fn run(
    session: &Session<'_>,
    targets: &[usize],
    options: &Options,
    events: &Sender<Event>,
    cancel: &Arc<AtomicBool>,
) -> anyhow::Result<Summary> {
    let started = Instant::now();
    let needed = session.graph.needed(targets);
    for (node, _) in session
        .graph
        .nodes
        .iter()
        .zip(&needed)
        .filter(|(_, needed)| **needed)
    {
        if session.executors.cluster(&node.handling).is_none() {
            options
                .machine
                .check(&node.name, &node.handling.resources)?;
        }
    }
    let _in_use = session.store.use_results(cancel, &mut |holder| {
        let holder = holder.to_owned();
        send(events, Event::RunWaiting { holder });
    })?;
    session.store.sweep();
    let stages = needed.iter().filter(|needed| **needed).count();
    send(
        events,
        Event::RunStarted {
            recipe: session.recipe.to_owned(),
            stages,
            version: EVENT_VERSION,
        },
    );
    let (shared, queued) = session.shared.open(session.store, events);
    let mut sources = session.sources();
    session.fetch(&needed, targets, &mut sources, events, cancel)?;
    let (summary, _shared) = std::thread::scope(|scope| {
        // Moved here, so that a panic drops the sender too.
        let shared = shared;
        let (done, results) = channel();
        let Session {
            store,
            shared: sender,
            ..
        } = *session;
        std::thread::Builder::new()
            .spawn_scoped(scope, move || {
                sender.send_all(store, &queued, events, cancel);
            })
            .context("could not start a thread")?;
        let summary = Runner {
            session,
            events,
            cancel,
            options,
            last_results: LastResults::open(session.store, session.recipe),
            known_results: KnownResults::open(session.store, session.recipe),
            free: Free::all(&options.machine),
            done,
            running: BTreeMap::new(),
            started: (seconds_now(), started),
            fingerprints: vec![None; session.graph.nodes.len()],
            ran: vec![false; session.graph.nodes.len()],
            inspections: vec![0; session.graph.nodes.len()],
            summary: Summary::default(),
            record: None,
        }
        .drive(scope, &needed, &mut sources, &results);
        shared.close();
        anyhow::Ok((summary?, shared))
    })?;
    let Summary {
        fresh,
        ran,
        failed,
        skipped,
        saved,
        interrupted,
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
            interrupted,
        },
    );
    session.shared.check()?;
    Ok(summary)
}

struct Runner<'a, 'b> {
    session: &'a Session<'b>,
    events: &'a Sender<Event>,
    cancel: &'a Arc<AtomicBool>,
    options: &'a Options,
    last_results: LastResults,
    known_results: KnownResults,
    free: Free,
    done: Sender<Done>,
    /// Where each running stage runs.
    running: BTreeMap<usize, Allocation>,
    /// When the run began, in seconds since 1970 and by the clock that only goes forward.
    started: (u64, Instant),
    fingerprints: Vec<Option<Digest>>,
    ran: Vec<bool>,
    /// How often each stage was looked at again.
    inspections: Vec<usize>,
    summary: Summary,
    /// What is written down of the run, from the first stage that is started, and when it was written.
    record: Option<(RunInProgress, Instant)>,
}

impl<'a> Runner<'a, '_> {
    fn drive<'scope>(
        mut self,
        scope: &'scope Scope<'scope, 'a>,
        needed: &[bool],
        sources: &mut Sources,
        results: &Receiver<Done>,
    ) -> anyhow::Result<Summary>
    where
        'a: 'scope,
    {
        let graph = self.session.graph;
        let readers = graph.readers();
        let mut contents: Vec<Option<Digest>> = vec![None; graph.nodes.len()];
        // A frozen stage waits for nothing.
        let frozen = |index: usize| graph.nodes[index].handling.frozen;
        let waits =
            |(index, inputs): (usize, &Vec<usize>)| if frozen(index) { 0 } else { inputs.len() };
        let mut open: Vec<usize> = graph.inputs.iter().enumerate().map(waits).collect();
        let readers: Vec<Vec<usize>> = (readers.into_iter())
            .map(|all| all.into_iter().filter(|&reader| !frozen(reader)).collect())
            .collect();
        let mut rank = vec![0; graph.nodes.len()];
        for (position, &index) in graph.order.iter().enumerate() {
            rank[index] = position;
        }
        // Ready stages by their rank in the graph's order; stale ones wait in `stale` for what they need.
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
                    match self.look_up(index, &contents, needed, sources) {
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
                if !stale.is_empty() {
                    self.check_clusters(needed, &contents)?;
                    self.begin_record(&contents);
                }
                self.start(scope, &mut stale);
            }
            if self.running.is_empty() {
                break;
            }
            // Until there is a result, anything may change.
            sources.look_again();
            self.known_results.look_again();
            let Ok((index, result)) = results.recv() else {
                break;
            };
            if let Some(Allocation::ThisMachine(gpus)) = self.running.remove(&index) {
                let handling = &graph.nodes[index].handling;
                self.free.give(&handling.resources, &gpus);
            }
            match result {
                worker::Outcome::Failed => self.summary.failed += 1,
                worker::Outcome::InputChanged(path) => {
                    self.inspections[index] += 1;
                    if self.inspections[index] > MAX_INSPECTIONS {
                        self.fail(
                            &graph.nodes[index].name,
                            format!(
                                "`{}` keeps changing: {MAX_INSPECTIONS} times it was inspected, and each time it changed before it could be \
                                 read; run again when nothing writes there any more",
                                path.display()
                            ),
                        );
                    } else {
                        sources.look_again();
                        ready.insert(rank[index], index);
                    }
                }
                worker::Outcome::Ready(made) => {
                    self.ran[index] = made.ran;
                    if made.ran {
                        self.summary.ran += 1;
                    } else {
                        self.summary.fresh += 1;
                    }
                    contents[index] = Some(made.artifact);
                    self.update_record(&contents);
                    release(&readers[index], needed, &mut open, &rank, &mut ready);
                }
            }
        }
        // All of them only spare work next time.
        let _ = sources.save();
        let _ = self.known_results.save(self.session.store);
        let _ = self
            .last_results
            .save(graph.nodes.iter().map(|node| node.name.as_str()));
        self.summary.interrupted = self.cancel.load(Ordering::Relaxed);
        if self.summary.interrupted {
            // A stage that was stopped has not failed.
            self.summary.failed = 0;
        }
        let left = needed.iter().filter(|needed| **needed).count()
            - self.summary.fresh
            - self.summary.ran
            - self.summary.failed;
        self.summary.skipped = left;
        self.summary.run = self.remember(&contents);
        self.summary.artifacts = contents;
        Ok(self.summary)
    }

    /// Before the first stage runs: an error if a cluster would never take the jobs of a stage that is not known to be fresh.
    fn check_clusters(&self, needed: &[bool], contents: &[Option<Digest>]) -> anyhow::Result<()> {
        if self.record.is_some() || !self.running.is_empty() {
            return Ok(());
        }
        let nodes = self.session.graph.nodes.iter().enumerate();
        let open = nodes.filter(|(index, _)| needed[*index] && contents[*index].is_none());
        let open = open.map(|(_, node)| (node.name.as_str(), &node.handling));
        self.session.executors.check(open)
    }

    /// Records that the run is in progress. A store that can't be written has no history, but its results can be used.
    fn begin_record(&mut self, contents: &[Option<Digest>]) {
        if self.record.is_some() {
            return;
        }
        let run = self.as_recorded(Outcome::Running, contents);
        let Session { store, recipe, .. } = self.session;
        if let Ok(record) = store.begin_run(recipe, run) {
            let run = record.number;
            send(self.events, Event::RunNumbered { run });
            self.record = Some((record, Instant::now()));
        }
    }

    /// Writes down what is ready by now, at most once a second.
    fn update_record(&mut self, contents: &[Option<Digest>]) {
        let run = |runner: &Self| runner.as_recorded(Outcome::Running, contents);
        if let Some((record, written)) = &self.record
            && written.elapsed() >= BETWEEN_RECORDS
        {
            // The next one, or the last, has it as well.
            let _ = record.update(&run(self));
            if let Some((_, written)) = &mut self.record {
                *written = Instant::now();
            }
        }
    }

    /// Records the run for `history` and `diff`. A store that can't be written has no history, but its results can be used.
    fn remember(&mut self, contents: &[Option<Digest>]) -> Option<u64> {
        let outcome = match &self.summary {
            Summary {
                interrupted: true, ..
            } => Outcome::Interrupted,
            Summary { failed: 1.., .. } => Outcome::Failed,
            _ => Outcome::Done,
        };
        let run = self.as_recorded(outcome, contents);
        let begun = self.record.take().map(|(record, _)| record);
        let Session { store, recipe, .. } = self.session;
        store.remember(recipe, run, begun).ok().flatten()
    }

    fn as_recorded(&self, outcome: Outcome, contents: &[Option<Digest>]) -> Run {
        Run {
            format: FORMAT,
            number: 0,
            started: self.started.0,
            seconds: self.started.1.elapsed().as_secs_f64(),
            outcome,
            stages: stages(self.session.graph, &self.fingerprints, contents, &self.ran),
            label: RunLabel::default(),
        }
    }

    /// Reports that a stage failed before it ran.
    fn fail(&mut self, stage: &str, error: String) {
        let failed = Event::StageFailed {
            stage: stage.to_owned(),
            error,
            kept: None,
            interrupted: false,
        };
        send(self.events, failed);
        self.summary.failed += 1;
    }

    /// Asks the store about a stage whose inputs are known.
    fn look_up(
        &mut self,
        index: usize,
        contents: &[Option<Digest>],
        needed: &[bool],
        sources: &mut Sources,
    ) -> Lookup {
        let node = &self.session.graph.nodes[index];
        let name = &node.name;
        let mut prepared = match self.session.prepare(index, contents, needed, sources) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.fail(name, format!("{error:#}"));
                return Lookup::Failed;
            }
        };
        self.fingerprints[index] = Some(prepared.digest.clone());
        if let Some(reasons) = &prepared.frozen {
            self.summary.frozen.insert(index, reasons.clone());
        }
        let Session {
            store,
            recipe,
            shared,
            ..
        } = self.session;
        let memos = (&self.last_results, &self.known_results);
        let verdict = match self.session.judge(index, &prepared, memos) {
            Ok(verdict) => verdict,
            Err(error) => {
                self.fail(name, format!("{error:#}"));
                return Lookup::Failed;
            }
        };
        let (artifact, seconds, restored, remote) = match verdict {
            Verdict::Fresh {
                artifact,
                seconds,
                restored,
                last,
                touched,
            } => {
                // Both only spare work next time: a store that can't be written still serves.
                if let Some(manifest) = touched {
                    let _ = store.write_manifest(&artifact, &manifest);
                }
                if !last {
                    self.session.keep_texts(node, &prepared);
                    let _ = store.set_last(recipe, name, &prepared.digest);
                }
                (artifact, seconds, restored, false)
            }
            Verdict::RemoteOnly {
                record, restored, ..
            } if !node.stage.has_requirements() && shared.is_set_remote_only(&prepared.digest) => {
                // So do these.
                self.session.keep_texts(node, &prepared);
                let _ = store.note_remote_only(&prepared.digest, &record);
                let _ = store.set_last(recipe, name, &prepared.digest);
                (record.artifact, record.seconds, restored, true)
            }
            // The files of what is away may be needed: a worker fetches them, or runs the stage.
            Verdict::Stale(reasons) | Verdict::RemoteOnly { reasons, .. } => {
                let files = node.sources.values();
                prepared.known = files.flat_map(|path| sources.known(path)).collect();
                return Lookup::Stale(Box::new(prepared), reasons);
            }
        };
        if let Err(error) = self.session.accept(index, &artifact) {
            self.fail(name, format!("{error:#}"));
            return Lookup::Failed;
        }
        self.summary.fresh += 1;
        self.summary.saved += seconds;
        send(
            self.events,
            Event::StageFresh {
                stage: name.clone(),
                artifact: artifact.clone(),
                restored,
                remote,
                saved: seconds,
                frozen: prepared.frozen,
            },
        );
        Lookup::Fresh(artifact)
    }

    /// Takes what a stage needs where it is to run; `None` if that is not free now.
    fn allocate(&mut self, index: usize) -> Option<Allocation> {
        let (nodes, executors) = (&self.session.graph.nodes, self.session.executors);
        let handling = &nodes[index].handling;
        if let Some(cluster) = executors.cluster(handling) {
            let there = self
                .running
                .keys()
                .filter(|running| nodes[**running].handling.executor == handling.executor);
            return (there.count() < cluster.most_jobs()).then_some(Allocation::Cluster);
        }
        let here = |(index, allocation): (&usize, &Allocation)| match allocation {
            Allocation::ThisMachine(_) => Some(*index),
            Allocation::Cluster => None,
        };
        let here: Vec<usize> = self.running.iter().filter_map(here).collect();
        let exclusive = |index: usize| nodes[index].stage.exclusive();
        if here.len() >= self.options.jobs.max(1)
            || (exclusive(index) && here.iter().any(|&running| exclusive(running)))
        {
            return None;
        }
        self.free
            .take(&handling.resources)
            .map(Allocation::ThisMachine)
    }

    /// Starts stale stages while the number of stages and their resources allow it. Exclusive stages run one at a time.
    fn start<'scope>(
        &mut self,
        scope: &'scope Scope<'scope, 'a>,
        stale: &mut BTreeMap<usize, (usize, Prepared, Vec<Reason>)>,
    ) where
        'a: 'scope,
    {
        let graph = self.session.graph;
        let ranks: Vec<usize> = stale.keys().copied().collect();
        for rank in ranks {
            let Some(&(index, ..)) = stale.get(&rank) else {
                continue;
            };
            let Some(allocation) = self.allocate(index) else {
                continue;
            };
            let Some((_, prepared, reasons)) = stale.remove(&rank) else {
                continue;
            };
            self.running.insert(index, allocation.clone());
            let gpus = match allocation {
                Allocation::ThisMachine(gpus) => gpus,
                Allocation::Cluster => Vec::new(),
            };
            let worker = Worker {
                session: self.session,
                events: self.events.clone(),
                cancel: Arc::clone(self.cancel),
                index,
                gpus,
                frozen: self.session.frozen_before(index, &self.summary.frozen),
            };
            let done = self.done.clone();
            let started = std::thread::Builder::new().spawn_scoped(scope, move || {
                let result = worker.work(&prepared, reasons);
                // Sending can't fail, since the runner outlives its workers.
                let _ = done.send((index, result));
            });
            if let Err(error) = started {
                let failed = Event::StageFailed {
                    stage: graph.nodes[index].name.clone(),
                    error: format!("could not start a thread: {error}"),
                    kept: None,
                    interrupted: false,
                };
                send(self.events, failed);
                let _ = self.done.send((index, worker::Outcome::Failed));
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
