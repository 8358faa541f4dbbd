//! Colours and emphasis, named by what they mean. Text is always painted; whether the escapes reach anybody is decided where it is
//! printed, by `--color`, `NO_COLOR`, `CLICOLOR`, `CLICOLOR_FORCE`, `TERM=dumb` and whether a terminal is there (crate `anstream`).

use anstyle::{AnsiColor, Effects, Style};

use super::harmless;

/// The word `error:`, carets under a mistake, failed stages.
pub const ERROR: Style = AnsiColor::Red.on_default().effects(Effects::BOLD);
/// The word `warning:`.
pub const WARNING: Style = AnsiColor::Yellow.on_default().effects(Effects::BOLD);
/// The word `hint:`.
pub const HINT: Style = AnsiColor::Cyan.on_default().effects(Effects::BOLD);
/// Where a mistake is.
pub const PLACE: Style = AnsiColor::Blue.on_default().effects(Effects::BOLD);
/// What is done or up to date.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// What runs or will run.
pub const RUNS: Style = AnsiColor::Yellow.on_default();
/// What waits for something else.
pub const WAITS: Style = AnsiColor::Blue.on_default();
/// What matters less: digests, times, units.
pub const DIM: Style = Style::new().effects(Effects::DIMMED);
/// Headings and names.
pub const BOLD: Style = Style::new().effects(Effects::BOLD);

/// The text in a style. What would steer the terminal is written out first.
pub fn paint(style: Style, text: &str) -> String {
    format!("{style}{}{style:#}", harmless(text))
}

/// [`paint`] where there are colours; elsewhere only what would steer the terminal is written out.
pub(super) fn paint_if(color: bool, style: Style, text: &str) -> String {
    if color {
        paint(style, text)
    } else {
        harmless(text).into_owned()
    }
}

/// The text without its styles, as who has no colours sees it.
pub fn stripped(text: &str) -> String {
    without_our_styles(text).unwrap_or_else(|| anstream::adapter::strip_str(text).to_string())
}

/// [`stripped`] of a text that has no control characters but ends of lines and those of styles (`ESC [ 1 ; 31 m`), many times as fast:
/// a run with nothing to do writes a line for each stage. `None` for any other text.
fn without_our_styles(text: &str) -> Option<String> {
    let is_plain = |text: &str| {
        let mut bytes = text.bytes();
        bytes.all(|byte| byte == b'\n' || (byte >= b' ' && byte != 0x7f))
    };
    let mut parts = text.split('\u{1b}');
    let mut plain = String::with_capacity(text.len());
    plain.push_str(parts.next().filter(|first| is_plain(first))?);
    for part in parts {
        let codes = part.strip_prefix('[')?;
        let rest = codes.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        let rest = rest.strip_prefix('m').filter(|rest| is_plain(rest))?;
        plain.push_str(rest);
    }
    // C1 control characters are two bytes in UTF-8.
    let steers = |c: char| c.is_control() && c != '\n';
    (plain.is_ascii() || !plain.chars().any(steers)).then_some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_way_strips_as_the_library_does() {
        let painted = format!("  {}  日 {}\n", paint(GOOD, "fresh"), paint(DIM, "é;[m"));
        for text in ["", "plain\nlines\n", "\u{1b}[1;31mred\u{1b}[0m", &painted] {
            let library = anstream::adapter::strip_str(text).to_string();
            assert_eq!(without_our_styles(text), Some(library), "{text:?}");
        }
        for text in [
            "\u{1b}[2J",
            "\u{1b}]8;;x\u{1b}\\",
            "a\u{7}",
            "\u{9b}1m",
            "\u{1b}[1",
            "a\tb\u{7f}",
        ] {
            assert_eq!(without_our_styles(text), None, "{text:?}");
            let library = anstream::adapter::strip_str(text).to_string();
            assert_eq!(stripped(text), library, "{text:?}");
        }
    }

    #[test]
    fn what_is_painted_can_not_steer() {
        let painted = paint(ERROR, "a\u{1b}[2Jb");
        assert_eq!(stripped(&painted), "a\\u{1b}[2Jb");
        assert!(painted.starts_with("\u{1b}["));
    }
}
