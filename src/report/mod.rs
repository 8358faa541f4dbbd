//! Consumers of the engine's events: the terminal for people, JSON lines for programs.
//!
//! A reporter reads events until the engine is done and writes them; it knows the engine's events and nothing else.

mod json;
mod terminal;
mod text;

use std::sync::mpsc::Receiver;

use crate::engine::Event;

pub use text::{ago, bytes, duration};

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

/// Writes events until the sender is gone.
pub fn report(events: &Receiver<Event>, style: Style) {
    match style {
        Style::Json => json::report(events),
        Style::Bars => terminal::report(events, true),
        Style::Lines => terminal::report(events, false),
    }
}
