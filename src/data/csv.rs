//! Rows from comma-separated values with a header line. Every column is text, and an empty field is an empty text: nothing is
//! guessed.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::csv::ReaderBuilder;
use arrow::csv::reader::Format;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::size::{BATCH_BYTES, MOST_FIELDS, pieces};
use super::table::BATCH_ROWS;

/// The most bytes that [`BATCH_ROWS`] rows may have.
const LONGEST_BATCH: u64 = 512 << 20;

/// The columns that the header names.
pub(super) fn header(path: &Path) -> Result<SchemaRef> {
    let format = Format::default().with_header(true);
    let (schema, _) = format.infer_schema(open(path)?.0, Some(0))?;
    let names: Vec<&String> = schema.fields().iter().map(|field| field.name()).collect();
    ensure!(
        !names.is_empty(),
        "the file is empty: expected a line with the columns' names"
    );
    ensure!(
        names.len() <= MOST_FIELDS,
        "its header names {} columns; at most {MOST_FIELDS} are read",
        names.len()
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
    let (file, read) = open(path)?;
    let reader = ReaderBuilder::new(schema.clone())
        .with_header(true)
        .with_batch_size(BATCH_ROWS)
        .build_buffered(file)?;
    let name = path.display().to_string();
    let rows = reader.flat_map(move |batch| {
        read.set(0);
        match batch.with_context(|| format!("`{name}` is not well formed")) {
            Ok(batch) => pieces(batch, BATCH_BYTES).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        }
    });
    Ok(Box::new(rows.map(|batch| {
        let batch = batch?;
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

/// The file without a byte order mark, and how much of it was read since that was last set to zero.
fn open(path: &Path) -> Result<(Metered, Rc<Cell<u64>>)> {
    let file = File::open(path).with_context(|| format!("could not read `{}`", path.display()))?;
    let mut reader = BufReader::new(file);
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    let read = Rc::new(Cell::new(0));
    let metered = Metered {
        inner: reader,
        read: Rc::clone(&read),
    };
    Ok((metered, read))
}

/// A reader that ends with an error when one batch of rows takes too much of it, as where a quote is never closed.
struct Metered {
    inner: BufReader<File>,
    read: Rc<Cell<u64>>,
}

impl Metered {
    fn check(&self) -> std::io::Result<()> {
        if self.read.get() <= LONGEST_BATCH {
            return Ok(());
        }
        Err(std::io::Error::other(format!(
            "{BATCH_ROWS} rows have more than {} MiB; is there a quote that is never closed?",
            LONGEST_BATCH >> 20
        )))
    }
}

impl Read for Metered {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.read.set(self.read.get() + count as u64);
        self.check()?;
        Ok(count)
    }
}

impl BufRead for Metered {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.check()?;
        self.inner.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.read.set(self.read.get() + count as u64);
        self.inner.consume(count);
    }
}
