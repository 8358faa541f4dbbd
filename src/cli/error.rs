//! The one place where mistakes are rendered: the sentence, the place, the line with a caret, and what to do.

use std::fmt::Write as _;

use crate::recipe::{RecipeError, RecipeErrors};
use crate::report::style::{ERROR, HINT, PLACE, paint};
use crate::report::{harmless, steers};

/// Lines longer than this are shown in part, around the span.
const MAX_LINE: usize = 160;

/// All mistakes of a recipe, a blank line between two.
pub fn render(errors: &RecipeErrors) -> String {
    let all: Vec<String> = errors.0.iter().map(render_one).collect();
    all.join("\n")
}

/// A mistake outside recipes.
pub(super) fn plain(message: &str) -> String {
    format!("{} {}\n", paint(ERROR, "error:"), harmless(message))
}

/// The same with what to do.
pub(super) fn with_hint(message: &str, hint: &str) -> String {
    format!(
        "{}{} {}\n",
        plain(message),
        paint(HINT, "hint:"),
        harmless(hint)
    )
}

fn render_one(error: &RecipeError) -> String {
    let mut text = format!("{} {}\n", paint(ERROR, "error:"), harmless(&error.message));
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
            let (line, start, length) = window(line, span.column, span.length);
            let (before, marked) = caret(&line, start, length);
            let carets = paint(ERROR, &"^".repeat(marked));
            _ = writeln!(text, "{margin} {} {file}:{span}", paint(PLACE, "-->"));
            _ = writeln!(text, "{margin}  {bar}");
            _ = writeln!(text, " {} {bar} {}", paint(PLACE, &number), expand(&line));
            _ = writeln!(text, "{margin}  {bar} {}{carets}", " ".repeat(before));
        }
        (None, Some(span), None) => {
            _ = writeln!(text, "  {} {file}:{span}", paint(PLACE, "-->"));
        }
        (None, None, _) => _ = writeln!(text, "  {} {file}", paint(PLACE, "-->")),
    }
    if let Some(hint) = &error.hint {
        _ = writeln!(text, "{} {}", paint(HINT, "hint:"), harmless(hint));
    }
    text
}

/// The part of a line around a span: the part, the span's index in it from 0, and its length.
fn window(line: &str, column: usize, length: usize) -> (String, usize, usize) {
    let at = column.saturating_sub(1);
    let count = line.chars().count();
    let skip = if count > MAX_LINE {
        at.saturating_sub(MAX_LINE / 2).min(count - MAX_LINE)
    } else {
        0
    };
    let part: String = line.chars().skip(skip).take(MAX_LINE).collect();
    let start = at.saturating_sub(skip);
    let room = part.chars().count().saturating_sub(start);
    (part, start, length.min(room).max(1))
}

/// A line as it is printed: tabs are four spaces, and what would steer the terminal is one sign, so that carets stay under their
/// span.
fn expand(line: &str) -> String {
    let keep = |c: char| if steers(c) { '\u{fffd}' } else { c };
    line.replace('\t', "    ").chars().map(keep).collect()
}

/// The columns before a span and under it.
fn caret(line: &str, start: usize, length: usize) -> (usize, usize) {
    let before = line.chars().take(start).map(width).sum();
    let marked: usize = line.chars().skip(start).take(length).map(width).sum();
    (before, marked.max(1))
}

/// The columns of a character: East Asian wide ones and emoji take two, combining marks none.
fn width(character: char) -> usize {
    match u32::from(character) {
        0x09 => 4,
        0x0300..=0x036f | 0x200b..=0x200d | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1f64f
        | 0x1f900..=0x1f9ff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
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
            line,
            column,
            length,
        }
    }

    #[test]
    fn a_mistake_is_shown_with_its_line() {
        let shown = stripped(&render(&error("  x: { dataset: bbb }", span(12, 17, 3))));
        let expected = "\
error: there is no stage `b`
   --> r.yaml:12:17
    |
 12 |   x: { dataset: bbb }
    |                 ^^^
hint: did you mean `a`?
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn carets_stand_right_behind_tabs_and_wide_characters() {
        let shown = stripped(&render(&error("\t\u{65e5}: x\u{1b}", span(1, 5, 1))));
        assert!(
            shown.contains(" 1 |     \u{65e5}: x\u{fffd}\n   |         ^\n"),
            "{shown}"
        );
    }

    #[test]
    fn long_lines_are_cut_around_the_span() {
        let line = format!("{}bad{}", "x".repeat(1000), "y".repeat(1000));
        let shown = stripped(&render(&error(&line, span(1, 1001, 3))));
        let lines: Vec<&str> = shown.lines().collect();
        let at = lines[4].find('^').unwrap();
        assert_eq!(&lines[3][at..at + 3], "bad");
        assert!(lines[3].len() < 200);
    }

    #[test]
    fn a_span_beyond_the_line_still_has_a_caret() {
        assert!(render(&error("", span(1, 9, 5))).contains('^'));
    }
}
