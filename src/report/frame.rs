//! The lines that change at a terminal while stages run: one for each stage, and one for all.

use std::time::Instant;

use super::progress::{Pen, Running};
use super::style::{DIM, paint};
use super::text::{count, duration, harmless};
use super::width::cut;

/// What is to be drawn.
pub(super) struct Frame<'a> {
    /// The running stages, in the order in which they began.
    pub(super) running: &'a [(String, Running)],
    /// The stages of the run, and those that are ready.
    pub(super) stages: (usize, usize),
    /// Seconds since the run began.
    pub(super) elapsed: f64,
    /// Whether the user has asked the run to stop.
    pub(super) stopping: bool,
    /// The number of the frame.
    pub(super) number: usize,
    /// The lines of the terminal.
    pub(super) rows: usize,
    pub(super) pen: Pen,
}

impl Frame<'_> {
    /// The lines, none wider than the pen's columns.
    pub(super) fn lines(&self) -> Vec<String> {
        let Pen {
            columns, unicode, ..
        } = self.pen;
        let spinners = if unicode {
            &["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"][..]
        } else {
            &["|", "/", "-", "\\"][..]
        };
        let spinner = spinners[self.number % spinners.len()];
        let now = Instant::now();
        // One line is for all stages, one for the prompt behind.
        let room = self.rows.saturating_sub(3).max(1);
        let shown = self.running.iter().take(room);
        let mut lines: Vec<String> = shown
            .map(|(name, running)| {
                let name = name.replace('\n', " ");
                running.line(&harmless(&name), spinner, now, self.pen)
            })
            .collect();
        let (all, ready) = self.stages;
        let more = match self.running.len().saturating_sub(room) {
            0 => String::new(),
            hidden => format!(", {hidden} more running"),
        };
        let note = if self.stopping {
            "stopping; Ctrl-C again stops at once".to_owned()
        } else {
            let elapsed = duration(self.elapsed);
            format!(
                "{ready} of {}{more}, {elapsed}",
                count(all as u64, "stages")
            )
        };
        let indent = if columns >= 72 { 11 } else { 3 };
        let note = cut(&note, columns.saturating_sub(indent));
        lines.push(format!("{}{}", " ".repeat(indent), paint(DIM, &note)));
        lines
    }
}
