//! A table of numbers as Parquet, for other programs to read.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

/// A column of a table.
#[derive(Debug, Clone, PartialEq)]
pub enum Column {
    /// Texts.
    Texts(Vec<String>),
    /// Counts, some of which may be missing.
    Counts(Vec<Option<u64>>),
    /// Numbers, some of which may be missing.
    Numbers(Vec<Option<f64>>),
}

impl Column {
    fn array(&self) -> ArrayRef {
        match self {
            Self::Texts(texts) => Arc::new(StringArray::from_iter_values(texts)),
            Self::Counts(counts) => Arc::new(UInt64Array::from(counts.clone())),
            Self::Numbers(numbers) => Arc::new(Float64Array::from(numbers.clone())),
        }
    }

    fn data_type(&self) -> DataType {
        match self {
            Self::Texts(_) => DataType::Utf8,
            Self::Counts(_) => DataType::UInt64,
            Self::Numbers(_) => DataType::Float64,
        }
    }
}

/// Writes a table with these columns, which are equally long.
///
/// # Errors
/// The columns differ in length, or the file can't be written.
pub fn write_numbers(path: &Path, columns: &[(String, Column)]) -> Result<()> {
    let fields = columns
        .iter()
        .map(|(name, column)| Field::new(name, column.data_type(), true));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let arrays = columns.iter().map(|(_, column)| column.array()).collect();
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays)?;
    let write = || -> Result<()> {
        let zstd = Compression::ZSTD(ZstdLevel::default());
        let properties = WriterProperties::builder().set_compression(zstd).build();
        let file = std::fs::File::create(path)?;
        let mut writer = ArrowWriter::try_new(file, schema, Some(properties))?;
        writer.write(&batch)?;
        writer.close()?;
        Ok(())
    };
    write().with_context(|| format!("could not write `{}`", path.display()))
}
