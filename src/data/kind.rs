//! Column types found by looking at values, and Arrow arrays built from values of such a type.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, ListArray, NullArray, StringArray,
    StructArray,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields};

use super::cell::Cell;

/// The type that all values of a column share.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kind {
    /// Only null so far.
    Null,
    Bool,
    Int,
    Float,
    Text,
    List(Box<Kind>),
    Map(Vec<(String, Kind)>),
    /// Values that don't agree, kept as JSON text.
    Json,
}

impl Kind {
    pub(super) fn of(cell: &Cell) -> Self {
        match cell {
            Cell::Null => Self::Null,
            Cell::Bool(_) => Self::Bool,
            Cell::Int(_) => Self::Int,
            Cell::Float(_) => Self::Float,
            Cell::Text(_) => Self::Text,
            Cell::List(items) => {
                let kind = items
                    .iter()
                    .fold(Self::Null, |kind, item| kind.merge(Self::of(item)));
                Self::List(Box::new(kind))
            }
            Cell::Map(entries) => Self::Map(
                entries
                    .iter()
                    .map(|(name, value)| (name.clone(), Self::of(value)))
                    .collect(),
            ),
        }
    }

    /// How many columns it takes, nested ones included.
    pub(super) fn columns(&self) -> usize {
        match self {
            Self::List(item) => item.columns(),
            Self::Map(entries) => entries.iter().map(|(_, kind)| kind.columns()).sum(),
            _ => 1,
        }
    }

    /// The noun for messages, as [`Cell::noun`] has it for a value of this type.
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "a boolean",
            Self::Int | Self::Float => "a number",
            Self::Text | Self::Json => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "an object",
        }
    }

    /// The type of a column that holds both; [`Kind::Json`] when nothing closer fits.
    pub(super) fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (Self::Int, Self::Float) | (Self::Float, Self::Int) => Self::Float,
            (Self::List(a), Self::List(b)) => Self::List(Box::new(a.merge(*b))),
            (Self::Map(mut a), Self::Map(b)) => {
                for (place, (name, kind)) in b.into_iter().enumerate() {
                    // Most objects have their keys in one order.
                    let same = a.get(place).is_some_and(|(earlier, _)| *earlier == name);
                    let found = if same {
                        Some(place)
                    } else {
                        a.iter().position(|(earlier, _)| *earlier == name)
                    };
                    match found.and_then(|place| a.get_mut(place)) {
                        Some(entry) => {
                            let earlier = std::mem::replace(&mut entry.1, Self::Null);
                            entry.1 = earlier.merge(kind);
                        }
                        None => a.push((name, kind)),
                    }
                }
                Self::Map(a)
            }
            (a, b) if a == b => a,
            _ => Self::Json,
        }
    }

    /// Whether this is a list of messages (objects with a `role`), or may become one.
    pub(super) fn is_messages(&self) -> bool {
        match self {
            Self::List(item) => match item.as_ref() {
                Self::Null => true,
                Self::Map(entries) => entries.iter().any(|(name, _)| name == "role"),
                _ => false,
            },
            _ => false,
        }
    }

    pub(super) fn data_type(&self) -> DataType {
        match self {
            Self::Null => DataType::Null,
            Self::Bool => DataType::Boolean,
            Self::Int => DataType::Int64,
            Self::Float => DataType::Float64,
            Self::Text | Self::Json => DataType::Utf8,
            Self::List(item) => DataType::List(item_field(item)),
            // Parquet has no type for an object without fields.
            Self::Map(entries) if entries.is_empty() => DataType::Utf8,
            Self::Map(entries) => DataType::Struct(fields(entries)),
        }
    }

    /// An array of this type. Values that don't fit become null, which can't happen when the type was merged from them.
    pub(super) fn build(&self, cells: &[&Cell]) -> Result<ArrayRef> {
        Ok(match self {
            Self::Null => Arc::new(NullArray::new(cells.len())),
            Self::Bool => {
                let value = |cell: &&Cell| match cell {
                    Cell::Bool(value) => Some(*value),
                    _ => None,
                };
                Arc::new(cells.iter().map(value).collect::<BooleanArray>())
            }
            Self::Int => {
                let value = |cell: &&Cell| match cell {
                    Cell::Int(value) => Some(*value),
                    _ => None,
                };
                Arc::new(cells.iter().map(value).collect::<Int64Array>())
            }
            Self::Float => {
                let value = |cell: &&Cell| match cell {
                    Cell::Float(value) => Some(*value),
                    Cell::Int(value) => Some(*value as f64),
                    _ => None,
                };
                Arc::new(cells.iter().map(value).collect::<Float64Array>())
            }
            Self::Text => {
                let texts = cells.iter().map(|cell| match cell {
                    Cell::Text(value) => Some(value.as_str()),
                    _ => None,
                });
                Arc::new(texts.collect::<StringArray>())
            }
            Self::Json => json_texts(cells)?,
            Self::Map(entries) if entries.is_empty() => json_texts(cells)?,
            Self::List(item) => {
                let items = |cell: &Cell| match cell {
                    Cell::List(items) => items.len(),
                    _ => 0,
                };
                let offsets = OffsetBuffer::from_lengths(cells.iter().map(|cell| items(cell)));
                let flat: Vec<&Cell> = cells
                    .iter()
                    .flat_map(|cell| match cell {
                        Cell::List(items) => items.as_slice(),
                        _ => &[],
                    })
                    .collect();
                let nulls = nulls(cells, |cell| matches!(cell, Cell::List(_)));
                Arc::new(ListArray::try_new(
                    item_field(item),
                    offsets,
                    item.build(&flat)?,
                    nulls,
                )?)
            }
            Self::Map(entries) => {
                let rows: Vec<Lookup<'_>> = cells.iter().map(|cell| Lookup::of(cell)).collect();
                let columns: Result<Vec<ArrayRef>> = entries
                    .iter()
                    .map(|(name, kind)| {
                        let values: Vec<&Cell> = rows.iter().map(|row| row.get(name)).collect();
                        kind.build(&values)
                    })
                    .collect();
                let nulls = nulls(cells, |cell| matches!(cell, Cell::Map(_)));
                Arc::new(StructArray::try_new(fields(entries), columns?, nulls)?)
            }
        })
    }
}

/// The fields of a value, to be looked up one after the other.
pub(super) enum Lookup<'a> {
    Few(&'a Cell),
    Many(HashMap<&'a str, &'a Cell>),
}

impl<'a> Lookup<'a> {
    pub(super) fn of(cell: &'a Cell) -> Self {
        match cell {
            Cell::Map(entries) if entries.len() > 32 => {
                let entries = entries.iter();
                Self::Many(
                    entries
                        .map(|(name, value)| (name.as_str(), value))
                        .collect(),
                )
            }
            cell => Self::Few(cell),
        }
    }

    /// The field called `name`, or null.
    pub(super) fn get(&self, name: &str) -> &'a Cell {
        let found = match self {
            Self::Few(cell) => cell.get(name),
            Self::Many(entries) => entries.get(name).copied(),
        };
        found.unwrap_or(&Cell::Null)
    }
}

fn json_texts(cells: &[&Cell]) -> Result<ArrayRef> {
    let texts: Result<Vec<Option<String>>> = cells
        .iter()
        .map(|cell| match cell {
            Cell::Null => Ok(None),
            Cell::Text(text) => Ok(Some(text.clone())),
            other => Ok(Some(serde_json::to_string(other)?)),
        })
        .collect();
    Ok(Arc::new(StringArray::from(texts?)))
}

fn item_field(item: &Kind) -> Arc<Field> {
    Arc::new(Field::new_list_field(item.data_type(), true))
}

fn fields(entries: &[(String, Kind)]) -> Fields {
    entries
        .iter()
        .map(|(name, kind)| Field::new(name, kind.data_type(), true))
        .collect()
}

fn nulls(cells: &[&Cell], present: impl Fn(&Cell) -> bool) -> Option<NullBuffer> {
    let valid: Vec<bool> = cells.iter().map(|cell| present(cell)).collect();
    valid.contains(&false).then(|| NullBuffer::from(valid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(texts: &[&str]) -> Vec<Cell> {
        texts
            .iter()
            .map(|text| serde_json::from_str(text).unwrap())
            .collect()
    }

    #[test]
    fn values_survive_the_way_through_arrow() {
        let rows = cells(&[
            r#"{"a": [1, 2.5], "b": {"c": "x"}, "d": [{"role": "user", "content": "é"}]}"#,
            r#"{"a": null, "b": {"c": null, "e": true}, "d": []}"#,
        ]);
        let kind = rows
            .iter()
            .fold(Kind::Null, |kind, row| kind.merge(Kind::of(row)));
        let array = kind.build(&rows.iter().collect::<Vec<_>>()).unwrap();
        let back: Vec<String> = (0..2)
            .map(|row| {
                let cell = Cell::from_arrow(&array, row).unwrap();
                serde_json::to_string(&cell).unwrap()
            })
            .collect();
        assert_eq!(
            back,
            [
                r#"{"a":[1.0,2.5],"b":{"c":"x","e":null},"d":[{"role":"user","content":"é"}]}"#,
                r#"{"a":null,"b":{"c":null,"e":true},"d":[]}"#,
            ]
        );
    }

    #[test]
    fn values_that_do_not_agree_are_kept_as_json_text() {
        let rows = cells(&["1", r#""one""#, r#"{"n": 1}"#]);
        let kind = rows
            .iter()
            .fold(Kind::Null, |kind, row| kind.merge(Kind::of(row)));
        assert_eq!(kind, Kind::Json);
        let array = kind.build(&rows.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(
            Cell::from_arrow(&array, 2).unwrap(),
            Cell::Text(r#"{"n":1}"#.into())
        );
    }

    #[test]
    fn messages_are_lists_of_objects_with_a_role() {
        let kind = |text| Kind::of(&serde_json::from_str(text).unwrap());
        assert!(kind(r#"[{"role": "user", "content": "x"}]"#).is_messages());
        assert!(!kind(r#"[{"from": "human"}]"#).is_messages());
        assert!(!kind(r#"["x"]"#).is_messages());
    }
}
