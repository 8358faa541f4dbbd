//! What a store remembers of remotes: results whose files stayed there, and results that are still to be sent.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::super::canonical::Digest;
use super::super::canonical::is_digest;
use super::super::files::{remove, write_atomically};
use super::super::record::Record;
use super::super::store::Store;

impl Store {
    /// Whether only the record of this fingerprint was taken from a remote, because nobody needed the files here.
    pub(crate) fn is_left(&self, fingerprint: &str) -> bool {
        self.folder("left").join(fingerprint).exists()
    }

    /// Whether there is any such result.
    pub(crate) fn has_left(&self) -> bool {
        std::fs::read_dir(self.folder("left")).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Keeps a record from a remote without its files.
    pub(crate) fn leave(&self, fingerprint: &str, record: &Record) -> anyhow::Result<()> {
        if self.is_left(fingerprint) {
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
    pub fn fingerprints(&self) -> Vec<Digest> {
        let names = self.names("records").into_iter();
        names
            .filter_map(|name| name.strip_suffix(".json").map(str::to_owned))
            .collect()
    }
}
