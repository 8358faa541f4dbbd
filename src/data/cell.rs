//! One value of a table as a tree, between JSON and Arrow. Unlike `serde_json::Value` it keeps the order of keys whatever
//! features other crates turn on: a chat template may print a message, so the order can reach a result.

use std::fmt;

use anyhow::{Result, anyhow, bail};
use arrow::array::{Array, ArrayRef, AsArray, StructArray};
use arrow::datatypes::{
    DataType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::size::MOST_FIELDS;

/// A value of any type a row may hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Cell {
    /// Nothing.
    #[default]
    Null,
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
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

    /// About how many bytes it takes in memory.
    pub(super) fn bytes(&self) -> usize {
        let own = size_of::<Self>();
        match self {
            Self::Text(text) => own + text.len(),
            Self::List(items) => own + items.iter().map(Self::bytes).sum::<usize>(),
            Self::Map(entries) => {
                let entry = |(name, value): &(String, Self)| name.len() + 24 + value.bytes();
                own + entries.iter().map(entry).sum::<usize>()
            }
            _ => own,
        }
    }

    /// The noun for messages.
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

    /// The same value without keys that hold null: Parquet gives every message of a list the same fields, and a chat template
    /// must not see those that its author never wrote.
    #[must_use]
    pub fn without_nulls(self) -> Self {
        match self {
            Self::List(items) => Self::List(items.into_iter().map(Self::without_nulls).collect()),
            Self::Map(entries) => Self::Map(
                entries
                    .into_iter()
                    .filter(|(_, value)| *value != Self::Null)
                    .map(|(name, value)| (name, value.without_nulls()))
                    .collect(),
            ),
            other => other,
        }
    }

    /// As JSON.
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
            DataType::Int64 => Self::Int(array.as_primitive::<Int64Type>().value(row)),
            DataType::UInt8 => Self::Int(array.as_primitive::<UInt8Type>().value(row).into()),
            DataType::UInt16 => Self::Int(array.as_primitive::<UInt16Type>().value(row).into()),
            DataType::UInt32 => Self::Int(array.as_primitive::<UInt32Type>().value(row).into()),
            DataType::UInt64 => {
                let value = array.as_primitive::<UInt64Type>().value(row);
                i64::try_from(value).map_or(Self::Float(value as f64), Self::Int)
            }
            DataType::Float32 => Self::Float(array.as_primitive::<Float32Type>().value(row).into()),
            DataType::Float64 => Self::Float(array.as_primitive::<Float64Type>().value(row)),
            DataType::Utf8 => Self::Text(array.as_string::<i32>().value(row).to_owned()),
            DataType::LargeUtf8 => Self::Text(array.as_string::<i64>().value(row).to_owned()),
            DataType::Utf8View => Self::Text(array.as_string_view().value(row).to_owned()),
            DataType::List(_) => Self::list(&array.as_list::<i32>().value(row))?,
            DataType::LargeList(_) => Self::list(&array.as_list::<i64>().value(row))?,
            DataType::FixedSizeList(..) => Self::list(&array.as_fixed_size_list().value(row))?,
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

    fn list(items: &ArrayRef) -> Result<Self> {
        let items: Result<_> = (0..items.len())
            .map(|row| Self::from_arrow(items, row))
            .collect();
        items.map(Self::List)
    }

    fn map(array: &StructArray, row: usize) -> Result<Self> {
        let columns = array.fields().iter().zip(array.columns());
        let entries: Result<_> = columns
            .map(|(field, column)| Ok((field.name().clone(), Self::from_arrow(column, row)?)))
            .collect();
        entries.map(Self::Map)
    }
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
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
        Ok(Cell::Int(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Cell, E> {
        Ok(i64::try_from(value).map_or(Cell::Float(value as f64), Cell::Int))
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
    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Cell, A::Error> {
        let mut entries: Vec<(String, Cell)> = Vec::new();
        while let Some((name, value)) = access.next_entry::<String, Cell>()? {
            if entries.len() == MOST_FIELDS {
                return Err(A::Error::custom(format_args!(
                    "an object has more than {MOST_FIELDS} keys"
                )));
            }
            // As in Python, the last of two equal keys counts and keeps the first one's place.
            match entries.iter_mut().find(|(earlier, _)| *earlier == name) {
                Some(entry) => entry.1 = value,
                None => entries.push((name, value)),
            }
        }
        Ok(Cell::Map(entries))
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
    fn fields_that_hold_null_disappear_at_every_depth() {
        let cell: Cell = serde_json::from_str(r#"[{"role": "user", "name": null}]"#).unwrap();
        let expected: Cell = serde_json::from_str(r#"[{"role": "user"}]"#).unwrap();
        assert_eq!(cell.without_nulls(), expected);
    }
}
