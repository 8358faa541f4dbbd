//! Reads the small files of a model folder, within bounds.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// The longest `tokenizer.json`, in bytes; those of the largest vocabularies have some ten million.
pub(super) const LONGEST_TOKENIZER: u64 = 512 << 20;
/// The longest of the other files.
const LONGEST_CONFIG: u64 = 64 << 20;

/// The name of a file without its folder, for messages, where the path in the store would not help.
pub(super) fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Reads a file of at most `most` bytes. The limit holds even if the file grows while it is read.
pub(super) fn read_short(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 <= most,
        "it has more than {} MiB",
        most >> 20
    );
    Ok(bytes)
}

/// Reads a small JSON file; `None` if it does not exist.
pub(super) fn json_file(path: &Path) -> Result<Option<Value>> {
    if !path.is_file() {
        return Ok(None);
    }
    let read =
        || -> Result<Value> { Ok(serde_json::from_slice(&read_short(path, LONGEST_CONFIG)?)?) };
    read()
        .with_context(|| format!("could not read `{}`", file_name(path)))
        .map(Some)
}
