//! The events of one attempt at a stage. They are passed on as they come, and the last ones are kept for the log of a failure.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};

use super::event::{Event, send};

/// The largest number of events in the log of a failure.
const LONGEST_LOG: usize = 10_000;

/// The receiver of the events of one attempt at a stage.
pub struct StageEvents {
    sender: Sender<Event>,
    /// The last events, but for progress.
    last: Mutex<VecDeque<Event>>,
}

impl StageEvents {
    /// Sends events on to `sender`.
    pub fn new(sender: Sender<Event>) -> Self {
        Self {
            sender,
            last: Mutex::default(),
        }
    }

    /// Sends an event on.
    pub fn send(&self, event: Event) {
        if !matches!(event, Event::Progress { .. }) {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.len() == LONGEST_LOG {
                last.pop_front();
            }
            last.push_back(event.clone());
        }
        send(&self.sender, event);
    }

    /// The last events, but for progress.
    pub fn last(&self) -> Vec<Event> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().cloned().collect()
    }

    /// The last events and how the stage ended, as JSON lines.
    pub(crate) fn log(&self, stage: &str, error: &anyhow::Error) -> Vec<u8> {
        let failed = Event::StageFailed {
            stage: stage.to_owned(),
            error: format!("{error:#}"),
            kept: None,
            interrupted: false,
        };
        let mut log = Vec::new();
        for event in self.last().iter().chain([&failed]) {
            event.write_line(&mut log);
        }
        log
    }
}
