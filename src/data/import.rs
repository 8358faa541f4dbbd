//! Bringing other people's files into the project's own columns: Parquet, JSON lines, JSON and CSV become one Parquet file.
//! Its one entry is [`import_files`]. Memory is bounded by a few thousand rows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow::array::{RecordBatch, new_null_array};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::kind::Kind;
use super::table::{BATCH_ROWS, Split, Writer, pass_batches, split_of};
use super::{csv, json};

/// The columns that later stages know. `system` is text; the others are text or messages, `messages` is always messages.
pub const CANONICAL: [&str; 5] = ["system", "prompt", "chosen", "rejected", "messages"];

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

/// What to import.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    /// From our column's name to the file's.
    pub columns: BTreeMap<String, String>,
    /// Stop after so many rows.
    pub max_rows: Option<usize>,
    /// The format, when the files' extensions don't tell.
    pub format: Option<Format>,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// The number of rows.
    pub rows: usize,
    /// The columns of the new file.
    pub columns: Vec<String>,
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
struct Source {
    path: PathBuf,
    schema: SchemaRef,
    batches: Box<dyn Fn() -> Result<Batches<'static>> + Sync>,
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
    let sources: Result<Vec<Source>> = sources
        .iter()
        .map(|path| {
            let source = open(path, options);
            source.with_context(|| format!("could not import `{}`", path.display()))
        })
        .collect();
    let sources = sources?;
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

/// The first `left` rows of all files.
fn first_rows(sources: &[Source], mut left: usize) -> impl Iterator<Item = Result<RecordBatch>> {
    let mut batches = sources.iter().flat_map(|source| {
        let named = || format!("could not import `{}`", source.path.display());
        let batches: Batches<'_> = match (source.batches)() {
            Ok(batches) => Box::new(batches.map(move |batch| batch.with_context(named))),
            Err(error) => Box::new(std::iter::once(Err(error))),
        };
        batches
    });
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let batch = batches.next()?;
        Some(batch.map(|batch| {
            let batch = batch.slice(0, batch.num_rows().min(left));
            left -= batch.num_rows();
            batch
        }))
    })
}

fn open(path: &Path, options: &ImportOptions) -> Result<Source> {
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
                batches: Box::new(move || Ok(Box::new(split.batches(BATCH_ROWS)))),
            }
        }
        Format::Jsonl | Format::Json => {
            let as_list = format == Format::Json && json::is_list(&path)?;
            let columns =
                json::columns(&path, as_list, options.max_rows, &canonical_names(options))?;
            let fields: Vec<_> = columns
                .iter()
                .map(|(name, kind)| Field::new(name, kind.data_type(), true))
                .collect();
            let columns = Arc::new(columns);
            Source {
                path: path.clone(),
                schema: Arc::new(Schema::new(fields)),
                batches: Box::new(move || json::batches(&path, as_list, columns.clone())),
            }
        }
        Format::Csv => {
            let schema = csv::header(&path)?;
            Source {
                path: path.clone(),
                schema: schema.clone(),
                batches: Box::new(move || csv::batches(&path, &schema)),
            }
        }
    })
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
