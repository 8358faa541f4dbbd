//! The values of our columns: how they are computed and serialised.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow_array::ArrayRef;
use arrow_array::builder::{BooleanBuilder, StringBuilder};
use arrow_schema::{DataType, Field};

use crate::data::cell::{Cell, is_json};
use crate::data::messages::text_message;

/// A value of one of our columns.
pub(super) enum Made {
    Null,
    /// An unchanged value.
    Same(Cell),
    /// A converted value.
    Other(Cell),
    /// A value as the JSON that was written.
    Raw(String),
}

impl Made {
    pub(super) fn new(value: Cell, changed: bool) -> Self {
        if changed {
            Self::Other(value)
        } else {
            Self::Same(value)
        }
    }
}

/// Parses a text that holds JSON, as in CSV files. The second result says whether it was such a text.
pub(super) fn unpacked(value: Cell, name: &str) -> Result<(Cell, bool)> {
    match value {
        Cell::Text(text) => {
            let value =
                Cell::parse(&text).with_context(|| format!("`{name}` is text that is no JSON"))?;
            Ok((value, true))
        }
        value => Ok((value, false)),
    }
}

/// The messages of Alpaca's `history`, pairs of questions and answers, followed by the prompt.
pub(super) fn turns(history: Cell, prompt: String) -> Result<Cell> {
    let mut made = Vec::new();
    let pairs = match history {
        Cell::Null => Vec::new(),
        Cell::List(pairs) => pairs,
        other => bail!("`history` is {}: expected a list of pairs", other.noun()),
    };
    for (number, pair) in (1..).zip(pairs) {
        match pair {
            Cell::List(pair) => match <[Cell; 2]>::try_from(pair) {
                Ok([Cell::Text(asked), Cell::Text(answered)]) => {
                    made.push(text_message("user", asked));
                    made.push(text_message("assistant", answered));
                }
                _ => bail!("pair {number} of `history` is no pair of texts"),
            },
            other => bail!(
                "pair {number} of `history` is {}: expected two texts",
                other.noun()
            ),
        }
    }
    made.push(text_message("user", prompt));
    Ok(Cell::List(made))
}

/// Builds a column of values, which must fit its field.
pub(super) fn build(field: &Field, cells: Vec<Made>) -> ArrayRef {
    if *field.data_type() == DataType::Boolean {
        let mut made = BooleanBuilder::with_capacity(cells.len());
        for cell in cells {
            made.append_option(match cell {
                Made::Same(Cell::Bool(value)) | Made::Other(Cell::Bool(value)) => Some(value),
                _ => None,
            });
        }
        return Arc::new(made.finish());
    }
    let json = is_json(field);
    let mut made = StringBuilder::new();
    for cell in cells {
        match cell {
            Made::Null => made.append_null(),
            Made::Raw(text) => made.append_value(text),
            Made::Same(Cell::Text(text)) | Made::Other(Cell::Text(text)) if !json => {
                made.append_value(text);
            }
            // Our values can always be serialised.
            Made::Same(value) | Made::Other(value) => {
                made.append_option(serde_json::to_string(&value).ok());
            }
        }
    }
    Arc::new(made.finish())
}
