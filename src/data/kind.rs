//! Column types found by looking at values, and Arrow arrays built from values of such a type. Only plain values have types of
//! their own: whatever has parts, and whatever differs between rows, stays JSON as it was written.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use arrow_array::builder::StringBuilder;
use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, NullArray};
use arrow_schema::{DataType, Field};
use serde_json::value::RawValue;

use super::cell::{json_field, reason};

/// The type that all values of a column share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Only null so far.
    Null,
    Bool,
    Int,
    Float,
    Text,
    /// Lists, objects, and values that don't agree.
    Json,
}

impl Kind {
    pub(super) fn from_value(value: &RawValue) -> Self {
        let text = value.get();
        match text.as_bytes().first() {
            Some(b'n') | None => Self::Null,
            Some(b't' | b'f') => Self::Bool,
            Some(b'"') => Self::Text,
            Some(b'[' | b'{') => Self::Json,
            Some(_) if text.contains(['.', 'e', 'E']) => Self::Float,
            Some(_) if text.parse::<i64>().is_ok() => Self::Int,
            Some(_) => Self::Json,
        }
    }

    /// The type of a column that holds both.
    pub(super) fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (a, b) if a == b => a,
            _ => Self::Json,
        }
    }

    pub(super) fn field(self, name: &str) -> Field {
        let data_type = match self {
            Self::Null => DataType::Null,
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::Json => return json_field(name),
        };
        Field::new(name, data_type, true)
    }

    /// An array of this type; null stands where there is no value. Every value must be of this type or null.
    pub(super) fn build(self, values: &[Option<&RawValue>]) -> Result<ArrayRef> {
        fn present(value: Option<&RawValue>) -> Option<&str> {
            value.map(RawValue::get).filter(|text| *text != "null")
        }
        let texts = values.iter().copied().map(present);
        Ok(match self {
            Self::Null => Arc::new(NullArray::new(values.len())),
            Self::Bool => {
                let values = texts.map(|text| text.map(|text| text == "true"));
                Arc::new(values.collect::<BooleanArray>())
            }
            Self::Int => Arc::new(parsed(texts)?.into_iter().collect::<Int64Array>()),
            Self::Float => {
                let finite = texts.map(|text| text.filter(|text| !is_out_of_range(text)));
                Arc::new(parsed(finite)?.into_iter().collect::<Float64Array>())
            }
            Self::Text => {
                let bytes = texts.clone().flatten().map(str::len).sum();
                let mut column = StringBuilder::with_capacity(values.len(), bytes);
                for text in texts {
                    match text {
                        None => column.append_null(),
                        Some(text) => column.append_value(plain(text)?),
                    }
                }
                Arc::new(column.finish())
            }
            Self::Json => {
                let bytes = texts.clone().flatten().map(str::len).sum();
                let mut column = StringBuilder::with_capacity(values.len(), bytes);
                for text in texts {
                    column.append_option(text.filter(|text| !is_out_of_range(text)));
                }
                Arc::new(column.finish())
            }
        })
    }
}

/// Whether a number is beyond what a float can be.
pub(super) fn is_out_of_range(text: &str) -> bool {
    text.contains(['e', 'E']) && text.parse().is_ok_and(f64::is_infinite)
}

/// The text that a JSON string stands for.
pub(super) fn plain(text: &str) -> Result<std::borrow::Cow<'_, str>> {
    let inner = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .filter(|text| !text.contains('\\'));
    match inner {
        Some(inner) => Ok(inner.into()),
        None => serde_json::from_str::<String>(text)
            .map(Into::into)
            .map_err(|error| anyhow!("a text can't be read: {}", reason(&error))),
    }
}

fn parsed<'a, T: serde::Deserialize<'a>>(
    texts: impl Iterator<Item = Option<&'a str>>,
) -> Result<Vec<Option<T>>> {
    texts
        .map(|text| Ok(text.map(serde_json::from_str).transpose()?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::cell::Cell;
    use super::*;

    fn raw(texts: &[&str]) -> Vec<Box<RawValue>> {
        texts
            .iter()
            .map(|text| RawValue::from_string((*text).to_owned()).unwrap())
            .collect()
    }

    fn kind(values: &[Box<RawValue>]) -> Kind {
        values.iter().fold(Kind::Null, |kind, value| {
            kind.merge(Kind::from_value(value))
        })
    }

    #[test]
    fn values_of_a_column_come_back_as_they_were_written() {
        for (texts, expected) in [
            (vec!["1", "null", "-3"], Kind::Int),
            (vec!["1.5", "1e300"], Kind::Float),
            (vec!["1", "1.0"], Kind::Json),
            (vec!["18446744073709551616"], Kind::Json),
            (vec!["true", "null", "false"], Kind::Bool),
            (vec![r#""a\n\u00e9""#, r#""""#, "null"], Kind::Text),
            (
                vec!["\"pear\"", "[1, 2.5, true]", r#"{"z": {}, "a": null}"#],
                Kind::Json,
            ),
        ] {
            let values = raw(&texts);
            assert_eq!(kind(&values), expected, "{texts:?}");
            let some: Vec<Option<&RawValue>> = values.iter().map(|value| Some(&**value)).collect();
            let array = expected.build(&some).unwrap();
            for (row, text) in texts.iter().enumerate() {
                let cell = Cell::of_column(&expected.field("x"), &array, row).unwrap();
                assert_eq!(cell, Cell::parse(text).unwrap());
            }
        }
    }
}
