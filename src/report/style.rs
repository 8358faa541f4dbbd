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

/// The text without its styles, as who has no colours sees it.
pub fn stripped(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_painted_can_not_steer() {
        let painted = paint(ERROR, "a\u{1b}[2Jb");
        assert_eq!(stripped(&painted), "a\\u{1b}[2Jb");
        assert!(painted.starts_with("\u{1b}["));
    }
}
