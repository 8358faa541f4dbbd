//! Splits of a folder as Parquet files: reading them as a stream, and writing one with the same bytes every time.

mod writer;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow_array::RecordBatch;
use arrow_cast::cast;
use arrow_schema::ArrowError;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};

use super::cell::{is_json, json_field};
use super::size::{BATCH_BYTES, DEEPEST, MOST_FIELDS, batch_bytes, pieces};
pub(in crate::data) use writer::pass_batches;
pub use writer::{Made, Writer, pass, pass_pieces};

/// Rows that are read, worked on and written at once. Part of the written bytes: it decides where pages may end.
pub const BATCH_ROWS: usize = 1024;

/// Which file of a split, and of how many.
type Part = (usize, usize);

/// The splits of a folder and the files of each, in order. `train.parquet` and `train-00000-of-00002.parquet` both belong to
/// `train`. A split with missing parts is an error.
pub fn splits(folder: &Path) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut found: BTreeMap<String, Vec<(Option<Part>, PathBuf)>> = BTreeMap::new();
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("could not list the folder `{}`", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(stem) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if let Some(stem) = stem.strip_suffix(".parquet") {
            let (split, part) = split_of(stem);
            found
                .entry(split.to_owned())
                .or_default()
                .push((part, path.clone()));
        }
    }
    let mut splits = BTreeMap::new();
    for (split, mut files) in found {
        files.sort();
        let whole = files
            .iter()
            .enumerate()
            .all(|(index, (part, _))| match part {
                None => files.len() == 1,
                Some((number, count)) => *number == index && *count == files.len(),
            });
        ensure!(
            whole,
            "the files of the split `{split}` in `{}` don't make a whole: expected one `{split}.parquet`, or all parts \
             `{split}-00000-of-NNNNN.parquet`",
            folder.display()
        );
        splits.insert(split, files.into_iter().map(|(_, path)| path).collect());
    }
    Ok(splits)
}

/// The split's name in a file's name without its extension, and which part of how many it is.
pub(super) fn split_of(stem: &str) -> (&str, Option<Part>) {
    let part = |text: &str| {
        let digits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<usize>().ok()).flatten()
    };
    let parsed = stem.rsplit_once("-of-").and_then(|(rest, count)| {
        let (split, number) = rest.rsplit_once('-')?;
        Some((split, (part(number)?, part(count)?)))
    });
    match parsed {
        Some((split, part)) if !split.is_empty() => (split, Some(part)),
        _ => (stem, None),
    }
}

/// One split of a folder, open for reading.
#[derive(Debug, Clone)]
pub struct Split {
    name: String,
    files: Vec<PathBuf>,
    schema: SchemaRef,
    rows: usize,
    /// The number of rows of each file.
    counts: Vec<usize>,
    /// For each file the first row and the number of rows, where it is a part of a split.
    parts: Option<Vec<(usize, usize)>>,
}

impl Split {
    /// Opens `name` in `folder`: reads only the files' footers.
    pub fn open(folder: &Path, name: &str) -> Result<Self> {
        let mut all = splits(folder)?;
        let Some(files) = all.remove(name) else {
            let names: Vec<_> = all.keys().map(|name| format!("`{name}`")).collect();
            // The folder is one of a store, which tells people nothing.
            bail!(
                "the dataset has no split `{name}`, but {}; hint: `split_dataset` makes a `test` split, and the parameters that end in `split` \
                 name another",
                if names.is_empty() {
                    "none at all".to_owned()
                } else {
                    names.join(", ")
                }
            );
        };
        Self::of_files(name, files)
    }

    /// The same from Parquet files anywhere.
    pub fn of_files(name: &str, files: Vec<PathBuf>) -> Result<Self> {
        let mut schema: Option<SchemaRef> = None;
        let mut rows = 0;
        let mut counts = Vec::with_capacity(files.len());
        for file in &files {
            let before = rows;
            let reader = reader(file)?;
            let count = reader.metadata().file_metadata().num_rows();
            rows = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_add(rows))
                .ok_or_else(|| anyhow!("`{}` says it has {count} rows", file.display()))?;
            counts.push(rows - before);
            let found = plain(reader.schema());
            match &schema {
                None => schema = Some(found),
                Some(first) => ensure!(
                    *first == found,
                    "`{}` has other columns or types than `{}`",
                    file.display(),
                    files[0].display()
                ),
            }
        }
        let schema = schema.ok_or_else(|| anyhow!("the split `{name}` has no file"))?;
        Ok(Self {
            name: name.to_owned(),
            files,
            schema,
            rows,
            counts,
            parts: None,
        })
    }

    /// Some rows of a whole split, as a split.
    #[must_use]
    pub fn slice(&self, start: usize, rows: usize) -> Self {
        let mut before = 0;
        let parts = self.counts.iter().map(|&count| {
            let from = start.clamp(before, before + count);
            let to = start.saturating_add(rows).clamp(before, before + count);
            let part = (from - before, to - from);
            before += count;
            part
        });
        Self {
            rows,
            parts: Some(parts.collect()),
            ..self.clone()
        }
    }

    /// The split's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its columns, without metadata.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The number of rows, from the files' footers.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its files, in order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The rows from the first to the last, in batches of at most `batch_rows`, and of at most some MiB unless one row has more.
    pub fn batches(&self, batch_rows: usize) -> impl Iterator<Item = Result<RecordBatch>> + use<> {
        let schema = self.schema.clone();
        let mut parts = self.parts.clone().map(Vec::into_iter);
        self.files.clone().into_iter().flat_map(move |file| -> Batches {
            let part = parts.as_mut().and_then(Iterator::next);
            let schema = schema.clone();
            let opened = viewer(&file, batch_rows, part).and_then(|batches| {
                let held = std::fs::metadata(&file)?.len();
                Ok((batches, MOST_FOR_NOTHING.saturating_add(held.saturating_mul(MOST_A_BYTE))))
            });
            let (batches, most) = match opened {
                Err(error) => return one(Err(error)),
                Ok(opened) => opened,
            };
            let mut bytes = 0;
            Box::new(batches.flat_map(move |batch| -> Batches {
                let read = || format!("could not read `{}`", file.display());
                let batch = match batch.with_context(read) {
                    Err(error) => return one(Err(error)),
                    Ok(batch) => batch,
                };
                bytes += batch_bytes(&batch);
                if bytes > most {
                    let file = file.display();
                    return one(Err(anyhow!(
                        "`{file}` holds {bytes} bytes of values and more, over {MOST_A_BYTE} times as much as it has itself"
                    )));
                }
                let schema = schema.clone();
                // One after the other: each is a copy, and together they may be far more than the batch was.
                let pieces = pieces(batch, BATCH_BYTES).into_iter();
                Box::new(pieces.map(move |piece| as_declared(&piece, &schema)))
            }))
        })
    }
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch>>>;

fn one(batch: Result<RecordBatch>) -> Batches {
    Box::new(std::iter::once(batch))
}

fn reader(file: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let open = || -> Result<_> {
        let opened = File::open(file)?;
        let bytes = opened.metadata()?.len();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&opened)?;
        check(&metadata, bytes)?;
        // The types come from Parquet itself: an Arrow schema kept beside them may ask for exotic ones.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = ArrowReaderMetadata::try_new(Arc::new(metadata), options)?;
        Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(
            opened, metadata,
        ))
    };
    open().with_context(|| format!("could not read `{}` as Parquet", file.display()))
}

/// The bytes that a file's values may take for each byte of the file, above 256 MiB: texts that repeat take little in a file.
const MOST_A_BYTE: u64 = 4096;
const MOST_FOR_NOTHING: u64 = 256 << 20;
/// The most bytes of a row.
const LONGEST: u64 = 64 << 20;
/// The most values of a column in a row, on the average of a row group.
const MOST_VALUES_A_ROW: i64 = 16 << 20;

/// Refuses what would cost more than it can be worth: a footer can say anything.
fn check(metadata: &ParquetMetaData, bytes: u64) -> Result<()> {
    let columns = metadata.file_metadata().schema_descr().columns();
    ensure!(
        columns.len() <= MOST_FIELDS,
        "it has {} columns, nested ones included; at most {MOST_FIELDS} are read; hint: leave out those that no stage needs",
        columns.len()
    );
    let depth = columns
        .iter()
        .map(|column| column.path().parts().len())
        .max();
    ensure!(
        depth.unwrap_or(0) <= DEEPEST,
        "its columns are nested {} deep; at most {DEEPEST} levels are read",
        depth.unwrap_or(0)
    );
    let rows = metadata.row_groups().iter().map(RowGroupMetaData::num_rows);
    let rows = rows.fold(0_u64, |all, rows| {
        all.saturating_add(u64::try_from(rows).unwrap_or(u64::MAX))
    });
    ensure!(
        rows <= 1_000_000 + bytes.saturating_mul(4096),
        "it says that it holds {rows} rows in {bytes} bytes"
    );
    let values = values_a_row(metadata);
    ensure!(
        values <= MOST_VALUES_A_ROW,
        "its rows have {values} values in one column; at most {MOST_VALUES_A_ROW} are read"
    );
    Ok(())
}

/// The rows of a file with texts as views, which share the bytes of a page: a text that stands once in a file and a thousand times
/// in a batch takes no more memory than in the file.
fn viewer(
    file: &Path,
    batch_rows: usize,
    part: Option<(usize, usize)>,
) -> Result<ParquetRecordBatchReader> {
    let reader = reader(file)?;
    let open = || -> Result<_> {
        let options = ArrowReaderOptions::new()
            .with_skip_arrow_metadata(true)
            .with_schema(viewed(reader.schema()));
        let metadata = ArrowReaderMetadata::try_new(reader.metadata().clone(), options)?;
        let batch_rows = batch_rows.min(most_rows(reader.metadata()));
        let mut reader =
            ParquetRecordBatchReaderBuilder::new_with_metadata(File::open(file)?, metadata);
        if let Some((start, rows)) = part {
            reader = reader.with_offset(start).with_limit(rows);
        }
        Ok(reader.with_batch_size(batch_rows).build()?)
    };
    open().with_context(|| format!("could not read `{}`", file.display()))
}

/// Rows that may be read at once for their number of values.
fn most_rows(metadata: &ParquetMetaData) -> usize {
    const MOST_VALUES: i64 = 8 << 20;
    usize::try_from(MOST_VALUES / values_a_row(metadata))
        .unwrap_or(1)
        .max(1)
}

/// The most values of a column in a row, on the average of a row group; at least 1.
fn values_a_row(metadata: &ParquetMetaData) -> i64 {
    let groups = metadata.row_groups().iter().flat_map(|group| {
        let rows = group.num_rows().max(1);
        let columns = group.columns().iter();
        columns.map(move |column| column.num_values() / rows)
    });
    groups.max().unwrap_or(0).max(1)
}

/// A schema with views in place of texts.
fn viewed(schema: &Schema) -> SchemaRef {
    Arc::new(Schema::new(
        schema.fields().iter().map(viewed_field).collect::<Vec<_>>(),
    ))
}

fn viewed_field(field: &Arc<Field>) -> Arc<Field> {
    let data_type = match field.data_type() {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Binary => DataType::BinaryView,
        DataType::List(item) => DataType::List(viewed_field(item)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(viewed_field).collect()),
        other => other.clone(),
    };
    Arc::new(field.as_ref().clone().with_data_type(data_type))
}

/// A batch with the columns' own types.
fn as_declared(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let bytes = batch_bytes(batch);
    ensure!(
        batch.num_rows() > 1 || bytes <= LONGEST,
        "a row has {bytes} bytes; at most {} MiB are read",
        LONGEST >> 20
    );
    let columns: Result<Vec<_>, ArrowError> = batch
        .columns()
        .iter()
        .zip(schema.fields())
        .map(|(column, field)| cast(column, field.data_type()))
        .collect();
    Ok(RecordBatch::try_new(schema.clone(), columns?)?)
}

/// A schema without metadata, which differs between programs that write the same rows; that a column is JSON stays.
pub(super) fn plain(schema: &Schema) -> SchemaRef {
    let fields: Vec<_> = schema
        .fields()
        .iter()
        .map(|field| {
            let plain = field.as_ref().clone().with_nullable(true);
            if is_json(field) {
                json_field(field.name()).with_data_type(plain.data_type().clone())
            } else {
                plain.with_metadata(HashMap::new())
            }
        })
        .collect();
    Arc::new(Schema::new(fields))
}

#[cfg(test)]
mod tests {
    use arrow_array::{ArrayRef, Int64Array, StringArray};
    use arrow_select::concat::concat_batches;

    use super::*;

    fn batch(range: std::ops::Range<i64>) -> RecordBatch {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(range.clone()));
        let texts: ArrayRef = Arc::new(StringArray::from_iter_values(
            range.map(|n| format!("row {n}")),
        ));
        RecordBatch::try_from_iter([("n", numbers), ("text", texts)]).unwrap()
    }

    #[test]
    fn slices_of_a_split_of_several_files_join_to_the_split() {
        let folder = tempfile::tempdir().unwrap();
        for (name, range) in [
            ("train-00000-of-00003", 0..3),
            ("train-00001-of-00003", 3..4),
            ("train-00002-of-00003", 4..9),
        ] {
            let mut writer =
                Writer::create(folder.path(), name, plain(&batch(0..1).schema())).unwrap();
            writer.write(&batch(range)).unwrap();
            writer.finish().unwrap();
        }
        let split = Split::open(folder.path(), "train").unwrap();
        let numbers = |split: &Split| -> Vec<i64> {
            let batches = split.batches(2).map(Result::unwrap);
            let columns = batches.map(|batch| batch.column(0).clone());
            columns
                .flat_map(|column| {
                    let column = column.as_any().downcast_ref::<Int64Array>().unwrap();
                    column.values().to_vec()
                })
                .collect()
        };
        for (start, rows) in [(0, 9), (0, 0), (2, 3), (3, 1), (4, 5), (8, 1), (9, 0)] {
            let slice = split.slice(start, rows);
            let expected: Vec<i64> = (start as i64..(start + rows) as i64).collect();
            assert_eq!((slice.rows(), numbers(&slice)), (rows, expected));
        }
    }

    #[test]
    fn parts_of_a_split_are_read_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for (name, range) in [
            ("train-00001-of-00002", 3..5),
            ("train-00000-of-00002", 0..3),
            ("test", 9..10),
        ] {
            let mut writer =
                Writer::create(folder.path(), name, plain(&batch(0..1).schema())).unwrap();
            writer.write(&batch(range)).unwrap();
            writer.finish().unwrap();
        }
        let names: Vec<_> = splits(folder.path()).unwrap().into_keys().collect();
        assert_eq!(names, ["test", "train"]);
        let split = Split::open(folder.path(), "train").unwrap();
        assert_eq!(split.rows(), 5);
        let batches: Result<Vec<_>> = split.batches(2).collect();
        let all = concat_batches(split.schema(), &batches.unwrap()).unwrap();
        assert_eq!(
            all,
            RecordBatch::try_new(split.schema().clone(), batch(0..5).columns().to_vec()).unwrap()
        );
        std::fs::remove_file(folder.path().join("train-00000-of-00002.parquet")).unwrap();
        assert!(
            splits(folder.path())
                .unwrap_err()
                .to_string()
                .contains("don't make a whole")
        );
    }

    #[test]
    fn an_unknown_split_is_named_beside_those_there_are() {
        let folder = tempfile::tempdir().unwrap();
        Writer::create(folder.path(), "train", plain(&batch(0..1).schema()))
            .unwrap()
            .finish()
            .unwrap();
        let error = Split::open(folder.path(), "test").unwrap_err().to_string();
        assert!(error.contains("no split `test`, but `train`"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_parquet_is_an_error_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("train.parquet"),
            b"<html>not found</html>",
        )
        .unwrap();
        let error = Split::open(folder.path(), "train").unwrap_err();
        assert!(format!("{error:#}").contains("train.parquet"));
    }

    #[test]
    fn names_of_splits() {
        assert_eq!(split_of("train"), ("train", None));
        assert_eq!(split_of("a-b-00001-of-00012"), ("a-b", Some((1, 12))));
        assert_eq!(split_of("train-of-thought"), ("train-of-thought", None));
    }
}
