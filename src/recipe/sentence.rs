//! Serde's sentences in words for people.

use serde_yaml::Value;

use super::hints;

/// A message and what to do.
pub(crate) struct Sentence {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// Says that `parameter` of `kind` can't be read.
pub(crate) fn of(parameter: &str, kind: &str, serde: &str) -> Sentence {
    let subject = if parameter.is_empty() {
        format!("`{kind}`")
    } else {
        format!("`{parameter}` of `{kind}`")
    };
    let serde = serde.split(" at line ").next().unwrap_or(serde);
    let after = |prefix: &str| serde.strip_prefix(prefix);
    if let Some(rest) = after("invalid type: ").or_else(|| after("invalid value: ")) {
        let (found, expected) = rest.rsplit_once(", expected ").unwrap_or((rest, "another"));
        let text_number = matches!(expected, "f64" | "f32") && found.starts_with("string")
            || expected.starts_with(['u', 'i']) && found.starts_with("string");
        let hint =
            text_number.then(|| "write the number without quotes and without a unit".to_owned());
        return Sentence {
            message: format!(
                "{subject} must be {}, not {}",
                expectation(expected),
                finding(found)
            ),
            hint,
        };
    }
    if let Some(rest) = after("unknown variant `") {
        let (found, expected) = rest.split_once("`, ").unwrap_or((rest, ""));
        let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        let message = format!(
            "{subject} must be {}, not `{found}`",
            hints::either(known.iter().copied())
        );
        let hint = hints::nearest(found, known).map(|known| format!("did you mean `{known}`?"));
        return Sentence { message, hint };
    }
    if let Some(rest) = after("missing field `") {
        let name = rest.split('`').next().unwrap_or(rest);
        return Sentence {
            message: format!("{subject} needs `{name}`"),
            hint: None,
        };
    }
    if let Some(rest) = after("unknown field `") {
        let (name, expected) = rest.split_once("`, ").unwrap_or((rest, ""));
        let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        let hint = match hints::nearest(name, known.iter().copied()) {
            Some(known) => format!("did you mean `{known}`?"),
            None => format!("known are {}", hints::list(known)),
        };
        // The path ends with the key itself.
        return Sentence {
            message: format!("unknown parameter {subject}"),
            hint: Some(hint),
        };
    }
    Sentence {
        message: format!("{subject} is wrong: {serde}"),
        hint: None,
    }
}

fn expectation(expected: &str) -> String {
    match expected {
        "f64" | "f32" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "a boolean" => "`true` or `false`",
        "a string" => "a text",
        "a sequence" => "a list",
        "unit" => "nothing",
        other if other.starts_with("struct ") || other == "a map" => "a map",
        other if other.starts_with("enum ") => "one of the known words",
        other => other,
    }
    .to_owned()
}

fn finding(found: &str) -> String {
    for prefix in ["string ", "integer ", "floating point ", "boolean "] {
        if let Some(value) = found.strip_prefix(prefix) {
            let value = value.trim_matches('`');
            if prefix == "string " {
                return format!("the text {value}");
            }
            return value.to_owned();
        }
    }
    match found {
        "map" => "a map",
        "sequence" => "a list",
        "unit value" | "null" | "Option value" => "nothing",
        other => other,
    }
    .to_owned()
}

/// A value as a noun.
pub(crate) fn noun(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "`true` or `false`",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) | Value::Tagged(_) => "a map",
    }
}

/// A value in a sentence: scalars as they are, the rest by its noun.
pub(crate) fn show(value: &Value) -> String {
    match scalar(value) {
        Some(text) => format!("`{text}`"),
        None => noun(value).to_owned(),
    }
}

/// The text of a scalar that is not null.
pub(crate) fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(value) => Some(value.to_string()),
        Value::String(value) => Some(value.clone()),
        _ => None,
    }
}
