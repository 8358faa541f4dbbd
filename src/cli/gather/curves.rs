//! The numbers of a training by step: those of its artifact, which has every step, and where there is none those that its run told.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::cli::project::Project;
use crate::engine::{Event, LoggedEvent, Outcome, Record, Run};
use crate::ml::io::folder::METRICS;
use crate::ml::train::Log;

/// How often the same numbers are looked for in the history.
const MOST_EARLIER: usize = 5;

/// A training, finished or not.
pub(in crate::cli) struct Attempt {
    /// The run in which it ran, if that is known.
    pub(in crate::cli) run: Option<u64>,
    /// Whether it is running now.
    pub(in crate::cli) running: bool,
    /// The record of its result, if it has one.
    pub(in crate::cli) record: Option<Record>,
    /// Its numbers, by rising step; there may be several of a step.
    pub(in crate::cli) logs: Vec<Log>,
}

impl Attempt {
    /// What it is called beside others.
    pub(in crate::cli) fn label(&self) -> String {
        match (self.running, self.run) {
            (true, _) => "running now".into(),
            (false, Some(run)) if self.record.is_none() => format!("run {run} (not finished)"),
            (false, Some(run)) => format!("run {run}"),
            (false, None) => "last result".into(),
        }
    }

    /// The names of its numbers.
    pub(in crate::cli) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .logs
            .iter()
            .flat_map(|log| log.values.keys().cloned())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// One of its numbers by step.
    pub(in crate::cli) fn points(&self, name: &str) -> Vec<(f64, f64)> {
        let logs = self.logs.iter();
        logs.filter_map(|log| Some((log.step as f64, *log.values.get(name)?)))
            .collect()
    }
}

/// The trainings of a stage: first that which is running or whose result counts now, then earlier ones that differ, the latest first.
pub(in crate::cli) fn attempts(
    project: &Project,
    stage: &str,
    current: Option<&Record>,
    running: Option<&[LoggedEvent]>,
) -> Vec<Attempt> {
    let mut found: Vec<Attempt> = Vec::new();
    if let Some(events) = running {
        let logs = told(events, stage);
        let ended = |event: &LoggedEvent| matches!(&event.event, Event::StageDone { stage: done, .. } | Event::StageFailed { stage: done, .. } if done == stage);
        if !logs.is_empty() && !events.iter().any(ended) {
            found.push(Attempt {
                run: None,
                running: true,
                record: None,
                logs,
            });
        }
    }
    let runs = project.runs();
    let ran_in = |fingerprint: &str| {
        let ran = |run: &&Run| {
            let stage = run.stages.get(stage);
            stage.is_some_and(|stage| {
                stage.ran && *stage.fingerprint == *fingerprint && stage.artifact.is_some()
            })
        };
        runs.iter().rev().find(ran).map(|run| run.number)
    };
    let mut seen = Vec::new();
    if let Some(record) = current {
        let fingerprint = record.fingerprint.digest();
        let run = ran_in(&fingerprint);
        let logs = of_result(project, record, stage, run);
        seen.push(fingerprint);
        found.push(Attempt {
            run,
            running: false,
            record: Some(record.clone()),
            logs,
        });
    }
    for run in runs.iter().rev() {
        if found.len() > MOST_EARLIER {
            break;
        }
        // That one is the first already, or has nothing to show yet.
        if run.outcome == Outcome::Running {
            continue;
        }
        let Some(made) = run.stages.get(stage).filter(|made| made.ran) else {
            continue;
        };
        if made.artifact.is_some() && seen.contains(&made.fingerprint) {
            continue;
        }
        let record = made
            .artifact
            .as_ref()
            .and_then(|_| project.store.record(&made.fingerprint));
        let logs = match &record {
            Some(record) => of_result(project, record, stage, Some(run.number)),
            None => project
                .events(run.number)
                .map_or_else(Vec::new, |events| told(&events.collect::<Vec<_>>(), stage)),
        };
        if logs.is_empty() {
            continue;
        }
        seen.push(made.fingerprint.clone());
        found.push(Attempt {
            run: Some(run.number),
            running: false,
            record,
            logs,
        });
    }
    found
}

/// The numbers of a finished training.
fn of_result(project: &Project, record: &Record, stage: &str, run: Option<u64>) -> Vec<Log> {
    let mut logs = read(&project.store.artifact(&record.artifact));
    let events = run.and_then(|run| project.events(run));
    let told = events.map_or_else(Vec::new, |events| told(&events.collect::<Vec<_>>(), stage));
    if logs.is_empty() {
        return told;
    }
    // How fast it went is no part of the result, only the run knows it.
    let speeds: BTreeMap<u64, &Log> = told.iter().map(|log| (log.step, log)).collect();
    for log in &mut logs {
        for name in OF_THE_RUN {
            if let Some(speed) = speeds.get(&log.step).and_then(|told| told.values.get(name)) {
                log.values.entry(name.to_owned()).or_insert(*speed);
            }
        }
    }
    logs
}

/// Numbers that tell of a run and not of its result.
const OF_THE_RUN: [&str; 1] = ["tokens_per_second"];

/// The numbers in a training's artifact, every step of them; nothing where there are none.
pub(in crate::cli) fn read(folder: &Path) -> Vec<Log> {
    let text = fs::read_to_string(folder.join(METRICS)).unwrap_or_default();
    text.lines().filter_map(Log::parse).collect()
}

/// The numbers that a run told of a stage. After a resume a step may have been told before: the last word counts.
fn told(events: &[LoggedEvent], stage: &str) -> Vec<Log> {
    let mut logs: Vec<Log> = Vec::new();
    for logged in events {
        if let Event::Metrics {
            stage: of,
            step,
            values,
            ..
        } = &logged.event
            && of == stage
        {
            let mut values = values.clone();
            let epoch = values.remove("epoch").unwrap_or(f64::NAN);
            logs.retain(|log| {
                log.step < *step
                    || (log.step == *step
                        && !log.values.keys().any(|name| values.contains_key(name)))
            });
            logs.push(Log {
                step: *step,
                epoch,
                values,
            });
        }
    }
    logs
}
