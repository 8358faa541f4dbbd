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
use super::manifest::Manifest;
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
    record: Stat,
    manifest: Stat,
    contents: Manifest,
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
            let settled = known.record.settled_at(time) && known.manifest.settled_at(time);
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
            record: stat_of_file(&store.record_path(fingerprint))?,
            manifest: stat_of_file(&store.manifest_path(&whole.artifact))?,
            contents,
        })
    }

    /// Whether everything looks as it did.
    fn holds(&self, store: &Store, fingerprint: &str) -> bool {
        stat_of_file(&store.record_path(fingerprint)) == Some(self.record)
            && stat_of_file(&store.manifest_path(&self.artifact)) == Some(self.manifest)
            && self
                .contents
                .is_as_remembered(&store.artifact(&self.artifact))
    }
}

/// The stat of a file; `None` for anything else.
fn stat_of_file(path: &Path) -> Option<Stat> {
    let found = fs::symlink_metadata(path).ok()?;
    found.is_file().then(|| Stat::from_metadata(&found))
}
