//! Bringing other people's files into the project's own columns: Parquet, JSON lines, JSON and CSV become one Parquet file.
//! Its one entry is [`import_files`]. Memory is bounded by a few thousand rows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use arrow::array::{RecordBatch, new_null_array};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::kind::Kind;
use super::reading::Encoding;
use super::table::{Writer, pass_batches};
pub use mix::{Mix, StoppingStrategy, mix_rows};
pub use source::{Format, split_of_file};
use source::{Source, first_rows, open_all};

mod mix;
mod source;

/// The columns that later stages know. `system` is text; the others are text or messages, `messages` is always messages.
pub const CANONICAL: [&str; 5] = ["system", "prompt", "chosen", "rejected", "messages"];

/// What to import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// From our column's name to the file's.
    pub columns: BTreeMap<String, String>,
    /// Stop after so many rows.
    pub max_rows: Option<usize>,
    /// The format, when the files' extensions don't tell.
    pub format: Option<Format>,
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
}

/// Imports `sources`, one after the other, as the Parquet file `destination`. `progress` hears the number of rows so far and
/// may stop by an error. Later files may lack columns of earlier ones, which become null.
pub fn import_files(
    sources: &[PathBuf],
    options: &ImportOptions,
    destination: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<ImportReport> {
    for ours in options.columns.keys() {
        ensure!(
            CANONICAL.contains(&ours.as_str()),
            "`columns` maps to `{ours}`, which is no column of ours: expected one of {}",
            list(CANONICAL)
        );
    }
    let sources = open_all(sources, options)?;
    let schema = unite(&sources, options)?;
    let writer = Writer::create_file(destination, schema.clone())?;
    let most = options.max_rows.unwrap_or(usize::MAX);
    let mut done = 0;
    let rows = pass_batches(|| first_rows(&sources, most), writer, &mut |batch, made| {
        done += batch.num_rows();
        progress(done as u64)?;
        made.send(fit(&batch, &schema, options)?)
    })?;
    let columns = schema
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .collect();
    Ok(ImportReport { rows, columns })
}

/// The names that the canonical columns have in the files.
fn canonical_names(options: &ImportOptions) -> Vec<String> {
    let name = |ours: &&str| {
        options
            .columns
            .get(*ours)
            .cloned()
            .unwrap_or_else(|| (*ours).to_owned())
    };
    CANONICAL.iter().map(name).collect()
}

/// Our name of a file's column; none when another column was given that name by `columns`.
fn our_name<'a>(theirs: &'a str, options: &'a ImportOptions) -> Option<&'a str> {
    let mapped = options.columns.iter().find(|(_, source)| *source == theirs);
    match mapped {
        Some((ours, _)) => Some(ours),
        None if options.columns.contains_key(theirs) => None,
        None => Some(theirs),
    }
}

/// The columns of the new file.
fn unite(sources: &[Source], options: &ImportOptions) -> Result<SchemaRef> {
    let mut fields: Vec<Field> = Vec::new();
    let mut found: Vec<String> = Vec::new();
    for source in sources {
        for field in source.schema.fields() {
            if !found.contains(field.name()) {
                found.push(field.name().clone());
            }
            let Some(name) = our_name(field.name(), options) else {
                continue;
            };
            let data_type = canonical_type(name, field.data_type())
                .with_context(|| format!("could not import `{}`", source.path.display()))?;
            match fields.iter_mut().find(|known| known.name() == name) {
                None => fields.push(Field::new(name, data_type, true)),
                Some(known) if *known.data_type() == data_type => {}
                Some(known) if *known.data_type() == DataType::Null => {
                    *known = Field::new(name, data_type, true);
                }
                Some(_) if data_type == DataType::Null => {}
                Some(known) => bail!(
                    "the column `{name}` is {} in `{}` and {data_type} in `{}`",
                    known.data_type(),
                    sources[0].path.display(),
                    source.path.display(),
                ),
            }
        }
    }
    for theirs in options.columns.values() {
        ensure!(
            found.contains(theirs),
            "`columns` names `{theirs}`, which is not there: found {}",
            list(&found)
        );
    }
    let usable = fields
        .iter()
        .any(|field| CANONICAL[1..].contains(&field.name().as_str()));
    if !usable {
        let path = sources
            .first()
            .map(|source| source.path.display().to_string())
            .unwrap_or_default();
        bail!(
            "`{path}` has no column that can be used: found {}, expected `prompt`, `chosen` and `rejected`, or `messages`; hint: \
             say which is which, as in `columns: {{prompt: question, chosen: good, rejected: bad}}`",
            list(&found)
        );
    }
    // A column without any value has no type of its own.
    let fields: Vec<Field> = fields
        .into_iter()
        .map(|field| match field.data_type() {
            DataType::Null => field.with_data_type(DataType::Utf8),
            _ => field,
        })
        .collect();
    Ok(Arc::new(Schema::new(fields)))
}

/// The type under which a column is kept.
fn canonical_type(name: &str, data_type: &DataType) -> Result<DataType> {
    let text = |data_type: &DataType| {
        matches!(
            data_type,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
        )
    };
    let plain = match data_type {
        other if text(other) => DataType::Utf8,
        DataType::Dictionary(_, values) if text(values) => DataType::Utf8,
        other => other.clone(),
    };
    if !CANONICAL.contains(&name) || plain == DataType::Null {
        return Ok(plain);
    }
    let messages = match &plain {
        DataType::List(item) | DataType::LargeList(item) => match item.data_type() {
            DataType::Struct(fields) => fields.iter().any(|field| field.name() == "role"),
            DataType::Null => true,
            _ => false,
        },
        _ => false,
    };
    match name {
        "system" => ensure!(
            plain == DataType::Utf8,
            "the column `system` holds {plain}: expected text"
        ),
        "messages" => ensure!(
            messages,
            "the column `messages` holds {plain}: expected lists of messages with `role` and `content`"
        ),
        _ => ensure!(
            messages || plain == DataType::Utf8,
            "the column `{name}` holds {plain}: expected text, or lists of messages with `role` and `content`"
        ),
    }
    Ok(plain)
}

/// A batch of a file under our names and types.
fn fit(batch: &RecordBatch, schema: &SchemaRef, options: &ImportOptions) -> Result<RecordBatch> {
    let source = batch.schema();
    let theirs = source.fields().iter().enumerate();
    let places: HashMap<&str, usize> = theirs
        .rev()
        .filter_map(|(place, theirs)| Some((our_name(theirs.name(), options)?, place)))
        .collect();
    let columns: Result<Vec<_>> = schema
        .fields()
        .iter()
        .map(|field| {
            let place = places.get(field.name().as_str());
            let Some(column) = place.map(|place| batch.column(*place)) else {
                return Ok(new_null_array(field.data_type(), batch.num_rows()));
            };
            if column.data_type() == field.data_type() {
                return Ok(column.clone());
            }
            if column.data_type() == &DataType::Null {
                return Ok(new_null_array(field.data_type(), batch.num_rows()));
            }
            ensure!(
                can_cast_types(column.data_type(), field.data_type()),
                "the column `{}` can't be read as {}",
                field.name(),
                field.data_type()
            );
            Ok(cast(column, field.data_type())?)
        })
        .collect();
    Ok(RecordBatch::try_new(schema.clone(), columns?)?)
}

fn list<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<_> = names
        .into_iter()
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Whether values of a type fit a canonical column.
pub(super) fn fits(name: &str, kind: &Kind) -> bool {
    match (name, kind) {
        (_, Kind::Null) => true,
        ("system", kind) => *kind == Kind::Text,
        ("messages", kind) => kind.is_messages(),
        (_, kind) => *kind == Kind::Text || kind.is_messages(),
    }
}

#[cfg(test)]
mod tests;
