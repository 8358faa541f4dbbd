//! Bringing other people's files into the project's own columns: they become one Parquet file.
//! Its one entry is [`import_files`]. Memory is bounded by a few thousand rows.
//!
//! Plain values keep their types. Whatever has parts (messages, tools, objects) is JSON as it was written, in a column that Parquet
//! knows as JSON, until a chat template reads it.

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

/// What to import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// From our column's name to the file's, or to an expression on the file's columns.
    pub columns: BTreeMap<String, String>,
    /// Stop after so many rows.
    pub max_rows: Option<usize>,
    /// The format, when the files' extensions don't tell.
    pub format: Option<Format>,
    /// The form of the rows, when their columns don't tell.
    pub form: Option<Form>,
    /// Leave out up to so many rows that can't be used.
    pub skip_invalid_rows: u64,
    /// What stands between the values of a line, when the format doesn't tell.
    pub delimiter: Option<u8>,
    /// The encoding of files of text, when it is not UTF-8.
    pub encoding: Option<Encoding>,
    /// What messages call files, when it is not their paths.
    pub names: BTreeMap<PathBuf, String>,
}

impl ImportOptions {
    /// What messages call a file.
    fn shown(&self, path: &Path) -> String {
        let name = self.names.get(path).cloned();
        name.unwrap_or_else(|| path.display().to_string())
    }
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// The number of rows.
    pub rows: usize,
    /// The columns of the new file.
    pub columns: Vec<String>,
    /// What the user should know of how the rows were read.
    pub told: Vec<String>,
    /// The number of rows that can't be used and were left out.
    pub rows_skipped: u64,
    /// Why they can't be used; of many only the first.
    pub skipped: Vec<String>,
}

/// Imports `sources`, one after the other, as the Parquet file `destination`. `progress` hears the number of rows so far and
/// may stop by an error. Columns that a file lacks become null.
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
    let union = Union::of(&opened);
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
        // More may be read than are taken where rows are left out.
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
        let batch = rows.of(&batch, &path, first_row, left)?;
        left -= batch.num_rows();
        done += batch.num_rows() as u64;
        progress(done)?;
        made.send(batch)
    })?;
    let columns = rows.schema().fields().iter();
    let columns = columns.map(|field| field.name().clone()).collect();
    let (told, rows_skipped, skipped) = rows.end();
    ensure!(
        written > 0 || skipped.is_empty(),
        "no row can be used; {}",
        skipped.first().map_or("", String::as_str)
    );
    Ok(ImportReport {
        rows: written,
        columns,
        told,
        rows_skipped,
        skipped,
    })
}

/// Makes sure that each file has a column of answers: one of another form would give rows of nothing.
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
