//! The header of a safetensors file: which tensors it holds, and where.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, ensure};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

/// The largest header in bytes, which is the limit of the safetensors format.
const LONGEST: u64 = 100_000_000;
/// The key under which a header has the file's metadata.
const METADATA: &str = "__metadata__";

/// A tensor as a header describes it.
#[derive(Debug, Clone, Deserialize)]
pub struct TensorInfo {
    /// The type of its values.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The start and the end of its bytes, counted from [`Header::start`].
    pub data_offsets: (u64, u64),
}

impl TensorInfo {
    /// Whether it has as many bytes as its shape and type need.
    fn has_its_size(&self) -> bool {
        let (start, end) = self.data_offsets;
        let mut sizes = self.shape.iter().map(|size| *size as u64);
        let bits = sizes.try_fold(self.dtype.bitsize() as u64, u64::checked_mul);
        let bytes = end.checked_sub(start);
        bits.is_some() && bits == bytes.and_then(|bytes| bytes.checked_mul(8))
    }
}

/// A header whose tensors fill the file, one after the other, with the sizes that they need.
#[derive(Debug, Clone)]
pub struct Header {
    /// The offset in the file at which the values begin.
    pub start: u64,
    /// The size of all values in bytes.
    pub size: u64,
    /// The tensors by their names.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// The file's metadata.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// The file can't be read, or is not a safetensors file whose tensors fill it.
    pub fn read(file: &File) -> anyhow::Result<Self> {
        let metadata = file.metadata()?;
        ensure!(metadata.is_file(), "it is not a file");
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0)
            .context("it is shorter than a header")?;
        let length = u64::from_le_bytes(length);
        let room = metadata.len().saturating_sub(8);
        ensure!(
            length <= room.min(LONGEST),
            "it announces a header of {length} bytes, but is {} bytes long; is it a pointer of git-lfs or a page of text?",
            metadata.len()
        );
        let mut text = vec![0; usize::try_from(length)?];
        file.read_exact_at(&mut text, 8)?;
        Self::parse(&text, room - length)
    }

    /// Checks the text of a header, behind which there are `size` bytes.
    fn parse(text: &[u8], size: u64) -> anyhow::Result<Self> {
        let mut entries: BTreeMap<String, Value> =
            serde_json::from_slice(text).context("its header is not JSON")?;
        let metadata = match entries.remove(METADATA) {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(value) => serde_json::from_value(value)
                .context("its header has metadata that are not texts")?,
        };
        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            let tensor: TensorInfo = serde_json::from_value(entry).with_context(|| {
                format!("its header says nothing usable of the tensor `{name}`")
            })?;
            let (start, end) = tensor.data_offsets;
            ensure!(
                tensor.has_its_size(),
                "its header gives the tensor `{name}` ({:?} {:?}) the bytes {start} to {end}",
                tensor.dtype,
                tensor.shape
            );
            tensors.insert(name, tensor);
        }
        let mut ranges: Vec<_> = tensors.values().map(|tensor| tensor.data_offsets).collect();
        ranges.sort_unstable();
        let mut covered = 0;
        for (start, end) in ranges {
            ensure!(
                start == covered,
                "its header leaves a gap between two tensors, or lays one over another, at byte {covered}"
            );
            covered = end;
        }
        ensure!(
            covered == size,
            "its header speaks of {covered} bytes of tensors, but there are {size}; was it cut off?"
        );
        Ok(Self {
            start: 8 + text.len() as u64,
            size,
            tensors,
            metadata,
        })
    }
}
