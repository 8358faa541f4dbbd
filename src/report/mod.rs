//! Reporters of the engine's events: the terminal for people, JSON lines for programs, and the log of the run.
//!
//! A reporter hears of events one by one; it knows the engine's events and nothing else. A new one is a file with an
//! implementation of [`Reporter`].

pub mod chart;
mod event_schema;
mod frame;
mod json;
mod log;
mod look;
pub mod page;
mod progress;
mod screen;
pub mod sparkline;
pub mod style;
mod table;
pub mod tensorboard;
mod terminal;
mod text;
pub mod tracking;
mod width;

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::engine::Event;

pub use event_schema::{events_reference, events_schema};
pub use json::JsonLines;
pub use look::{Look, RecipeNames, Size, StagePlaces, Verbosity, quoted};
pub use screen::above;
pub use terminal::Terminal;
pub(crate) use text::has_the_store;
pub use text::{ago, bytes, count, duration, harmless, harmless_json, steers, thousands};
pub use width::{width, wrap};

/// Hears of events.
pub trait Reporter {
    /// Takes in an event.
    fn event(&mut self, event: &Event);

    /// Shows what was taken in: for now there is no further event.
    fn flush(&mut self) {}

    /// Called some times a second while nothing happens.
    fn tick(&mut self) {}
}

/// How long events may gather before they are shown: to wake for each would cost more than to show it.
const GATHERING: Duration = Duration::from_millis(3);
/// Without an event, reporters are called after this time.
const TICK: Duration = Duration::from_millis(120);

/// Hands every event to all reporters, until the last sender is gone.
pub fn report(events: &Receiver<Event>, reporters: &mut [&mut dyn Reporter]) {
    loop {
        let first = match events.recv_timeout(TICK) {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => {
                for reporter in reporters.iter_mut() {
                    reporter.tick();
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut show = |event: &Event| {
            for reporter in reporters.iter_mut() {
                reporter.event(event);
            }
        };
        show(&first);
        std::thread::sleep(GATHERING);
        for event in events.try_iter() {
            show(&event);
        }
        for reporter in reporters.iter_mut() {
            reporter.flush();
        }
    }
}
