//! Rows from comma-separated values with a header line. Every column is text, and an empty field is an empty text: nothing is
//! guessed.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::Format;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::table::BATCH_ROWS;

/// The columns that the header names.
pub(super) fn header(path: &Path) -> Result<SchemaRef> {
    let format = Format::default().with_header(true);
    let (schema, _) = format.infer_schema(open(path)?, Some(0))?;
    let names: Vec<&String> = schema.fields().iter().map(|field| field.name()).collect();
    ensure!(
        !names.is_empty(),
        "the file is empty: expected a line with the columns' names"
    );
    for (place, name) in names.iter().enumerate() {
        ensure!(
            !names[..place].contains(name),
            "the column `{name}` appears twice in the header"
        );
    }
    let fields: Vec<_> = names
        .iter()
        .map(|name| Field::new(name.as_str(), DataType::Utf8, true))
        .collect();
    Ok(Arc::new(Schema::new(fields)))
}

/// The rows as batches.
pub(super) fn batches(
    path: &Path,
    schema: &SchemaRef,
) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
    let reader = ReaderBuilder::new(schema.clone())
        .with_header(true)
        .with_batch_size(BATCH_ROWS)
        .build(open(path)?)?;
    let name = path.display().to_string();
    Ok(Box::new(reader.map(move |batch| {
        let batch = batch.with_context(|| format!("`{name}` is not well formed"))?;
        let columns: Result<Vec<ArrayRef>> = batch
            .columns()
            .iter()
            .map(|column| {
                let texts = column
                    .as_string_opt::<i32>()
                    .context("a column is no text")?;
                let texts = texts.iter().map(|text| Some(text.unwrap_or_default()));
                Ok(Arc::new(texts.collect::<StringArray>()) as ArrayRef)
            })
            .collect();
        Ok(RecordBatch::try_new(batch.schema(), columns?)?)
    })))
}

/// The file without a byte order mark.
fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).with_context(|| format!("could not read `{}`", path.display()))?;
    let mut reader = BufReader::new(file);
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    Ok(reader)
}
