//! Groups rows, and finds their classes, by the values of columns.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Schema};
use serde_json::Value;

use crate::data::cell::is_json;
use crate::data::table::{BATCH_ROWS, Split};
use crate::engine::{Context, canonical_json};

/// What rows are grouped by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum By {
    /// Each row is its own group.
    Nothing,
    /// The prompt: the column `prompt`, the common beginning of `chosen` and `rejected`, or all `messages` before the last answer.
    Prompt,
    /// The values of columns.
    Columns(Vec<String>),
}

/// The groups of a split's rows.
pub(crate) struct Groups {
    /// The number of each row's group; groups are numbered as they first appear.
    pub(crate) of_row: Vec<usize>,
    pub(crate) sizes: Vec<usize>,
    /// The last row of each group.
    pub(crate) last: Vec<usize>,
    /// A text that describes each group in messages.
    pub(crate) shown: Vec<String>,
}

/// The longest text of a value that is shown.
const SHOWN: usize = 60;

impl Groups {
    /// Groups the rows of a split.
    pub(crate) fn build(split: &Split, by: &By, cx: &Context) -> Result<Self> {
        let mut groups = Self {
            of_row: Vec::with_capacity(split.rows().min(1 << 20)),
            sizes: Vec::new(),
            last: Vec::new(),
            shown: Vec::new(),
        };
        let reads = columns(split.schema(), by)?;
        let mut known: HashMap<[u8; 32], usize> = HashMap::new();
        for batch in split.batches(BATCH_ROWS) {
            let batch = batch?;
            cx.check_cancelled()?;
            let values = Values::new(&batch, &reads)?;
            for row in 0..batch.num_rows() {
                let place = groups.of_row.len();
                let key = match by {
                    By::Nothing => None,
                    By::Prompt if reads.len() == 2 => values.beginning(row),
                    By::Prompt if reads == ["messages"] => values.before_the_answer(row),
                    By::Prompt | By::Columns(_) => Some(values.all(row)?),
                };
                let fresh = groups.sizes.len();
                let group = key.as_ref().map_or(fresh, |key| {
                    *known
                        .entry(blake3::hash(key.as_bytes()).into())
                        .or_insert(fresh)
                });
                if group == fresh {
                    groups.sizes.push(0);
                    groups.last.push(place);
                    let shown = key.as_deref().unwrap_or_default().chars().take(SHOWN);
                    groups.shown.push(shown.collect());
                }
                groups.sizes[group] += 1;
                groups.last[group] = place;
                groups.of_row.push(group);
            }
        }
        Ok(groups)
    }
}

/// The columns that are read: one or more for their values, or `chosen` and `rejected` for what they begin with.
fn columns(schema: &Schema, by: &By) -> Result<Vec<String>> {
    let has = |name: &str| schema.field_with_name(name).is_ok();
    let wanted = match by {
        By::Nothing => return Ok(Vec::new()),
        By::Prompt if has("prompt") => vec!["prompt".to_owned()],
        By::Prompt if !has("chosen") && has("messages") => vec!["messages".to_owned()],
        By::Prompt => vec!["chosen".to_owned(), "rejected".to_owned()],
        By::Columns(columns) => columns.clone(),
    };
    if let Some(missing) = wanted.iter().find(|name| !has(name)) {
        let names: Vec<_> = schema
            .fields()
            .iter()
            .map(|field| format!("`{}`", field.name()))
            .collect();
        bail!("there is no column `{missing}`: found {}", names.join(", "));
    }
    Ok(wanted)
}

/// Columns of a batch, as text.
struct Values<'a> {
    columns: Vec<Column<'a>>,
}

enum Column<'a> {
    Json(&'a ArrayRef),
    Text(&'a ArrayRef),
    Other(ArrayFormatter<'a>, &'a ArrayRef),
}

impl<'a> Values<'a> {
    fn new(batch: &'a RecordBatch, names: &[String]) -> Result<Self> {
        let columns = names.iter().map(|name| {
            let schema = batch.schema_ref();
            let field = schema.field_with_name(name)?;
            let column = batch.column(schema.index_of(name)?);
            Ok(match column.data_type() {
                DataType::Utf8 if is_json(field) => Column::Json(column),
                DataType::Utf8 => Column::Text(column),
                _ => Column::Other(
                    ArrayFormatter::try_new(column.as_ref(), &FormatOptions::default())?,
                    column,
                ),
            })
        });
        Ok(Self {
            columns: columns.collect::<Result<_>>()?,
        })
    }

    /// The values of a row, so that equal texts mean equal values. A single text is itself.
    fn all(&self, row: usize) -> Result<String> {
        let mut texts = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            texts.push(match column {
                Column::Json(array) | Column::Text(array) | Column::Other(_, array)
                    if array.is_null(row) =>
                {
                    "null".to_owned()
                }
                Column::Json(array) => match parsed(array, row)? {
                    Value::String(text) => text,
                    value => canonical_json(&plain(value)),
                },
                Column::Text(array) => array.as_string::<i32>().value(row).to_owned(),
                Column::Other(values, _) => values.value(row).try_to_string()?,
            });
        }
        match <[String; 1]>::try_from(texts) {
            Ok([one]) => Ok(one),
            Err(several) => Ok(canonical_json(&Value::from(several))),
        }
    }

    /// The messages before the last answer of a conversation; none where there are no messages.
    fn before_the_answer(&self, row: usize) -> Option<String> {
        let mut messages = messages(self.columns.first()?, row)?;
        let role = messages.last().and_then(|last| last.get("role"));
        if role.and_then(Value::as_str) == Some("assistant") {
            messages.pop();
        }
        let messages: Vec<Value> = messages.into_iter().map(plain).collect();
        (!messages.is_empty()).then(|| canonical_json(&Value::from(messages)))
    }

    /// The messages that two conversations begin with alike; none where they are texts or have nothing in common.
    fn beginning(&self, row: usize) -> Option<String> {
        let [chosen, rejected] = self.columns.as_slice() else {
            return None;
        };
        let (chosen, rejected) = (messages(chosen, row)?, messages(rejected, row)?);
        let pairs = chosen
            .into_iter()
            .map(plain)
            .zip(rejected.into_iter().map(plain));
        let alike = pairs.take_while(|(left, right)| left == right);
        let alike: Vec<Value> = alike.map(|(left, _)| left).collect();
        (!alike.is_empty()).then(|| canonical_json(&Value::from(alike)))
    }
}

/// The messages of a conversation.
fn messages(column: &Column<'_>, row: usize) -> Option<Vec<Value>> {
    match column {
        Column::Json(array) if !array.is_null(row) => match parsed(array, row).ok()? {
            Value::Array(messages) => Some(messages),
            _ => None,
        },
        _ => None,
    }
}

fn parsed(array: &ArrayRef, row: usize) -> Result<Value> {
    let text = array.as_string::<i32>().value(row);
    serde_json::from_str(text).context("a column of JSON holds something else")
}

/// A value with contents that are only parts of text as that text.
fn plain(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(plain).collect()),
        Value::Object(mut message) => {
            let text = message
                .get("content")
                .and_then(Value::as_array)
                .and_then(|parts| {
                    let texts = parts.iter().map(|part| {
                        let is_text = part.get("type").and_then(Value::as_str) == Some("text");
                        part.get("text").and_then(Value::as_str).filter(|_| is_text)
                    });
                    texts.collect::<Option<String>>()
                });
            if let Some(text) = text {
                message.insert("content".to_owned(), Value::String(text));
            }
            Value::Object(message)
        }
        other => other,
    }
}
