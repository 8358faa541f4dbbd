//! Events as JSON lines on standard output.

use std::io::{BufWriter, Write};
use std::sync::mpsc::Receiver;

use super::text::harmless_json;
use crate::engine::Event;

pub(super) fn report(events: &Receiver<Event>) {
    let out = std::io::stdout().lock();
    let mut out = BufWriter::new(out);
    super::each(
        events,
        &mut out,
        |out, event| show(out, &event),
        |out| _ = out.flush(),
    );
}

fn show(out: &mut impl Write, event: &Event) {
    if let Ok(line) = serde_json::to_string(event) {
        // A reader that went away is no reason to stop the run.
        let _ = writeln!(out, "{}", harmless_json(&line));
    }
}
