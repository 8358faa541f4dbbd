//! Rows from JSON lines and JSON lists, streamed twice: once for the columns' types, once for the rows.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Context as _, Result, anyhow, bail};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::cell::Cell;
use super::import::fits;
use super::kind::Kind;
use super::table::BATCH_ROWS;

/// Columns in the order in which they first appear.
pub(super) type Columns = Vec<(String, Kind)>;

/// Whether the file's first character begins a list. Many files called `.json` hold JSON lines.
pub(super) fn is_list(path: &Path) -> Result<bool> {
    let mut first = [0; 256];
    let count = File::open(path)?.read(&mut first)?;
    let text = first.get(..count).unwrap_or_default();
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    Ok(text.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'['))
}

/// Reads the whole file for its columns. `canonical` are the names that must hold text or messages.
pub(super) fn columns(
    path: &Path,
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
    rows(path, as_list, &mut |row, place| {
        let Cell::Map(entries) = row else {
            bail!(
                "{place}: expected an object with columns, found {}",
                row.noun()
            );
        };
        for (name, value) in entries {
            let kind = Kind::of(&value);
            let index = *places.entry(name.clone()).or_insert_with(|| {
                columns.push((name.clone(), Kind::Null));
                columns.len() - 1
            });
            let Some((_, known)) = columns.get_mut(index) else {
                continue;
            };
            let before = known.clone();
            *known = before.clone().merge(kind.clone());
            let Some(ours) = ours.get(name.as_str()) else {
                continue;
            };
            if fits(ours, known) {
                continue;
            }
            let holds = value.noun();
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

/// The rows as batches. They are read on a thread of their own, which ends when the iterator is dropped.
pub(super) fn batches(
    path: &Path,
    as_list: bool,
    columns: Arc<Columns>,
) -> Result<Box<dyn Iterator<Item = Result<RecordBatch>>>> {
    let (sender, receiver) = sync_channel::<Result<Vec<Cell>>>(2);
    let path = path.to_owned();
    std::thread::Builder::new()
        .name("json".to_owned())
        .spawn(move || {
            let mut pending = Vec::with_capacity(BATCH_ROWS);
            let read = rows(&path, as_list, &mut |row, _| {
                pending.push(row);
                if pending.len() < BATCH_ROWS {
                    return Ok(true);
                }
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
        for (name, kind) in columns.iter() {
            let cells: Vec<&Cell> = rows
                .iter()
                .map(|row| row.get(name).unwrap_or(&Cell::Null))
                .collect();
            fields.push(Field::new(name, kind.data_type(), true));
            arrays.push(kind.build(&cells)?);
        }
        Ok(RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?)
    })
}

/// Calls `each` with every row and its place, until it says false.
fn rows(
    path: &Path,
    as_list: bool,
    each: &mut dyn FnMut(Cell, &str) -> Result<bool>,
) -> Result<()> {
    let file = File::open(path).with_context(|| format!("could not read `{}`", path.display()))?;
    let reader = BufReader::with_capacity(1 << 20, file);
    let name = path.display().to_string();
    if as_list {
        list(reader, &name, each)
    } else {
        lines(reader, &name, each)
    }
}

fn lines(
    mut reader: impl BufRead,
    name: &str,
    each: &mut dyn FnMut(Cell, &str) -> Result<bool>,
) -> Result<()> {
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        let place = format!("{name}:{number}");
        if reader
            .read_until(b'\n', &mut line)
            .with_context(|| place.clone())?
            == 0
        {
            break;
        }
        let text = if number == 1 {
            line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line)
        } else {
            &line
        };
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let row = serde_json::from_slice(text).map_err(|error| {
            let text = String::from_utf8_lossy(text);
            let shown: String = text.trim_end().chars().take(80).collect();
            anyhow!(
                "{place}:{}: this line is no JSON: {}\n  {shown}",
                error.column(),
                reason(&error)
            )
        })?;
        if !each(row, &place)? {
            break;
        }
    }
    Ok(())
}

/// Serde's sentence without its own place, which would say "line 1" of every line.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ")
        .map_or(text.clone(), |(reason, _)| reason.to_owned())
}

fn list(
    mut reader: impl BufRead,
    name: &str,
    each: &mut dyn FnMut(Cell, &str) -> Result<bool>,
) -> Result<()> {
    let start = reader.fill_buf()?;
    if start.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    let mut outcome = Ok(());
    let mut stopped = false;
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let visitor = Rows {
        name,
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

/// Hands on the elements of a list as they are parsed, so that the list is never held whole.
struct Rows<'a> {
    name: &'a str,
    each: &'a mut dyn FnMut(Cell, &str) -> Result<bool>,
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
            match (self.each)(row, &format!("{}: row {number}", self.name)) {
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
