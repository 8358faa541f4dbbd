//! Rows from JSON lines and JSON lists. Files are streamed twice: once for the types of columns, and once for the rows.

use std::cell::Cell as Counter;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Context as _, Result, anyhow, bail};
use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow_schema::{DataType, Field, Schema};
use rayon::prelude::*;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::cell::{Cell, reason};
use super::kind::{Kind, is_out_of_range};
use super::reading::TextFile;
use super::size::{BATCH_BYTES, LONGEST_ROW, MOST_FIELDS};
use super::table::BATCH_ROWS;
use row::{DEEPEST_JSON, Lookup, Parsed, Row, WithoutNan, too_deep, without_nan};

mod row;

/// The number of bytes of lines that are parsed together.
const BLOCK_BYTES: usize = 8 << 20;

/// The name of the column with the reason why a row can't be read. No JSON key or header is likely to have this name; if one has, it only
/// makes its row invalid.
pub(super) const BROKEN: &str = "\u{0}broken";
/// The layout of a file's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One object in each line.
    Lines,
    /// One list of objects.
    List,
    /// Consecutive objects, each over any number of lines.
    Objects,
}

/// The columns and the number of rows of a file.
#[derive(Debug)]
pub(super) struct Columns {
    /// The columns with their types, in the order in which they first appear.
    pub(super) kinds: Vec<(String, Kind)>,
    /// The columns with NaN or an infinity, each with its first row.
    pub(super) not_finite: BTreeMap<String, u64>,
    /// The number of rows that can't be read.
    pub(super) broken: u64,
    /// The number of rows that can be read.
    pub(super) rows: usize,
}

/// Determines the layout of a JSON file. Many files called `.json` hold JSON lines, and vice versa.
pub(super) fn layout(file: &TextFile) -> Result<Layout> {
    let mut reader = file.open()?;
    let start = reader
        .fill_buf()
        .map_err(|error| anyhow!("{}:1: {error}", file.display()))?;
    if start.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Ok(Layout::List);
    }
    let mut block = Block::default();
    block.read(&mut reader, file.display(), 1)?;
    let first = block.texts().first().map(|(_, text)| text.to_vec());
    // An object that continues in the next line.
    let goes_on = first.is_some_and(|line| {
        serde_json::from_slice::<Parsed>(&line).is_err_and(|error| error.is_eof())
    });
    Ok(if goes_on {
        Layout::Objects
    } else {
        Layout::Lines
    })
}

/// Determines the columns by reading the whole file, or its first `most` rows. Up to `skip` rows may be broken.
pub(super) fn columns(file: &TextFile, layout: Layout, most: usize, skip: u64) -> Result<Columns> {
    let mut columns: Vec<(String, Kind)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut not_finite = BTreeMap::new();
    let mut read = 0_usize;
    let mut broken = 0;
    // Only the types of values are needed, so values are dropped on the thread that parsed them.
    let kinds = |row: Row| {
        let kinds = row.values.iter().map(|(name, value)| {
            let text = value.get();
            if text.starts_with(['[', '{']) && too_deep(text) {
                bail!("the column `{name}` is nested more than {DEEPEST_JSON} levels deep");
            }
            if text.contains("\\u") {
                Cell::parse(text).with_context(|| format!("the column `{name}` can't be read"))?;
            }
            Ok((name.clone(), Kind::from_value(value)))
        });
        let kinds = kinds.collect::<Result<Vec<_>>>()?;
        let great = row
            .values
            .iter()
            .filter(|(_, value)| is_out_of_range(value.get()));
        let mut odd: Vec<String> = great.map(|(name, _)| name.clone()).collect();
        odd.extend(row.not_finite);
        Ok((kinds, odd))
    };
    rows(file, layout, &kinds, &mut |row, place| {
        let (kinds, odd) = match row {
            Ok(row) => row,
            Err(_) if broken < skip => {
                broken += 1;
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        for (name, kind) in kinds {
            if let Some((_, known)) = places.get(&name).and_then(|at| columns.get_mut(*at)) {
                *known = known.merge(kind);
                continue;
            }
            if columns.len() == MOST_FIELDS {
                bail!(
                    "{place}: the rows up to this one have more than {MOST_FIELDS} columns; hint: leave out those that no stage needs, or \
                     keep them in an object"
                );
            }
            places.insert(name.clone(), columns.len());
            columns.push((name, kind));
        }
        for name in odd {
            not_finite.entry(name).or_insert(place.row);
        }
        read += 1;
        Ok(read < most)
    })?;
    Ok(Columns {
        kinds: columns,
        not_finite,
        broken,
        rows: read,
    })
}

/// The fields of a file's rows and, if some rows can't be read, the field of [`BROKEN`].
pub(super) fn fields(columns: &Columns) -> Vec<Field> {
    let known = columns.kinds.iter();
    let mut fields: Vec<Field> = known.map(|(name, kind)| kind.field(name)).collect();
    if columns.broken > 0 {
        fields.push(Field::new(BROKEN, DataType::Utf8, true));
    }
    fields
}

/// The rows as batches. They are read on a thread of their own, which ends when the iterator is dropped.
pub(super) fn batches(
    file: &TextFile,
    layout: Layout,
    most: usize,
    columns: Arc<Columns>,
) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
    let (sender, receiver) = sync_channel::<Result<Vec<Result<Row, String>>>>(2);
    let file = file.clone();
    let skips = columns.broken > 0;
    std::thread::Builder::new()
        .name("json".to_owned())
        .spawn(move || {
            let mut pending = Vec::with_capacity(BATCH_ROWS);
            let (mut bytes, mut left) = (0, most);
            let keep = |row: Row| Ok(row);
            let read = rows(&file, layout, &keep, &mut |row, _| {
                let row = match row {
                    Ok(row) => Ok(row),
                    Err(error) if skips => Err(format!("{error:#}")),
                    Err(error) => return Err(error),
                };
                bytes += row.as_ref().map_or(0, Row::bytes);
                left = left.saturating_sub(usize::from(row.is_ok()));
                pending.push(row);
                if left == 0 {
                    return Ok(false);
                }
                if pending.len() < BATCH_ROWS && bytes < BATCH_BYTES {
                    return Ok(true);
                }
                bytes = 0;
                Ok(sender.send(Ok(std::mem::take(&mut pending))).is_ok())
            });
            // If the receiver is gone, nobody needs the rows.
            let _ = sender.send(Ok(pending));
            if let Err(error) = read {
                let _ = sender.send(Err(error));
            }
        })?;
    Ok(Box::new(receive(receiver, columns)))
}

fn receive(
    receiver: Receiver<Result<Vec<Result<Row, String>>>>,
    columns: Arc<Columns>,
) -> impl Iterator<Item = Result<RecordBatch>> {
    let schema = Arc::new(Schema::new(fields(&columns)));
    receiver.into_iter().map(move |rows| {
        let rows = rows?;
        let named: Vec<_> = rows
            .iter()
            .map(|row| Lookup::new(row.as_ref().ok()))
            .collect();
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(schema.fields().len());
        for (name, kind) in &columns.kinds {
            let values: Vec<Option<&RawValue>> = named.iter().map(|row| row.get(name)).collect();
            arrays.push(kind.build(&values)?);
        }
        if columns.broken > 0 {
            let reasons = rows.iter().map(|row| row.as_ref().err());
            arrays.push(Arc::new(reasons.collect::<StringArray>()));
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows.len()));
        Ok(RecordBatch::try_new_with_options(
            schema.clone(),
            arrays,
            &options,
        )?)
    })
}

/// The position of a row, for messages.
struct RowPosition<'a> {
    file: &'a str,
    /// Its number from 1, without blank lines.
    row: u64,
    line: Option<u64>,
}

impl fmt::Display for RowPosition<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) if line != self.row => write!(f, "{}:{line}: row {}", self.file, self.row),
            Some(line) => write!(f, "{}:{line}", self.file),
            None => write!(f, "{}: row {}", self.file, self.row),
        }
    }
}

/// Calls `each` with the result of `convert` for every row, and its position, until `each` returns false. Rows come in order; lines are
/// parsed and converted on all cores.
fn rows<T: Send>(
    file: &TextFile,
    layout: Layout,
    convert: &(dyn Fn(Row) -> Result<T> + Sync),
    each: &mut dyn FnMut(Result<T>, &RowPosition<'_>) -> Result<bool>,
) -> Result<()> {
    let reader = file.open()?;
    let name = file.display().to_owned();
    match layout {
        Layout::Lines => lines(reader, &name, convert, each),
        Layout::List => list(reader, &name, convert, each),
        Layout::Objects => objects(reader, &name, convert, each),
    }
}

/// A block of lines that are parsed together.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    /// For each line that is not blank, its number and its end in the bytes.
    lines: Vec<(u64, usize)>,
    last_number: u64,
}

impl Block {
    /// Reads the next lines; false at the end of the file.
    fn read(&mut self, reader: &mut impl BufRead, name: &str, most: usize) -> Result<bool> {
        self.bytes.clear();
        self.lines.clear();
        while self.lines.len() < most && self.bytes.len() < BLOCK_BYTES {
            let start = self.bytes.len();
            let number = self.last_number + 1;
            let count = (&mut *reader)
                .take(LONGEST_ROW as u64 + 1)
                .read_until(b'\n', &mut self.bytes)
                .map_err(|error| anyhow!("{name}:{number}: {error}"));
            let count = match count {
                Ok(count) => count,
                // The rows before the error come first, because no more of them may be needed.
                Err(_) if !self.lines.is_empty() => {
                    self.bytes.truncate(start);
                    return Ok(true);
                }
                Err(error) => return Err(error),
            };
            if count > LONGEST_ROW {
                bail!(
                    "{name}:{number}: this line has more than {} MiB; a row may not be longer; hint: is this JSON lines, with a row a line?",
                    LONGEST_ROW >> 20
                );
            }
            if count == 0 {
                return Ok(!self.lines.is_empty());
            }
            self.last_number = number;
            if self.bytes[start..].iter().all(u8::is_ascii_whitespace) {
                self.bytes.truncate(start);
            } else {
                self.lines.push((number, self.bytes.len()));
            }
        }
        Ok(true)
    }

    /// The lines with their numbers.
    fn texts(&self) -> Vec<(u64, &[u8])> {
        let mut start = 0;
        let text = |(number, end): &(u64, usize)| {
            let text = &self.bytes[start..*end];
            start = *end;
            (*number, text)
        };
        self.lines.iter().map(text).collect()
    }
}

fn lines<T: Send>(
    mut reader: impl BufRead,
    name: &str,
    convert: &(dyn Fn(Row) -> Result<T> + Sync),
    each: &mut dyn FnMut(Result<T>, &RowPosition<'_>) -> Result<bool>,
) -> Result<()> {
    let mut block = Block::default();
    let mut number = 0;
    while block.read(&mut reader, name, BATCH_ROWS)? {
        let parsed: Vec<(u64, Result<T>)> = block
            .texts()
            .into_par_iter()
            .with_min_len(32)
            .map(|(line_number, text)| {
                let at = || format!("{name}:{line_number}");
                let row = line(text, name, line_number);
                (
                    line_number,
                    row.and_then(|row| convert(row).with_context(at)),
                )
            })
            .collect();
        for (line, row) in parsed {
            number += 1;
            let place = RowPosition {
                file: name,
                row: number,
                line: Some(line),
            };
            if !each(row, &place)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn line(text: &[u8], name: &str, number: u64) -> Result<Row> {
    let at = || format!("{name}:{number}");
    let error = match serde_json::from_slice::<Parsed>(text) {
        Ok(parsed) => return parsed.row().with_context(at),
        Err(error) => error,
    };
    let marked = without_nan(text).and_then(|text| serde_json::from_slice::<Parsed>(&text).ok());
    if let Some(parsed) = marked {
        return parsed.marked_row().with_context(at);
    }
    let text = String::from_utf8_lossy(text);
    let shown: String = text.trim_end().chars().take(80).collect();
    Err(anyhow!(
        "{name}:{number}:{}: this line is no JSON: {}\n  {shown}",
        error.column().max(1),
        reason(&error)
    ))
}

fn list<T>(
    reader: impl BufRead,
    name: &str,
    convert: &dyn Fn(Row) -> Result<T>,
    each: &mut dyn FnMut(Result<T>, &RowPosition<'_>) -> Result<bool>,
) -> Result<()> {
    let mut outcome = Ok(());
    let mut stopped = false;
    let left = Counter::new(LONGEST_ROW);
    let mut deserializer = serde_json::Deserializer::from_reader(Metered {
        inner: WithoutNan::new(reader),
        left: &left,
    });
    let visitor = Rows {
        name,
        left: &left,
        each: &mut |row, place| {
            let at = || place.to_string();
            each(row.marked_row().and_then(convert).with_context(at), place)
        },
        outcome: &mut outcome,
        stopped: &mut stopped,
    };
    let read = deserializer
        .deserialize_seq(visitor)
        .and_then(|()| deserializer.end());
    outcome?;
    if stopped {
        return Ok(());
    }
    read.map_err(|error| no_json(name, &error))
}

fn objects<T>(
    reader: impl BufRead,
    name: &str,
    convert: &dyn Fn(Row) -> Result<T>,
    each: &mut dyn FnMut(Result<T>, &RowPosition<'_>) -> Result<bool>,
) -> Result<()> {
    let left = Counter::new(LONGEST_ROW);
    let reader = Metered {
        inner: WithoutNan::new(reader),
        left: &left,
    };
    let parsed = serde_json::Deserializer::from_reader(reader).into_iter::<Parsed>();
    for (number, parsed) in (1..).zip(parsed) {
        left.set(LONGEST_ROW);
        let place = RowPosition {
            file: name,
            row: number,
            line: None,
        };
        let parsed = parsed.map_err(|error| no_json(name, &error))?;
        let row = parsed.marked_row().and_then(convert);
        if !each(row.with_context(|| place.to_string()), &place)? {
            return Ok(());
        }
    }
    Ok(())
}

fn no_json(name: &str, error: &serde_json::Error) -> anyhow::Error {
    let no_json = if error.is_io() {
        ""
    } else {
        "this is no JSON: "
    };
    anyhow!(
        "{name}:{}:{}: {no_json}{}",
        error.line(),
        error.column().max(1),
        reason(error)
    )
}

/// A reader that fails when too many bytes are read for one row.
struct Metered<'a, R> {
    inner: R,
    left: &'a Counter<usize>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(bytes)?;
        let left = self.left.get().checked_sub(count);
        let left = left.ok_or_else(|| {
            std::io::Error::other(format!("a row has more than {} MiB", LONGEST_ROW >> 20))
        })?;
        self.left.set(left);
        Ok(count)
    }
}

/// A visitor that passes on the elements of a list as they are parsed, so that the whole list is never in memory.
struct Rows<'a> {
    name: &'a str,
    left: &'a Counter<usize>,
    each: &'a mut dyn FnMut(Parsed, &RowPosition<'_>) -> Result<bool>,
    outcome: &'a mut Result<()>,
    stopped: &'a mut bool,
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let mut number = 0_u64;
        while let Some(row) = access.next_element()? {
            number += 1;
            self.left.set(LONGEST_ROW);
            let place = RowPosition {
                file: self.name,
                row: number,
                line: None,
            };
            match (self.each)(row, &place) {
                Ok(true) => {}
                Ok(false) => {
                    *self.stopped = true;
                    return Err(serde::de::Error::custom("stopped"));
                }
                Err(error) => {
                    *self.outcome = Err(error);
                    return Err(serde::de::Error::custom("stopped"));
                }
            }
        }
        Ok(())
    }
}
