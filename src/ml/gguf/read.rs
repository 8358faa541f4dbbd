//! Reads GGUF files: metadata and the table of tensors at once, values when they are wanted.
//!
//! A file may come from anybody. Every count and length in it is compared with the bytes that are left before anything is allocated, and
//! every tensor lies inside the file once it is open.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, ErrorKind, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};

use super::{ALIGNMENT, Array, GgmlType, MAGIC, Value, ValueType};

/// The most bytes in front of the tensors. Vocabularies of 262 144 tokens with their merges have some 20 MiB.
const LONGEST_HEADER: u64 = 256 << 20;
/// How deep arrays may lie in arrays.
const DEEPEST: usize = 4;
/// The most dimensions of a tensor (`GGML_MAX_DIMS`).
const DIMENSIONS: u32 = 4;
/// The largest accepted alignment in bytes.
const LARGEST_ALIGNMENT: u64 = 1 << 20;
/// The elements of an array for which room is made before they are read.
const ROOM: usize = 1 << 12;

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its values.
    pub kind: GgmlType,
    /// Its shape, the width of a row last, as torch has it (the file has it the other way round).
    pub shape: Vec<usize>,
    /// The offset of its first byte in the file.
    pub start: u64,
    /// Its bytes.
    pub bytes: usize,
}

impl TensorInfo {
    /// The number of its values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open file.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    open: fs::File,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl File {
    /// Opens a file and reads everything in front of the values.
    ///
    /// # Errors
    /// The file can't be read, is no GGUF file of the versions 1 to 3, or contradicts itself. The error names the file.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> anyhow::Result<Self> {
            let file = fs::File::open(path)?;
            let size = file.metadata()?.len();
            let (metadata, tensors) = Header::read(&file, size)?;
            Ok(Self {
                path: path.to_path_buf(),
                open: file,
                metadata,
                tensors,
            })
        };
        open().with_context(|| format!("could not read `{}`", path.display()))
    }

    /// The metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensors by their names.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Fills `out` with the bytes of a tensor of this file from offset `first` on.
    ///
    /// # Errors
    /// The tensor has fewer bytes, or the file can't be read or became shorter since it was opened.
    pub fn read(&self, tensor: &TensorInfo, first: usize, out: &mut [u8]) -> anyhow::Result<()> {
        let end = first.checked_add(out.len());
        ensure!(
            end.is_some_and(|end| end <= tensor.bytes),
            "a tensor has {} bytes, fewer than are wanted",
            tensor.bytes
        );
        let read = self.open.read_exact_at(out, tensor.start + first as u64);
        read.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => anyhow!("the file became shorter while it was read"),
            _ => error.into(),
        })
        .with_context(|| format!("could not read `{}`", self.path.display()))
    }

    /// A value of the metadata; `None` if the file doesn't have the key.
    ///
    /// # Errors
    /// `read` returns `None`: the value is not `wanted`.
    fn value<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> anyhow::Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let kind = value.kind();
        let value = read(value);
        let value = value.with_context(|| format!("`{key}` is a {kind:?}, expected {wanted}"))?;
        Ok(Some(value))
    }

    /// A text.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&self, key: &str) -> anyhow::Result<Option<&str>> {
        self.value(key, "a text", Value::text)
    }

    /// A whole number from 0 on.
    ///
    /// # Errors
    /// It is something else.
    pub fn unsigned(&self, key: &str) -> anyhow::Result<Option<u64>> {
        self.value(key, "a whole number from 0 on", Value::unsigned)
    }

    /// A number.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&self, key: &str) -> anyhow::Result<Option<f64>> {
        self.value(key, "a number", Value::number)
    }

    /// A boolean.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&self, key: &str) -> anyhow::Result<Option<bool>> {
        self.value(key, "true or false", Value::flag)
    }

    /// An array of texts.
    ///
    /// # Errors
    /// It is something else.
    pub fn texts(&self, key: &str) -> anyhow::Result<Option<&[String]>> {
        self.value(key, "an array of texts", |value| value.array()?.texts())
    }

    /// An array.
    ///
    /// # Errors
    /// It is something else.
    pub fn array(&self, key: &str) -> anyhow::Result<Option<&Array>> {
        self.value(key, "an array", Value::array)
    }
}

/// Reads the part of a file in front of the values.
struct Header<R> {
    from: R,
    /// The bytes that were read.
    position: u64,
    /// The bytes that there are.
    end: u64,
    version: u32,
}

impl Header<BufReader<&fs::File>> {
    fn read(
        file: &fs::File,
        size: u64,
    ) -> anyhow::Result<(BTreeMap<String, Value>, BTreeMap<String, TensorInfo>)> {
        let mut header = Header {
            from: BufReader::with_capacity(1 << 16, file),
            position: 0,
            end: size.min(LONGEST_HEADER),
            version: 0,
        };
        header.all(size)
    }
}

impl<R: Read> Header<R> {
    fn all(
        &mut self,
        size: u64,
    ) -> anyhow::Result<(BTreeMap<String, Value>, BTreeMap<String, TensorInfo>)> {
        let magic: [u8; 4] = self.bytes().context("it is too short for a GGUF file")?;
        if magic != MAGIC {
            let found = magic.escape_ascii();
            // Before GGUF, numbers in the file's own order spelled `ggml`, `ggmf` and `ggjt` backwards.
            let old = [*b"lmgg", *b"fmgg", *b"tjgg"].contains(&magic);
            ensure!(
                !old,
                "it has llama.cpp's format from before August 2023, expected GGUF; hint: look for a newer file of the model"
            );
            bail!(
                "it begins with `{found}`, expected `GGUF`; is it a pointer of git-lfs, or a page of text?"
            );
        }
        self.version = self.u32()?;
        ensure!(
            self.version & 0xffff != 0,
            "it is big-endian, expected a little-endian file; hint: the `gguf` package converts it (`gguf-convert-endian FILE little`)"
        );
        ensure!(
            (1..=3).contains(&self.version),
            "it has version {} of the format, expected 1, 2 or 3",
            self.version
        );
        let tensor_count = self.length()?;
        let count = self.length()?;
        let mut metadata = BTreeMap::new();
        for number in 0..count {
            let key = self.name().with_context(|| {
                format!(
                    "could not read the key {} of {count} of the metadata",
                    number + 1
                )
            })?;
            let value = self
                .typed_value()
                .with_context(|| format!("could not read the value of `{key}`"))?;
            let again = metadata.insert(key.clone(), value).is_some();
            ensure!(!again, "its metadata have `{key}` twice");
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => value
                .unsigned()
                .filter(|value| value.is_power_of_two() && *value <= LARGEST_ALIGNMENT)
                .with_context(|| {
                    format!(
                        "`general.alignment` is {value:?}, expected a power of 2 up to {LARGEST_ALIGNMENT}"
                    )
                })?,
        };
        let mut tensors = BTreeMap::new();
        for number in 0..tensor_count {
            let name = self.name().with_context(|| {
                format!(
                    "could not read the name of tensor {} of {tensor_count}",
                    number + 1
                )
            })?;
            let tensor = self
                .tensor()
                .with_context(|| format!("its table says nothing usable of the tensor `{name}`"))?;
            let again = tensors.insert(name.clone(), tensor).is_some();
            ensure!(!again, "its table has the tensor `{name}` twice");
        }
        // The offsets so far count from the first value.
        let first = self.position.next_multiple_of(alignment);
        for (name, tensor) in &mut tensors {
            let start = first.checked_add(tensor.start);
            let end = start.and_then(|start| start.checked_add(tensor.bytes as u64));
            let (Some(start), Some(end)) = (start, end) else {
                bail!("the tensor `{name}` lies beyond all files");
            };
            ensure!(
                end <= size,
                "the tensor `{name}` ends at byte {end}, but the file has {size}; was it cut off?"
            );
            tensor.start = start;
        }
        Ok((metadata, tensors))
    }

    /// The bytes that are left.
    fn left(&self) -> u64 {
        self.end - self.position
    }

    fn fill(&mut self, out: &mut [u8]) -> anyhow::Result<()> {
        let left = self.left();
        ensure!(
            out.len() as u64 <= left,
            "{} bytes are wanted at byte {}, but only {left} are left{}; was it cut off?",
            out.len(),
            self.position,
            if self.end == LONGEST_HEADER {
                " of the 256 MiB that metadata may take"
            } else {
                ""
            }
        );
        self.from.read_exact(out)?;
        self.position += out.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> anyhow::Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> anyhow::Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A count or a length, which version 1 has in 32 bits.
    fn length(&mut self) -> anyhow::Result<u64> {
        if self.version == 1 {
            Ok(self.u32()?.into())
        } else {
            self.u64()
        }
    }

    /// The bytes of a text.
    fn raw_text(&mut self) -> anyhow::Result<Vec<u8>> {
        let length = self.length()?;
        let left = self.left();
        ensure!(
            length <= left,
            "a text has {length} bytes, but only {left} are left; was the file cut off?"
        );
        let mut bytes = vec![0; usize::try_from(length)?];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// A key or the name of a tensor.
    fn name(&mut self) -> anyhow::Result<String> {
        let bytes = self.raw_text()?;
        String::from_utf8(bytes).map_err(|error| {
            let name = String::from_utf8_lossy(error.as_bytes()).into_owned();
            anyhow!("the name `{name}` is not UTF-8")
        })
    }

    /// A text. Some files have a description in another encoding: what is not UTF-8 becomes U+FFFD.
    fn text(&mut self) -> anyhow::Result<String> {
        let bytes = self.raw_text()?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn flag(&mut self) -> anyhow::Result<bool> {
        let [byte] = self.bytes()?;
        ensure!(byte <= 1, "a boolean is {byte}, expected 0 or 1");
        Ok(byte == 1)
    }

    fn kind(&mut self) -> anyhow::Result<ValueType> {
        let id = self.u32()?;
        ValueType::from_id(id)
            .with_context(|| format!("its type has the number {id}, expected 0 to 12"))
    }

    fn typed_value(&mut self) -> anyhow::Result<Value> {
        let kind = self.kind()?;
        Ok(match kind {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.bytes()?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.bytes()?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            ValueType::Bool => Value::Bool(self.flag()?),
            ValueType::String => Value::String(self.text()?),
            ValueType::Array => Value::Array(self.array(1)?),
        })
    }

    /// An array that lies in `depth - 1` others.
    fn array(&mut self, depth: usize) -> anyhow::Result<Array> {
        ensure!(
            depth <= DEEPEST,
            "arrays lie in arrays more than {DEEPEST} deep"
        );
        let kind = self.kind()?;
        let length = self.length()?;
        let prefix = if self.version == 1 { 4 } else { 8 };
        let least = match kind {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
            ValueType::String => prefix,
            ValueType::Array => 4 + prefix,
        };
        let left = self.left();
        ensure!(
            length.checked_mul(least).is_some_and(|bytes| bytes <= left),
            "an array has {length} elements, but only {left} bytes are left; was the file cut off?"
        );
        let length = usize::try_from(length)?;
        Ok(match kind {
            ValueType::U8 => {
                let mut bytes = vec![0; length];
                self.fill(&mut bytes)?;
                Array::U8(bytes)
            }
            ValueType::I8 => Array::I8(self.numbers(length, i8::from_le_bytes)?),
            ValueType::U16 => Array::U16(self.numbers(length, u16::from_le_bytes)?),
            ValueType::I16 => Array::I16(self.numbers(length, i16::from_le_bytes)?),
            ValueType::U32 => Array::U32(self.numbers(length, u32::from_le_bytes)?),
            ValueType::I32 => Array::I32(self.numbers(length, i32::from_le_bytes)?),
            ValueType::U64 => Array::U64(self.numbers(length, u64::from_le_bytes)?),
            ValueType::I64 => Array::I64(self.numbers(length, i64::from_le_bytes)?),
            ValueType::F32 => Array::F32(self.numbers(length, f32::from_le_bytes)?),
            ValueType::F64 => Array::F64(self.numbers(length, f64::from_le_bytes)?),
            ValueType::Bool => Array::Bool(self.elements(length, Self::flag)?),
            ValueType::String => Array::String(self.elements(length, Self::text)?),
            ValueType::Array => {
                Array::Array(self.elements(length, |header| header.array(depth + 1))?)
            }
        })
    }

    fn numbers<T, const N: usize>(
        &mut self,
        length: usize,
        number: impl Fn([u8; N]) -> T,
    ) -> anyhow::Result<Vec<T>> {
        self.elements(length, |header| Ok(number(header.bytes()?)))
    }

    fn elements<T>(
        &mut self,
        length: usize,
        mut one: impl FnMut(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        let mut elements = Vec::with_capacity(length.min(ROOM));
        for _ in 0..length {
            elements.push(one(self)?);
        }
        Ok(elements)
    }

    /// A row of the table. Its offset counts from the first value of the file.
    fn tensor(&mut self) -> anyhow::Result<TensorInfo> {
        let dimensions = self.u32()?;
        ensure!(
            dimensions <= DIMENSIONS,
            "it has {dimensions} dimensions, expected at most {DIMENSIONS}"
        );
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.length()?;
            ensure!(size > 0, "a dimension is 0");
            shape.push(usize::try_from(size)?);
        }
        shape.reverse();
        let id = self.u32()?;
        let kind = GgmlType::from_id(id)
            .with_context(|| format!("its type has the number {id}, which is not known"))?;
        let values = shape
            .iter()
            .try_fold(1usize, |values, size| values.checked_mul(*size))
            .with_context(|| format!("its shape {shape:?} has too many values"))?;
        let width = shape.last().copied().unwrap_or(1);
        ensure!(
            width.is_multiple_of(kind.block()),
            "a row has {width} values, but the type {kind} has blocks of {}",
            kind.block()
        );
        let bytes = kind.bytes(values)?;
        let start = self.u64()?;
        Ok(TensorInfo {
            kind,
            shape,
            start,
            bytes,
        })
    }
}
