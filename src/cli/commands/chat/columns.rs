//! Two answers side by side.

use textwrap::core::display_width;

use crate::report::harmless;
use crate::report::style::{BOLD, DIM, paint};

/// Between the columns.
const GAP: &str = " │";

/// Texts under their headings, each as wide as a part of `width` columns.
pub(super) fn columns(texts: &[(&str, &str)], width: usize) -> String {
    let count = texts.len().max(1);
    let gaps = (count - 1) * (display_width(GAP) + 1);
    let each = (width.saturating_sub(gaps) / count).max(10);
    let wrapped: Vec<Vec<String>> = texts
        .iter()
        .map(|(_, text)| {
            let text = harmless(text);
            let lines = textwrap::wrap(text.trim_end(), each);
            lines
                .into_iter()
                .map(|line| line.replace('\t', " "))
                .collect()
        })
        .collect();
    let pad = |text: &str| {
        format!(
            "{text}{}",
            " ".repeat(each.saturating_sub(display_width(text)))
        )
    };
    let gap = format!("{} ", paint(DIM, GAP));
    let headings: Vec<String> = texts
        .iter()
        .map(|(heading, _)| paint(BOLD, &pad(heading)))
        .collect();
    let mut shown = headings.join(&gap);
    shown.push('\n');
    let longest = wrapped.iter().map(Vec::len).max().unwrap_or(0);
    for number in 0..longest {
        let cells: Vec<String> = wrapped
            .iter()
            .map(|lines| pad(lines.get(number).map_or("", String::as_str)))
            .collect();
        shown.push_str(cells.join(&gap).trim_end());
        shown.push('\n');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::style::stripped;

    #[test]
    fn texts_of_any_letters_stay_in_their_columns() {
        let texts = [
            ("base", "one two three four five\n\nsix"),
            ("tuned", "日本語 の ことば です ね"),
        ];
        let shown = stripped(&columns(&texts, 27));
        let expected = "\
base         │ tuned       \n\
one two      │ 日本語 の\n\
three four   │ ことば です\n\
five         │ ね\n\
\x20            │\n\
six          │\n";
        assert_eq!(shown, expected);
        assert!(shown.lines().all(|line| display_width(line) <= 27));
    }
}
