//! Rows from Arrow files, in both formats of its IPC: streams (`save_to_disk` of `datasets`) and files (Feather, version 2).
//!
//! A file holds a stream between its first bytes and a footer, and that stream is read. The size of each message is checked before its bytes
//! are read or decoded, because a message may claim any size.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_cast::{can_cast_types, cast};
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{read_dictionary, read_record_batch};
use arrow_ipc::{Endianness, Message, MessageHeader, RecordBatch as Layout, root_as_message};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};

use super::reading::{head_of, starts_as};
use super::size::{BATCH_BYTES, DEEPEST, MOST_FIELDS, pieces};
use super::table::BATCH_ROWS;

/// The first bytes of the file format.
const MAGIC: &[u8] = b"ARROW1";
/// The marker before a message's length in a stream.
const CONTINUES: u32 = u32::MAX;
/// The longest description of a message in bytes.
const LONGEST_DESCRIPTION: u32 = 64 << 20;
/// The largest number of bytes of a batch of rows, as stored and decompressed.
const MOST_BYTES: u64 = 1 << 30;
/// The largest number of rows in a batch.
const MOST_ROWS: i64 = 256 << 20;

/// An Arrow file, and its columns as they are read.
#[derive(Debug, Clone)]
pub(super) struct ArrowFile {
    path: std::path::PathBuf,
    shown: String,
    schema: SchemaRef,
}

impl ArrowFile {
    /// Reads the description of the columns.
    pub(super) fn open(path: &Path, shown: &str) -> Result<Self> {
        let stream = Stream::open(path);
        let stream = stream.with_context(|| format!("could not read `{shown}`"))?;
        Ok(Self {
            path: path.to_owned(),
            shown: shown.to_owned(),
            schema: stream.readable,
        })
    }

    /// The columns with plain types, without the encodings in which Arrow may store them.
    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The rows as batches.
    pub(super) fn batches(&self) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
        let named = |shown: &str| format!("could not read `{shown}`");
        let mut stream = Stream::open(&self.path).with_context(|| named(&self.shown))?;
        let shown = self.shown.clone();
        let mut row = 0_usize;
        let batches = std::iter::from_fn(move || {
            let whole = stream.next().transpose()?;
            let schema = stream.readable.clone();
            let whole = match whole {
                Ok(whole) => whole,
                Err(error) => {
                    let behind = match row {
                        0 => named(&shown),
                        row => format!("{} behind row {row}", named(&shown)),
                    };
                    return Some(vec![Err(error.context(behind))]);
                }
            };
            row += whole.num_rows();
            let starts = (0..whole.num_rows()).step_by(BATCH_ROWS);
            let some = starts.flat_map(|start| {
                let rows = whole.slice(start, BATCH_ROWS.min(whole.num_rows() - start));
                match plainly(&rows, &schema) {
                    Ok(batch) => pieces(batch, BATCH_BYTES).into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(error.context(named(&shown)))],
                }
            });
            Some(some.collect())
        });
        Ok(Box::new(batches.flatten()))
    }
}

/// The messages of a file.
struct Stream {
    file: BufReader<File>,
    /// The number of bytes that are left.
    left: u64,
    /// The columns as the file has them.
    schema: SchemaRef,
    readable: SchemaRef,
    dictionaries: HashMap<i64, ArrayRef>,
}

impl Stream {
    fn open(path: &Path) -> Result<Self> {
        let head = head_of(path)?;
        let is_file = head.starts_with(MAGIC);
        let is_stream = matches!(head.as_slice(), [0xff, 0xff, 0xff, 0xff, ..]);
        // In old versions a stream starts with the length of its first message.
        let is_old = matches!(head.as_slice(), [_, _, 0, 0, more @ ..] if more.contains(&0));
        if !is_stream && !is_old {
            starts_as(&head, MAGIC, "Arrow file")?;
        }
        let file = File::open(path)?;
        let left = file.metadata()?.len();
        let mut stream = Self {
            file: BufReader::with_capacity(1 << 16, file),
            left,
            schema: Arc::new(Schema::empty()),
            readable: Arc::new(Schema::empty()),
            dictionaries: HashMap::new(),
        };
        if is_file {
            stream.take(8)?;
        }
        let description = stream.description()?;
        let description = description.context("it has no description of its columns")?;
        let message = message(&description)?;
        let schema = message.header_as_schema();
        let schema = schema.context("it doesn't begin with a description of its columns")?;
        ensure!(
            schema.endianness() == Endianness::Little,
            "it was written on a machine with the other order of bytes; hint: write it anew as Parquet"
        );
        let schema = try_fb_to_schema(schema)
            .map_err(|_| anyhow!("its columns have types that are not known"))?;
        stream.readable = readable(&schema)?;
        stream.schema = Arc::new(schema);
        Ok(stream)
    }

    /// The next rows, if there are more.
    fn next(&mut self) -> Result<Option<RecordBatch>> {
        while let Some(description) = self.description()? {
            let message = message(&description)?;
            let length = u64::try_from(message.bodyLength()).unwrap_or(u64::MAX);
            ensure!(
                length <= MOST_BYTES,
                "one batch of rows has {length} bytes; at most {} MiB are read; hint: write it in smaller batches or as Parquet",
                MOST_BYTES >> 20
            );
            let body = self.take(length)?;
            let version = message.version();
            match message.header_type() {
                MessageHeader::DictionaryBatch => {
                    let batch = message.header_as_dictionary_batch();
                    let batch = batch.with_context(damaged)?;
                    let id = batch.id();
                    #[expect(deprecated)]
                    let field = self
                        .schema
                        .fields_with_dict_id(id)
                        .first()
                        .copied()
                        .cloned();
                    let values = match field.as_ref().map(Field::data_type) {
                        Some(DataType::Dictionary(_, values)) => {
                            Field::new("", values.as_ref().clone(), true)
                        }
                        _ => bail!(damaged()),
                    };
                    measure(
                        batch.data().with_context(damaged)?,
                        &body,
                        &[Arc::new(values)],
                    )?;
                    read_dictionary(&body, batch, &self.schema, &mut self.dictionaries, &version)
                        .map_err(|_| anyhow!(damaged()))?;
                }
                MessageHeader::RecordBatch => {
                    let batch = message.header_as_record_batch();
                    let batch = batch.with_context(damaged)?;
                    measure(batch, &body, self.schema.fields())?;
                    let schema = Arc::clone(&self.schema);
                    let rows =
                        read_record_batch(&body, batch, schema, &self.dictionaries, None, &version);
                    return Ok(Some(rows.map_err(|_| anyhow!(damaged()))?));
                }
                MessageHeader::Schema => bail!("its columns are described twice"),
                _ => {}
            }
        }
        Ok(None)
    }

    /// The description of the next message; `None` at the end.
    fn description(&mut self) -> Result<Option<Buffer>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut length = self.number()?;
        if length == CONTINUES {
            length = self.number()?;
        }
        if length == 0 {
            return Ok(None);
        }
        ensure!(length <= LONGEST_DESCRIPTION, "{}", damaged());
        Ok(Some(self.take(u64::from(length))?))
    }

    fn number(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        let bytes = bytes.as_slice().try_into().ok();
        Ok(u32::from_le_bytes(bytes.with_context(damaged)?))
    }

    /// The next bytes.
    fn take(&mut self, count: u64) -> Result<Buffer> {
        let cut_off = || "it is cut off in the middle of its rows; hint: fetch it anew";
        self.left = self.left.checked_sub(count).with_context(cut_off)?;
        let length = usize::try_from(count).with_context(cut_off)?;
        let mut bytes = MutableBuffer::from_len_zeroed(length);
        match self.file.read_exact(bytes.as_slice_mut()) {
            Ok(()) => Ok(bytes.into()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => bail!(cut_off()),
            Err(error) => Err(error.into()),
        }
    }
}

fn damaged() -> String {
    "it is damaged: what it says of its rows doesn't fit; hint: fetch it anew".to_owned()
}

fn message(description: &Buffer) -> Result<Message<'_>> {
    root_as_message(description.as_slice()).map_err(|_| anyhow!(damaged()))
}

/// Checks that the parts of a batch lie within its bytes, hold whole values, and are not too large once they are decompressed.
fn measure(batch: Layout<'_>, body: &Buffer, fields: &[FieldRef]) -> Result<()> {
    let rows = batch.length();
    ensure!(
        (0..=MOST_ROWS).contains(&rows),
        "one batch says that it has {rows} rows; at most {MOST_ROWS} are read; hint: write it in smaller batches or as Parquet"
    );
    let nodes = batch.nodes();
    let fits = |length: i64| (0..=i64::from(i32::MAX)).contains(&length);
    let mut lengths = nodes.iter().flat_map(IntoIterator::into_iter);
    ensure!(
        lengths.all(|node| fits(node.length()) && (0..=node.length()).contains(&node.null_count())),
        "{}",
        damaged()
    );
    let mut widths = Vec::new();
    let mut more = batch.variadicBufferCounts().into_iter().flatten();
    for field in fields {
        value_widths(field.data_type(), &mut more, &mut widths)?;
    }
    let packed = batch.compression().is_some();
    let mut all = 0_u64;
    let parts = batch
        .buffers()
        .into_iter()
        .flat_map(|buffers| buffers.iter());
    for (number, part) in parts.enumerate() {
        let range = usize::try_from(part.offset())
            .ok()
            .zip(usize::try_from(part.length()).ok());
        let bytes = range.and_then(|(start, length)| body.get(start..start.checked_add(length)?));
        let bytes = bytes.with_context(damaged)?;
        let mut length = bytes.len() as u64;
        if packed && !bytes.is_empty() {
            let said = bytes.first_chunk().with_context(damaged)?;
            // A length of -1 means that the part is not compressed.
            length = match i64::from_le_bytes(*said) {
                -1 => length,
                said => u64::try_from(said).ok().with_context(damaged)?,
            };
        }
        let width = widths.get(number).copied().unwrap_or(1);
        ensure!(length.is_multiple_of(width), "{}", damaged());
        all = all.saturating_add(length);
    }
    ensure!(
        all <= MOST_BYTES,
        "one batch of rows has {all} bytes; at most {} MiB are read; hint: write it in smaller batches or as Parquet",
        MOST_BYTES >> 20
    );
    Ok(())
}

/// The bytes of a value in each part of a column, in the order in which a batch has them.
fn value_widths(
    data_type: &DataType,
    more: &mut dyn Iterator<Item = i64>,
    widths: &mut Vec<u64>,
) -> Result<()> {
    let mut below =
        |field: &FieldRef, widths: &mut Vec<u64>| value_widths(field.data_type(), more, widths);
    match data_type {
        DataType::Null => {}
        DataType::Utf8 | DataType::Binary => widths.extend([1, 4, 1]),
        DataType::LargeUtf8 | DataType::LargeBinary => widths.extend([1, 8, 1]),
        DataType::Utf8View | DataType::BinaryView => {
            let count = more.next().and_then(|count| usize::try_from(count).ok());
            let count = count.filter(|count| *count < 1 << 20);
            widths.extend([1, 16]);
            widths.resize(widths.len() + count.with_context(damaged)?, 1);
        }
        DataType::List(item) | DataType::Map(item, _) => {
            widths.extend([1, 4]);
            below(item, widths)?;
        }
        DataType::LargeList(item) => {
            widths.extend([1, 8]);
            below(item, widths)?;
        }
        DataType::ListView(item) => {
            widths.extend([1, 4, 4]);
            below(item, widths)?;
        }
        DataType::LargeListView(item) => {
            widths.extend([1, 8, 8]);
            below(item, widths)?;
        }
        DataType::FixedSizeList(item, _) => {
            widths.push(1);
            below(item, widths)?;
        }
        DataType::Struct(fields) => {
            widths.push(1);
            for field in fields {
                below(field, widths)?;
            }
        }
        DataType::RunEndEncoded(ends, values) => {
            below(ends, widths)?;
            below(values, widths)?;
        }
        DataType::Dictionary(keys, _) => {
            widths.extend([1, keys.primitive_width().unwrap_or(1) as u64]);
        }
        plain => widths.extend([1, plain.primitive_width().unwrap_or(1) as u64]),
    }
    Ok(())
}

/// The columns with the types in which they are read.
fn readable(schema: &Schema) -> Result<SchemaRef> {
    let mut fields = Vec::with_capacity(schema.fields().len());
    let mut count = 0;
    for field in schema.fields() {
        let name = field.name();
        let is_new = fields.iter().all(|known: &FieldRef| known.name() != name);
        ensure!(is_new, "it has two columns called `{name}`");
        let plain = plain_field(field, 1, &mut count)
            .with_context(|| format!("the column `{name}` can't be read; hint: leave it out"))?;
        ensure!(
            can_cast_types(field.data_type(), plain.data_type()),
            "the column `{name}` has a type that can't be read; hint: leave it out"
        );
        fields.push(plain);
    }
    Ok(Arc::new(Schema::new(fields)))
}

/// A field with the types of Parquet files: our columns have no dictionaries, views or large offsets.
fn plain_field(field: &FieldRef, depth: usize, count: &mut usize) -> Result<FieldRef> {
    *count += 1;
    ensure!(
        *count <= MOST_FIELDS,
        "the file has more than {MOST_FIELDS} columns, nested ones included"
    );
    ensure!(
        depth <= DEEPEST,
        "its values are nested more than {DEEPEST} deep"
    );
    let mut below = |field: &FieldRef| plain_field(field, depth + 1, count);
    let data_type = match field.data_type() {
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, 0..) => DataType::List(below(item)?),
        DataType::Struct(fields) => {
            DataType::Struct(fields.iter().map(below).collect::<Result<_>>()?)
        }
        DataType::Dictionary(_, values) => {
            let values = Field::new(field.name(), values.as_ref().clone(), true);
            below(&Arc::new(values))?.data_type().clone()
        }
        DataType::RunEndEncoded(_, values) => below(values)?.data_type().clone(),
        DataType::Union(..) => bail!("its values have several types (a union)"),
        DataType::Map(..) => bail!("it holds maps"),
        DataType::FixedSizeList(..) | DataType::FixedSizeBinary(i32::MIN..0) => bail!(damaged()),
        plain => plain.clone(),
    };
    let plain = Field::new(field.name(), data_type, true);
    Ok(Arc::new(plain.with_metadata(field.metadata().clone())))
}

/// Converts rows to the columns' plain types.
fn plainly(rows: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let columns: std::result::Result<Vec<_>, _> = rows
        .columns()
        .iter()
        .zip(schema.fields())
        .map(|(column, field)| cast(column, field.data_type()))
        .collect();
    let batch = columns.and_then(|columns| RecordBatch::try_new(schema.clone(), columns));
    batch.map_err(|_| anyhow!("its values can't be read as text, numbers and lists of them"))
}

#[cfg(test)]
mod tests;
