//! Results that were read and found whole, with the stats under which that holds, so that a run with nothing to do reads one file instead
//! of two for each stage.
//!
//! Whether a record and a manifest are valid depends on their contents alone, and whether an artifact is as its manifest says on the
//! stats of its files. Each of these stats is compared each time, and a file with an equal stat has not changed (see [`Stat`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::files::{behind, read_sealed, write_sealed};
use super::one_look::OneLook;
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
    /// The results that looked as they did.
    looked: RefCell<OneLook<Digest, ()>>,
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
    /// The artifact's folders, itself included.
    folders: Vec<String>,
    files: Vec<String>,
    /// The digest of how record, manifest, folders and files look: it is read in a fraction of the time that their numbers take.
    looks: Digest,
}

/// How files and folders look, as bytes of which a digest is made.
#[derive(Default)]
struct Looks(Vec<u8>);

impl Looks {
    fn note_file(&mut self, stat: Stat) {
        self.0.extend(stat.size.to_le_bytes());
        self.0.extend(stat.modified.to_le_bytes());
        self.0.extend(stat.changed.to_le_bytes());
        self.0.extend(stat.inode.to_le_bytes());
    }

    /// Of a folder the time of the last change counts.
    fn note_folder(&mut self, changed: i64) {
        self.0.extend(changed.to_le_bytes());
    }

    /// Looks at a file. Whether it is one.
    fn at_file(&mut self, path: &Path) -> bool {
        let Some(stat) = look_at(path) else {
            return false;
        };
        self.note_file(stat);
        true
    }

    /// Looks at a folder. Whether it is one.
    fn at_folder(&mut self, path: &Path) -> bool {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => {
                self.note_folder(Stat::from_metadata(&found).changed);
                true
            }
            _ => false,
        }
    }

    fn digest(&self) -> Digest {
        blake3::hash(&self.0).to_hex().to_string()
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
            looked: RefCell::new(OneLook::new()),
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
        if let Some(known) = known.filter(|known| self.holds(known, store, fingerprint)) {
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

    /// [`Known::holds`], asked once a look: stages with the same fingerprint have the same result.
    fn holds(&self, known: &Known, store: &Store, fingerprint: &str) -> bool {
        let mut looked = self.looked.borrow_mut();
        if looked.get(fingerprint).is_some() {
            return true;
        }
        let now = Instant::now();
        let holds = known.holds(store, fingerprint);
        if holds {
            looked.note(now, fingerprint.to_owned(), ());
        }
        holds
    }

    /// Ends a look: from now on all results are looked at again.
    pub(super) fn look_again(&self) {
        self.looked.borrow_mut().end();
    }

    /// Trusts what was found since the memo was opened, however new it is.
    #[cfg(test)]
    pub(super) fn trust_all(&mut self, store: &Store) {
        let found = std::mem::take(&mut self.seen.get_mut().found).into_iter();
        let known = found.map(|(fingerprint, whole)| {
            let known = Known::new(store, &fingerprint, &whole, None).unwrap();
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
            let known = Known::new(store, &fingerprint, &whole, Some(whole.time - behind))?;
            Some((fingerprint, known))
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
    /// What a result looks like now; `None` if it is too large, or not all of it is told by its stats. Record and manifest must have been
    /// as they are since before `settled_at`, if that is given.
    fn new(
        store: &Store,
        fingerprint: &str,
        whole: &Whole,
        settled_at: Option<i64>,
    ) -> Option<Self> {
        let contents = store.manifest(&whole.artifact)?;
        let is_small = contents.files.len() <= MOST_FILES;
        let is_told = contents.digest() == whole.artifact && !contents.folders.is_empty();
        let record = look_at(&store.record_path(fingerprint))?;
        let manifest = look_at(&store.manifest_path(&whole.artifact))?;
        let is_settled = |stat: Stat| settled_at.is_none_or(|time| stat.settled_at(time));
        if !(is_small && is_told && is_settled(record) && is_settled(manifest)) {
            return None;
        }
        let mut looks = Looks::default();
        looks.note_file(record);
        looks.note_file(manifest);
        for changed in contents.folders.values() {
            looks.note_folder(*changed);
        }
        for entry in contents.files.values() {
            looks.note_file(entry.stat);
        }
        Some(Self {
            artifact: whole.artifact.clone(),
            seconds: whole.seconds,
            folders: contents.folders.into_keys().collect(),
            files: contents.files.into_keys().collect(),
            looks: looks.digest(),
        })
    }

    /// Whether everything looks as it did.
    fn holds(&self, store: &Store, fingerprint: &str) -> bool {
        let mut looks = Looks::default();
        let artifact = store.artifact(&self.artifact);
        // A path that ends in a slash would follow a link.
        let below = |name: &String| match name.as_str() {
            "" => artifact.clone(),
            name => artifact.join(name),
        };
        looks.at_file(&store.record_path(fingerprint))
            && looks.at_file(&store.manifest_path(&self.artifact))
            && (self.folders.iter()).all(|name| looks.at_folder(&below(name)))
            && (self.files.iter()).all(|name| looks.at_file(&below(name)))
            && looks.digest() == self.looks
    }
}

/// The stat of a file; `None` for anything else.
fn look_at(path: &Path) -> Option<Stat> {
    let found = fs::symlink_metadata(path).ok()?;
    found.is_file().then(|| Stat::from_metadata(&found))
}
