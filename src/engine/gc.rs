//! Frees space: removes results that nobody needs any more.
//!
//! Records and the history stay (a few KB each), so reasons can still be told, and a removed result is made again when it is
//! wanted. A run in progress and a collection exclude each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, bail};

use super::canonical::Digest;
use super::files::remove;
use super::store::Store;

/// What to keep beside the results that are named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// The results of each recipe's last runs.
    pub keep_runs: usize,
    /// Results that nobody needs may stay up to so many bytes, the newest first.
    pub max_size: u64,
}

/// Something that can go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// What it is: `result`, `unfinished work`, `end state` (what a finished stage left).
    pub what: &'static str,
    /// The stage that made it, if a record tells.
    pub stage: Option<String>,
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// The right to use a store's results: many runs share it, a collection has it alone.
pub(crate) struct InUse(
    #[expect(dead_code, reason = "dropping the file frees the lock")] Option<File>,
);

impl Store {
    /// Taken by a run, so that nothing is collected under it. A store that can't be written can't be locked, and still serves
    /// what it has.
    pub(crate) fn use_results(&self) -> anyhow::Result<InUse> {
        let Ok(file) = self.use_lock() else {
            return Ok(InUse(None));
        };
        file.lock_shared().context("could not lock the store")?;
        Ok(InUse(Some(file)))
    }

    fn use_lock(&self) -> anyhow::Result<File> {
        super::store::open_lock(&self.lock_path("in-use"))
    }

    /// Finds what can go, and with `remove_it` removes it. Kept are the results in `needed`, those of the last runs, and the
    /// newest of the rest up to a size. Fails while a run uses the store.
    pub fn collect(
        &self,
        needed: &BTreeSet<Digest>,
        limits: Limits,
        remove_it: bool,
    ) -> anyhow::Result<Vec<Garbage>> {
        let lock = self.use_lock()?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("a run uses the store; try again when it is done")
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).context("could not lock the store");
            }
        }
        let mut keep = needed.clone();
        for recipe in self.names("state/runs") {
            let runs = self.runs(&recipe);
            for run in runs.iter().rev().take(limits.keep_runs) {
                keep.extend(
                    run.stages
                        .values()
                        .filter_map(|stage| stage.artifact.clone()),
                );
            }
        }
        let made_by = self.made_by();
        let mut results = Vec::new();
        for content in self.names("artifacts") {
            if content.contains('.') || keep.contains(&content) {
                continue;
            }
            let path = self.artifact(&content);
            let made = fs::metadata(&path)
                .and_then(|found| found.modified())
                .unwrap_or(UNIX_EPOCH);
            let garbage = Garbage {
                what: "result",
                stage: made_by.get(&content).cloned(),
                size: size(&path),
                path,
            };
            results.push((made, content, garbage));
        }
        results.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        let mut garbage = Vec::new();
        let mut room = limits.max_size;
        for (_, content, result) in results {
            if let Some(left) = room.checked_sub(result.size) {
                room = left;
                continue;
            }
            room = 0;
            if remove_it {
                // The manifest goes first: without it there is no result, whatever is left of the folder.
                remove(&self.artifact(&format!("{content}.json")))?;
                remove(&result.path)?;
            }
            garbage.push(result);
        }
        for family in self.names("ends") {
            let ends = self.ends(&family);
            for fingerprint in self.names(&format!("ends/{family}")) {
                let record = self.record(&fingerprint);
                if record
                    .as_ref()
                    .is_some_and(|record| keep.contains(&record.artifact))
                {
                    continue;
                }
                let path = ends.join(&fingerprint);
                garbage.push(Garbage {
                    what: "end state",
                    stage: record.map(|record| record.stage),
                    size: size(&path),
                    path: path.clone(),
                });
                if remove_it {
                    remove(&path)?;
                }
            }
            if remove_it {
                // Only when nothing is left in it.
                let _ = fs::remove_dir(&ends);
            }
        }
        for kind in ["partial", "scratch", "failed", "incoming"] {
            for name in self.names(kind) {
                let path = self.folder(kind).join(&name);
                garbage.push(Garbage {
                    what: "unfinished work",
                    stage: None,
                    size: size(&path),
                    path: path.clone(),
                });
                if remove_it {
                    remove(&path)?;
                }
            }
        }
        Ok(garbage)
    }

    /// The stage that made each content, from the records.
    fn made_by(&self) -> BTreeMap<Digest, String> {
        let mut made = BTreeMap::new();
        for name in self.names("records") {
            if let Some(record) = name
                .strip_suffix(".json")
                .and_then(|name| self.record(name))
            {
                made.insert(record.artifact, record.stage);
            }
        }
        made
    }

    pub(super) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.folder(folder))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        names
    }
}

/// The bytes of all files below a path.
fn size(path: &std::path::Path) -> u64 {
    let mut size = 0;
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {
                open.extend(
                    fs::read_dir(&path)
                        .into_iter()
                        .flatten()
                        .flatten()
                        .map(|entry| entry.path()),
                );
            }
            Ok(found) => size += found.len(),
            Err(_) => {}
        }
    }
    size
}
