//! The bottom of a terminal, where lines change while stages run.
//!
//! While such lines are drawn the cursor stands at the beginning of the first one. So whatever happens to the window's width, what
//! is drawn is erased from there on, and nothing of it is left behind. Everything else that is written to the terminal goes through
//! [`above`].

use std::fmt::Write as _;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

/// Moves to the beginning of the line and erases everything from there on.
const ERASE: &str = "\r\u{1b}[J";

/// Whether lines are drawn now.
static DRAWN: Mutex<bool> = Mutex::new(false);

/// A terminal with lines at its bottom that change.
pub(super) struct Screen<W: Write> {
    out: W,
    drawn: &'static Mutex<bool>,
}

impl<W: Write> Screen<W> {
    /// The terminal that this process writes its errors to, as `out`.
    pub(super) fn new(out: W) -> Self {
        Self { out, drawn: &DRAWN }
    }

    /// A terminal of its own, for tests.
    #[cfg(test)]
    pub(super) fn alone(out: W) -> Self {
        let drawn = Box::leak(Box::new(Mutex::new(false)));
        Self { out, drawn }
    }

    /// Writes whole lines that stay, and below them those that are drawn now in place of those before. None of the latter may be
    /// wider than the terminal.
    pub(super) fn draw(&mut self, lasting: &str, live: &[String]) {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        if std::mem::replace(&mut *drawn, !live.is_empty()) {
            text.push_str(ERASE);
        }
        text.push_str(lasting);
        if let Some(below) = live.len().checked_sub(1) {
            // If the window became narrower this moment, lines are cut at its edge and not wrapped.
            text.push_str("\u{1b}[?7l");
            text.push_str(&live.join("\n"));
            text.push_str("\u{1b}[?7h\r");
            if below > 0 {
                _ = write!(text, "\u{1b}[{below}A");
            }
        }
        // Somebody closed the terminal: the run goes on.
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }
}

/// Writes to the terminal while no changing lines are there; the next drawing brings them back.
pub fn above<R>(write: impl FnOnce() -> R) -> R {
    let mut drawn = DRAWN.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::take(&mut *drawn) {
        let _ = std::io::stderr().write_all(ERASE.as_bytes());
    }
    write()
}
