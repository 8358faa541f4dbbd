//! Imports files into one Parquet file with our columns. The only entry is [`import_files`]. Memory is limited to a few thousand rows.
//!
//! Plain values keep their types. Values with parts (messages, tools, objects) are kept as the JSON that was written, in a column that Parquet
//! marks as JSON, until a chat template reads them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

pub use super::forms::{CANONICAL, Form};
use super::forms::{Reading, list, recognise};
use super::reading::Encoding;
use super::table::{Writer, pass_batches};
use columns::Union;
pub use mix::{Mix, StoppingStrategy, mix_rows};
use rows::Rows;
pub use source::{Format, split_of_file};
use source::{Source, open_all};

mod columns;
mod mix;
mod rows;
mod source;
mod values;

/// The options of an import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// From the names of our columns to those of the file, or to expressions on its columns.
    pub columns: BTreeMap<String, String>,
    /// The largest number of rows.
    pub max_rows: Option<usize>,
    /// The format, if the files' extensions don't determine it.
    pub format: Option<Format>,
    /// The form of the rows, if their columns don't determine it.
    pub form: Option<Form>,
    /// The largest number of unusable rows that are left out; more are an error.
    pub skip_invalid_rows: u64,
    /// The delimiter between the values of a line, if the format doesn't determine it.
    pub delimiter: Option<u8>,
    /// The encoding of text files, if it is not UTF-8.
    pub encoding: Option<Encoding>,
    /// The names of files in messages, if they are not their paths.
    pub names: BTreeMap<PathBuf, String>,
}

impl ImportOptions {
    /// The name of a file in messages.
    fn shown(&self, path: &Path) -> String {
        let name = self.names.get(path).cloned();
        name.unwrap_or_else(|| path.display().to_string())
    }
}

/// The result of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// The number of rows.
    pub rows: usize,
    /// The columns of the new file.
    pub columns: Vec<String>,
    /// Sentences for the user about how the rows were read.
    pub messages: Vec<String>,
    /// The number of unusable rows that were left out.
    pub rows_skipped: u64,
    /// Why the first of these can't be used.
    pub skipped: Vec<String>,
}

/// Imports `sources`, one after the other, into the Parquet file `destination`. `progress` is called with the number of rows so far and may
/// stop with an error. Columns that a file lacks become null.
///
/// # Errors
/// A file can't be read, has no usable form, or has more unusable rows than the options allow.
pub fn import_files(
    sources: &[PathBuf],
    options: &ImportOptions,
    destination: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<ImportReport> {
    let opened = open_all(sources, options)?;
    let Some(first) = opened.first() else {
        bail!("there is no file to import");
    };
    let union = Union::new(&opened);
    ensure!(
        !union.names().is_empty(),
        "`{}` holds no rows",
        first.path.display()
    );
    let reading = recognise(&union.names(), &options.columns, options.form)
        .with_context(|| format!("could not import `{}`", first.path.display()))?;
    all_have_answers(&opened, &reading)?;
    let rows = Rows::new(reading, union, options)?;
    let writer = Writer::create_file(destination, rows.schema().clone())?;
    let mut left = options.max_rows.unwrap_or(usize::MAX);
    let mut done = 0;
    let batches = || {
        let batches = opened.iter().enumerate().flat_map(|(number, source)| {
            let mut start = 0;
            source.rows().map(move |batch| {
                let batch = batch?;
                let first_row = start + 1;
                start += batch.num_rows() as u64;
                Ok((number, first_row, batch))
            })
        });
        let mut read = 0_usize;
        let most = options.max_rows.unwrap_or(usize::MAX);
        // If rows are left out, more have to be read than are taken.
        let enough = usize::try_from(options.skip_invalid_rows)
            .unwrap_or(usize::MAX)
            .saturating_add(most);
        batches.take_while(move |batch| {
            let more = read < enough;
            read += batch.as_ref().map_or(0, |(_, _, batch)| batch.num_rows());
            more
        })
    };
    let written = pass_batches(batches, writer, &mut |(number, first_row, batch), made| {
        if left == 0 {
            return Ok(());
        }
        let path = opened
            .get(number)
            .map(|source| source.path.display().to_string())
            .unwrap_or_default();
        let batch = rows.convert(&batch, &path, first_row, left)?;
        left -= batch.num_rows();
        done += batch.num_rows() as u64;
        progress(done)?;
        made.send(batch)
    })?;
    let columns = rows.schema().fields().iter();
    let columns = columns.map(|field| field.name().clone()).collect();
    let (messages, rows_skipped, skipped) = rows.end();
    ensure!(
        written > 0 || skipped.is_empty(),
        "no row can be used; {}",
        skipped.first().map_or("", String::as_str)
    );
    Ok(ImportReport {
        rows: written,
        columns,
        messages,
        rows_skipped,
        skipped,
    })
}

/// Fails if a file has no column of answers although others have: its rows would be empty.
fn all_have_answers(sources: &[Source], reading: &Reading) -> Result<()> {
    const ANSWERS: [&str; 3] = ["chosen", "messages", "text"];
    let answers = reading.ours.iter();
    let answers = answers.filter(|(ours, _)| ANSWERS.contains(ours));
    let reads: Vec<&String> = answers.flat_map(|(_, from)| from.reads()).collect();
    if reads.is_empty() {
        // Prompts alone.
        return Ok(());
    }
    let filled = |source: &&Source| !source.schema.fields().is_empty();
    for source in sources.iter().filter(filled) {
        let has = |name: &&&String| source.schema.field_with_name(name).is_ok();
        ensure!(
            reads.iter().any(|name| has(&name)),
            "`{}` has none of the columns that answers are read from, {}; hint: files of another form are a dataset of their own, as in \
             `datasets: [{{path: a.jsonl}}, {{path: b.jsonl}}]`",
            source.path.display(),
            list(reads)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
