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
use super::record::Record;
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
    /// New results, and when the reading of each began in nanoseconds since 1970.
    found: BTreeMap<Digest, (Known, i64)>,
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
        if let Found::Hit(record, None) = &found
            && let Some(known) = Known::new(store, fingerprint, record)
        {
            seen.found.insert(fingerprint.to_owned(), (known, time));
        }
        Ok(Lookup::Read(found))
    }

    /// Trusts what was found since the memo was opened, however new it is.
    #[cfg(test)]
    pub(super) fn trust_all(&mut self) {
        let found = std::mem::take(&mut self.seen.get_mut().found).into_iter();
        let known = found.map(|(fingerprint, (known, _))| (fingerprint, known));
        self.memo.results.extend(known);
    }

    /// Writes the memo back, if there is anything new in it.
    pub(crate) fn save(&self, store: &Store) -> anyhow::Result<()> {
        let seen = self.seen.take();
        if seen.found.is_empty() {
            return Ok(());
        }
        // A file that was changed shortly before it was read may have been changed again without a new time.
        let behind = behind(&store.folder("records"));
        let settled = seen.found.into_iter().filter(|(_, (known, time))| {
            let time = time - behind;
            known.record.settled_at(time) && known.manifest.settled_at(time)
        });
        let settled: Vec<_> = settled.map(|(name, (known, _))| (name, known)).collect();
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
    /// A result that was read just now; `None` if it is too large, or what it looks like is not known.
    fn new(store: &Store, fingerprint: &str, record: &Record) -> Option<Self> {
        let contents = store.manifest(&record.artifact)?;
        let is_small = contents.files.len() <= MOST_FILES;
        (is_small && contents.digest() == record.artifact && !contents.folders.is_empty()).then(
            || {
                Some(Self {
                    artifact: record.artifact.clone(),
                    seconds: record.seconds,
                    record: stat_of_file(&store.record_path(fingerprint))?,
                    manifest: stat_of_file(&store.manifest_path(&record.artifact))?,
                    contents,
                })
            },
        )?
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
