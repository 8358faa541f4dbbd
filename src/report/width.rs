//! The columns that text takes at a terminal.

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// The columns of a text without escapes.
pub fn width(text: &str) -> usize {
    text.width()
}

/// The beginning of a text that fits into so many columns, with a sign that it was cut if it was.
pub(super) fn cut(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let mut cut = String::new();
    let mut left = columns.saturating_sub(1);
    for character in text.chars() {
        let Some(rest) = left.checked_sub(character.width().unwrap_or(0)) else {
            break;
        };
        left = rest;
        cut.push(character);
    }
    if columns > 0 {
        cut.push('…');
    }
    cut
}

/// The text in lines of at most so many columns, broken between words; words that are longer stay whole.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    if columns == usize::MAX {
        return vec![text.to_owned()];
    }
    let mut lines = vec![String::new()];
    // The columns that are used of the last line, and whether it has a word.
    let (mut used, mut begun) = (0, false);
    for (number, word) in text.split(' ').enumerate() {
        let wide = width(word);
        if begun && used + 1 + wide > columns {
            lines.push(String::new());
            (used, begun) = (0, false);
        } else if number > 0 {
            used += 1;
            if let Some(last) = lines.last_mut() {
                last.push(' ');
            }
        }
        used += wide;
        begun |= wide > 0;
        if let Some(last) = lines.last_mut() {
            last.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_and_wrapped_by_columns() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdefg", 6), "abcde…");
        assert_eq!(cut("日本語", 5), "日本…");
        assert_eq!(cut("abc", 0), "");
        assert_eq!(wrap("one two three", 8), ["one two", "three"]);
        assert_eq!(wrap("a-very-long-word b", 5), ["a-very-long-word", "b"]);
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap(" one  two ", usize::MAX), [" one  two "]);
        assert_eq!(wrap("  a  b", 50), ["  a  b"]);
    }
}
