//! The numbers of trainings on their way to experiment trackers, while the trainings run.
//!
//! A tracker that can't be reached never holds a training up or fails it: each has a thread of its own, and what went wrong is told when
//! the run is over. Another tracker is a file with an implementation of [`Tracker`].

mod event_files;
mod mlflow;
mod trackio;

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

pub use event_files::EventFiles;
pub use mlflow::{Credentials, Mlflow};
pub use trackio::Trackio;

use super::Reporter;
use crate::engine::Event;

/// After so many failures in a row nothing more is sent.
const MOST_FAILURES: usize = 3;

/// Numbers of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// When they came, in seconds since 1970.
    pub at: f64,
    /// The step.
    pub step: u64,
    /// The numbers by TRL's names.
    pub values: BTreeMap<String, f64>,
}

/// How a training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It is done.
    Finished,
    /// It failed.
    Failed,
    /// The run was stopped.
    Stopped,
}

/// Where the numbers of one training go. Each method may fail and is then tried again with the next numbers.
pub trait Tracker: Send {
    /// What it is, for people: the tracker and its place.
    fn name(&self) -> String;

    /// Begins a run there. `at` is in seconds since 1970.
    fn begin(&mut self, at: f64) -> anyhow::Result<()>;

    /// Adds numbers.
    fn log(&mut self, points: &[Point]) -> anyhow::Result<()>;

    /// Ends the run there.
    fn end(&mut self, ending: Ending, at: f64) -> anyhow::Result<()>;
}

enum Message {
    Begin(f64),
    Point(Point),
    End(Ending, f64),
}

/// Hands the numbers of trainings to their trackers.
#[derive(Default)]
pub struct Tracking {
    by_stage: BTreeMap<String, Vec<Line>>,
}

/// The way to one tracker. Without a thread nothing goes there.
struct Line {
    sender: Option<Sender<Message>>,
    thread: Option<JoinHandle<Option<String>>>,
    begun: bool,
}

impl Tracking {
    /// Sends the numbers of `stage` to a tracker as well.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn add(&mut self, stage: &str, tracker: Box<dyn Tracker>) -> std::io::Result<()> {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new().spawn(move || serve(tracker, &receiver))?;
        let line = Line {
            sender: Some(sender),
            thread: Some(thread),
            begun: false,
        };
        self.by_stage
            .entry(stage.to_owned())
            .or_default()
            .push(line);
        Ok(())
    }

    /// Waits until all numbers are sent or given up; gives a sentence for each tracker that did not get all of them.
    pub fn finish(mut self) -> Vec<String> {
        let lines = self.by_stage.values_mut().flatten();
        let threads: Vec<_> = lines
            .filter_map(|line| {
                if line.begun {
                    line.send(Message::End(Ending::Stopped, now()));
                }
                line.sender = None;
                line.thread.take()
            })
            .collect();
        let ended = threads.into_iter().map(JoinHandle::join);
        ended.filter_map(|warning| warning.ok().flatten()).collect()
    }
}

impl Line {
    fn send(&self, message: Message) {
        if let Some(sender) = &self.sender {
            // A thread that gave up says so at the end.
            let _ = sender.send(message);
        }
    }
}

impl Reporter for Tracking {
    fn event(&mut self, event: &Event) {
        let (Event::StageStarted { stage, .. }
        | Event::Metrics { stage, .. }
        | Event::StageDone { stage, .. }
        | Event::StageFailed { stage, .. }) = event
        else {
            return;
        };
        let Some(lines) = self.by_stage.get_mut(stage) else {
            return;
        };
        for line in lines {
            match event {
                Event::StageStarted { .. } => {
                    line.begun = true;
                    line.send(Message::Begin(now()));
                }
                Event::Metrics { step, values, .. } => line.send(Message::Point(Point {
                    at: now(),
                    step: *step,
                    values: values.clone(),
                })),
                Event::StageDone { .. } if line.begun => {
                    line.begun = false;
                    line.send(Message::End(Ending::Finished, now()));
                }
                Event::StageFailed { interrupted, .. } if line.begun => {
                    line.begun = false;
                    let ending = if *interrupted {
                        Ending::Stopped
                    } else {
                        Ending::Failed
                    };
                    line.send(Message::End(ending, now()));
                }
                _ => {}
            }
        }
    }
}

/// Hands messages to a tracker; all that came meanwhile go together. Gives a sentence if something was not sent.
fn serve(mut tracker: Box<dyn Tracker>, messages: &Receiver<Message>) -> Option<String> {
    let mut begins: Option<f64> = None;
    let mut points = Vec::new();
    let mut ends = None;
    let mut failures = 0;
    let mut reason = None;
    while let Ok(first) = messages.recv() {
        for message in std::iter::once(first).chain(messages.try_iter()) {
            match message {
                Message::Begin(at) => begins = Some(at),
                Message::Point(point) => points.push(point),
                Message::End(ending, at) => ends = Some((ending, at)),
            }
        }
        if failures >= MOST_FAILURES {
            continue;
        }
        let mut deliver = || -> anyhow::Result<()> {
            if let Some(at) = begins {
                tracker.begin(at)?;
                begins = None;
            }
            if !points.is_empty() {
                tracker.log(&points)?;
                points.clear();
            }
            if let Some((ending, at)) = ends {
                tracker.end(ending, at)?;
                ends = None;
            }
            Ok(())
        };
        match deliver() {
            Ok(()) => failures = 0,
            Err(error) => {
                failures += 1;
                reason = Some(format!("{error:#}"));
            }
        }
    }
    let lost = begins.is_some() || !points.is_empty() || ends.is_some();
    let name = tracker.name();
    reason
        .filter(|_| lost)
        .map(|reason| format!("{name} did not get all numbers: {reason}"))
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0., |now| now.as_secs_f64())
}

/// The finite ones of some numbers: JSON has no others.
fn finite(values: &BTreeMap<String, f64>) -> impl Iterator<Item = (&String, f64)> {
    let values = values.iter().map(|(name, value)| (name, *value));
    values.filter(|(_, value)| value.is_finite())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use anyhow::bail;

    use super::*;

    /// Writes down what it is told; fails so many times first.
    struct Scribe(Arc<Mutex<Vec<String>>>, usize);

    impl Scribe {
        fn write(&mut self, line: String) -> anyhow::Result<()> {
            if self.1 > 0 {
                self.1 -= 1;
                bail!("not now");
            }
            self.0.lock().unwrap().push(line);
            Ok(())
        }
    }

    impl Tracker for Scribe {
        fn name(&self) -> String {
            "scribe".into()
        }

        fn begin(&mut self, _: f64) -> anyhow::Result<()> {
            self.write("begin".into())
        }

        fn log(&mut self, points: &[Point]) -> anyhow::Result<()> {
            points
                .iter()
                .try_for_each(|point| self.write(format!("step {}", point.step)))
        }

        fn end(&mut self, ending: Ending, _: f64) -> anyhow::Result<()> {
            self.write(format!("{ending:?}"))
        }
    }

    fn metrics(stage: &str, step: u64) -> Event {
        serde_json::from_value(serde_json::json!({
            "event": "metrics", "stage": stage, "step": step, "values": { "loss": 1.0 },
        }))
        .unwrap()
    }

    fn started(stage: &str) -> Event {
        serde_json::from_value(serde_json::json!({
            "event": "stage_started", "stage": stage, "kind": "train_sft", "reasons": [],
        }))
        .unwrap()
    }

    #[test]
    fn numbers_reach_the_tracker_of_their_stage() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut tracking = Tracking::default();
        tracking
            .add("a", Box::new(Scribe(Arc::clone(&told), 1)))
            .unwrap();
        for event in [
            started("a"),
            metrics("b", 1),
            metrics("a", 2),
            metrics("a", 3),
        ] {
            tracking.event(&event);
            // So that the failure falls on one message.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(tracking.finish(), Vec::<String>::new());
        let told = told.lock().unwrap();
        assert_eq!(*told, ["begin", "step 2", "step 3", "Stopped"]);
    }

    #[test]
    fn a_tracker_that_is_away_is_told_at_the_end() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut tracking = Tracking::default();
        tracking
            .add("a", Box::new(Scribe(Arc::clone(&told), usize::MAX)))
            .unwrap();
        tracking.event(&started("a"));
        (1..100).for_each(|step| tracking.event(&metrics("a", step)));
        assert_eq!(
            tracking.finish(),
            ["scribe did not get all numbers: not now"]
        );
    }
}
