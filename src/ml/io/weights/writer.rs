//! Writes safetensors files tensor by tensor, with the same bytes as the safetensors library.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;

/// The bytes that are written and digested at once.
const PIECE: usize = 1 << 19;
/// Fewer bytes than this are collected before they are written.
const SMALL: usize = 1 << 16;

/// The declaration of a tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Entry {
    /// The declaration of a tensor.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// The size of its values in bytes.
    ///
    /// # Errors
    /// The size does not fit into `usize`.
    pub fn size(&self) -> anyhow::Result<usize> {
        let count = self
            .shape
            .iter()
            .try_fold(1usize, |count, side| count.checked_mul(*side));
        let bits = count.and_then(|count| count.checked_mul(self.dtype.bitsize()));
        let bits = bits.with_context(|| format!("the tensor `{}` is too large", self.name))?;
        ensure!(
            bits.is_multiple_of(8),
            "the tensor `{}` ends within a byte",
            self.name
        );
        Ok(bits / 8)
    }
}

/// A file that is being written, and the digest of what was written. A piece is digested while it is still in the cache.
#[derive(Debug)]
struct Digesting {
    file: File,
    blake3: blake3::Hasher,
}

impl Write for Digesting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = bytes.get(..PIECE).unwrap_or(bytes);
        let count = self.file.write(bytes)?;
        self.blake3.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A safetensors file that is being written. All tensors are declared first; then their bytes are written in the file's order.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: BufWriter<Digesting>,
    entries: Vec<Entry>,
    next: usize,
    /// The bytes still missing from the current tensor.
    missing: usize,
}

impl Writer {
    /// Creates a file and writes the header for `entries`, with the metadata `format: pt`. As in the safetensors library, tensors with
    /// wider types come first, so that all are aligned, then they are sorted by name: see [`Writer::order`].
    ///
    /// # Errors
    /// The file can't be created, or a size does not fit into `usize`.
    pub fn create(path: &Path, entries: Vec<Entry>) -> anyhow::Result<Self> {
        Self::with_metadata(path, entries, &[("format", "pt")])
    }

    /// Like [`Writer::create`], with other metadata.
    ///
    /// # Errors
    /// The file can't be created, or a size does not fit into `usize`.
    pub fn with_metadata(
        path: &Path,
        mut entries: Vec<Entry>,
        metadata: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let start = || -> anyhow::Result<BufWriter<Digesting>> {
            let header = header(&entries, metadata)?;
            let file = Digesting {
                file: File::create(path)?,
                blake3: blake3::Hasher::new(),
            };
            let mut file = BufWriter::with_capacity(SMALL, file);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            Ok(file)
        };
        let file = start().with_context(|| format!("could not write `{}`", path.display()))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            entries,
            next: 0,
            missing: 0,
        })
    }

    /// The tensors in the order in which they have to be written.
    pub fn order(&self) -> &[Entry] {
        &self.entries
    }

    /// Writes the next tensor of [`Writer::order`], which must be `name`, with all its bytes: little-endian and row-major.
    ///
    /// # Errors
    /// It is not the next tensor, the number of bytes is wrong, or the file can't be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        if let Some(entry) = self.entries.get(self.next).filter(|e| e.name == name) {
            let size = entry.size()?;
            ensure!(
                bytes.len() == size,
                "`{name}` has {} bytes, expected {size} in `{}`",
                bytes.len(),
                self.path.display()
            );
        }
        self.start(name)?;
        self.append(bytes)
    }

    /// Begins the next tensor of [`Writer::order`], which must be `name`. Its bytes follow by [`Writer::append`].
    ///
    /// # Errors
    /// It is not the next tensor, or the one before it is incomplete.
    pub fn start(&mut self, name: &str) -> anyhow::Result<()> {
        self.complete()?;
        let path = self.path.display();
        let entry = self.entries.get(self.next);
        let entry = entry.ok_or_else(|| anyhow!("`{name}` was not declared for `{path}`"))?;
        ensure!(
            entry.name == name,
            "`{name}` comes out of order in `{path}`, expected `{}`",
            entry.name
        );
        self.missing = entry.size()?;
        self.next += 1;
        Ok(())
    }

    /// Writes the next bytes of the current tensor.
    ///
    /// # Errors
    /// The tensor has fewer bytes, or the file can't be written.
    pub fn append(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let left = self.missing.checked_sub(bytes.len());
        self.missing = left.with_context(|| {
            format!(
                "`{}` has {} bytes too many for `{}`",
                self.current(),
                bytes.len() - self.missing,
                self.path.display()
            )
        })?;
        let written = self.file.write_all(bytes);
        written.with_context(|| format!("could not write `{}`", self.path.display()))
    }

    fn current(&self) -> &str {
        let entry = self
            .next
            .checked_sub(1)
            .and_then(|last| self.entries.get(last));
        entry.map_or("a tensor", |entry| entry.name.as_str())
    }

    /// Fails if the current tensor is incomplete.
    fn complete(&self) -> anyhow::Result<()> {
        ensure!(
            self.missing == 0,
            "`{}` lacks {} bytes in `{}`",
            self.current(),
            self.missing,
            self.path.display()
        );
        Ok(())
    }

    /// Completes the file and returns the BLAKE3 digest of its bytes in hexadecimal digits.
    ///
    /// # Errors
    /// A declared tensor was not written, or the file can't be written.
    pub fn finish(mut self) -> anyhow::Result<String> {
        self.complete()?;
        if let Some(entry) = self.entries.get(self.next) {
            return Err(anyhow!(
                "`{}` was not written to `{}`",
                entry.name,
                self.path.display()
            ));
        }
        let flushed = self.file.flush();
        flushed.with_context(|| format!("could not write `{}`", self.path.display()))?;
        Ok(self.file.get_ref().blake3.finalize().to_hex().to_string())
    }
}

/// The file's header, compact JSON padded with spaces to a multiple of 8 bytes. Two tensors of one name are an error.
fn header(entries: &[Entry], metadata: &[(&str, &str)]) -> anyhow::Result<Vec<u8>> {
    let mut members = Vec::with_capacity(entries.len() + 1);
    if !metadata.is_empty() {
        let sorted: BTreeMap<_, _> = metadata.iter().copied().collect();
        members.push(format!(
            "\"__metadata__\":{}",
            serde_json::to_string(&sorted)?
        ));
    }
    let mut start = 0usize;
    let mut names = std::collections::BTreeSet::new();
    for entry in entries {
        ensure!(
            names.insert(&entry.name),
            "the tensor `{}` is declared twice",
            entry.name
        );
        let end = start
            .checked_add(entry.size()?)
            .context("the tensors are too large")?;
        members.push(format!(
            "{}:{{\"dtype\":{},\"shape\":{},\"data_offsets\":[{start},{end}]}}",
            json!(entry.name),
            serde_json::to_string(&entry.dtype)?,
            json!(entry.shape),
        ));
        start = end;
    }
    let mut header = format!("{{{}}}", members.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Writes a small safetensors file of tensors in memory. The metadata is sorted, so the same tensors always give the same bytes.
///
/// # Errors
/// A tensor's type is not supported, or the file can't be written.
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &[(&str, &str)],
) -> anyhow::Result<()> {
    let entry = |(name, tensor): (&String, &Tensor)| {
        Entry::new(name.clone(), tensor.dtype().into(), tensor.dims())
    };
    let entries = tensors.iter().map(entry).collect();
    let mut writer = Writer::with_metadata(path, entries, metadata)?;
    let order: Vec<String> = writer
        .order()
        .iter()
        .map(|entry| entry.name.clone())
        .collect();
    for name in order {
        if let Some(tensor) = tensors.get(&name) {
            writer.write(&name, &bytes(tensor)?)?;
        }
    }
    writer.finish().map(drop)
}

/// The values of a tensor, little-endian and in row-major order.
pub(in crate::ml) fn bytes(tensor: &Tensor) -> anyhow::Result<Vec<u8>> {
    fn all<T: candle_core::WithDType, const N: usize>(
        tensor: &Tensor,
        bytes: impl Fn(T) -> [u8; N],
    ) -> candle_core::Result<Vec<u8>> {
        let values = tensor.flatten_all()?.to_vec1::<T>()?;
        Ok(values.into_iter().flat_map(bytes).collect())
    }
    Ok(match tensor.dtype() {
        DType::U8 => tensor.flatten_all()?.to_vec1::<u8>()?,
        DType::U32 => all(tensor, u32::to_le_bytes)?,
        DType::I64 => all(tensor, i64::to_le_bytes)?,
        DType::F16 => all(tensor, f16::to_le_bytes)?,
        DType::BF16 => all(tensor, bf16::to_le_bytes)?,
        DType::F32 => all(tensor, f32::to_le_bytes)?,
        DType::F64 => all(tensor, f64::to_le_bytes)?,
        other => return Err(anyhow!("a tensor of the type {other:?} can't be written")),
    })
}
