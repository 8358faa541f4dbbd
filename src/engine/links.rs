//! Creating or removing a hard link changes the ctime of a file, and a file with a new ctime is read again in case its bytes changed. When
//! this program links or unlinks files of the store, it records their new stats, so that a model of many GB is not read needlessly.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::canonical::Digest;
use super::files::outlast;
use super::manifest::Manifest;
use super::stat::Stat;
use super::store::Store;

/// Files of artifacts that are about to be linked or unlinked, and whose stats are still those recorded.
pub(super) struct Linked<'a> {
    store: &'a Store,
    artifacts: Vec<(Digest, Manifest, Vec<String>)>,
}

impl<'a> Linked<'a> {
    /// Checks the stats of files, given by artifact.
    pub(super) fn before(store: &'a Store, files: BTreeMap<Digest, BTreeSet<String>>) -> Self {
        let mut artifacts = Vec::new();
        for (artifact, names) in files {
            let Some(manifest) = store.manifest(&artifact).filter(|_| !names.is_empty()) else {
                continue;
            };
            let as_remembered = |name: &String| {
                let entry = manifest.files.get(name);
                entry.is_some_and(|entry| stat(store, &artifact, name) == Some(entry.stat))
            };
            let names = names.into_iter().filter(as_remembered).collect();
            artifacts.push((artifact, manifest, names));
        }
        Self { store, artifacts }
    }

    /// Records the new stats of the files whose size, modification time and inode are unchanged.
    pub(super) fn after(self) {
        for (artifact, mut manifest, names) in self.artifacts {
            let mut changed = false;
            for name in &names {
                let now = stat(self.store, &artifact, name);
                if let (Some(entry), Some(now)) = (manifest.files.get_mut(name), now)
                    && now != entry.stat
                    && unedited(&now, &entry.stat)
                {
                    entry.stat = now;
                    changed = true;
                }
            }
            // A failure only costs a later read of the file.
            let artifacts = self.store.folder("artifacts");
            if changed && outlast(&artifacts, manifest.newest()).is_ok() {
                let _ = self.store.write_manifest(&artifact, &manifest);
            }
        }
    }
}

/// Whether two stats of a file differ at most in what linking it changes.
pub(super) fn unedited(one: &Stat, other: &Stat) -> bool {
    (one.size, one.modified, one.inode) == (other.size, other.modified, other.inode)
}

fn stat(store: &Store, artifact: &str, name: &str) -> Option<Stat> {
    let found = fs::symlink_metadata(store.artifact(artifact).join(name)).ok()?;
    Some(Stat::from_metadata(&found))
}
