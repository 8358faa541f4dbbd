//! A look at a folder of splits: what is in it, and its first rows.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::cell::{Cell, is_json};
use super::table::{Split, splits};

/// What a folder of splits holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The splits, by name.
    pub splits: Vec<SplitSummary>,
}

/// What one split holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SplitSummary {
    /// The split's name.
    pub name: String,
    /// The number of rows.
    pub rows: usize,
    /// The columns with their Arrow types.
    pub columns: Vec<(String, String)>,
}

/// Looks at all splits of `folder`; reads only the files' footers.
pub fn summary(folder: &Path) -> Result<Summary> {
    let splits: Result<_> = splits(folder)?
        .into_iter()
        .map(|(name, files)| {
            let split = Split::of_files(&name, files)?;
            let fields = split.schema().fields();
            Ok(SplitSummary {
                rows: split.rows(),
                columns: fields
                    .iter()
                    .map(|field| {
                        let data_type = if is_json(field) {
                            "JSON".to_owned()
                        } else {
                            field.data_type().to_string()
                        };
                        (field.name().clone(), data_type)
                    })
                    .collect(),
                name,
            })
        })
        .collect();
    Ok(Summary { splits: splits? })
}

/// The first `count` rows of a split as JSON objects.
pub fn head(folder: &Path, split: &str, count: usize) -> Result<Vec<serde_json::Value>> {
    let split = Split::open(folder, split)?;
    let mut rows = Vec::new();
    for batch in split.batches(count.clamp(1, 1024)) {
        let batch = batch?;
        for row in 0..batch.num_rows() {
            if rows.len() == count {
                return Ok(rows);
            }
            let schema = batch.schema();
            let entries: Result<Vec<_>> = schema
                .fields()
                .iter()
                .zip(batch.columns())
                .map(|(field, column)| {
                    Ok((field.name().clone(), Cell::of_column(field, column, row)?))
                })
                .collect();
            rows.push(Cell::Map(entries?).to_json()?);
        }
    }
    Ok(rows)
}
