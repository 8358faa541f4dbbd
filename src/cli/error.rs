//! The one place where mistakes are rendered: the sentence, the place, the line with a caret, and what to do.

use std::fmt::Write as _;

use textwrap::{Options, WordSplitter, fill};
use unicode_width::UnicodeWidthChar as _;

use super::variable;
use crate::recipe::{RecipeError, RecipeErrors};
use crate::report::style::{ERROR, HINT, PLACE, WARNING, paint};
use crate::report::{harmless, steers};

/// The columns of a source line where nobody says how wide the terminal is.
const WITHOUT_TERMINAL: usize = 160;
/// The least columns that a source line is shown in.
const NARROWEST: usize = 12;
/// Stands where a line goes on.
const CUT: &str = "..";
/// The columns of a tab.
const TAB: usize = 4;

/// All mistakes of a recipe, a blank line between two, as wide as the terminal.
pub fn render(errors: &RecipeErrors) -> String {
    render_at(errors, columns())
}

/// The same for so many columns; nothing is wrapped without a number.
fn render_at(errors: &RecipeErrors, columns: Option<usize>) -> String {
    let all: Vec<String> = errors
        .0
        .iter()
        .map(|error| render_one(error, columns))
        .collect();
    all.join("\n")
}

/// A mistake outside recipes.
pub(super) fn plain(message: &str) -> String {
    told(&paint(ERROR, "error:"), message)
}

/// A sentence with the hint of a stage, if it has one, on a line of its own.
fn told(word: &str, message: &str) -> String {
    let (message, hint) = without_hint(message);
    let mut text = sentence(word, &message, columns());
    if let Some(hint) = hint {
        text += &hint_line(&hint, columns());
    }
    text
}

/// A message of a stage, and the hint that stands at the end of its first line.
fn without_hint(message: &str) -> (String, Option<String>) {
    let (first, rest) = match message.find('\n') {
        Some(end) => message.split_at(end),
        None => (message, ""),
    };
    match first.split_once("; hint: ") {
        Some((first, hint)) => (format!("{first}{rest}"), Some(hint.to_owned())),
        None => (message.to_owned(), None),
    }
}

/// What people should know of, and which stops nothing.
pub(super) fn warning(message: &str) -> String {
    told(&paint(WARNING, "warning:"), message)
}

/// What is good to know.
pub(super) fn note(message: &str) -> String {
    sentence("note:", message, columns())
}

/// The same as [`plain`] with what to do.
pub(super) fn with_hint(message: &str, hint: &str) -> String {
    format!("{}{}", plain(message), hint_line(hint, columns()))
}

/// The columns of the terminal that errors are written to: `COLUMNS`, or what the terminal says.
fn columns() -> Option<usize> {
    let told = variable("COLUMNS").and_then(|columns| columns.parse().ok());
    let measured = || {
        let (width, _) = terminal_size::terminal_size_of(std::io::stderr())?;
        Some(usize::from(width.0))
    };
    told.or_else(measured).filter(|columns| *columns > 0)
}

/// A painted word and a sentence behind it, wrapped between words.
fn sentence(word: &str, text: &str, columns: Option<usize>) -> String {
    let text = format!("{word} {}", harmless(text));
    let Some(columns) = columns else {
        return text + "\n";
    };
    let columns = columns.max(NARROWEST);
    let mut lines = text.lines().map(|line| match line.strip_prefix("  ") {
        None => wrapped(line, columns, "", "  "),
        Some(row) => table_row(row, columns),
    });
    lines.by_ref().collect()
}

fn wrapped(line: &str, columns: usize, first: &str, others: &str) -> String {
    let options = Options::new(columns)
        .initial_indent(first)
        .subsequent_indent(others)
        .word_splitter(WordSplitter::NoHyphenation)
        .break_words(false);
    fill(line, options) + "\n"
}

/// A row of two columns, two spaces or more between them. The second is wrapped below itself, or below the first where there is little
/// room.
fn table_row(row: &str, columns: usize) -> String {
    let Some((first, second)) = row.split_once("  ") else {
        return wrapped(row, columns, "    ", "      ");
    };
    let start = row.len() - second.trim_start().len();
    let second = second.trim_start();
    if columns < start + 30 {
        return format!(
            "    {first}\n{}",
            wrapped(second, columns, "      ", "      ")
        );
    }
    let indent = " ".repeat(4 + start);
    let lines = wrapped(second, columns, &indent, &indent);
    format!("    {:start$}{}", first, lines.trim_start())
}

fn hint_line(hint: &str, columns: Option<usize>) -> String {
    sentence(&paint(HINT, "hint:"), hint, columns)
}

fn render_one(error: &RecipeError, columns: Option<usize>) -> String {
    let mut text = sentence(&paint(ERROR, "error:"), &error.message, columns);
    let file = error.file.display().to_string();
    let file = harmless(&file);
    match (&error.origin, error.span, &error.source_line) {
        (Some(origin), ..) => {
            _ = writeln!(text, "  {} from {}", paint(PLACE, "-->"), harmless(origin));
        }
        (None, Some(span), Some(line)) => {
            let number = span.line.to_string();
            let margin = " ".repeat(number.len());
            let bar = paint(PLACE, "|");
            let room = columns.map_or(WITHOUT_TERMINAL, |columns| {
                columns.saturating_sub(number.len() + 4).max(NARROWEST)
            });
            let window = Window::of(line, span.column, span.length, room);
            let carets = paint(ERROR, &"^".repeat(window.marked));
            _ = writeln!(text, "{margin} {} {file}:{span}", paint(PLACE, "-->"));
            _ = writeln!(text, "{margin}  {bar}");
            _ = writeln!(text, " {} {bar} {}", paint(PLACE, &number), window.text);
            _ = writeln!(
                text,
                "{margin}  {bar} {}{carets}",
                " ".repeat(window.before)
            );
        }
        (None, Some(span), None) => {
            _ = writeln!(text, "  {} {file}:{span}", paint(PLACE, "-->"));
        }
        (None, None, _) => _ = writeln!(text, "  {} {file}", paint(PLACE, "-->")),
    }
    if let Some(hint) = &error.hint {
        text.push_str(&hint_line(hint, columns));
    }
    text
}

/// The part of a line around a span.
struct Window {
    /// As it is printed.
    text: String,
    /// The columns before the span.
    before: usize,
    /// The columns of the span, at least one.
    marked: usize,
}

impl Window {
    /// At most `room` columns of a line, with the span of `length` characters that begins at `column` (from 1) inside.
    fn of(line: &str, column: usize, length: usize, room: usize) -> Self {
        let first = column.saturating_sub(1);
        let mut cells = Vec::new();
        let (mut at, mut start, mut end) = (0, None, None);
        for (index, character) in line.chars().enumerate() {
            if index == first {
                start = Some(at);
            }
            if index == first.saturating_add(length) {
                end = Some(at);
            }
            // What would steer the terminal is one sign, so that carets stay under their span.
            let (shown, width, times) = match character {
                '\t' => (' ', 1, TAB),
                c if steers(c) => ('\u{fffd}', 1, 1),
                c => (c, c.width().unwrap_or(0), 1),
            };
            for _ in 0..times {
                cells.push((at, width, shown));
                at += width;
            }
        }
        let total = at;
        let start = start.unwrap_or(total);
        let end = end.unwrap_or(total).max(start + 1);
        let (mut from, mut to) = (0, total.max(room));
        if total > room {
            let inside = room - 2 * CUT.len();
            let middle = start + (end - start).min(inside) / 2;
            from = middle.saturating_sub(room / 2).min(total - room);
            to = from + room;
        }
        let (cut_before, cut_behind) = (from > 0, to < total);
        from += if cut_before { CUT.len() } else { 0 };
        to -= if cut_behind { CUT.len() } else { 0 };
        let mut window = Self {
            text: String::new(),
            before: 0,
            marked: 0,
        };
        if cut_before {
            window.text.push_str(CUT);
            window.before = CUT.len();
        }
        for (at, width, shown) in cells {
            if at < from || at + width > to {
                continue;
            }
            window.text.push(shown);
            if at < start {
                window.before += width;
            } else if at < end {
                window.marked += width;
            }
        }
        if cut_behind {
            window.text.push_str(CUT);
        }
        window.marked = window.marked.max(1);
        window
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::SourceSpan;
    use crate::report::style::stripped;

    fn error(line: &str, span: SourceSpan) -> RecipeErrors {
        RecipeErrors(vec![RecipeError {
            file: "r.yaml".into(),
            message: "there is no stage `b`".into(),
            span: Some(span),
            origin: None,
            hint: Some("did you mean `a`?".into()),
            source_line: Some(line.into()),
        }])
    }

    fn span(line: usize, column: usize, length: usize) -> SourceSpan {
        SourceSpan {
            file: 0,
            line,
            column,
            length,
        }
    }

    fn shown(line: &str, span: SourceSpan, columns: Option<usize>) -> String {
        stripped(&render_at(&error(line, span), columns))
    }

    #[test]
    fn a_mistake_is_shown_with_its_line() {
        let expected = "\
error: there is no stage `b`
   --> r.yaml:12:17
    |
 12 |   x: { dataset: bbb }
    |                 ^^^
hint: did you mean `a`?
";
        assert_eq!(
            shown("  x: { dataset: bbb }", span(12, 17, 3), None),
            expected
        );
    }

    #[test]
    fn carets_stand_right_behind_tabs_and_wide_characters() {
        let shown = shown("\t\u{65e5}: x\u{1b}", span(1, 5, 1), Some(80));
        assert!(
            shown.contains(" 1 |     \u{65e5}: x\u{fffd}\n   |         ^\n"),
            "{shown}"
        );
    }

    /// At every width the caret stands under its span and no line is wider than the terminal, wherever the span is.
    #[test]
    fn long_lines_are_cut_around_the_span() {
        for columns in [20, 50, 80, 165, 300] {
            for before in [0, 1, 30, 77, 500, 1000] {
                for filler in ["x", "\u{65e5}", "\u{1f600}"] {
                    let line = format!("{}bad{}", filler.repeat(before), "y".repeat(1000 - before));
                    let shown = shown(&line, span(1, before + 1, 3), Some(columns));
                    let lines: Vec<&str> = shown
                        .lines()
                        .filter(|line| line.starts_with(" 1 |") || line.starts_with("   |"))
                        .collect();
                    let columns_of = |text: &str| -> usize {
                        text.chars().map(|c| c.width().unwrap_or(0)).sum()
                    };
                    let [_, source, carets] = lines[..] else {
                        panic!("{shown}")
                    };
                    assert!(
                        columns_of(source) <= columns && columns_of(carets) <= columns,
                        "{shown}"
                    );
                    let at = source.find("bad").unwrap_or_else(|| panic!("{shown}"));
                    assert_eq!(
                        carets.find("^^^"),
                        Some(columns_of(&source[..at])),
                        "{shown}"
                    );
                }
            }
        }
    }

    #[test]
    fn sentences_are_wrapped_between_words() {
        let text = sentence("hint:", &"seven letters ".repeat(20), Some(50));
        assert!(text.lines().count() > 4);
        for (number, line) in text.lines().enumerate() {
            assert!(
                line.len() <= 50 && (number == 0 || line.starts_with("  ")),
                "{text}"
            );
        }
        let table = sentence("hint:", "keys:\n  a   b\n  c   d", Some(50));
        assert_eq!(table, "hint: keys:\n    a   b\n    c   d\n");
        let table = sentence(
            "hint:",
            &format!("keys:\n  a   {}", "word ".repeat(12).trim()),
            Some(40),
        );
        let words = "word word word word word word";
        assert_eq!(
            table,
            format!("hint: keys:\n    a   {words}\n        {words}\n")
        );
        let narrow = sentence(
            "hint:",
            "keys:\n  a_long_key_of_others   here it is",
            Some(30),
        );
        assert_eq!(
            narrow,
            "hint: keys:\n    a_long_key_of_others\n      here it is\n"
        );
    }

    #[test]
    fn a_span_longer_than_the_terminal_or_beyond_the_line_still_has_carets() {
        assert!(shown("", span(1, 9, 5), Some(80)).contains('^'));
        let long = shown(&"x".repeat(400), span(1, 1, 400), Some(60));
        assert!(
            long.lines().all(|line| line.len() <= 60) && long.contains("^^^"),
            "{long}"
        );
    }
}
