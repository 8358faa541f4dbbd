//! An open file of rows: its columns, and its rows in batches, which can be read several times.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, anyhow};
use arrow_array::RecordBatch;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::errors::ParquetError;

use super::ImportOptions;
use crate::data::arrow_file::ArrowFile;
use crate::data::json::BROKEN;
use crate::data::reading::{TextFile, head_of, starts_as};
use crate::data::table::{BATCH_ROWS, Split, split_of};
use crate::data::{csv, json};

/// A file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// Apache Parquet.
    Parquet,
    /// One JSON object a line.
    Jsonl,
    /// One JSON list of objects.
    Json,
    /// Values between commas, with a header line.
    Csv,
    /// Values between tabs, with a header line.
    Tsv,
    /// Apache Arrow: a file (Feather, version 2) or a stream.
    Arrow,
}

/// The extensions of compressed files.
const PACKED: [&str; 4] = ["gz", "zst", "xz", "bz2"];

impl Format {
    /// All formats in the order of preference: if a split exists in several of them, the first is read.
    pub const ALL: [Self; 6] = [
        Self::Parquet,
        Self::Arrow,
        Self::Jsonl,
        Self::Json,
        Self::Csv,
        Self::Tsv,
    ];

    /// The format of a file by its extension; for a compressed file (`train.jsonl.gz`) by the one before.
    pub fn of_file(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_lowercase();
        match extension.as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            "json" => Some(Self::Json),
            "csv" => Some(Self::Csv),
            "tsv" | "tab" => Some(Self::Tsv),
            "arrow" | "feather" => Some(Self::Arrow),
            packed if PACKED.contains(&packed) => {
                let inner = Self::of_file(Path::new(path.file_stem()?))?;
                (!matches!(inner, Self::Parquet | Self::Arrow)).then_some(inner)
            }
            _ => None,
        }
    }

    /// The name of the format in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
            Self::Json => "json",
            Self::Csv => "csv",
            Self::Tsv => "tsv",
            Self::Arrow => "arrow",
        }
    }
}

/// The split of a file by its name: `train` for `train.jsonl.gz` and for `train-00000-of-00002.parquet`.
pub fn split_of_file(path: &Path) -> String {
    let is_packed = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| PACKED.contains(&extension.to_lowercase().as_str()))
    };
    let stem = |path: &Path| path.file_stem().map(PathBuf::from).unwrap_or_default();
    let plain = if is_packed(path) {
        stem(path)
    } else {
        path.to_owned()
    };
    split_of(&stem(&plain).to_string_lossy()).0.to_owned()
}

type Batches<'a> = Box<dyn Iterator<Item = Result<RecordBatch>> + 'a>;

/// An open file of rows.
pub(super) struct Source {
    /// Its name in messages.
    pub(super) path: PathBuf,
    pub(super) schema: SchemaRef,
    /// The columns with NaN or an infinity, which JSON does not have, each with its first row.
    pub(super) not_finite: BTreeMap<String, u64>,
    batches: Box<dyn Fn() -> Result<Batches<'static>> + Sync>,
}

impl Source {
    /// The rows from the first to the last.
    pub(super) fn rows(&self) -> Batches<'static> {
        (self.batches)().unwrap_or_else(|error| Box::new(std::iter::once(Err(error))))
    }
}

/// Opens files, but none after those that have as many rows as `options` allows.
pub(super) fn open_all(paths: &[PathBuf], options: &ImportOptions) -> Result<Vec<Source>> {
    let mut left = options.max_rows.unwrap_or(usize::MAX);
    let mut sources = Vec::with_capacity(paths.len());
    // The number of usable rows of a file is not known before they are read.
    let is_counted = options.max_rows.is_some() && options.skip_invalid_rows == 0;
    let more = usize::try_from(options.skip_invalid_rows).unwrap_or(usize::MAX);
    for (index, path) in paths.iter().enumerate() {
        if left == 0 {
            break;
        }
        let is_counted = is_counted && index + 1 < paths.len();
        let (source, rows) = open(path, options, left.saturating_add(more), is_counted)?;
        sources.push(source);
        left -= rows.min(left);
    }
    Ok(sources)
}

/// Opens a file for its first `most` rows, and counts them if `is_counted`.
fn open(
    path: &Path,
    options: &ImportOptions,
    most: usize,
    is_counted: bool,
) -> Result<(Source, usize)> {
    let shown = options.shown(path);
    let by_delimiter = options.delimiter.map(|_| Format::Csv);
    let format = options
        .format
        .or_else(|| Format::of_file(Path::new(&shown)))
        .or(by_delimiter);
    let format = format.ok_or_else(|| {
        let names = Format::ALL.map(Format::name).join("`, `");
        anyhow!("the extension of `{shown}` is not known; hint: say its format, `format:` with one of `{names}`")
    })?;
    let is_table = matches!(format, Format::Csv | Format::Tsv);
    let is_text = !matches!(format, Format::Parquet | Format::Arrow);
    let without = |parameter: &str| {
        anyhow!(
            "`{shown}` is read as `{}`, which has no `{parameter}`; hint: leave `{parameter}` out, or say another `format`",
            format.name()
        )
    };
    if options.delimiter.is_some() && !is_table {
        return Err(without("delimiter"));
    }
    if options.encoding.is_some() && !is_text {
        return Err(without("encoding"));
    }
    let file = TextFile::new(path, &shown, options.encoding.as_ref());
    let named = PathBuf::from(&shown);
    let count = |rows: usize| if is_counted { rows.min(most) } else { 0 };
    Ok(match format {
        Format::Parquet => {
            let split = parquet(path, &shown)?;
            let rows = count(split.rows());
            let path = path.to_owned();
            let source = Source {
                path: named,
                schema: split.schema().clone(),
                not_finite: BTreeMap::new(),
                batches: Box::new(move || {
                    let (path, shown) = (path.clone(), shown.clone());
                    let batches = split.batches(BATCH_ROWS.min(most));
                    Ok(Box::new(batches.map(move |batch| {
                        batch.map_err(|error| plainly(&error, &path, &shown))
                    })))
                }),
            };
            (source, rows)
        }
        Format::Arrow => {
            let file = ArrowFile::open(path, &shown)?;
            let mut rows = 0;
            if is_counted {
                for batch in file.batches()? {
                    rows += batch?.num_rows();
                    if rows >= most {
                        break;
                    }
                }
            }
            let source = Source {
                path: named,
                schema: file.schema().clone(),
                not_finite: BTreeMap::new(),
                batches: Box::new(move || file.batches()),
            };
            (source, rows)
        }
        Format::Jsonl | Format::Json => {
            let layout = json::layout(&file)?;
            let skip = options.skip_invalid_rows;
            let columns = Arc::new(json::columns(&file, layout, most, skip)?);
            let rows = count(columns.rows);
            let source = Source {
                path: named,
                schema: Arc::new(Schema::new(json::fields(&columns))),
                not_finite: columns.not_finite.clone(),
                batches: Box::new(move || json::batches(&file, layout, most, columns.clone())),
            };
            (source, rows)
        }
        Format::Csv | Format::Tsv => {
            let plain = if format == Format::Csv { b',' } else { b'\t' };
            let delimiter = options.delimiter.unwrap_or(plain);
            let header = csv::header(&file, delimiter)?;
            let rows = if is_counted {
                csv::count(&file, delimiter, most)?
            } else {
                0
            };
            let skips = options.skip_invalid_rows > 0;
            let mut fields: Vec<_> = header.fields().iter().cloned().collect();
            if skips {
                fields.push(Arc::new(Field::new(BROKEN, DataType::Utf8, true)));
            }
            let source = Source {
                path: named,
                schema: Arc::new(Schema::new(fields)),
                not_finite: BTreeMap::new(),
                batches: Box::new(move || csv::batches(&file, delimiter, most, skips)),
            };
            (source, rows)
        }
    })
}

/// Opens a Parquet file by itself; the columns of several files are compared later.
fn parquet(path: &Path, shown: &str) -> Result<Split> {
    let head = head_of(path).map_err(Error::from);
    head.and_then(|head| starts_as(&head, b"PAR1", "Parquet file"))
        .with_context(|| format!("could not read `{shown}`"))?;
    Split::of_files("source", vec![path.to_owned()]).map_err(|error| plainly(&error, path, shown))
}

/// An error with the file's name from the recipe, without the library's own words.
fn plainly(error: &Error, path: &Path, shown: &str) -> Error {
    let is_library = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<ParquetError>() || cause.is::<arrow_schema::ArrowError>()
    };
    if error.chain().any(is_library) {
        return anyhow!(
            "`{shown}` can't be read as Parquet: it is damaged or cut off, or packed in a way that is not known here; hint: fetch or write \
             it anew"
        );
    }
    let message = format!("{error:#}");
    anyhow!(message.replace(&path.display().to_string(), shown))
}
