//! Writes GGUF files: header, metadata and the table of tensors at once, then the tensors as their bytes are made.
//!
//! The bytes go to a thread of its own, which digests and writes them, so that the next ones are made meanwhile.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use anyhow::{Context as _, anyhow, ensure};

use super::{ALIGNMENT, Array, GgmlType, MAGIC, VERSION, Value};

/// The number of pieces that may wait for the disk.
const QUEUE: usize = 2;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TensorInfo {
    /// Its name.
    pub(super) name: String,
    /// The type of its values.
    pub(super) kind: GgmlType,
    /// Its shape in torch's order: rows before columns. GGUF has the reverse.
    pub(super) shape: Vec<usize>,
}

impl TensorInfo {
    /// The number of its values.
    ///
    /// # Errors
    /// They are too many to be counted.
    pub(super) fn values(&self) -> anyhow::Result<usize> {
        let mut sizes = self.shape.iter();
        let count = sizes.try_fold(1usize, |count, size| count.checked_mul(*size));
        count.with_context(|| format!("the tensor `{}` is too large", self.name))
    }

    /// The size of its values in bytes.
    ///
    /// # Errors
    /// Its values are no whole number of blocks.
    pub(super) fn bytes(&self) -> anyhow::Result<usize> {
        let bytes = self.kind.bytes(self.values()?);
        bytes.with_context(|| format!("could not store the tensor `{}`", self.name))
    }
}

/// Where the bytes of the tensors go.
pub(super) struct Sink {
    pieces: SyncSender<Vec<u8>>,
    used: Receiver<Vec<u8>>,
    /// The number of bytes that were sent of the current tensor.
    sent: usize,
}

impl Sink {
    /// A piece that was written, to be filled again, or a new one.
    pub(super) fn piece(&mut self) -> Vec<u8> {
        self.used.try_recv().unwrap_or_default()
    }

    /// Sends the next bytes of the current tensor.
    ///
    /// # Errors
    /// The writing thread has stopped; its own error is the reason.
    pub(super) fn send(&mut self, piece: Vec<u8>) -> anyhow::Result<()> {
        self.sent += piece.len();
        self.pieces
            .send(piece)
            .map_err(|_| anyhow!("the file can't be written"))
    }
}

/// Writes a file with `metadata` and `tensors`, and returns the BLAKE3 digest of its bytes in hexadecimal digits. `make` is called for each
/// tensor in turn, with its index, and sends all its bytes.
///
/// # Errors
/// The file can't be written, a tensor's size is wrong, or `make` fails.
pub(super) fn write_file(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[TensorInfo],
    make: &mut dyn FnMut(usize, &mut Sink) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let head = head(metadata, tensors)?;
    let mut file =
        File::create(path).with_context(|| format!("could not make `{}`", path.display()))?;
    std::thread::scope(|scope| {
        let (pieces, received) = sync_channel::<Vec<u8>>(QUEUE);
        let (free, used) = channel();
        let write = move || -> anyhow::Result<String> {
            let mut digest = blake3::Hasher::new();
            for piece in received {
                digest.update(&piece);
                file.write_all(&piece)
                    .with_context(|| format!("could not write `{}`", path.display()))?;
                // The other end may have finished already.
                let _ = free.send(piece);
            }
            Ok(digest.finalize().to_hex().to_string())
        };
        let writing = std::thread::Builder::new()
            .spawn_scoped(scope, write)
            .context("could not start a thread")?;
        let mut sink = Sink {
            pieces,
            used,
            sent: 0,
        };
        let make_all = || -> anyhow::Result<()> {
            sink.send(head)?;
            for (index, tensor) in tensors.iter().enumerate() {
                sink.sent = 0;
                make(index, &mut sink)?;
                let size = tensor.bytes()?;
                ensure!(
                    sink.sent == size,
                    "the tensor `{}` has {} bytes, expected {size}",
                    tensor.name,
                    sink.sent
                );
                let padding = vec![0; aligned(size)? - size];
                sink.send(padding)?;
            }
            Ok(())
        };
        let made = make_all();
        drop(sink);
        let wrote = writing
            .join()
            .map_err(|_| anyhow!("the writer of `{}` stopped", path.display()))?;
        // The writer's error is the cause of one at the other end.
        match (made, wrote) {
            (_, Err(error)) | (Err(error), _) => Err(error),
            (Ok(()), Ok(digest)) => Ok(digest),
        }
    })
}

/// `size` rounded up to the alignment.
fn aligned(size: usize) -> anyhow::Result<usize> {
    let rounded = size.checked_next_multiple_of(usize::try_from(ALIGNMENT)?);
    rounded.context("the file is too large")
}

/// Everything before the first tensor.
fn head(metadata: &[(String, Value)], tensors: &[TensorInfo]) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (name, value) in metadata {
        text(&mut out, name);
        out.extend(value.kind().id().to_le_bytes());
        put(&mut out, value);
    }
    let mut offset = 0usize;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend(u32::try_from(tensor.shape.len())?.to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        let size = aligned(tensor.bytes()?)?;
        offset = offset.checked_add(size).context("the file is too large")?;
    }
    out.resize(aligned(out.len())?, 0);
    Ok(out)
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => out.push(*value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push(u8::from(*value)),
        Value::String(value) => text(out, value),
        Value::Array(values) => array(out, values),
    }
}

fn array(out: &mut Vec<u8>, values: &Array) {
    out.extend(values.kind().id().to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    match values {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::U16(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::I16(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::U32(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::I32(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::U64(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::I64(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::F32(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::F64(values) => values.iter().for_each(|v| out.extend(v.to_le_bytes())),
        Array::Bool(values) => values.iter().for_each(|v| out.push(u8::from(*v))),
        Array::String(values) => values.iter().for_each(|v| text(out, v)),
        Array::Array(values) => values.iter().for_each(|v| array(out, v)),
    }
}
