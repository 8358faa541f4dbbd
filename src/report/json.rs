//! Events as JSON lines.

use std::io::{BufWriter, Write};
use std::time::SystemTime;

use super::Reporter;
use super::text::harmless_json;
use crate::engine::Event;

/// Writes events as JSON, one a line, each with the time as `time`: UTC, as in `2026-03-01T12:00:00.123Z`.
pub struct JsonLines<W: Write>(BufWriter<W>);

impl<W: Write> JsonLines<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self(BufWriter::new(out))
    }

    /// Writes an event that happened at some time.
    pub fn event_at(&mut self, event: &Event, time: SystemTime) {
        let Ok(line) = serde_json::to_string(event) else {
            return;
        };
        // An event is a map that is never empty.
        let fields = line.strip_prefix('{').unwrap_or_default();
        let time = humantime::format_rfc3339_millis(time);
        let fields = harmless_json(fields);
        // A reader that went away is no reason to stop the run.
        let _ = writeln!(self.0, "{{\"time\":\"{time}\",{fields}");
    }
}

impl<W: Write> Reporter for JsonLines<W> {
    fn event(&mut self, event: &Event) {
        self.event_at(event, SystemTime::now());
    }

    fn flush(&mut self) {
        let _ = self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn every_line_has_the_time() {
        let mut text = Vec::new();
        let mut lines = JsonLines::new(&mut text);
        let event = Event::StageSkipped {
            stage: "a\u{9b}".into(),
        };
        lines.event_at(&event, UNIX_EPOCH + Duration::from_millis(1_500));
        drop(lines);
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "{\"time\":\"1970-01-01T00:00:01.500Z\",\"event\":\"stage_skipped\",\"stage\":\"a\\u009b\"}\n"
        );
    }
}
