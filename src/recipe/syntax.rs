//! Mistakes in a recipe's text, in words.

use super::source_map::SourceSpan;

/// A mistake in the text itself.
pub(super) struct Mistake {
    pub(super) message: String,
    pub(super) span: Option<SourceSpan>,
    pub(super) hint: Option<String>,
}

/// Stands before our own sentences in the parser's errors; `|` parts the hint.
pub(super) const OURS: &str = "$ours ";

/// A sentence for an error of the YAML parser in the `file`-th file.
pub(super) fn syntax(error: &serde_yaml::Error, lines: &[&str], file: usize) -> Mistake {
    // The end of the text may be told as the start of a line behind the last one.
    let span = error.location().map(|location| {
        if location.line() <= lines.len() {
            SourceSpan {
                file,
                line: location.line(),
                column: location.column(),
                length: 1,
            }
        } else {
            SourceSpan {
                file,
                line: lines.len(),
                column: lines.last().map_or(0, |line| line.chars().count()) + 1,
                length: 1,
            }
        }
    });
    let text = error.to_string();
    // The innermost sentence: paths come before it, the span and the parser's context behind.
    let (problem, context) = text.split_once(", ").unwrap_or((&text, ""));
    let problem = problem.split(" at line ").next().unwrap_or_default();
    let at = span.and_then(|span| lines.get(span.line - 1)?.chars().nth(span.column - 1));
    let (message, hint) = if let Some((_, ours)) = problem.split_once(OURS) {
        let (message, hint) = ours.split_once('|').unwrap_or((ours, ""));
        (message.to_owned(), hint.to_owned())
    } else if problem.contains("more than one document") {
        (
            "the file holds more than one YAML document".to_owned(),
            "one recipe a file: remove the `---` between them".to_owned(),
        )
    } else if problem.contains("recursion limit") {
        (
            "the recipe is nested too deeply".to_owned(),
            "the limit is 128 levels; an alias must not contain itself".to_owned(),
        )
    } else if problem.contains("repetition limit") {
        (
            "the recipe's aliases expand to too much".to_owned(),
            "the limit is 200000 values".to_owned(),
        )
    } else if problem.contains("unknown anchor") {
        (
            "the alias has no anchor".to_owned(),
            "write `&name` before the value that `*name` repeats; a text that begins with `*` needs quotes".to_owned(),
        )
    } else {
        let hint = if at == Some('\t') {
            "YAML is indented with spaces, not with tabs".to_owned()
        } else if unquoted_var(span.and_then(|span| lines.get(span.line - 1)).copied()) {
            "a var needs quotes inside `{ }` and `[ ]`: `\"${name}\"`".to_owned()
        } else {
            unclosed(context)
        };
        (format!("this is not valid YAML: {problem}"), hint)
    };
    Mistake {
        message,
        span,
        hint: Some(hint).filter(|hint| !hint.is_empty()),
    }
}

/// The parser's context in words: a bracket that is not closed.
fn unclosed(context: &str) -> String {
    let flow = [
        ("while parsing a flow mapping at ", '{', '}'),
        ("while parsing a flow sequence at ", '[', ']'),
    ];
    for (told, open, close) in flow {
        if let Some(place) = context.strip_prefix(told) {
            return format!(
                "the `{open}` at {place} has no `{close}`, or a comma is missing behind it"
            );
        }
    }
    context.to_owned()
}

/// Whether a line has a var without quotes inside brackets, where its brace begins a map.
fn unquoted_var(line: Option<&str>) -> bool {
    let line = line.unwrap_or_default();
    line.match_indices("${").any(|(at, _)| {
        let before = line.get(..at).unwrap_or_default();
        before.contains(['{', '[']) && !before.ends_with(['"', '\'', '$'])
    })
}
