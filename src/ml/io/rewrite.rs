//! Rewrites a model's weights, file by file and tensor by tensor, into the same files as before.
//!
//! Tensors are computed in pieces, and a thread of its own writes them. So the next piece is computed while the last one is written,
//! and memory holds a few pieces, however large a tensor is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use anyhow::{Context as _, anyhow, bail};
use serde_json::json;

use super::finite;
use super::float::Float;
use super::folder::sorted_json;
use super::weights::{Entry, INDEX, Weights, Writer};
use crate::ml::quant::nf4::Nf4;

/// The bytes of a piece: a multiple of every type's size and of the blocks of 4-bit weights, and few enough to be still in the cache
/// when they are digested and written.
const PIECE: usize = 2 << 20;
/// The bytes of smaller tensors that are sent to the writing thread together.
const TOGETHER: usize = 1 << 20;
/// The number of such messages that may wait for the disk.
const QUEUE: usize = 4;

/// A tensor to write.
pub(in crate::ml) struct Output<'a> {
    pub(in crate::ml) entry: Entry,
    source: Source<'a>,
}

/// The source of a tensor's bytes, which is used when it is the tensor's turn.
enum Source<'a> {
    Whole(Box<dyn FnOnce() -> anyhow::Result<Cow<'a, [u8]>> + 'a>),
    Pieces(Box<Fill<'a>>),
}

/// Fills a piece; the first argument is the offset of its first byte in the tensor.
type Fill<'a> = dyn FnMut(usize, &mut [u8]) -> anyhow::Result<()> + 'a;

impl<'a> Output<'a> {
    /// A tensor whose bytes are computed at once.
    pub(in crate::ml) fn whole(
        entry: Entry,
        bytes: impl FnOnce() -> anyhow::Result<Cow<'a, [u8]>> + 'a,
    ) -> Self {
        let source = Source::Whole(Box::new(bytes));
        Self { entry, source }
    }

    /// A tensor that is computed in pieces: `fill(first, bytes)` computes the bytes from offset `first` on, a multiple of 2 MiB.
    pub(in crate::ml) fn pieces(
        entry: Entry,
        fill: impl FnMut(usize, &mut [u8]) -> anyhow::Result<()> + 'a,
    ) -> Self {
        let source = Source::Pieces(Box::new(fill));
        Self { entry, source }
    }

    /// A tensor of the model, unchanged; a NaN or an infinity in it is an error when it is written.
    pub(in crate::ml) fn finite(weights: &'a Weights, name: &str) -> anyhow::Result<Self> {
        let raw = weights.raw(name)?;
        let entry = Entry::new(name, raw.dtype, raw.shape);
        let owned = name.to_owned();
        let codes = Nf4::stored_shape(weights, name)?.is_some();
        let float = Float::from_safetensors(raw.dtype).filter(|_| !codes);
        Ok(Self::pieces(entry, move |first, bytes| {
            raw.read(first, bytes)?;
            if float.is_some_and(|float| !float.all_finite(bytes))
                && let Some(found) = finite::check(weights, &owned)?
            {
                bail!("{found}; look at where the model comes from");
            }
            Ok(())
        }))
    }

    /// A tensor of the model, unchanged.
    pub(in crate::ml) fn same(weights: &'a Weights, name: &str) -> anyhow::Result<Self> {
        let raw = weights.raw(name)?;
        let entry = Entry::new(name, raw.dtype, raw.shape);
        Ok(Self::pieces(entry, move |first, bytes| {
            raw.read(first, bytes)
        }))
    }
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its name in the folder.
    pub name: String,
    /// The BLAKE3 digest of its bytes in hexadecimal digits, computed while they were written.
    pub blake3: String,
}

/// A message to the writing thread: the name of the next tensor, or bytes of the current one. Pieces come back to be filled again.
enum Order<'a> {
    Start(String),
    Bytes(Cow<'a, [u8]>),
    Piece(Vec<u8>),
}

/// Messages to the writing thread. Several are sent together, because threads that wait for each other at each small tensor would take
/// longer than the writing.
struct Orders<'a> {
    waiting: Vec<Order<'a>>,
    /// The number of bytes in the pieces among them.
    bytes: usize,
    out: SyncSender<Vec<Order<'a>>>,
}

/// The error of a message to a writing thread that has stopped.
struct Stopped;

impl<'a> Orders<'a> {
    fn add(&mut self, order: Order<'a>) -> Result<(), Stopped> {
        self.bytes += match &order {
            Order::Start(_) | Order::Bytes(Cow::Borrowed(_)) => 0,
            Order::Bytes(Cow::Owned(bytes)) | Order::Piece(bytes) => bytes.len(),
        };
        self.waiting.push(order);
        if self.bytes >= TOGETHER {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), Stopped> {
        self.bytes = 0;
        let orders = std::mem::take(&mut self.waiting);
        self.out.send(orders).map_err(|_| Stopped)
    }
}

/// Writes a file of `outputs` and returns its digest. `written` is called with the name of each tensor that was computed.
pub(in crate::ml) fn write_file(
    path: &Path,
    outputs: Vec<Output<'_>>,
    written: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let entries = outputs.iter().map(|output| output.entry.clone()).collect();
    let mut writer = Writer::create(path, entries)?;
    let order: Vec<Entry> = writer.order().to_vec();
    let mut outputs: BTreeMap<String, Output<'_>> = outputs
        .into_iter()
        .map(|output| (output.entry.name.clone(), output))
        .collect();
    std::thread::scope(|scope| {
        let (orders, received) = sync_channel(QUEUE);
        let (free, used) = channel();
        let write = move || -> anyhow::Result<String> {
            for order in received.into_iter().flatten() {
                match order {
                    Order::Start(name) => writer.start(&name)?,
                    Order::Bytes(bytes) => writer.append(&bytes)?,
                    Order::Piece(piece) => {
                        writer.append(&piece)?;
                        // The computing thread may have finished already.
                        let _ = free.send(piece);
                    }
                }
            }
            writer.finish()
        };
        let writing = std::thread::Builder::new()
            .spawn_scoped(scope, write)
            .context("could not start a thread")?;
        let mut orders = Orders {
            waiting: Vec::new(),
            bytes: 0,
            out: orders,
        };
        let make = || -> anyhow::Result<()> {
            for entry in order {
                let output = outputs.remove(&entry.name);
                let output = output.with_context(|| format!("`{}` was lost", entry.name))?;
                if send(output, &mut orders, &used)?.is_err() {
                    return Ok(());
                }
                written(&entry.name)?;
            }
            // If the thread has stopped, joining it returns the reason.
            let _ = orders.send();
            Ok(())
        };
        let made = make();
        drop(orders);
        let wrote = writing.join();
        // The writer's error is the cause, unless it only lacks tensors because computing them failed.
        made?;
        wrote.map_err(|_| anyhow!("the writer of `{}` stopped", path.display()))?
    })
}

/// Computes a tensor's bytes and sends them to the writing thread.
fn send<'a>(
    output: Output<'a>,
    orders: &mut Orders<'a>,
    used: &Receiver<Vec<u8>>,
) -> anyhow::Result<Result<(), Stopped>> {
    let Output { entry, source } = output;
    let size = entry.size()?;
    let failed = || format!("could not make the tensor `{}`", entry.name);
    if orders.add(Order::Start(entry.name.clone())).is_err() {
        return Ok(Err(Stopped));
    }
    match source {
        Source::Whole(bytes) => {
            let bytes = bytes().with_context(failed)?;
            Ok(orders.add(Order::Bytes(bytes)))
        }
        Source::Pieces(mut fill) => {
            for first in (0..size).step_by(PIECE) {
                let mut piece = used.try_recv().unwrap_or_default();
                piece.resize(PIECE.min(size - first), 0);
                fill(first, &mut piece).with_context(failed)?;
                if orders.add(Order::Piece(piece)).is_err() {
                    return Ok(Err(Stopped));
                }
            }
            Ok(Ok(()))
        }
    }
}

/// Writes all files of a model's weights to `out`. `outputs` returns what each of the model's tensors becomes. A sharded model gets a
/// new index. Returns the files that were written.
pub(in crate::ml) fn rewrite<'a>(
    weights: &'a Weights,
    out: &Path,
    mut outputs: impl FnMut(&str) -> anyhow::Result<Vec<Output<'a>>>,
    written: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Written>> {
    let mut index = Index::default();
    let mut files = Vec::new();
    for file in weights.files() {
        let mut all = Vec::new();
        for name in weights.names_in(file) {
            let made =
                outputs(name).with_context(|| format!("could not use the tensor `{name}`"))?;
            all.extend(made);
        }
        if all.is_empty() && weights.sharded() {
            continue; // all that it held is not used
        }
        for output in &all {
            index.add(&output.entry, file)?;
        }
        let blake3 = write_file(&out.join(file), all, written)?;
        let name = file.to_owned();
        files.push(Written { name, blake3 });
    }
    if weights.sharded() {
        index.write(out)?;
    }
    Ok(files)
}

/// The index of a sharded model: which file holds which tensor.
#[derive(Default)]
pub(in crate::ml) struct Index {
    files: BTreeMap<String, String>,
    size: u64,
}

impl Index {
    pub(in crate::ml) fn add(&mut self, entry: &Entry, file: &str) -> anyhow::Result<()> {
        self.files.insert(entry.name.clone(), file.to_owned());
        self.size += entry.size()? as u64;
        Ok(())
    }

    pub(in crate::ml) fn write(&self, out: &Path) -> anyhow::Result<()> {
        let index = json!({"metadata": {"total_size": self.size}, "weight_map": self.files});
        std::fs::write(out.join(INDEX), sorted_json(&index)?)
            .with_context(|| format!("could not write `{INDEX}` to `{}`", out.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::Dtype;

    use super::*;

    const LARGE: usize = 2 * PIECE + 1000;

    fn byte(index: usize) -> u8 {
        (index % 251) as u8
    }

    fn outputs(in_pieces: bool) -> Vec<Output<'static>> {
        let large = Entry::new("large", Dtype::U8, [LARGE]);
        let large = if in_pieces {
            Output::pieces(large, |first, bytes| {
                for (index, out) in bytes.iter_mut().enumerate() {
                    *out = byte(first + index);
                }
                Ok(())
            })
        } else {
            Output::whole(large, || Ok(Cow::Owned((0..LARGE).map(byte).collect())))
        };
        let small = Entry::new("small", Dtype::U8, [3]);
        let none = Entry::new("none", Dtype::U8, [0]);
        vec![
            Output::whole(small, || Ok(Cow::Borrowed(b"abc"))),
            large,
            Output::pieces(none, |_, _| bail!("there is nothing to make")),
        ]
    }

    #[test]
    fn pieces_make_the_bytes_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let written = |name: &str, in_pieces: bool| {
            let path = folder.path().join(name);
            let mut names = Vec::new();
            let mut note = |name: &str| {
                names.push(name.to_owned());
                Ok(())
            };
            let digest = write_file(&path, outputs(in_pieces), &mut note).unwrap();
            assert_eq!(names, ["large", "none", "small"]);
            let bytes = fs::read(path).unwrap();
            assert_eq!(digest, blake3::hash(&bytes).to_hex().as_str());
            bytes
        };
        let whole = written("whole", false);
        assert!(whole.len() > LARGE && whole == written("pieces", true));
    }

    #[test]
    fn a_tensor_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let fails = |output: Output<'_>| {
            let error = write_file(&path, vec![output], &mut |_| Ok(())).unwrap_err();
            format!("{error:#}")
        };
        let entry = || Entry::new("x.weight", Dtype::U8, [LARGE]);
        let error = fails(Output::pieces(entry(), |first, _| {
            anyhow::ensure!(first == 0, "the second piece");
            Ok(())
        }));
        assert!(error.contains("`x.weight`: the second piece"), "{error}");
        // Fewer bytes than were declared are noticed by the writer.
        let error = fails(Output::whole(entry(), || Ok(Cow::Borrowed(&[1, 2]))));
        assert!(error.contains("`x.weight` lacks"), "{error}");
        let long = vec![0; LARGE + 1];
        let error = fails(Output::whole(entry(), || Ok(Cow::Borrowed(&long))));
        assert!(error.contains("1 bytes too many"), "{error}");
        let mut stop = |_: &str| bail!("interrupted");
        let error = write_file(&path, outputs(true), &mut stop).unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
    }
}
