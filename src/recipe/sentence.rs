//! What is wrong with a parameter, in words for people.

use serde_yaml::Value;

use super::hints;
use crate::engine::{Fault, FoundValue};

/// A message and what to do.
pub(crate) struct Sentence {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// Says that `parameter` of `kind` can't be read. `allowed` says in words what may stand there, as the schema has it.
pub(crate) fn describe(
    parameter: &str,
    kind: &str,
    fault: &Fault,
    allowed: &dyn Fn() -> Option<String>,
) -> Sentence {
    let subject = if parameter.is_empty() {
        format!("`{kind}`")
    } else {
        format!("`{parameter}` of `{kind}`")
    };
    let (message, hint) = match fault {
        Fault::Unfit { found, expected } => {
            let message = format!("{subject} must be {}, not {found}", expectation(expected));
            (message, form(parameter, expected, found))
        }
        Fault::Word { found, known } => {
            let message = format!(
                "{subject} must be {}, not `{found}`",
                hints::either(known.iter().copied())
            );
            (message, hints::word(parameter, found, known))
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
        // serde's own words for a value that is none of several types.
        Fault::Other(told) if told.contains("did not match any variant") => match allowed() {
            Some(allowed) => (format!("{subject} must be {allowed}"), None),
            None => (format!("{subject} is of a type that does not fit"), None),
        },
        Fault::Other(told) => (format!("{subject} is wrong: {told}"), None),
    };
    Sentence { message, hint }
}

/// How a value is written that has another form than it should.
fn form(parameter: &str, expected: &str, found: &FoundValue) -> Option<String> {
    let number = matches!(expected, "f64" | "f32") || expected.starts_with(['u', 'i']);
    let name = parameter.rsplit('.').next().unwrap_or(parameter);
    match found {
        FoundValue::Text(text) if expected == "a boolean" => {
            let meant = match text.to_lowercase().as_str() {
                "yes" | "y" | "on" | "true" | "1" => "true",
                "no" | "n" | "off" | "false" | "0" | "none" => "false",
                _ => return None,
            };
            Some(format!(
                "write `{name}: {meant}` without quotes; `{text}` is a text in YAML 1.2"
            ))
        }
        FoundValue::Text(text) if expected == "a sequence" => {
            Some(format!("write a list of one: `{name}: [{text}]`"))
        }
        FoundValue::Text(_) if number => {
            Some("write the number without quotes and without a unit".to_owned())
        }
        FoundValue::Nothing => Some(format!(
            "write a value behind `{name}:`, or leave the key out for the default"
        )),
        _ => None,
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
