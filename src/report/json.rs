//! Events as JSON lines on standard output.

use std::io::Write as _;
use std::sync::mpsc::Receiver;

use crate::engine::Event;

pub(super) fn report(events: &Receiver<Event>) {
    let mut out = std::io::stdout().lock();
    for event in events {
        let Ok(line) = serde_json::to_string(&event) else {
            continue;
        };
        // A reader that went away is no reason to stop the run.
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    }
}
