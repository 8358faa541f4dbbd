//! The events of each run that left a trace in the history, so that a later command can show or draw them:
//! `state/runs/<recipe>/<number>.events.jsonl` beside the run's `<number>.json`, a line of JSON each.
//!
//! A run that changes nothing writes no file.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::event::Event;
use super::files::TEMPORARY;
use super::store::Store;

/// From this size on, in bytes, metrics and messages are left out; how stages begin and end always stands there.
const LONGEST: usize = 32 << 20;
/// Of so many runs of a recipe the events are kept.
const MOST_RUNS: usize = 50;

/// An event of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoggedEvent {
    /// Seconds since the run began.
    pub at: f64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// The events of a run in progress. Without [`EventLog::keep`] nothing is left of it.
pub struct EventLog {
    folder: PathBuf,
    started: Instant,
    /// Events before the first stage began to run, up to which nothing is written.
    pending: Vec<LoggedEvent>,
    file: Option<NamedTempFile>,
    size: usize,
    /// Whether something was left out.
    full: bool,
}

impl EventLog {
    /// Begins the log of a run of `recipe`, the recipe's name in the store.
    pub fn new(store: &Store, recipe: &str) -> Self {
        Self {
            folder: store.runs_folder(recipe),
            started: Instant::now(),
            pending: Vec::new(),
            file: None,
            size: 0,
            full: false,
        }
    }

    /// Adds an event. Progress is left out: it is of use only while a stage runs.
    pub fn add(&mut self, event: &Event) {
        if matches!(event, Event::Progress { .. }) {
            return;
        }
        let logged = LoggedEvent {
            at: self.started.elapsed().as_secs_f64(),
            event: event.clone(),
        };
        if self.file.is_some() {
            self.write(&logged);
            return;
        }
        let begins = matches!(event, Event::StageStarted { .. });
        self.pending.push(logged);
        if begins {
            self.open();
        }
    }

    /// Keeps the log as that of the run with this number, and removes logs of runs that are long past.
    pub fn keep(mut self, number: u64) -> anyhow::Result<()> {
        if self.file.is_none() {
            self.open();
        }
        let Some(mut file) = self.file else {
            bail!(
                "could not write the events of the run into `{}`",
                self.folder.display()
            );
        };
        file.flush()?;
        let path = self.folder.join(name(number));
        file.persist(&path)
            .with_context(|| format!("could not write `{}`", path.display()))?;
        if let Some(last) = number.checked_sub(MOST_RUNS as u64) {
            for number in logs(&self.folder)
                .into_iter()
                .filter(|number| *number <= last)
            {
                // Tried again after the next run.
                let _ = fs::remove_file(self.folder.join(name(number)));
            }
        }
        Ok(())
    }

    /// Opens the file and writes what came before. A store that can't be written keeps no events.
    fn open(&mut self) {
        let open = || {
            fs::create_dir_all(&self.folder)?;
            // Whoever may read the history may read this.
            tempfile::Builder::new()
                .prefix(TEMPORARY)
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
                .tempfile_in(&self.folder)
        };
        self.file = open().ok();
        for event in std::mem::take(&mut self.pending) {
            self.write(&event);
        }
    }

    fn write(&mut self, logged: &LoggedEvent) {
        let (Some(file), Ok(mut line)) = (&mut self.file, serde_json::to_vec(logged)) else {
            return;
        };
        line.push(b'\n');
        let may_go = matches!(logged.event, Event::Metrics { .. } | Event::Message { .. });
        if may_go && self.size + line.len() > LONGEST {
            if !std::mem::replace(&mut self.full, true) {
                let text = "the log of this run is full; further metrics and messages are left out";
                let warning = Event::Warning { text: text.into() };
                self.write(&LoggedEvent {
                    at: logged.at,
                    event: warning,
                });
            }
            return;
        }
        self.size += line.len();
        // With a hole it would mislead: what can't be written ends it.
        if file.write_all(&line).is_err() {
            self.file = None;
        }
    }
}

impl Store {
    /// The events of a run; none if they are not kept any more. Damaged lines are left out.
    pub fn events(
        &self,
        recipe: &str,
        run: u64,
    ) -> Option<impl Iterator<Item = LoggedEvent> + use<>> {
        let file = fs::File::open(self.runs_folder(recipe).join(name(run))).ok()?;
        let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
        Some(lines.filter_map(|line| serde_json::from_slice(&line).ok()))
    }

    /// The files with events of a recipe's runs, with the runs' numbers.
    pub(super) fn event_logs(&self, recipe: &str) -> Vec<(u64, PathBuf)> {
        let folder = self.runs_folder(recipe);
        let logs = logs(&folder).into_iter();
        logs.map(|number| (number, folder.join(name(number))))
            .collect()
    }
}

/// What the names of these files end with, behind the run's number.
const ENDING: &str = ".events.jsonl";

fn name(run: u64) -> String {
    format!("{run:06}{ENDING}")
}

/// The numbers of the runs in a folder whose events are kept.
fn logs(folder: &std::path::Path) -> Vec<u64> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_suffix(ENDING)?.parse().ok()
    });
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(stage: &str) -> Event {
        Event::StageStarted {
            stage: stage.into(),
            kind: "toy".into(),
            reasons: vec![super::super::Reason::NeverRan],
        }
    }

    fn message(text: &str) -> Event {
        Event::Message {
            stage: "a".into(),
            level: super::super::Level::Info,
            text: text.into(),
        }
    }

    fn texts(store: &Store, run: u64) -> Vec<String> {
        let events = store.events("toy", run).unwrap();
        events
            .map(|logged| serde_json::to_string(&logged.event).unwrap())
            .collect()
    }

    #[test]
    fn events_are_kept_in_order_and_only_for_runs_that_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let all = [
            Event::StageSkipped { stage: "b".into() },
            started("a"),
            message("hello"),
            Event::Progress {
                stage: "a".into(),
                done: 1,
                total: None,
                unit: "rows".into(),
            },
        ];
        let mut log = EventLog::new(&store, "toy");
        for event in &all {
            log.add(event);
        }
        log.keep(3).unwrap();
        let kept = all[..3].iter();
        let kept: Vec<_> = kept
            .map(|event| serde_json::to_string(event).unwrap())
            .collect();
        assert_eq!(texts(&store, 3), kept);
        // One that is not kept leaves nothing, and neither does one that does nothing.
        let mut log = EventLog::new(&store, "toy");
        log.add(&started("a"));
        drop(log);
        EventLog::new(&store, "toy").add(&all[0]);
        assert_eq!(fs::read_dir(store.runs_folder("toy")).unwrap().count(), 1);
        assert!(store.events("toy", 4).is_none());
    }

    #[test]
    fn a_log_is_bounded_in_size_and_logs_in_number() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut log = EventLog::new(&store, "toy");
        log.add(&started("a"));
        let long = "x".repeat(1 << 20);
        (0..40).for_each(|_| log.add(&message(&long)));
        log.add(&started("b"));
        log.keep(1).unwrap();
        let texts = texts(&store, 1);
        assert!(texts.iter().map(String::len).sum::<usize>() <= LONGEST + 1000);
        assert!(texts[texts.len() - 2].contains("is full"));
        assert!(texts[texts.len() - 1].contains("stage_started"));
        for number in 2..=MOST_RUNS as u64 + 2 {
            EventLog::new(&store, "toy").keep(number).unwrap();
        }
        let mut numbers: Vec<u64> = store
            .event_logs("toy")
            .into_iter()
            .map(|log| log.0)
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (3..=MOST_RUNS as u64 + 2).collect::<Vec<_>>());
    }
}
