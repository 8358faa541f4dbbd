//! What a store remembers of remotes: results whose files stayed there, and results that are still to be sent.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;

use super::super::canonical::Digest;
use super::super::canonical::is_digest;
use super::super::files::{is_io_trouble, remove, write_atomically};
use super::super::record::Record;
use super::super::store::Store;

impl Store {
    /// Whether only the record of this fingerprint was taken from a remote, because nobody needed the files here. An error where
    /// that can't be told: taken for a no, it would make a result again that is there to be fetched.
    pub(crate) fn is_remote_only(&self, fingerprint: &str) -> anyhow::Result<bool> {
        let path = self.folder("left").join(fingerprint);
        match path.try_exists() {
            Err(error) if is_io_trouble(&error) => {
                Err(error).with_context(|| format!("could not look for `{}`", path.display()))
            }
            found => Ok(found.unwrap_or(false)),
        }
    }

    /// Whether there is any such result.
    pub(crate) fn has_remote_only(&self) -> anyhow::Result<bool> {
        Ok(!self.list("left")?.is_empty())
    }

    /// Keeps a record from a remote without its files.
    pub(crate) fn note_remote_only(
        &self,
        fingerprint: &str,
        record: &Record,
    ) -> anyhow::Result<()> {
        if self.is_remote_only(fingerprint)? {
            return Ok(());
        }
        self.write_record(fingerprint, record)?;
        write_atomically(&self.folder("left").join(fingerprint), b"")
    }

    /// Keeps a record from a remote whose files are here.
    pub(super) fn adopt(&self, fingerprint: &str, record: &Record) -> anyhow::Result<()> {
        let known = self.record(fingerprint);
        if known.is_some_and(|known| known.artifact == record.artifact) {
            return Ok(());
        }
        self.write_record(fingerprint, record)
    }

    /// The files of all artifacts by digest, as their manifests have them.
    pub(super) fn blobs(&self) -> BTreeMap<Digest, PathBuf> {
        let mut blobs = BTreeMap::new();
        for name in self.names("artifacts") {
            let content = name.strip_suffix(".json").unwrap_or_default();
            let Some(manifest) = self.manifest(content) else {
                continue;
            };
            let folder = self.artifact(content);
            for (path, entry) in manifest.files {
                blobs.insert(entry.blake3, folder.join(path));
            }
        }
        blobs
    }

    /// Notes that a result is to be sent to a remote, or that it was.
    pub(super) fn set_unsent(
        &self,
        remote: &str,
        fingerprint: &str,
        unsent: bool,
    ) -> anyhow::Result<()> {
        let path = self.folder("unsent").join(remote).join(fingerprint);
        if unsent {
            return write_atomically(&path, b"");
        }
        remove(&path)
    }

    /// The results that are to be sent to a remote.
    pub(super) fn unsent(&self, remote: &str) -> Vec<Digest> {
        let mut names = self.names(&format!("unsent/{remote}"));
        names.retain(|name| is_digest(name));
        names
    }

    /// The fingerprints of all results that have a record.
    pub fn fingerprints(&self) -> anyhow::Result<Vec<Digest>> {
        let names = self.list("records")?.into_iter();
        Ok(names
            .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
            .collect())
    }
}
