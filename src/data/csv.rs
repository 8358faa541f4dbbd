//! Rows from files with delimiters and a header line, such as CSV and TSV.
//!
//! Records are split as in pandas, which `datasets` uses. Every column is text, and an empty field is null. Nothing else is guessed, so
//! `007`, `NA` and `None` are kept. A record with more or fewer fields than the header is an error.

use std::cell::Cell;
use std::io::{BufRead, Read};
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Error, Result, bail, ensure};
use arrow_array::builder::StringBuilder;
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};

use super::json::BROKEN;
use super::reading::TextFile;
use super::size::{BATCH_BYTES, LONGEST_ROW, MOST_FIELDS};
use super::table::BATCH_ROWS;

/// A text that is appended to the file: it is a record of its own unless a quote is still open.
const END: &str = "\u{0}the end of the file\u{0}";
/// Other delimiters that a file may have, for a hint.
const DELIMITERS: [(u8, &str); 4] = [(b',', ","), (b'\t', "\\t"), (b';', ";"), (b'|', "|")];

/// The columns that the header names.
pub(super) fn header(file: &TextFile, delimiter: u8) -> Result<SchemaRef> {
    Ok(Records::open(file, delimiter)?.schema)
}

/// The number of rows, at most `most`.
pub(super) fn count(file: &TextFile, delimiter: u8, most: usize) -> Result<usize> {
    let mut records = Records::open(file, delimiter)?;
    let mut count = 0;
    while count < most && records.next()? {
        records.width()?;
        count += 1;
    }
    Ok(count)
}

/// The first `most` rows as batches; nothing after them is read. With `skips`, a row with another number of fields is included, with its
/// mistake in the column [`BROKEN`].
pub(super) fn batches(
    file: &TextFile,
    delimiter: u8,
    most: usize,
    skips: bool,
) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
    let mut records = Records::open(file, delimiter)?;
    let mut left = most;
    Ok(Box::new(std::iter::from_fn(move || {
        let batch = records.batch(left.min(BATCH_ROWS), skips).transpose()?;
        left = batch.as_ref().map_or(0, |batch| left - batch.num_rows());
        Some(batch)
    })))
}

/// A reader of a file's records.
struct Records {
    name: String,
    schema: SchemaRef,
    reader: Reader<Metered>,
    /// The number of bytes read since the last record, which is limited in case a quote is never closed.
    read: Rc<Cell<usize>>,
    record: StringRecord,
    /// The number of the current row, from 1.
    row: u64,
    /// The mistake after the rows that were returned.
    failed: Option<Error>,
}

impl Records {
    fn open(file: &TextFile, delimiter: u8) -> Result<Self> {
        let read = Rc::new(Cell::new(0));
        let text = Metered {
            text: file.open()?,
            end: format!("\n{END}\n").into_bytes(),
            read: Rc::clone(&read),
        };
        let reader = ReaderBuilder::new()
            .delimiter(delimiter)
            .has_headers(false)
            .flexible(true)
            .from_reader(text);
        let mut records = Self {
            name: file.display().to_owned(),
            schema: Arc::new(Schema::empty()),
            reader,
            read,
            record: StringRecord::new(),
            row: 0,
            failed: None,
        };
        ensure!(
            records.advance()?,
            "`{}` is empty: expected a line with the columns' names",
            records.name
        );
        records.schema = named(&records.name, &records.record, delimiter)?;
        Ok(records)
    }

    /// Reads the next record, whatever fields it has; false at the end.
    fn advance(&mut self) -> Result<bool> {
        self.read.set(0);
        let name = &self.name;
        let there = self.reader.read_record(&mut self.record);
        let there = there.map_err(|error| {
            let line = self.reader.position().line();
            match error.into_kind() {
                ErrorKind::Io(error) => anyhow::anyhow!("{name}:{line}: {error}"),
                _ => anyhow::anyhow!("{name}:{line}: this line can't be read"),
            }
        })?;
        if !there || (self.record.len() == 1 && self.record.get(0) == Some(END)) {
            return Ok(false);
        }
        let last = self.record.iter().next_back();
        if last.is_some_and(|last| last.ends_with(&format!("{END}\n"))) {
            bail!(
                "{name}:{}: this row has a quote (`\"`) that is never closed, so that the rest of the file would be one field; hint: a \
                 quote inside a quoted field is written twice",
                // The record never ends.
                self.line() + 1
            );
        }
        Ok(true)
    }

    /// Reads the next row; false at the end.
    fn next(&mut self) -> Result<bool> {
        let columns = self.schema.fields().len();
        loop {
            if !self.advance()? {
                return Ok(false);
            }
            let only = self.record.get(0).filter(|_| self.record.len() == 1);
            if columns == 1 || only.is_none_or(|text| !text.trim_matches([' ', '\t']).is_empty()) {
                break;
            }
        }
        self.row += 1;
        Ok(true)
    }

    /// Fails if the row has another number of fields than the header.
    fn width(&self) -> Result<()> {
        let columns = self.schema.fields().len();
        let found = self.record.len();
        if found != columns {
            let (line, row) = (self.line(), self.row);
            let hint = if found > columns {
                "a field that holds the delimiter or a quote stands in quotes"
            } else {
                "a field without a value is left empty, with its delimiters"
            };
            bail!(
                "{}:{line}: row {row} has {found} field{}, but the header names {columns} columns; hint: {hint}",
                self.name,
                if found == 1 { "" } else { "s" }
            );
        }
        Ok(())
    }

    /// The line at which the record begins. The reader's own count does not include blank lines directly before it.
    fn line(&self) -> u64 {
        let inside: usize = self
            .record
            .iter()
            .map(|field| field.matches('\n').count())
            .sum();
        self.reader
            .position()
            .line()
            .saturating_sub(1 + inside as u64)
            .max(1)
    }

    /// The next rows, at most `most`. If there is a mistake, the rows before it are returned first.
    fn batch(&mut self, most: usize, skips: bool) -> Result<Option<RecordBatch>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut columns: Vec<StringBuilder> = Vec::new();
        columns.resize_with(self.schema.fields().len(), StringBuilder::new);
        let mut broken = StringBuilder::new();
        let (mut rows, mut bytes) = (0, 0);
        while rows < most && bytes < BATCH_BYTES {
            let next = self.next().and_then(|there| {
                let width = if there { self.width() } else { Ok(()) };
                match width {
                    Err(error) if !skips => Err(error),
                    width => Ok(there.then_some(width)),
                }
            });
            let width = match next {
                Ok(Some(width)) => width,
                Ok(None) => break,
                Err(error) if rows == 0 => return Err(error),
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            };
            match width {
                Ok(()) => {
                    for (column, field) in columns.iter_mut().zip(self.record.iter()) {
                        column.append_option(Some(field).filter(|field| !field.is_empty()));
                    }
                    broken.append_null();
                }
                Err(error) => {
                    columns.iter_mut().for_each(StringBuilder::append_null);
                    broken.append_value(format!("{error:#}"));
                }
            }
            bytes += self.record.as_slice().len() as u64;
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        let mut fields: Vec<_> = self.schema.fields().iter().cloned().collect();
        if skips {
            fields.push(Arc::new(Field::new(BROKEN, DataType::Utf8, true)));
            columns.push(broken);
        }
        let columns = columns
            .iter_mut()
            .map(|column| Arc::new(column.finish()) as ArrayRef);
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.collect())?;
        Ok(Some(batch))
    }
}

/// The columns of a header.
fn named(file: &str, header: &StringRecord, delimiter: u8) -> Result<SchemaRef> {
    ensure!(
        header.len() <= MOST_FIELDS,
        "`{file}` names {} columns in its header; at most {MOST_FIELDS} are read",
        header.len()
    );
    if let (1, Some(only)) = (header.len(), header.get(0)) {
        let other = DELIMITERS
            .iter()
            .find(|(other, _)| *other != delimiter && only.as_bytes().contains(other));
        if let Some((_, other)) = other {
            bail!(
                "{file}:1: the header names one column, {only:?}, which holds `{other}`; hint: if that stands between columns say \
                 `delimiter: \"{other}\"`"
            );
        }
    }
    let mut names: Vec<String> = Vec::with_capacity(header.len());
    for (index, name) in header.iter().enumerate() {
        // This is pandas' name of a column without a name, such as that of its row numbers.
        let name = match name {
            "" => format!("Unnamed: {index}"),
            name => name.to_owned(),
        };
        ensure!(
            !names.contains(&name),
            "{file}:1: the header names the column `{name}` twice; hint: give one of them another name"
        );
        names.push(name);
    }
    let fields: Vec<_> = names
        .iter()
        .map(|name| Field::new(name, DataType::Utf8, true))
        .collect();
    Ok(Arc::new(Schema::new(fields)))
}

/// A reader of a text followed by [`END`], which fails when one row takes too many bytes.
struct Metered {
    text: Box<dyn BufRead + Send>,
    end: Vec<u8>,
    read: Rc<Cell<usize>>,
}

impl Read for Metered {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        if self.read.get() > LONGEST_ROW {
            return Err(std::io::Error::other(format!(
                "a row has more than {} MiB; hint: is there a quote that is never closed?",
                LONGEST_ROW >> 20
            )));
        }
        let mut count = self.text.read(bytes)?;
        if count == 0 {
            count = self.end.len().min(bytes.len());
            for (byte, end) in bytes.iter_mut().zip(self.end.drain(..count)) {
                *byte = end;
            }
        }
        self.read.set(self.read.get() + count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
