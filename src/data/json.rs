//! Rows from JSON lines and JSON lists, streamed twice: once for the columns' types, once for the rows.

use std::cell::Cell as Counter;
use std::collections::HashMap;
use std::fmt;
use std::io::{BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Result, anyhow, bail};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::cell::Cell;
use super::import::fits;
use super::kind::{Kind, Lookup};
use super::reading::TextFile;
use super::size::{BATCH_BYTES, LONGEST_ROW, MOST_FIELDS};
use super::table::BATCH_ROWS;

/// Lines are parsed together until they have so many bytes.
const BLOCK_BYTES: usize = 8 << 20;

/// Columns in the order in which they first appear.
pub(super) type Columns = Vec<(String, Kind)>;

/// Whether the file's first character begins a list. Many files called `.json` hold JSON lines.
pub(super) fn is_list(file: &TextFile) -> Result<bool> {
    let mut first = Vec::new();
    let read = file.open()?.take(256).read_to_end(&mut first);
    // A mistake behind the first character is told with its place when the rows are read.
    let start = first.iter().find(|byte| !byte.is_ascii_whitespace());
    match (start, read) {
        (None, Err(error)) => Err(anyhow!("{}:1: {error}", file.display())),
        (start, _) => Ok(start == Some(&b'[')),
    }
}

/// Reads the whole file for its columns. `canonical` are the names that must hold text or messages.
pub(super) fn columns(
    path: &TextFile,
    as_list: bool,
    max_rows: Option<usize>,
    canonical: &[String],
) -> Result<Columns> {
    let mut columns: Columns = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    let ours: HashMap<&str, &str> = canonical
        .iter()
        .map(String::as_str)
        .zip(super::import::CANONICAL)
        .collect();
    let mut left = max_rows.unwrap_or(usize::MAX);
    let mut width = 0_usize;
    // Values are only needed for their types, and are dropped where they were read.
    let kinds = |row: Cell| match row {
        Cell::Map(entries) => Ok(entries
            .into_iter()
            .map(|(name, value)| (name, Kind::of(&value)))
            .collect::<Vec<_>>()),
        row => Err(row.noun()),
    };
    rows(path, as_list, &kinds, &mut |row, place| {
        let entries =
            row.map_err(|noun| anyhow!("{place}: expected an object with columns, found {noun}"))?;
        for (name, kind) in entries {
            let index = if let Some(index) = places.get(&name) {
                *index
            } else {
                columns.push((name.clone(), Kind::Null));
                width += 1;
                places.insert(name.clone(), columns.len() - 1);
                columns.len() - 1
            };
            let Some((_, known)) = columns.get_mut(index) else {
                continue;
            };
            if *known == kind && width <= MOST_FIELDS {
                continue;
            }
            let before = known.clone();
            *known = before.clone().merge(kind.clone());
            width = width
                .saturating_add(known.columns())
                .saturating_sub(before.columns());
            if width > MOST_FIELDS {
                bail!(
                    "{place}: the rows up to this one have more than {MOST_FIELDS} columns and fields of objects, which each become a \
                     column; hint: leave out those that no stage needs, or write such an object as text"
                );
            }
            let Some(ours) = ours.get(name.as_str()) else {
                continue;
            };
            if fits(ours, known) {
                continue;
            }
            let holds = kind.noun();
            if fits(ours, &before) && fits(ours, &kind) {
                bail!(
                    "{place}: the column `{name}` holds {holds}, unlike the rows before: expected the same in every row"
                );
            }
            let expected = match *ours {
                "system" => "text",
                "messages" => "a list of messages with `role` and `content`",
                _ => "text, or a list of messages with `role` and `content`",
            };
            bail!("{place}: the column `{name}` holds {holds}: expected {expected}");
        }
        left = left.saturating_sub(1);
        Ok(left > 0)
    })?;
    Ok(columns)
}

/// The number of rows, but not above `most`.
pub(super) fn count(file: &TextFile, as_list: bool, most: usize) -> Result<usize> {
    let mut count = 0;
    rows(file, as_list, &|_| (), &mut |(), _| {
        count += 1;
        Ok(count < most)
    })?;
    Ok(count)
}

/// The rows as batches. They are read on a thread of their own, which ends when the iterator is dropped.
pub(super) fn batches(
    path: &TextFile,
    as_list: bool,
    most: usize,
    columns: Arc<Columns>,
) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
    let (sender, receiver) = sync_channel::<Result<Vec<Cell>>>(2);
    let path = path.clone();
    std::thread::Builder::new()
        .name("json".to_owned())
        .spawn(move || {
            let mut pending = Vec::with_capacity(BATCH_ROWS);
            let (mut bytes, mut left) = (0, most);
            let sized = |row: Cell| (row.bytes() as u64, row);
            let read = rows(&path, as_list, &sized, &mut |(size, row), _| {
                pending.push(row);
                bytes += size;
                left = left.saturating_sub(1);
                if left == 0 {
                    return Ok(false);
                }
                if pending.len() < BATCH_ROWS && bytes < BATCH_BYTES {
                    return Ok(true);
                }
                bytes = 0;
                Ok(sender.send(Ok(std::mem::take(&mut pending))).is_ok())
            });
            let last = read.map(|()| pending);
            // Nobody listening is no reason to complain.
            let _ = sender.send(last);
        })?;
    Ok(Box::new(receive(receiver, columns)))
}

fn receive(
    receiver: Receiver<Result<Vec<Cell>>>,
    columns: Arc<Columns>,
) -> impl Iterator<Item = Result<RecordBatch>> {
    receiver.into_iter().map(move |rows| {
        let rows = rows?;
        let mut fields = Vec::with_capacity(columns.len());
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(columns.len());
        let named: Vec<Lookup<'_>> = rows.iter().map(Lookup::of).collect();
        for (name, kind) in columns.iter() {
            let cells: Vec<&Cell> = named.iter().map(|row| row.get(name)).collect();
            fields.push(Field::new(name, kind.data_type(), true));
            arrays.push(kind.build(&cells)?);
        }
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    })
}

/// Where a row stands, for messages.
struct Place<'a> {
    file: &'a str,
    number: u64,
    is_line: bool,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.is_line { ":" } else { ": row " };
        write!(f, "{}{between}{}", self.file, self.number)
    }
}

/// Calls `each` with what `of` makes of every row, and its place, until it says false. Rows come in order; lines are parsed and
/// given to `of` on all cores.
fn rows<T: Send>(
    path: &TextFile,
    as_list: bool,
    of: &(dyn Fn(Cell) -> T + Sync),
    each: &mut dyn FnMut(T, &Place<'_>) -> Result<bool>,
) -> Result<()> {
    let reader = path.open()?;
    let name = path.display().to_owned();
    if as_list {
        list(reader, &name, &mut |row, place| each(of(row), place))
    } else {
        lines(reader, &name, of, each)
    }
}

/// Lines of a file that are parsed together.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    /// The number of each line that is not blank, and its end in the bytes.
    lines: Vec<(u64, usize)>,
    last_number: u64,
}

impl Block {
    /// Reads the next lines; false at the end of the file.
    fn read(&mut self, reader: &mut impl BufRead, name: &str) -> Result<bool> {
        self.bytes.clear();
        self.lines.clear();
        while self.lines.len() < BATCH_ROWS && self.bytes.len() < BLOCK_BYTES {
            let start = self.bytes.len();
            let number = self.last_number + 1;
            let count = (&mut *reader)
                .take(LONGEST_ROW as u64 + 1)
                .read_until(b'\n', &mut self.bytes)
                .map_err(|error| anyhow!("{name}:{number}: {error}"));
            let count = match count {
                Ok(count) => count,
                // The rows before it come first: no more of them may be wanted.
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
    of: &(dyn Fn(Cell) -> T + Sync),
    each: &mut dyn FnMut(T, &Place<'_>) -> Result<bool>,
) -> Result<()> {
    let mut block = Block::default();
    while block.read(&mut reader, name)? {
        let parsed: Vec<(u64, Result<T>)> = block
            .texts()
            .into_par_iter()
            .with_min_len(32)
            .map(|(number, text)| (number, line(text, name, number).map(of)))
            .collect();
        for (number, row) in parsed {
            let place = Place {
                file: name,
                number,
                is_line: true,
            };
            if !each(row?, &place)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn line(text: &[u8], name: &str, number: u64) -> Result<Cell> {
    serde_json::from_slice(text).map_err(|error| {
        let text = String::from_utf8_lossy(text);
        let shown: String = text.trim_end().chars().take(80).collect();
        anyhow!(
            "{name}:{number}:{}: this line is no JSON: {}\n  {shown}",
            error.column(),
            reason(&error)
        )
    })
}

/// Serde's sentence without its own place, which would say "line 1" of every line.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ")
        .map_or(text.clone(), |(reason, _)| reason.to_owned())
}

fn list(
    reader: impl BufRead,
    name: &str,
    each: &mut dyn FnMut(Cell, &Place<'_>) -> Result<bool>,
) -> Result<()> {
    let mut outcome = Ok(());
    let mut stopped = false;
    let left = Counter::new(LONGEST_ROW);
    let mut deserializer = serde_json::Deserializer::from_reader(Metered {
        inner: reader,
        left: &left,
    });
    let visitor = Rows {
        name,
        left: &left,
        each,
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
    read.map_err(|error| {
        anyhow!(
            "{name}:{}:{}: this is no JSON: {}",
            error.line(),
            error.column(),
            reason(&error)
        )
    })
}

/// A reader that ends with an error when too much is read of it at once.
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

/// Hands on the elements of a list as they are parsed, so that the list is never held whole.
struct Rows<'a> {
    name: &'a str,
    left: &'a Counter<usize>,
    each: &'a mut dyn FnMut(Cell, &Place<'_>) -> Result<bool>,
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
        while let Some(row) = access.next_element_seed(CellSeed)? {
            number += 1;
            self.left.set(LONGEST_ROW);
            let place = Place {
                file: self.name,
                number,
                is_line: false,
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

struct CellSeed;

impl<'de> DeserializeSeed<'de> for CellSeed {
    type Value = Cell;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cell, D::Error> {
        serde::Deserialize::deserialize(deserializer)
    }
}
