//! What is known of a recipe's stages, trainings and runs, for the commands that show it.

pub(super) mod curves;
mod data;
mod environment;
pub(super) mod evaluation;
pub(super) mod page;
pub(super) mod results;
pub(super) mod runs;
pub(super) mod stages;
pub(super) mod training;

use serde_json::Value;

use crate::engine::canonical_json;

/// A moment in seconds since 1970, as people write it.
pub(super) fn moment(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0))
        .map_or_else(String::new, |moment| {
            moment.format("%Y-%m-%d %H:%M UTC").to_string()
        })
}

/// Now, in seconds since 1970.
pub(super) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.as_secs())
}

/// A value as people read it: plain text without quotes, maps and lists in a line.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items)
            if items
                .iter()
                .all(|item| !item.is_object() && !item.is_array()) =>
        {
            items.iter().map(plain).collect::<Vec<_>>().join(", ")
        }
        Value::Object(map) if !map.is_empty() => {
            let parts = map.iter().map(|(name, value)| match value {
                Value::Object(_) => format!("{name} ({})", plain(value)),
                value => format!("{name} {}", plain(value)),
            });
            parts.collect::<Vec<_>>().join(", ")
        }
        value => canonical_json(value),
    }
}

/// The beginning of a text that may be long.
pub(super) fn head(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        Some((end, _)) => format!(
            "{}… ({} characters in all)",
            &text[..end],
            text.chars().count()
        ),
        None => text.to_owned(),
    }
}

/// A number with four significant digits, as short as that allows.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.fract() == 0. && value.abs() < 1e9 {
        return format!("{value}");
    }
    if (1e-3..1e6).contains(&value.abs()) {
        let digits = (3. - value.abs().log10().floor()).clamp(0., 6.) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') {
            return text.trim_end_matches('0').trim_end_matches('.').to_owned();
        }
        return text;
    }
    format!("{value:.3e}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_read_well() {
        assert_eq!(
            plain(&json!({"train": 3, "causes": {"empty": 1}})),
            "causes (empty 1), train 3"
        );
        assert_eq!(plain(&json!(["a", 1])), "a, 1");
        assert_eq!(head("abc", 2), "ab… (3 characters in all)");
        assert_eq!(number(0.123_456), "0.1235");
        assert_eq!(number(8e-6), "8.000e-6");
        assert_eq!(number(1200.), "1200");
        assert_eq!(number(12_345.678), "12346");
        assert_eq!(moment(1_795_700_000), "2026-11-26 13:33 UTC");
    }
}
