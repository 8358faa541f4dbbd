//! What the user says: lines edited at a terminal, or lines of a pipe.

use std::io::BufRead as _;

use anyhow::Context as _;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// The longest line of a pipe, in bytes.
const LONGEST: u64 = 16 << 20;
/// What begins and ends a text of several lines.
const FENCE: &str = "\"\"\"";

/// Where lines come from.
pub(super) enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    Text(String),
    /// Ctrl-C where nothing is answered.
    Interrupt,
    End,
}

impl Input {
    pub(super) fn new(at_terminal: bool) -> anyhow::Result<Self> {
        if !at_terminal {
            return Ok(Self::Pipe);
        }
        let editor = DefaultEditor::new().context("the terminal can't be used")?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    /// The next text. At a terminal one of several lines stands between lines of three quotation marks.
    pub(super) fn next(&mut self) -> anyhow::Result<Said> {
        match self {
            Self::Pipe => from_pipe(),
            Self::Terminal(editor) => {
                let first = match line(editor, ">>> ")? {
                    Said::Text(text) => text,
                    other => return Ok(other),
                };
                let Some(begun) = first.trim_start().strip_prefix(FENCE) else {
                    remember(editor, &first);
                    return Ok(Said::Text(first));
                };
                let mut text = begun.to_owned();
                loop {
                    if let Some(whole) = text.trim_end().strip_suffix(FENCE) {
                        let whole = whole.trim_matches('\n').to_owned();
                        remember(editor, &whole);
                        return Ok(Said::Text(whole));
                    }
                    match line(editor, "... ")? {
                        Said::Text(more) => {
                            text.push('\n');
                            text.push_str(&more);
                        }
                        other => return Ok(other),
                    }
                }
            }
        }
    }
}

fn remember(editor: &mut DefaultEditor, text: &str) {
    // It is only for the arrow keys.
    let _ = editor.add_history_entry(text);
}

fn line(editor: &mut DefaultEditor, prompt: &str) -> anyhow::Result<Said> {
    match editor.readline(prompt) {
        Ok(text) => Ok(Said::Text(text)),
        Err(ReadlineError::Interrupted) => Ok(Said::Interrupt),
        Err(ReadlineError::Eof) => Ok(Said::End),
        Err(error) => Err(anyhow::Error::from(error).context("the terminal can't be read")),
    }
}

fn from_pipe() -> anyhow::Result<Said> {
    let mut line = Vec::new();
    let stdin = std::io::stdin().lock();
    let read = std::io::Read::take(stdin, LONGEST + 1).read_until(b'\n', &mut line);
    if read.context("standard input can't be read")? == 0 {
        return Ok(Said::End);
    }
    anyhow::ensure!(
        line.len() as u64 <= LONGEST,
        "a line of standard input is longer than 16 MiB"
    );
    let line = String::from_utf8(line).context("standard input is not UTF-8")?;
    Ok(Said::Text(line.trim_end_matches(['\n', '\r']).to_owned()))
}
