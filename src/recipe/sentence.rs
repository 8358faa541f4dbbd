//! Describes in words what is wrong with a parameter.

use serde_yaml::Value;

use super::hints;
use crate::engine::{Fault, FoundValue};

/// A message and what to do.
pub(crate) struct Sentence {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// The message for a `parameter` of `kind` that can't be read.
pub(crate) fn describe(parameter: &str, kind: &str, fault: &Fault) -> Sentence {
    let subject = if parameter.is_empty() {
        format!("`{kind}`")
    } else {
        format!("`{parameter}` of `{kind}`")
    };
    let (message, hint) = match fault {
        Fault::Unfit { found, expected } => {
            let number =
                matches!(expected.as_str(), "f64" | "f32") || expected.starts_with(['u', 'i']);
            let hint = (number && matches!(found, FoundValue::Text(_)))
                .then(|| "write the number without quotes and without a unit".to_owned());
            let message = format!("{subject} must be {}, not {found}", expectation(expected));
            (message, hint)
        }
        Fault::Word { found, known } => {
            let message = format!(
                "{subject} must be {}, not `{found}`",
                hints::either(known.iter().copied())
            );
            let hint = hints::nearest(found, known.iter().copied());
            (
                message,
                hint.map(|known| format!("did you mean `{known}`?")),
            )
        }
        Fault::Missing(name) => (format!("{subject} needs `{name}`"), None),
        // The path ends with the key itself.
        Fault::Unknown { field, known } => {
            let hint = match hints::nearest(field, known.iter().copied()) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("known are {}", hints::list(known.iter().copied())),
            };
            (format!("unknown parameter {subject}"), Some(hint))
        }
        Fault::Other(message) => (format!("{subject} is wrong: {message}"), None),
    };
    Sentence { message, hint }
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
