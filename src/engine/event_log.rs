//! The events of each run that left a trace in the history, so that a later command can show or draw them:
//! `state/runs/<recipe>/<number>.events.jsonl` beside the run's `<number>.json`, a line of JSON each.
//!
//! A run that changes nothing writes no file.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use serde::{Deserialize, Serialize};

use super::event::Event;
use super::store::Store;

/// The size in bytes from which metrics and messages are left out. The events at the beginning and end of stages are always kept.
const LONGEST: usize = 32 << 20;
/// The number of runs of a recipe whose events are kept.
const MOST_RUNS: usize = 50;

/// An event of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoggedEvent {
    /// Seconds since the run began.
    pub at: f64,
    /// The moment, in milliseconds since 1970; 0 in old logs.
    #[serde(default)]
    pub unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// The events of a run in progress. The file is removed unless [`EventLog::keep`] is called or the process is killed.
pub struct EventLog {
    folder: PathBuf,
    started: Instant,
    /// The events before the run has a number; until then nothing is written.
    pending: Vec<LoggedEvent>,
    file: Option<File>,
    /// The run's number, once it has one.
    number: Option<u64>,
    kept: bool,
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
            number: None,
            kept: false,
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
            unix_ms: unix_ms(),
            event: event.clone(),
        };
        if self.number.is_some() {
            self.write(&logged);
            return;
        }
        self.pending.push(logged);
        if let Event::RunNumbered { run } = event {
            self.open(*run);
        }
    }

    /// Keeps the log as that of the run with this number, and removes logs of runs that are long past.
    pub fn keep(mut self, number: u64) -> anyhow::Result<()> {
        if self.number.is_none() {
            self.open(number);
        }
        self.kept = self.number == Some(number) && self.file.is_some();
        if !self.kept {
            bail!(
                "could not write the events of the run into `{}`",
                self.folder.display()
            );
        }
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
    fn open(&mut self, number: u64) {
        self.number = Some(number);
        let path = self.folder.join(name(number));
        self.file = fs::create_dir_all(&self.folder)
            .and_then(|()| File::create(path))
            .ok();
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
                    unix_ms: logged.unix_ms,
                    event: warning,
                });
            }
            return;
        }
        self.size += line.len();
        // A log with a gap would be misleading, so a failed write ends the log.
        if file.write_all(&line).is_err() {
            self.file = None;
        }
    }
}

impl Drop for EventLog {
    fn drop(&mut self) {
        if let Some(number) = self.number
            && !self.kept
        {
            // Otherwise events would remain for a run that is not in the history.
            let _ = fs::remove_file(self.folder.join(name(number)));
        }
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u64)
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

/// The suffix of the files' names, after the number of the run.
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
            expected: None,
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
            Event::RunNumbered { run: 3 },
            started("a"),
            message("hello"),
            Event::Progress {
                stage: "a".into(),
                done: 1,
                total: None,
                unit: "rows".into(),
                memory: None,
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
        log.add(&Event::RunNumbered { run: 4 });
        log.add(&started("a"));
        assert_eq!(texts(&store, 4).len(), 2, "killed now, it would be there");
        drop(log);
        EventLog::new(&store, "toy").add(&all[1]);
        assert_eq!(fs::read_dir(store.runs_folder("toy")).unwrap().count(), 1);
        assert!(store.events("toy", 4).is_none());
    }

    #[test]
    fn a_log_is_bounded_in_size_and_logs_in_number() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let mut log = EventLog::new(&store, "toy");
        log.add(&Event::RunNumbered { run: 1 });
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
