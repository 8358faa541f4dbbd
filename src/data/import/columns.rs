//! The union of the columns of several files: by name, each with a type for the values of all files.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow_array::builder::StringBuilder;
use arrow_array::{ArrayRef, RecordBatch, new_null_array};
use arrow_cast::cast;
use arrow_schema::{DataType, Field, SchemaRef};
use rayon::prelude::*;

use super::source::Source;
use crate::data::cell::{Cell, is_json, json_field};
use crate::data::json::BROKEN;

/// The type of a column in the union.
#[derive(Debug, Clone, PartialEq)]
enum Type {
    Null,
    Text,
    Json,
    Plain(DataType),
    /// Bytes, which no stage can use.
    Bytes,
}

impl Type {
    fn from_field(field: &Field) -> Self {
        if is_json(field) {
            return Self::Json;
        }
        match field.data_type() {
            DataType::Null => Self::Null,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Self::Text,
            DataType::Dictionary(_, values) => {
                Self::from_field(&Field::new("", values.as_ref().clone(), true))
            }
            DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32 => Self::Plain(DataType::Int64),
            DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
            | DataType::FixedSizeBinary(_) => Self::Bytes,
            nested if nested.is_nested() => {
                if holds_bytes(nested) {
                    Self::Bytes
                } else {
                    Self::Json
                }
            }
            plain => Self::Plain(plain.clone()),
        }
    }

    fn merge(self, other: Self) -> Self {
        let float = |kind: &DataType| {
            matches!(
                kind,
                DataType::Float16 | DataType::Float32 | DataType::Float64
            )
        };
        match (self, other) {
            (Self::Null, kind) | (kind, Self::Null) => kind,
            (a, b) if a == b => a,
            (Self::Bytes, _) | (_, Self::Bytes) => Self::Bytes,
            (Self::Plain(a), Self::Plain(b)) if float(&a) && float(&b) => {
                Self::Plain(DataType::Float64)
            }
            _ => Self::Json,
        }
    }

    fn field(&self, name: &str) -> Field {
        match self {
            // A column without any value has no type, so it becomes text.
            Self::Null | Self::Text | Self::Bytes => Field::new(name, DataType::Utf8, true),
            Self::Json => json_field(name),
            Self::Plain(data_type) => Field::new(name, data_type.clone(), true),
        }
    }
}

fn holds_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => true,
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::FixedSizeList(item, _)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::Map(item, _) => holds_bytes(item.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| holds_bytes(field.data_type())),
        _ => false,
    }
}

/// The columns of all files.
pub(super) struct Union {
    columns: Vec<(String, Type)>,
    /// The columns with NaN or an infinity, each with the file and the row of the first one.
    not_finite: BTreeMap<String, (String, u64)>,
}

impl Union {
    pub(super) fn new(sources: &[Source]) -> Self {
        let mut columns: Vec<(String, Type)> = Vec::new();
        let mut not_finite = BTreeMap::new();
        for source in sources {
            for field in source.schema.fields() {
                if field.name() == BROKEN {
                    continue;
                }
                let found = Type::from_field(field);
                match columns.iter_mut().find(|(name, _)| name == field.name()) {
                    Some((_, known)) => {
                        *known = std::mem::replace(known, Type::Null).merge(found);
                    }
                    None => columns.push((field.name().clone(), found)),
                }
            }
            for (name, row) in &source.not_finite {
                let place = (source.path.display().to_string(), *row);
                not_finite.entry(name.clone()).or_insert(place);
            }
        }
        Self {
            columns,
            not_finite,
        }
    }

    /// The columns' names, in the order in which they first appear.
    pub(super) fn names(&self) -> Vec<String> {
        self.columns.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Whether a column holds bytes, which are left out.
    pub(super) fn is_bytes(&self, name: &str) -> bool {
        self.columns
            .iter()
            .any(|(known, kind)| known == name && *kind == Type::Bytes)
    }

    /// The file and the row in which a column first has NaN or an infinity.
    pub(super) fn not_finite(&self, name: &str) -> Option<&(String, u64)> {
        self.not_finite.get(name)
    }

    /// All columns with NaN or an infinity.
    pub(super) fn all_not_finite(&self) -> impl Iterator<Item = &String> {
        self.not_finite.keys()
    }

    /// The field of a column in the union.
    pub(super) fn field(&self, name: &str) -> Field {
        let found = self.columns.iter().find(|(known, _)| known == name);
        found.map_or(&Type::Null, |(_, kind)| kind).field(name)
    }

    /// A column of a file's batch in the type of the union; null if the file lacks the column.
    pub(super) fn column(&self, batch: &RecordBatch, name: &str) -> Result<ArrayRef> {
        let field = self.field(name);
        let schema: SchemaRef = batch.schema();
        let rows = batch.num_rows();
        let Some((index, theirs)) = schema.column_with_name(name) else {
            return Ok(new_null_array(field.data_type(), rows));
        };
        let column = batch.column(index);
        if *theirs.data_type() == DataType::Null {
            return Ok(new_null_array(field.data_type(), rows));
        }
        if !is_json(&field) {
            if column.data_type() == field.data_type() {
                return Ok(column.clone());
            }
            // The target type can hold all values, so nothing becomes null.
            return cast(column, field.data_type()).with_context(|| {
                format!("the column `{name}` can't be read as {}", field.data_type())
            });
        }
        if is_json(theirs) {
            return Ok(cast(column, &DataType::Utf8)?);
        }
        let texts: Vec<Result<Option<String>>> = (0..rows)
            .into_par_iter()
            .with_min_len(16)
            .map(|row| match Cell::from_arrow(column, row)? {
                Cell::Null => Ok(None),
                value => Ok(Some(serde_json::to_string(&value)?)),
            })
            .collect();
        let mut made = StringBuilder::new();
        for text in texts {
            made.append_option(text.with_context(|| format!("the column `{name}` can't be read"))?);
        }
        Ok(Arc::new(made.finish()))
    }
}
