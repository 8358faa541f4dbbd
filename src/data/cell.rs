//! One value of a table as a tree, for conversions between JSON and Arrow. Unlike `serde_json::Value` it always keeps the order of keys,
//! whatever features other crates enable: a chat template may print a message, so the order can affect a result.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Result, anyhow, bail};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, StructArray};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::size::MOST_FIELDS;

/// A value of any type a row may hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Cell {
    /// Nothing.
    #[default]
    Null,
    /// True or false.
    Bool(bool),
    /// An integer of up to 38 digits.
    Int(i128),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
    /// Values in order.
    List(Vec<Cell>),
    /// Named values in their order.
    Map(Vec<(String, Cell)>),
}

impl Cell {
    /// The value under `key`, when this is a map that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Map(entries) => entries
                .iter()
                .find_map(|(name, value)| (name == key).then_some(value)),
            _ => None,
        }
    }

    /// A noun for the kind of value, for messages.
    pub fn noun(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "an object",
        }
    }

    /// Converts the value to JSON.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::to_value(self)?)
    }

    /// The value at `row` of an Arrow array. Types without a counterpart (dates, decimals, bytes) become text.
    pub fn from_arrow(array: &dyn Array, row: usize) -> Result<Self> {
        if row >= array.len() {
            bail!(
                "row {row} is outside of the {} rows of a column",
                array.len()
            );
        }
        if array.is_null(row) {
            return Ok(Self::Null);
        }
        Ok(match array.data_type() {
            DataType::Null => Self::Null,
            DataType::Boolean => Self::Bool(array.as_boolean().value(row)),
            DataType::Int8 => Self::Int(array.as_primitive::<Int8Type>().value(row).into()),
            DataType::Int16 => Self::Int(array.as_primitive::<Int16Type>().value(row).into()),
            DataType::Int32 => Self::Int(array.as_primitive::<Int32Type>().value(row).into()),
            DataType::Int64 => Self::Int(array.as_primitive::<Int64Type>().value(row).into()),
            DataType::UInt8 => Self::Int(array.as_primitive::<UInt8Type>().value(row).into()),
            DataType::UInt16 => Self::Int(array.as_primitive::<UInt16Type>().value(row).into()),
            DataType::UInt32 => Self::Int(array.as_primitive::<UInt32Type>().value(row).into()),
            DataType::UInt64 => Self::Int(array.as_primitive::<UInt64Type>().value(row).into()),
            DataType::Float32 => Self::Float(array.as_primitive::<Float32Type>().value(row).into()),
            DataType::Float64 => Self::Float(array.as_primitive::<Float64Type>().value(row)),
            DataType::Utf8 => Self::Text(array.as_string::<i32>().value(row).to_owned()),
            DataType::LargeUtf8 => Self::Text(array.as_string::<i64>().value(row).to_owned()),
            DataType::Utf8View => Self::Text(array.as_string_view().value(row).to_owned()),
            DataType::List(item) => Self::list(item, &array.as_list::<i32>().value(row))?,
            DataType::LargeList(item) => Self::list(item, &array.as_list::<i64>().value(row))?,
            DataType::FixedSizeList(item, _) => {
                Self::list(item, &array.as_fixed_size_list().value(row))?
            }
            DataType::Struct(_) => Self::map(array.as_struct(), row)?,
            DataType::Dictionary(..) => {
                let dictionary = array
                    .as_any_dictionary_opt()
                    .ok_or_else(|| anyhow!("a dictionary column could not be read"))?;
                let key = dictionary.normalized_keys().get(row).copied().unwrap_or(0);
                Self::from_arrow(dictionary.values(), key)?
            }
            _ => {
                let options = FormatOptions::default();
                let formatter = ArrayFormatter::try_new(array, &options)?;
                Self::Text(formatter.value(row).try_to_string()?)
            }
        })
    }

    /// The value at `row` of a column. Text of a column that is marked as JSON is parsed.
    pub fn of_column(field: &Field, array: &dyn Array, row: usize) -> Result<Self> {
        match Self::from_arrow(array, row)? {
            Self::Text(text) if is_json(field) => Self::parse(&text),
            value => Ok(value),
        }
    }

    /// Parses JSON. Integers of up to 38 digits keep all their digits.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Self = serde_json::from_str(text)
            .map_err(|error| anyhow!("it is no JSON that can be read: {}", reason(&error)))?;
        if has_long_number(text.as_bytes()) || has_minus_zero(text.as_bytes()) {
            return exact(serde_json::from_str(text)?);
        }
        Ok(value)
    }

    fn list(item: &Field, items: &ArrayRef) -> Result<Self> {
        let items: Result<_> = (0..items.len())
            .map(|row| Self::of_column(item, items, row))
            .collect();
        items.map(Self::List)
    }

    /// A map without the fields that are null. Parquet and Arrow give all objects of a column the same fields, and those that were never
    /// written must not appear.
    fn map(array: &StructArray, row: usize) -> Result<Self> {
        let columns = array.fields().iter().zip(array.columns());
        let written = columns
            .filter(|(_, column)| !column.is_null(row) && *column.data_type() != DataType::Null);
        let entries: Result<_> = written
            .map(|(field, column)| Ok((field.name().clone(), Self::of_column(field, column, row)?)))
            .collect();
        entries.map(Self::Map)
    }
}

/// The key of a field's metadata under which Arrow and Parquet mark text as JSON.
const EXTENSION: &str = "ARROW:extension:name";
const JSON: &str = "arrow.json";

/// Whether a column's texts are JSON.
pub fn is_json(field: &Field) -> bool {
    field
        .metadata()
        .get(EXTENSION)
        .is_some_and(|name| name == JSON)
}

/// A field for JSON, as `datasets` writes values of several types.
pub fn json_field(name: &str) -> Field {
    let mark = HashMap::from([
        (EXTENSION.to_owned(), JSON.to_owned()),
        ("ARROW:extension:metadata".to_owned(), String::new()),
    ]);
    Field::new(name, DataType::Utf8, true).with_metadata(mark)
}

/// What is wrong with a JSON text, without the position.
pub(super) fn reason(error: &serde_json::Error) -> String {
    const WORDS: &[(&str, &str)] = &[
        ("EOF while parsing a string", "it ends inside a text"),
        ("EOF while parsing an object", "it ends inside an object"),
        ("EOF while parsing a list", "it ends inside a list"),
        ("EOF while parsing", "it ends where a value should be"),
        ("expected value", "no value of JSON stands there"),
        ("expected ident", "no value of JSON stands there"),
        ("trailing characters", "something follows behind the value"),
        ("trailing comma", "a comma stands before the end"),
        (
            "key must be a string",
            "a key has to be a text in double quotes",
        ),
        (
            "control character",
            "a line's end or another control character stands inside a text",
        ),
        (
            "invalid escape",
            "a backslash stands before a character that has no meaning there",
        ),
        (
            "lone leading surrogate",
            "half of a pair of surrogates stands alone",
        ),
        (
            "unexpected end of hex escape",
            "half of a pair of surrogates stands alone",
        ),
        (
            "invalid unicode code point",
            "a character stands there that Unicode doesn't have",
        ),
        ("recursion limit exceeded", "it is nested too deeply"),
        ("invalid number", "a number is not written as in JSON"),
        ("expected `:`", "a colon is missing behind a key"),
        (
            "expected `,` or `}`",
            "a comma or a closing brace is missing",
        ),
        (
            "expected `,` or `]`",
            "a comma or a closing bracket is missing",
        ),
    ];
    let text = error.to_string();
    let text = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(reason, _)| reason);
    let known = WORDS.iter().find(|(theirs, _)| text.starts_with(theirs));
    known.map_or(text, |(_, words)| words).to_owned()
}

/// Whether there are as many consecutive digits as in a number of more than 64 bits.
fn has_long_number(text: &[u8]) -> bool {
    text.chunk_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit())
        .any(|run| run.len() >= 19)
}

/// Whether there may be a `-0`, which is the integer 0 in Python and a float in serde.
fn has_minus_zero(text: &[u8]) -> bool {
    text.windows(2).enumerate().any(|(at, pair)| {
        let before = at.checked_sub(1).and_then(|at| text.get(at));
        let after = text.get(at + 2);
        pair == b"-0"
            && before.is_none_or(|byte| b":[, \n\r\t".contains(byte))
            && after.is_none_or(|byte| b",]} \n\r\t".contains(byte))
    })
}

/// Parses a value level by level, because serde converts every long number to a float. The text has been parsed before, so it is not
/// nested too deeply.
fn exact(raw: &RawValue) -> Result<Cell> {
    let text = raw.get();
    Ok(match text.as_bytes().first() {
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text)?;
            Cell::List(items.into_iter().map(exact).collect::<Result<_>>()?)
        }
        Some(b'{') => {
            let Entries(entries) = serde_json::from_str(text)?;
            let entries = entries
                .into_iter()
                .map(|(name, value)| Ok((name, exact(&value)?)));
            Cell::Map(entries.collect::<Result<_>>()?)
        }
        Some(b'-' | b'0'..=b'9') if !text.contains(['.', 'e', 'E']) => {
            let number = text.parse().map_err(|_| {
                anyhow!(
                    "the number {text:.60} has more digits than can be kept; hint: write it as text"
                )
            })?;
            Cell::Int(number)
        }
        _ => serde_json::from_str(text)?,
    })
}

/// The entries of an object, each value as it was written. As in Python, the last of two equal keys counts, at the position of the first.
pub(super) struct Entries(pub(super) Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Entries, A::Error> {
                entries(access).map(Entries)
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// The entries of a map. The last of two equal keys counts, at the position of the first.
pub(super) fn entries<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    mut access: A,
) -> Result<Vec<(String, T)>, A::Error> {
    let mut entries: Vec<(String, T)> = Vec::new();
    while let Some((name, value)) = access.next_entry::<String, T>()? {
        if entries.len() == MOST_FIELDS {
            return Err(A::Error::custom(format_args!(
                "an object has more than {MOST_FIELDS} keys"
            )));
        }
        match entries.iter_mut().find(|(earlier, _)| *earlier == name) {
            Some(entry) => entry.1 = value,
            None => entries.push((name, value)),
        }
    }
    Ok(entries)
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => match i64::try_from(*value) {
                Ok(value) => serializer.serialize_i64(value),
                Err(_) => serializer.serialize_i128(*value),
            },
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Text(value) => serializer.serialize_str(value),
            Self::List(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    list.serialize_element(item)?;
                }
                list.end()
            }
            Self::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (name, value) in entries {
                    map.serialize_entry(name, value)?;
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

struct CellVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Cell, E> {
        Ok(Cell::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Cell, E> {
        Ok(Cell::Int(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Cell, E> {
        Ok(Cell::Int(value.into()))
    }
    fn visit_i128<E>(self, value: i128) -> Result<Cell, E> {
        Ok(Cell::Int(value))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Cell, E> {
        Ok(Cell::Float(value))
    }
    fn visit_str<E>(self, value: &str) -> Result<Cell, E> {
        Ok(Cell::Text(value.to_owned()))
    }
    fn visit_string<E>(self, value: String) -> Result<Cell, E> {
        Ok(Cell::Text(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Cell, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Cell::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Cell, A::Error> {
        entries(access).map(Cell::Map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_the_order_of_keys_and_the_last_of_two_equal_ones() {
        let cell: Cell =
            serde_json::from_str(r#"{"z": 1, "a": [true, null, 1.5], "z": "é"}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&cell).unwrap(),
            r#"{"z":"é","a":[true,null,1.5]}"#
        );
    }

    #[test]
    fn whole_numbers_of_any_usual_length_are_exact() {
        for number in [
            "0",
            "-7",
            "9223372036854775808",
            "18446744073709551616",
            "-123456789012345678901234567890",
        ] {
            let text = format!(r#"{{"a":[{number},1.0,1e5],"b":"18446744073709551616"}}"#);
            let cell = Cell::parse(&text).unwrap();
            let expected = text.replace("1e5", "100000.0");
            assert_eq!(serde_json::to_string(&cell).unwrap(), expected);
        }
        let zeros = Cell::parse(r#"[-0, -0.0, {"a": -0}, "-0, x"]"#).unwrap();
        assert_eq!(
            serde_json::to_string(&zeros).unwrap(),
            r#"[0,-0.0,{"a":0},"-0, x"]"#
        );
        let digits = "9".repeat(45);
        let error = Cell::parse(&format!("[{digits}]")).unwrap_err().to_string();
        assert!(error.contains("more digits"), "{error}");
    }

    #[test]
    fn text_of_a_json_column_is_parsed_and_other_text_is_not() {
        let array = arrow_array::StringArray::from(vec![r#"{"a": 1}"#, r#""pear""#]);
        let cell = |field: &Field, row| Cell::of_column(field, &array, row).unwrap();
        assert_eq!(cell(&json_field("x"), 1), Cell::Text("pear".into()));
        assert_eq!(cell(&json_field("x"), 0).get("a"), Some(&Cell::Int(1)));
        let text = Field::new("x", DataType::Utf8, true);
        assert_eq!(cell(&text, 1), Cell::Text(r#""pear""#.into()));
    }
}
