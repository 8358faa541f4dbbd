//! Numbers as people read them, and text from elsewhere that can't steer the terminal.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Whether a character moves the cursor, hides text or turns its direction around. Ends of lines and tabs don't count.
pub fn steers(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t')
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text for a terminal, in which characters that would steer it are written out, as in `\u{1b}`. Everything that comes from data, files,
/// recipes and remotes goes through this.
pub fn harmless(text: &str) -> Cow<'_, str> {
    written_out(text, |text, c| _ = write!(text, "{}", c.escape_unicode()))
}

/// The same for JSON: its own escapes, so that it still says the same. `serde_json` writes out only what JSON demands.
pub fn harmless_json(json: &str) -> Cow<'_, str> {
    // Outside of strings JSON has none of these characters, and all of them have four digits.
    written_out(json, |json, c| _ = write!(json, "\\u{:04x}", u32::from(c)))
}

fn written_out(text: &str, write_out: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers(c) {
            write_out(&mut safe, c);
        } else {
            safe.push(c);
        }
    }
    Cow::Owned(safe)
}

/// Why nothing can begin yet: somebody collects in the store.
pub(crate) fn has_the_store(holder: &str) -> String {
    format!("{holder} has the store to itself")
}

/// Seconds as `0.4 s`, `12 s`, `3 min 5 s`, `2 h 14 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// How long ago a moment was, in seconds since 1970.
pub fn ago(moment: u64) -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    match now.saturating_sub(moment) {
        seconds @ 0..60 => format!("{seconds} s ago"),
        seconds @ 60..3600 => format!("{} min ago", seconds / 60),
        seconds @ 3600..86_400 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

/// Bytes as `512 B`, `1.5 MB`, in powers of 1000.
pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            return if unit == "B" {
                format!("{bytes} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// A number with commas between its thousands.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// So many things, as in `1 stage` and `2 stages`. The noun is given in the plural, which ends in `s`.
pub fn count(number: u64, things: &str) -> String {
    let noun = match things.split_once(' ') {
        _ if number != 1 => things.to_owned(),
        None => things.strip_suffix('s').unwrap_or(things).to_owned(),
        Some((noun, rest)) => format!("{} {rest}", noun.strip_suffix('s').unwrap_or(noun)),
    };
    format!("{} {noun}", thousands(number))
}

/// Bytes in the unit in which [`bytes`] tells `of`, without naming it.
pub(super) fn bytes_of(bytes: u64, of: u64) -> String {
    let (divisor, decimals) = match of as f64 {
        0.0..999.5 => (1.0, 0),
        999.5..999_500.0 => (1e3, 1),
        999_500.0..999.5e6 => (1e6, 1),
        999.5e6..999.5e9 => (1e9, 1),
        _ => (1e12, 1),
    };
    format!("{:.decimals$}", bytes as f64 / divisor)
}

/// A number with four significant digits, in at most eight characters without its sign.
pub(super) fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let exponent = value.abs().log10().floor();
    if (-3.0..5.0).contains(&exponent) {
        let digits = (3.0 - exponent).max(0.0) as usize;
        return format!("{value:.digits$}");
    }
    format!("{value:.3e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_elsewhere_does_not_steer_the_terminal() {
        let text = "a\u{1b}[2J\u{7}\r\u{9b}1m\u{202e}b\u{7f}\n\tc\u{e9}";
        assert_eq!(
            harmless(text),
            "a\\u{1b}[2J\\u{7}\\u{d}\\u{9b}1m\\u{202e}b\\u{7f}\n\tc\u{e9}"
        );
        assert!(matches!(
            harmless("pl\u{e4}in \u{1f600}\n"),
            Cow::Borrowed(_)
        ));
        let json = serde_json::to_string(&text).unwrap();
        let safe = harmless_json(&json);
        assert!(!safe.contains(steers));
        assert_eq!(serde_json::from_str::<String>(&safe).unwrap(), text);
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(duration(0.04), "0.0 s");
        assert_eq!(duration(12.3), "12 s");
        assert_eq!(duration(185.0), "3 min 5 s");
        assert_eq!(duration(8040.0), "2 h 14 min");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_500_000), "1.5 MB");
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(count(1, "stages"), "1 stage");
        assert_eq!(count(3000, "steps"), "3,000 steps");
        assert_eq!(
            count(1, "rows by the reference model"),
            "1 row by the reference model"
        );
        assert_eq!(bytes_of(1_500_000, 2_000_000_000), "0.0");
        assert_eq!(bytes_of(1_500_000, 20_000_000), "1.5");
        assert_eq!(significant(0.000_008), "8.000e-6");
        assert_eq!(significant(7.515_888), "7.516");
        assert_eq!(significant(0.001_038), "0.001038");
        assert_eq!(significant(-0.000_707_5), "-7.075e-4");
        let mut value = 9.999_96e-9;
        while value < 1e9 {
            assert!(significant(value).len() <= 8, "{value}");
            value *= 1.37;
        }
    }
}
