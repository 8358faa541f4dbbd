//! Uploads results to the remote: first the files it lacks, then the manifest, and last the record, unless another one was published.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context as _, anyhow};

use super::super::Event;
use super::super::canonical::Digest;
use super::super::manifest::Manifest;
use super::super::record::Record;
use super::super::store::Store;
use super::layout::{
    blob_key, get, manifest_bytes, manifest_key, parse_manifest, parse_record, record_key,
};
use super::pull::{PARALLEL, in_parallel};
use super::{Remote, Shared};

/// What was uploaded for one result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Files that the remote lacked.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Whether the record was new there.
    pub record: bool,
}

impl Shared {
    /// Sends what is queued until the queue ends, the run is interrupted, or the remote can't be written.
    pub(crate) fn send_all(
        &self,
        store: &Store,
        queued: &Receiver<Digest>,
        events: &Sender<Event>,
        cancel: &AtomicBool,
    ) {
        for fingerprint in queued {
            if cancel.load(Ordering::Relaxed) || !self.pushes() {
                continue;
            }
            match self.push(store, &fingerprint, false, cancel) {
                Ok(Some((record, sent))) => {
                    // Should it stay, the next run asks whether the remote has it.
                    let _ = store.set_unsent(&self.place(), &fingerprint, false);
                    // A reporter that is gone misses nothing else.
                    let _ = events.send(Event::StageSent {
                        stage: record.stage,
                        artifact: record.artifact,
                        files: sent.files,
                        bytes: sent.bytes,
                    });
                }
                Ok(None) => _ = store.set_unsent(&self.place(), &fingerprint, false),
                Err(_) if cancel.load(Ordering::Relaxed) => {}
                Err(error) => self.unwritable(&error),
            }
        }
    }

    /// Sends one result; `None` if it is not whole here. Files are asked for one by one when `thorough`, or else only if the
    /// remote has no such artifact.
    pub fn push(
        &self,
        store: &Store,
        fingerprint: &str,
        thorough: bool,
        cancel: &AtomicBool,
    ) -> anyhow::Result<Option<(Record, Sent)>> {
        let remote = self.remote.as_ref().context("there is no remote")?.as_ref();
        if remote.read_only() {
            return Err(anyhow!("it is read-only"));
        }
        let Some(record) = store.record(fingerprint) else {
            return Ok(None);
        };
        let content = &record.artifact;
        let Some(manifest) = store.manifest(content).filter(|_| store.is_sound(content)) else {
            return Ok(None);
        };
        let departure = Departure {
            shared: self,
            remote,
            folder: store.artifact(content),
            cancel,
            files: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
        };
        departure.artifact(content, &manifest, thorough)?;
        let new = departure.record(fingerprint, &record)?;
        let sent = Sent {
            files: departure.files.into_inner(),
            bytes: departure.bytes.into_inner(),
            record: new,
        };
        Ok(Some((record, sent)))
    }
}

impl Shared {
    /// Sends the files of an artifact that lie below a folder, as far as the remote lacks them. No record names them.
    pub(super) fn send_artifact(
        &self,
        folder: PathBuf,
        content: &str,
        manifest: &Manifest,
        cancel: &AtomicBool,
    ) -> anyhow::Result<()> {
        let remote = self.remote.as_ref().context("there is no remote")?.as_ref();
        let departure = Departure {
            shared: self,
            remote,
            folder,
            cancel,
            files: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
        };
        departure.artifact(content, manifest, false)
    }
}

struct Departure<'a> {
    shared: &'a Shared,
    remote: &'a dyn Remote,
    folder: PathBuf,
    cancel: &'a AtomicBool,
    files: AtomicUsize,
    bytes: AtomicU64,
}

impl Departure<'_> {
    fn is_bad(&self, digest: &str) -> bool {
        self.shared.state().bad.contains(digest)
    }

    fn artifact(&self, content: &str, manifest: &Manifest, thorough: bool) -> anyhow::Result<()> {
        let key = manifest_key(content);
        if !thorough && !self.is_bad(content) {
            let there = get(self.remote, &key)?;
            // Published after its files: they are there.
            if there.is_some_and(|bytes| parse_manifest(content, &bytes).is_ok()) {
                return Ok(());
            }
        }
        let blobs: BTreeMap<_, _> = manifest
            .files
            .iter()
            .map(|(name, entry)| (&entry.blake3, (name, entry.stat.size)))
            .collect();
        let blobs: Vec<_> = blobs.into_iter().collect();
        // Where one file is damaged, others may be that nobody has looked at.
        let suspect = self.is_bad(content);
        let trouble = in_parallel(&blobs, PARALLEL, |(blake3, (name, size))| {
            let key = blob_key(blake3);
            if !suspect && self.remote.size(&key)? == Some(*size) {
                return Ok(());
            }
            self.blob(&key, blake3, &self.folder.join(name), *size)
        });
        if let Some(error) = trouble {
            return Err(error);
        }
        let bytes = manifest_bytes(manifest)?;
        self.remote
            .write(&key, bytes.len() as u64, &mut bytes.as_slice())
    }

    fn blob(&self, key: &str, blake3: &str, path: &Path, size: u64) -> anyhow::Result<()> {
        let file =
            File::open(path).with_context(|| format!("could not read `{}`", path.display()))?;
        let mut source = Checked {
            file,
            hasher: blake3::Hasher::new(),
            blake3,
            cancel: self.cancel,
        };
        self.remote.write(key, size, &mut source)?;
        self.files.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }

    /// Publishes a record; whether it is new. Whoever was first stays, unless what they published is of no use.
    fn record(&self, fingerprint: &str, record: &Record) -> anyhow::Result<bool> {
        let key = record_key(fingerprint);
        let bytes = serde_json::to_vec_pretty(record)?;
        let size = bytes.len() as u64;
        let useless = self.is_bad(fingerprint) || self.shared.is_distrusted(fingerprint);
        let created = if useless {
            Ok(false)
        } else {
            self.remote.create(&key, bytes.clone())
        };
        if let Ok(true) = created {
            return Ok(true);
        }
        // Somebody was first, or the answer got lost: what is there now tells.
        let there = get(self.remote, &key)?;
        let there = there.map(|bytes| parse_record(fingerprint, &bytes));
        match (there, created) {
            (Some(Ok(there)), _) if there.artifact == record.artifact => Ok(false),
            (Some(Ok(_)), Ok(_)) if !useless => {
                self.shared.warn(&format!(
                    "`{}`: another machine made other bytes from the same fingerprint; the remote keeps those",
                    record.stage
                ));
                Ok(false)
            }
            (None, Err(error)) => Err(error),
            // Damaged, or pointing to what is.
            _ => {
                self.remote.write(&key, size, &mut bytes.as_slice())?;
                Ok(true)
            }
        }
    }
}

/// A reader of a file that fails at the end if the contents don't match the digest, so that no wrong file is uploaded.
struct Checked<'a> {
    file: File,
    hasher: blake3::Hasher,
    blake3: &'a str,
    cancel: &'a AtomicBool,
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(io::Error::other("interrupted"));
        }
        let count = self.file.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        if count == 0
            && !buffer.is_empty()
            && self.hasher.finalize().to_hex().as_str() != self.blake3
        {
            return Err(io::Error::other("the file was changed since it was made"));
        }
        Ok(count)
    }
}
