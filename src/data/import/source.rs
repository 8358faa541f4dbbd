//! One file of rows, opened: its columns, and its rows in batches as often as they are asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ImportOptions;
use crate::data::table::{BATCH_ROWS, Split, split_of};
use crate::data::{csv, json};

/// A file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// One JSON list of objects.
    Json,
    /// Comma-separated values with a header line.
    Csv,
}

impl Format {
    /// The format that a file's extension stands for.
    pub fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_lowercase();
        match extension.as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            _ => None,
        }
    }
}

/// The split that a file's name stands for: `train` for `train.jsonl` and for `train-00000-of-00002.parquet`.
pub fn split_of_file(path: &Path) -> String {
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default();
    split_of(&stem).0.to_owned()
}

type Batches<'a> = Box<dyn Iterator<Item = Result<RecordBatch>> + 'a>;

/// One file: its columns, and its rows as often as they are asked for.
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) schema: SchemaRef,
    /// Columns that hold NaN or an infinity where JSON has no such thing, and the first row that does.
    pub(super) not_finite: BTreeMap<String, u64>,
    batches: Box<dyn Fn() -> Result<Batches<'static>> + Sync>,
}

impl Source {
    /// The rows from the first to the last.
    pub(super) fn batches(&self) -> Batches<'static> {
        let path = self.path.clone();
        let named = move || format!("could not import `{}`", path.display());
        match (self.batches)() {
            Ok(batches) => Box::new(batches.map(move |batch| batch.with_context(&named))),
            Err(error) => Box::new(std::iter::once(Err(error.context(named())))),
        }
    }
}

pub(super) fn open(path: &Path, options: &ImportOptions) -> Result<Source> {
    let format = options.format.or_else(|| Format::of(path)).ok_or_else(|| {
        anyhow!("its extension is not known; hint: say `format: parquet`, `jsonl`, `json` or `csv`")
    })?;
    let path = path.to_owned();
    Ok(match format {
        Format::Parquet => {
            let split = Split::of_files("source", vec![path.clone()])?;
            Source {
                path,
                schema: split.schema().clone(),
                not_finite: BTreeMap::new(),
                batches: Box::new(move || Ok(Box::new(split.batches(BATCH_ROWS)))),
            }
        }
        Format::Jsonl | Format::Json => {
            let layout = json::layout(&path)?;
            let skip = options.skip_invalid_rows;
            let columns = Arc::new(json::columns(&path, layout, options.max_rows, skip)?);
            Source {
                path: path.clone(),
                schema: Arc::new(Schema::new(json::fields(&columns))),
                not_finite: columns.not_finite.clone(),
                batches: Box::new(move || json::batches(&path, layout, columns.clone())),
            }
        }
        Format::Csv => {
            let schema = csv::header(&path)?;
            Source {
                path: path.clone(),
                schema: schema.clone(),
                not_finite: BTreeMap::new(),
                batches: Box::new(move || csv::batches(&path, &schema)),
            }
        }
    })
}
