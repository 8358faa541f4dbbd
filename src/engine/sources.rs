//! Content digests of local files and folders, remembered by stat so that an unchanged file is not read again.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::canonical::{Digest, digest_json};
use super::files::{read_sealed, write_sealed};
use super::manifest::{Entry, Stat, digest_file};
use super::store::Store;

/// A file changed within this many nanoseconds may change again without a new time: it is not remembered.
const SETTLING: i64 = 2_000_000_000;

/// Digests of local files, with a memo in the store.
pub(crate) struct Sources {
    path: PathBuf,
    memo: Memo,
    changed: bool,
}

#[derive(Default, Serialize, Deserialize)]
struct Memo {
    files: BTreeMap<String, Entry>,
}

impl Sources {
    /// The memo of a store; an unreadable one is empty.
    pub(crate) fn open(store: &Store) -> Self {
        let path = store.state("sources.json");
        let memo = read_sealed(&path).unwrap_or_default();
        Self {
            path,
            memo,
            changed: false,
        }
    }

    /// The digest of a file's contents, or of a folder's files and names. Hidden files in a folder don't count.
    pub(crate) fn digest(&mut self, path: &Path) -> anyhow::Result<Digest> {
        let metadata =
            fs::metadata(path).with_context(|| format!("could not read `{}`", path.display()))?;
        if metadata.is_file() {
            return self.file(path, &metadata);
        }
        let mut files = Vec::new();
        let mut open = vec![(String::new(), path.to_path_buf())];
        while let Some((prefix, folder)) = open.pop() {
            for entry in fs::read_dir(&folder)
                .with_context(|| format!("could not read `{}`", folder.display()))?
            {
                let path = entry
                    .with_context(|| format!("could not read `{}`", folder.display()))?
                    .path();
                let Some(part) = path.file_name().and_then(|name| name.to_str()) else {
                    bail!("`{}` has a name that is not Unicode", path.display());
                };
                if part.starts_with('.') {
                    continue;
                }
                let name = if prefix.is_empty() {
                    part.to_owned()
                } else {
                    format!("{prefix}/{part}")
                };
                // Links are followed, so that a snapshot folder of links reads as the files it stands for.
                let metadata = fs::metadata(&path)
                    .with_context(|| format!("could not read `{}`", path.display()))?;
                if metadata.is_dir() {
                    if prefix.matches('/').count() > 32 {
                        bail!(
                            "`{}` is nested too deeply; is there a link to a folder above it?",
                            path.display()
                        );
                    }
                    open.push((name, path));
                } else if metadata.is_file() {
                    files.push((name, self.file(&path, &metadata)?));
                }
            }
        }
        files.sort_unstable();
        Ok(digest_json(&json!(files)))
    }

    /// What is remembered of a file, or of the files in a folder: digests with the stats under which they hold.
    pub(crate) fn known(&self, path: &Path) -> BTreeMap<PathBuf, Entry> {
        let start = path.to_string_lossy().into_owned();
        let below = self.memo.files.range(start..);
        below
            .map(|(name, entry)| (PathBuf::from(name), entry))
            .take_while(|(name, _)| name.starts_with(path))
            .map(|(name, entry)| (name, entry.clone()))
            .collect()
    }

    /// Writes the memo back, if there is anything new in it.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.changed) {
            write_sealed(&self.path, &self.memo)?;
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, metadata: &Metadata) -> anyhow::Result<Digest> {
        let before = Stat::of(metadata);
        let name = path.to_string_lossy();
        if let Some(entry) = self.memo.files.get(&*name)
            && entry.stat == before
        {
            return Ok(entry.blake3.clone());
        }
        let blake3 = digest_file(path)?;
        let after = fs::metadata(path).map(|metadata| Stat::of(&metadata));
        let after = after.with_context(|| format!("could not read `{}`", path.display()))?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_nanos() as i64);
        if before == after && after.modified + SETTLING < now {
            self.memo.files.insert(
                name.into_owned(),
                Entry {
                    blake3: blake3.clone(),
                    stat: after,
                },
            );
            self.changed = true;
        }
        Ok(blake3)
    }
}
