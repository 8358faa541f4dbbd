//! Writing a Parquet file on all cores: columns are encoded and compressed beside each other, and beside whatever makes the
//! next rows. The bytes are those of `ArrowWriter`, and depend on the rows alone.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context as _, Result, anyhow};
use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::{
    ArrowColumnChunk, ArrowColumnWriter, ArrowRowGroupWriterFactory, compute_leaves,
};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use rayon::prelude::*;

use super::super::size::batch_bytes;
use super::{BATCH_ROWS, Split};

/// Most rows of a row group.
const GROUP_ROWS: usize = 64 * BATCH_ROWS;
/// A row group ends when its rows take this many bytes in memory.
const GROUP_BYTES: usize = 64 << 20;
/// Rows that wait to be [`BATCH_ROWS`] are encoded before that when they take this many bytes.
const PENDING_BYTES: u64 = 256 << 20;

/// Writes one split as `<name>.parquet`. The bytes depend on the rows alone, not on the batches they arrive in.
pub struct Writer {
    parquet: SerializedFileWriter<File>,
    factory: ArrowRowGroupWriterFactory,
    /// The columns of the row group in the making, and its rows.
    group: Option<(Vec<ArrowColumnWriter>, usize)>,
    schema: SchemaRef,
    pending: Vec<RecordBatch>,
    pending_rows: usize,
    pending_bytes: u64,
    group_bytes: usize,
    rows: usize,
    path: PathBuf,
}

impl Writer {
    /// Creates the file of the split `name` in `folder`.
    pub fn create(folder: &Path, name: &str, schema: SchemaRef) -> Result<Self> {
        Self::create_file(&folder.join(format!("{name}.parquet")), schema)
    }

    /// Creates a file anywhere.
    pub fn create_file(path: &Path, schema: SchemaRef) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("could not create `{}`", path.display()))?;
        let (parquet, factory) = ArrowWriter::try_new(file, schema.clone(), Some(properties()?))
            .and_then(ArrowWriter::into_serialized_writer)
            .with_context(|| format!("could not write `{}`", path.display()))?;
        Ok(Self {
            parquet,
            factory,
            group: None,
            schema,
            pending: Vec::new(),
            pending_rows: 0,
            pending_bytes: 0,
            group_bytes: 0,
            rows: 0,
            path: path.to_owned(),
        })
    }

    /// Adds rows at the end.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.rows += batch.num_rows();
        let mut start = 0;
        while start < batch.num_rows() {
            let length = (BATCH_ROWS - self.pending_rows).min(batch.num_rows() - start);
            let piece = batch.slice(start, length);
            start += length;
            let bytes = batch_bytes(&piece);
            if self.pending_bytes + bytes < PENDING_BYTES {
                self.add(piece, bytes)?;
                continue;
            }
            // Row by row, so that it depends on the rows alone where they are cut.
            for row in 0..length {
                let row = piece.slice(row, 1);
                let bytes = batch_bytes(&row);
                self.add(row, bytes)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, rows: RecordBatch, bytes: u64) -> Result<()> {
        self.pending_rows += rows.num_rows();
        self.pending_bytes += bytes;
        self.pending.push(rows);
        if self.pending_rows == BATCH_ROWS || self.pending_bytes >= PENDING_BYTES {
            self.pass_on()?;
        }
        Ok(())
    }

    /// Completes the file; returns the number of rows.
    pub fn finish(mut self) -> Result<usize> {
        self.pass_on()?;
        let finished = self.end_group().and_then(|()| self.parquet.close());
        finished.with_context(|| format!("could not write `{}`", self.path.display()))?;
        Ok(self.rows)
    }

    fn pass_on(&mut self) -> Result<()> {
        if self.pending_rows == 0 {
            return Ok(());
        }
        // The bytes of a slice's lists are those of the whole, which would end the group too early.
        let flat = |batch: &RecordBatch| {
            let mut columns = batch.columns().iter();
            columns.all(|column| !column.data_type().is_nested())
        };
        let batch = match self.pending.as_slice() {
            [batch] if flat(batch) => batch.clone(),
            batches => concat_batches(&self.schema, batches)?,
        };
        self.pending.clear();
        self.pending_rows = 0;
        self.pending_bytes = 0;
        let sizes = batch
            .columns()
            .iter()
            .map(|column| column.to_data().get_slice_memory_size());
        for size in sizes {
            self.group_bytes += size?;
        }
        let written = self.encode(&batch).and_then(|()| {
            if self.group_bytes >= GROUP_BYTES {
                self.group_bytes = 0;
                self.end_group()?;
            }
            Ok(())
        });
        written.with_context(|| format!("could not write `{}`", self.path.display()))
    }

    /// Adds at most [`BATCH_ROWS`] rows to the group, a column a thread.
    fn encode(&mut self, batch: &RecordBatch) -> Result<(), ParquetError> {
        let (columns, rows) = if let Some(group) = &mut self.group {
            group
        } else {
            let number = self.parquet.flushed_row_groups().len();
            let columns = self.factory.create_column_writers(number)?;
            self.group.insert((columns, 0))
        };
        let mut leaves = Vec::with_capacity(columns.len());
        for (field, column) in self.schema.fields().iter().zip(batch.columns()) {
            leaves.extend(compute_leaves(field, column)?);
        }
        columns
            .par_iter_mut()
            .zip(leaves)
            .try_for_each(|(column, leaf)| column.write(&leaf))?;
        *rows += batch.num_rows();
        if *rows >= GROUP_ROWS {
            self.end_group()?;
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<(), ParquetError> {
        let Some((columns, _)) = self.group.take() else {
            return Ok(());
        };
        let chunks: Result<Vec<ArrowColumnChunk>, _> = columns
            .into_par_iter()
            .map(ArrowColumnWriter::close)
            .collect();
        let mut group = self.parquet.next_row_group()?;
        for chunk in chunks? {
            chunk.append_to_row_group(&mut group)?;
        }
        group.close()?;
        Ok(())
    }
}

fn properties() -> Result<WriterProperties> {
    Ok(WriterProperties::builder()
        .set_created_by("pipeline".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        // Page statistics of long texts would cost space and help nobody.
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .build())
}

/// Passes all rows of `split` through `work` into `writer`, in order, while the next rows are read and the last ones written.
/// Returns the number of rows written.
pub fn pass(
    split: &Split,
    writer: Writer,
    mut work: impl FnMut(RecordBatch) -> Result<RecordBatch>,
) -> Result<usize> {
    pass_pieces(split, writer, |batch, made| made.send(work(batch)?))
}

/// The same for a `work` that makes several batches of one, because rows may grow.
pub fn pass_pieces(
    split: &Split,
    writer: Writer,
    mut work: impl FnMut(RecordBatch, &mut Made<'_>) -> Result<()>,
) -> Result<usize> {
    pass_batches(|| split.batches(BATCH_ROWS), writer, &mut work)
}

/// Takes what was made of rows.
pub struct Made<'a> {
    queue: &'a SyncSender<RecordBatch>,
    /// Whether the writer stopped, which tells why itself.
    gone: bool,
}

impl Made<'_> {
    /// Hands rows to the writer.
    pub fn send(&mut self, batch: RecordBatch) -> Result<()> {
        self.gone |= self.queue.send(batch).is_err();
        Ok(())
    }
}

/// The same for rows from anywhere; `open` is called on the reading thread.
pub(in crate::data) fn pass_batches<T: Send, I: Iterator<Item = Result<T>>>(
    open: impl FnOnce() -> I + Send,
    mut writer: Writer,
    work: &mut dyn FnMut(T, &mut Made<'_>) -> Result<()>,
) -> Result<usize> {
    std::thread::scope(|scope| {
        let (reader, batches) = sync_channel(2);
        let read = move || {
            for batch in open() {
                // Nobody listening is no reason to complain.
                if reader.send(batch).is_err() {
                    break;
                }
            }
        };
        let thread = || std::thread::Builder::new();
        thread()
            .spawn_scoped(scope, read)
            .context("could not start a thread")?;
        let (queue, made_batches) = sync_channel::<RecordBatch>(2);
        let write = move || {
            for batch in made_batches {
                writer.write(&batch)?;
            }
            writer.finish()
        };
        let written = thread()
            .spawn_scoped(scope, write)
            .context("could not start a thread")?;
        let mut made = Made {
            queue: &queue,
            gone: false,
        };
        let mut worked = Ok(());
        for batch in batches {
            worked = batch.and_then(|batch| work(batch, &mut made));
            if worked.is_err() || made.gone {
                break;
            }
        }
        drop(queue);
        let rows = written.join();
        worked?;
        rows.map_err(|_| anyhow!("the writer of a table stopped"))?
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::types::Int32Type;
    use arrow_array::{ArrayRef, Int64Array, ListArray, StringArray};

    use super::super::plain;
    use super::*;

    /// Numbers, texts, some of them null, and lists.
    fn batch(range: std::ops::Range<i64>) -> RecordBatch {
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(range.clone()));
        let text =
            |n: i64| (n % 7 != 0).then(|| format!("row {n} {}", "x".repeat(n as usize % 50)));
        let texts: ArrayRef = Arc::new(range.clone().map(text).collect::<StringArray>());
        let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
            range.map(|n| Some((0..n as i32 % 5).map(Some))),
        ));
        RecordBatch::try_from_iter([("n", numbers), ("text", texts), ("list", lists)]).unwrap()
    }

    fn schema() -> SchemaRef {
        plain(&batch(0..1).schema())
    }

    fn written(sizes: &[i64]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(folder.path(), "train", schema()).unwrap();
        let mut start = 0;
        for size in sizes {
            writer.write(&batch(start..start + size)).unwrap();
            start += size;
        }
        assert_eq!(writer.finish().unwrap(), usize::try_from(start).unwrap());
        std::fs::read(folder.path().join("train.parquet")).unwrap()
    }

    #[test]
    fn bytes_do_not_depend_on_the_batches() {
        let whole = written(&[5000]);
        assert_eq!(whole, written(&[1, 1023, 2000, 0, 1976]));
        assert_eq!(whole, written(&[1024, 1024, 1024, 1024, 904]));
        assert_ne!(whole, written(&[4999]));
    }

    #[test]
    fn bytes_are_those_of_the_library_whatever_the_threads() {
        let rows = GROUP_ROWS as i64 + 3000;
        let mut theirs =
            ArrowWriter::try_new(Vec::new(), schema(), Some(properties().unwrap())).unwrap();
        for start in (0..rows).step_by(BATCH_ROWS) {
            let end = rows.min(start + BATCH_ROWS as i64);
            let batch = batch(start..end);
            let batch = RecordBatch::try_new(schema(), batch.columns().to_vec()).unwrap();
            theirs.write(&batch).unwrap();
        }
        let theirs = theirs.into_inner().unwrap();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let ours = pool.unwrap().install(|| written(&[rows]));
            assert!(ours == theirs, "{threads}");
        }
        assert!(
            written(&[]) == {
                let empty = ArrowWriter::try_new(Vec::new(), schema(), Some(properties().unwrap()));
                empty.unwrap().into_inner().unwrap()
            }
        );
    }

    #[test]
    fn rows_pass_in_order_and_errors_stop_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(folder.path(), "train", schema()).unwrap();
        writer.write(&batch(0..5000)).unwrap();
        writer.finish().unwrap();
        let split = Split::open(folder.path(), "train").unwrap();
        let copy = || Writer::create(folder.path(), "copy", schema()).unwrap();
        let mut seen = 0;
        let rows = pass(&split, copy(), |batch| {
            seen += batch.num_rows();
            Ok(batch)
        });
        assert_eq!((rows.unwrap(), seen), (5000, 5000));
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        assert!(read("train.parquet") == read("copy.parquet"));
        let mut calls = 0;
        let error = pass(&split, copy(), |batch| {
            calls += 1;
            anyhow::ensure!(calls < 3, "the third");
            Ok(batch)
        });
        assert_eq!(error.unwrap_err().to_string(), "the third");
        // A batch that doesn't fit the file stops the writer, and its sentence is the one that is told.
        let error = pass(&split, copy(), |batch| Ok(batch.project(&[0])?)).unwrap_err();
        assert!(format!("{error:#}").contains("copy.parquet"), "{error:#}");
    }
}
