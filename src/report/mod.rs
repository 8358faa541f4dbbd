//! Consumers of the engine's events: the terminal for people, JSON lines for programs.
//!
//! A reporter reads events until the engine is done and writes them; it knows the engine's events and nothing else.

mod json;
mod terminal;
mod text;

use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::engine::Event;

pub(crate) use text::has_the_store;
pub use text::{ago, bytes, duration, harmless, harmless_json, steers};

/// How to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Bars that move, for a person at a terminal.
    Bars,
    /// Plain lines, for a log.
    Lines,
    /// One JSON object a line, for programs.
    Json,
}

/// How long events may gather before they are shown: to wake for each would cost more than to show it.
const GATHERING: Duration = Duration::from_millis(3);

/// Calls `show` with every event, and `flush` whenever none is left for now, until the sender is gone.
fn each<T>(
    events: &Receiver<Event>,
    to: &mut T,
    mut show: impl FnMut(&mut T, Event),
    flush: fn(&mut T),
) {
    while let Ok(first) = events.recv() {
        show(to, first);
        std::thread::sleep(GATHERING);
        for event in events.try_iter() {
            show(to, event);
        }
        flush(to);
    }
}

/// Writes events until the sender is gone. `places` says where each stage stands in its recipe.
pub fn report(events: &Receiver<Event>, style: Style, places: &BTreeMap<String, String>) {
    match style {
        Style::Json => json::report(events),
        Style::Bars => terminal::report(events, true, places),
        Style::Lines => terminal::report(events, false, places),
    }
}
