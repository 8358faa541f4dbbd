//! Hard links change the ctime of a file, and what has another ctime is read again, lest its bytes changed, too. Where this program links
//! or unlinks files of the store, it remembers their new stats, so that a model of many GB is not read for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::canonical::Digest;
use super::files::outlast;
use super::manifest::Manifest;
use super::stat::Stat;
use super::store::Store;

/// Files of artifacts that are about to be linked or unlinked, and were as remembered before.
pub(super) struct Linked<'a> {
    store: &'a Store,
    artifacts: Vec<(Digest, Manifest, Vec<String>)>,
}

impl<'a> Linked<'a> {
    /// Looks at the files, by artifact.
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

    /// Remembers what became of them: other links, and the same size, time and inode.
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
            // Only spares work.
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
    Some(Stat::of(&found))
}
