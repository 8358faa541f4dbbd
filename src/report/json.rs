//! Events as JSON lines.

use std::io::{BufWriter, Write};

use super::Reporter;
use super::text::harmless_json;
use crate::engine::Event;

/// Writes events as JSON, one a line.
pub struct JsonLines<W: Write>(BufWriter<W>);

impl<W: Write> JsonLines<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self(BufWriter::new(out))
    }
}

impl<W: Write> Reporter for JsonLines<W> {
    fn event(&mut self, event: &Event) {
        if let Ok(line) = serde_json::to_string(event) {
            // A reader that went away is no reason to stop the run.
            let _ = writeln!(self.0, "{}", harmless_json(&line));
        }
    }

    fn flush(&mut self) {
        let _ = self.0.flush();
    }
}
