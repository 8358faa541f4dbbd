//! What the program writes to: how much, in which colours, and whether that went well.

use std::io::{ErrorKind, IsTerminal as _, Write};
use std::sync::atomic::{AtomicBool, AtomicI8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anstream::{AutoStream, ColorChoice};

use super::variable;
use crate::report::{Look, Verbosity, above};

/// How much is shown: below 0 less, above 0 more.
static VERBOSITY: AtomicI8 = AtomicI8::new(0);

/// Why something could not be written to standard output.
static UNWRITTEN: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// What every command takes.
#[derive(clap::Args)]
#[command(next_help_heading = "Display")]
pub(super) struct DisplayArgs {
    /// Shows warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Shows more: every reason and every metric
    #[arg(short, long, global = true)]
    verbose: bool,
}

impl DisplayArgs {
    /// Makes this the setting of the process.
    pub(super) fn set(&self) {
        let level = i8::from(self.verbose) - i8::from(self.quiet);
        VERBOSITY.store(level, Ordering::Relaxed);
    }
}

/// How much is to be shown.
pub(super) fn verbosity() -> Verbosity {
    match VERBOSITY.load(Ordering::Relaxed) {
        ..0 => Verbosity::Quiet,
        0 => Verbosity::Normal,
        1.. => Verbosity::Verbose,
    }
}

/// How events are shown on standard error: with lines that change, if it is a terminal that can move its cursor.
pub(super) fn look_of_errors(stopping: Arc<AtomicBool>) -> Look {
    let stderr = std::io::stderr();
    let dumb = variable("TERM").is_some_and(|term| term == "dumb");
    let moves = stderr.is_terminal() && !dumb;
    Look {
        color: AutoStream::choice(&stderr) != ColorChoice::Never,
        unicode: is_unicode(),
        verbosity: verbosity(),
        size: moves.then_some(size as fn() -> (usize, usize)),
        stopping,
        columns: None,
    }
}

/// How events are shown on standard output, as lines.
pub(super) fn look_of_output() -> Look {
    Look {
        color: AutoStream::choice(&std::io::stdout()) != ColorChoice::Never,
        unicode: is_unicode(),
        verbosity: verbosity(),
        columns: output_columns(),
        ..Look::default()
    }
}

/// The columns of the terminal that standard output is; `None` where it is none.
pub(super) fn output_columns() -> Option<usize> {
    let (columns, _) = terminal_size::terminal_size_of(std::io::stdout())?;
    Some(usize::from(columns.0)).filter(|columns| *columns > 0)
}

/// The columns and lines of the terminal that standard error is.
fn size() -> (usize, usize) {
    match terminal_size::terminal_size_of(std::io::stderr()) {
        Some((columns, lines)) if columns.0 > 0 => (columns.0.into(), lines.0.into()),
        _ => (80, 24),
    }
}

/// Whether the locale has more characters than ASCII.
fn is_unicode() -> bool {
    let names = ["LC_ALL", "LC_CTYPE", "LANG"];
    let set = names
        .iter()
        .find_map(|name| variable(name).filter(|value| !value.is_empty()));
    set.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Writes to standard output; what is styled keeps its colours only where they are wanted. A reader that has seen enough (`| head`) is no
/// error; what else goes wrong is told when the command has ended.
pub(super) fn to_output(text: &str, styled: bool) {
    let result = if styled {
        let mut out = anstream::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    } else {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    };
    if let Err(error) = result {
        remember(error);
    }
}

/// Standard output for whoever writes to it by themselves; what goes wrong is handled as by [`to_output`].
pub(super) struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if let Err(error) = std::io::stdout().lock().write_all(bytes) {
            remember(error);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if let Err(error) = std::io::stdout().lock().flush() {
            remember(error);
        }
        Ok(())
    }
}

/// Keeps why standard output could not be written, for the end of the command.
fn remember(error: std::io::Error) {
    if error.kind() != ErrorKind::BrokenPipe {
        *UNWRITTEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Writes to standard error what is rendered, above lines that change.
pub(super) fn to_errors(text: &str) {
    above(|| {
        // There is nowhere else to tell that it failed.
        let _ = anstream::stderr().lock().write_all(text.as_bytes());
    });
}

/// Why standard output could not be written, if it could not.
pub(super) fn unwritten() -> Option<std::io::Error> {
    UNWRITTEN
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
}
