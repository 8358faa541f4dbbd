//! Describes in words the mistakes in a recipe's YAML syntax.

use super::source_map::SourceSpan;

/// A mistake in the text itself.
pub(super) struct Mistake {
    pub(super) message: String,
    pub(super) span: Option<SourceSpan>,
    pub(super) hint: Option<String>,
}

/// The prefix of our own messages in the parser's errors. A `|` separates the message from the hint.
pub(super) const OURS: &str = "$ours ";

/// A sentence for an error of the YAML parser.
pub(super) fn syntax(error: &serde_yaml::Error, lines: &[&str]) -> Mistake {
    // The parser may give the end of the text as the start of a line after the last one.
    let span = error.location().map(|location| {
        if location.line() <= lines.len() {
            SourceSpan {
                line: location.line(),
                column: location.column(),
                length: 1,
            }
        } else {
            SourceSpan {
                line: lines.len(),
                column: lines.last().map_or(0, |line| line.chars().count()) + 1,
                length: 1,
            }
        }
    });
    let text = error.to_string();
    // Takes the innermost message: the path comes before it, the position and the parser's context after it.
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
            context.to_owned()
        };
        (format!("this is not valid YAML: {problem}"), hint)
    };
    Mistake {
        message,
        span,
        hint: Some(hint).filter(|hint| !hint.is_empty()),
    }
}

/// Whether a line has an unquoted var inside brackets, where its brace starts a map.
fn unquoted_var(line: Option<&str>) -> bool {
    let line = line.unwrap_or_default();
    line.match_indices("${").any(|(at, _)| {
        let before = line.get(..at).unwrap_or_default();
        before.contains(['{', '[']) && !before.ends_with(['"', '\'', '$'])
    })
}
