//! Results that were read and found whole, with the stats under which that holds, so that a run with nothing to do reads one file instead
//! of two for each stage.
//!
//! Whether a record and a manifest are valid depends on their contents alone, and whether an artifact is as its manifest says on the
//! stats of its files. Each of these stats is compared each time, and a file with an equal stat has not changed (see [`Stat`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::files::{behind, read_sealed, write_sealed};
use super::manifest::looks_like;
use super::stat::{Stat, nanoseconds_now};
use super::store::{Found, Store};

/// The most files of a result that is remembered. To read the manifest of a larger one takes little beside looking at its files.
const MOST_FILES: usize = 64;

/// The most results of a recipe that are remembered; where there are more, those that the last run asked for.
const MOST_RESULTS: usize = 10_000;

/// The results of a recipe that earlier runs found whole, by fingerprint.
pub(crate) struct KnownResults {
    path: PathBuf,
    memo: Memo,
    seen: RefCell<Seen>,
}

#[derive(Default, Serialize, Deserialize)]
struct Memo {
    results: BTreeMap<Digest, Known>,
}

/// What a lookup gives, and all that has to look the same for it to hold.
#[derive(Clone, Serialize, Deserialize)]
struct Known {
    artifact: Digest,
    seconds: f64,
    record: Look,
    manifest: Look,
    /// The times of the last change of the artifact's folders.
    folders: BTreeMap<String, i64>,
    files: BTreeMap<String, Look>,
}

/// A stat as a list of numbers, which is read in a third of the time that one with names takes.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, i64, i64, u64)", into = "(u64, i64, i64, u64)")]
struct Look(Stat);

impl From<(u64, i64, i64, u64)> for Look {
    fn from((size, modified, changed, inode): (u64, i64, i64, u64)) -> Self {
        Self(Stat {
            size,
            modified,
            changed,
            inode,
        })
    }
}

impl From<Look> for (u64, i64, i64, u64) {
    fn from(Look(stat): Look) -> Self {
        (stat.size, stat.modified, stat.changed, stat.inode)
    }
}

/// What happened since the memo was opened.
#[derive(Default)]
struct Seen {
    asked: BTreeSet<Digest>,
    found: BTreeMap<Digest, Whole>,
}

/// A result that was read and found whole.
struct Whole {
    artifact: Digest,
    seconds: f64,
    /// When its reading began, in nanoseconds since 1970.
    time: i64,
}

/// What [`KnownResults::find`] gives.
pub(crate) enum Lookup {
    /// The result is in the store, as recorded.
    Known {
        /// Its content digest.
        artifact: Digest,
        /// Seconds the stage took.
        seconds: f64,
    },
    /// What reading gives.
    Read(Found),
}

impl KnownResults {
    /// Reads the memo of a recipe; an unreadable one is empty.
    pub(crate) fn open(store: &Store, recipe: &str) -> Self {
        let path = store.state("results").join(format!("{recipe}.json"));
        Self {
            memo: read_sealed(&path).unwrap_or_default(),
            path,
            seen: RefCell::default(),
        }
    }

    /// [`Store::find`], without reading anything where all looks as it did when it was read. With `thorough` everything is read.
    pub(crate) fn find(
        &self,
        store: &Store,
        fingerprint: &str,
        thorough: bool,
    ) -> anyhow::Result<Lookup> {
        let mut seen = self.seen.borrow_mut();
        seen.asked.insert(fingerprint.to_owned());
        let known = self.memo.results.get(fingerprint).filter(|_| !thorough);
        if let Some(known) = known.filter(|known| known.holds(store, fingerprint)) {
            return Ok(Lookup::Known {
                artifact: known.artifact.clone(),
                seconds: known.seconds,
            });
        }
        let time = nanoseconds_now();
        let found = store.find(fingerprint, thorough)?;
        if let Found::Hit(record, None) = &found {
            let whole = Whole {
                artifact: record.artifact.clone(),
                seconds: record.seconds,
                time,
            };
            seen.found.insert(fingerprint.to_owned(), whole);
        }
        Ok(Lookup::Read(found))
    }

    /// Trusts what was found since the memo was opened, however new it is.
    #[cfg(test)]
    pub(super) fn trust_all(&mut self, store: &Store) {
        let found = std::mem::take(&mut self.seen.get_mut().found).into_iter();
        let known = found.map(|(fingerprint, whole)| {
            let known = Known::new(store, &fingerprint, &whole).unwrap();
            (fingerprint, known)
        });
        self.memo.results.extend(known);
    }

    /// Writes the memo back, if there is anything new in it.
    pub(crate) fn save(&self, store: &Store) -> anyhow::Result<()> {
        let seen = self.seen.take();
        if seen.found.is_empty() {
            return Ok(());
        }
        // A file whose last change was long enough before it was read is what was read, and each later change will show.
        let behind = behind(&store.folder("records"));
        let settled = seen.found.into_iter().filter_map(|(fingerprint, whole)| {
            let known = Known::new(store, &fingerprint, &whole)?;
            let time = whole.time - behind;
            let settled = known.record.0.settled_at(time) && known.manifest.0.settled_at(time);
            settled.then_some((fingerprint, known))
        });
        let settled: Vec<_> = settled.collect();
        if settled.is_empty() {
            return Ok(());
        }
        let mut results = self.memo.results.clone();
        results.extend(settled);
        if results.len() > MOST_RESULTS {
            results.retain(|fingerprint, _| seen.asked.contains(fingerprint));
        }
        write_sealed(&self.path, &Memo { results })
    }
}

impl Known {
    /// What a result looks like now; `None` if it is too large, or not all of it is told by its stats.
    fn new(store: &Store, fingerprint: &str, whole: &Whole) -> Option<Self> {
        let contents = store.manifest(&whole.artifact)?;
        let is_small = contents.files.len() <= MOST_FILES;
        let is_told = contents.digest() == whole.artifact && !contents.folders.is_empty();
        if !(is_small && is_told) {
            return None;
        }
        Some(Self {
            artifact: whole.artifact.clone(),
            seconds: whole.seconds,
            record: look_at(&store.record_path(fingerprint))?,
            manifest: look_at(&store.manifest_path(&whole.artifact))?,
            folders: contents.folders,
            files: (contents.files.into_iter())
                .map(|(name, entry)| (name, Look(entry.stat)))
                .collect(),
        })
    }

    /// Whether everything looks as it did.
    fn holds(&self, store: &Store, fingerprint: &str) -> bool {
        let files = self.files.iter();
        let files = files.map(|(name, Look(stat))| (name.as_str(), *stat));
        look_at(&store.record_path(fingerprint)) == Some(self.record)
            && look_at(&store.manifest_path(&self.artifact)) == Some(self.manifest)
            && looks_like(&store.artifact(&self.artifact), &self.folders, files)
    }
}

/// The stat of a file; `None` for anything else.
fn look_at(path: &Path) -> Option<Look> {
    let found = fs::symlink_metadata(path).ok()?;
    found.is_file().then(|| Look(Stat::from_metadata(&found)))
}
