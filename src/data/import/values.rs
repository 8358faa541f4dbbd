//! Values of our columns: what they are made of and how they are written.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use arrow_array::ArrayRef;
use arrow_array::builder::{BooleanBuilder, StringBuilder};
use arrow_schema::{DataType, Field};

use crate::data::cell::{Cell, is_json};
use crate::data::messages::text_message;

/// A value of ours.
pub(super) enum Made {
    Null,
    /// As it was.
    Same(Cell),
    /// Written another way.
    Other(Cell),
    /// JSON as it was written.
    Raw(String),
}

impl Made {
    pub(super) fn of(value: Cell, changed: bool) -> Self {
        if changed {
            Self::Other(value)
        } else {
            Self::Same(value)
        }
    }
}

/// The value of a text that holds JSON, as CSV files have it; whether it was one.
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

/// The turns of Alpaca's `history`, pairs of what was asked and answered, and the prompt behind them.
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

/// A column of values, which fit its field.
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
            // Values of ours can always be written.
            Made::Same(value) | Made::Other(value) => {
                made.append_option(serde_json::to_string(&value).ok());
            }
        }
    }
    Arc::new(made.finish())
}
