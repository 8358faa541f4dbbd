//! The contents of a folder: its files with sizes and digests, and a memo of their stat so that a second look reads nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::canonical::{Digest, digest_list};
use super::digest::digest_file;
use super::files::{cannot_read, is_trouble};
use super::stat::{Stat, is_settled, nanoseconds_now};

/// The largest size of a manifest in bytes. It has about a hundred bytes per file.
pub(super) const LONGEST_MANIFEST: usize = 256 << 20;

/// One file of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Entry {
    /// BLAKE3 of the contents.
    pub blake3: Digest,
    /// The stat for which the digest is known to be right.
    pub stat: Stat,
}

/// An [`Entry`] as it is stored, in one flat object. Reading it with `#[serde(flatten)]` would take three times as long.
#[derive(Serialize, Deserialize)]
struct Written {
    blake3: Digest,
    size: u64,
    modified: i64,
    // Missing in manifests of earlier versions. No file has the default as its time, so those files are read once.
    #[serde(default)]
    changed: i64,
    inode: u64,
}

impl From<Written> for Entry {
    fn from(written: Written) -> Self {
        Self {
            blake3: written.blake3,
            stat: Stat {
                size: written.size,
                modified: written.modified,
                changed: written.changed,
                inode: written.inode,
            },
        }
    }
}

impl From<Entry> for Written {
    fn from(entry: Entry) -> Self {
        Self {
            blake3: entry.blake3,
            size: entry.stat.size,
            modified: entry.stat.modified,
            changed: entry.stat.changed,
            inode: entry.stat.inode,
        }
    }
}

/// The files of a folder by relative path, with `/` between parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Path to entry.
    pub files: BTreeMap<String, Entry>,
    /// The time of the last change of each folder by path; the top folder has the empty path. While these times are the same, no file
    /// was added or removed, so the folders need not be listed.
    #[serde(
        default,
        rename = "folders_changed",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub folders: BTreeMap<String, i64>,
}

/// How a folder compares with its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// Every file has the recorded stat.
    Sound,
    /// Some stats differ, but the contents are the same. Holds the manifest with the new stats.
    Touched(Manifest),
    /// The folder is not there.
    Missing,
    /// Something in it differs from the record.
    Damaged(String),
    /// It could not be read, for a reason other than damage: missing permissions, a failing disk.
    Unreadable(String),
}

impl Manifest {
    /// Reads every file below `folder`. Links are refused: an artifact stands alone.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        Self::read_with(folder, &BTreeMap::new())
    }

    /// [`Manifest::read`], but for files whose digest is known.
    pub(super) fn read_with(
        folder: &Path,
        known: &BTreeMap<String, Digest>,
    ) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        let found = walk(folder)?;
        let folders = folders(folder, found.iter().map(|(name, _)| name.as_str()));
        for (name, path) in found {
            let entry = match known.get(&name) {
                Some(known) => Entry {
                    blake3: known.clone(),
                    stat: stat_of(&path)?,
                },
                None => read_entry(&path)?,
            };
            files.insert(name, entry);
        }
        Ok(Self { files, folders })
    }

    /// Records the folders of a copy in `folder`.
    pub(super) fn remember_folders(&mut self, folder: &Path) {
        self.folders = folders(folder, self.files.keys().map(String::as_str));
    }

    /// The newest time of a change to a file or folder.
    pub(super) fn newest(&self) -> i64 {
        let files = self.files.values().map(|entry| entry.stat.changed);
        let all = files.chain(self.folders.values().copied());
        all.max().unwrap_or(i64::MIN)
    }

    /// The name of the contents: paths, sizes and digests, no stats.
    pub fn digest(&self) -> Digest {
        let files = self.files.iter();
        let files = files.map(|(path, entry)| (path, entry.stat.size, &entry.blake3));
        digest_list(&files.collect::<Vec<_>>())
    }

    /// The bytes of all files. The sum saturates, since a manifest that was tampered with may claim any sizes.
    pub fn size(&self) -> u64 {
        let sizes = self.files.values().map(|entry| entry.stat.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Compares a folder with this manifest. Reads only files whose stat differs, or all when `thorough`.
    pub fn check(&self, folder: &Path, thorough: bool) -> Check {
        if !thorough && self.is_as_remembered(folder) {
            return Check::Sound;
        }
        let there = fs::metadata(folder).with_context(|| cannot_read(folder));
        let compared = match there {
            Ok(found) if found.is_dir() => self.compare(folder, thorough),
            Err(error) if is_trouble(&error) => Err(error),
            Ok(_) | Err(_) => return Check::Missing,
        };
        match compared {
            Ok(None) => Check::Sound,
            Ok(Some(touched)) => Check::Touched(touched),
            Err(error) if is_trouble(&error) => Check::Unreadable(format!("{error:#}")),
            Err(what) => Check::Damaged(what.to_string()),
        }
    }

    /// Whether every folder and file has the recorded stat.
    fn is_as_remembered(&self, folder: &Path) -> bool {
        let files = self.files.iter();
        looks_like(
            folder,
            &self.folders,
            files.map(|(name, entry)| (name.as_str(), entry.stat)),
        )
    }

    fn compare(&self, folder: &Path, thorough: bool) -> anyhow::Result<Option<Self>> {
        let time = nanoseconds_now();
        // The times are taken before the names are read, since a file added meanwhile changes them again.
        let times = folders(folder, self.files.keys().map(String::as_str));
        let found: BTreeMap<_, _> = walk(folder)?.into_iter().collect();
        if let Some(extra) = found.keys().find(|name| !self.files.contains_key(*name)) {
            bail!("`{extra}` does not belong there");
        }
        let mut touched = self.clone();
        for (name, time_of_it) in times {
            // A file that may still change without a new time is checked again next time.
            if is_settled(time_of_it, time) {
                touched.folders.insert(name, time_of_it);
            }
        }
        let mut changed = touched.folders != self.folders;
        for (name, entry) in &mut touched.files {
            let Some(path) = found.get(name) else {
                bail!("`{name}` is missing")
            };
            let stat = stat_of(path)?;
            if stat == entry.stat && !thorough {
                continue;
            }
            if stat.size != entry.stat.size
                || digest_file(path)? != entry.blake3
                || stat_of(path)? != stat
            {
                bail!("`{name}` was changed");
            }
            if stat != entry.stat && stat.settled_at(time) {
                changed = true;
                entry.stat = stat;
            }
        }
        Ok(changed.then_some(touched))
    }
}

/// Whether a folder's folders have these times of their last change, and its files these stats. Without the time of the folder itself
/// nobody knows.
fn looks_like<'n>(
    folder: &Path,
    folders: &BTreeMap<String, i64>,
    mut files: impl Iterator<Item = (&'n str, Stat)>,
) -> bool {
    let mut path = folder.to_path_buf();
    let mut metadata = |name: &str| {
        path.clear();
        path.push(folder);
        if !name.is_empty() {
            path.push(name);
        }
        fs::symlink_metadata(&path).ok()
    };
    !folders.is_empty()
        && folders.iter().all(|(name, changed)| {
            metadata(name).is_some_and(|found| {
                found.is_dir() && Stat::from_metadata(&found).changed == *changed
            })
        })
        && files.all(|(name, stat)| {
            metadata(name)
                .is_some_and(|found| found.is_file() && Stat::from_metadata(&found) == stat)
        })
}

/// The times of the last change of a folder and of all folders that hold the files. What can't be read is left out, and then
/// remembered by no manifest as it is.
pub(super) fn folders<'n>(
    folder: &Path,
    files: impl Iterator<Item = &'n str>,
) -> BTreeMap<String, i64> {
    let mut names: BTreeSet<&str> = [""].into();
    for name in files {
        let ends = name.match_indices('/').map(|(end, _)| end);
        names.extend(ends.filter_map(|end| name.get(..end)));
    }
    let changed = |name: &str| {
        let path = if name.is_empty() {
            folder.to_path_buf()
        } else {
            folder.join(name)
        };
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((name.to_owned(), Stat::from_metadata(&metadata).changed))
    };
    names.into_iter().filter_map(changed).collect()
}

fn stat_of(path: &Path) -> anyhow::Result<Stat> {
    let metadata = fs::symlink_metadata(path).with_context(|| cannot_read(path))?;
    Ok(Stat::from_metadata(&metadata))
}

/// The digest of a file with the stat it has before and after.
fn read_entry(path: &Path) -> anyhow::Result<Entry> {
    let stat = stat_of(path)?;
    let blake3 = digest_file(path)?;
    ensure!(
        stat_of(path)? == stat,
        "`{}` was changed while it was read",
        path.display()
    );
    Ok(Entry { blake3, stat })
}

/// Every file below `folder` with its relative name, sorted by name.
pub(crate) fn walk(folder: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut open = vec![(String::new(), folder.to_path_buf())];
    while let Some((prefix, folder)) = open.pop() {
        for entry in fs::read_dir(&folder).with_context(|| cannot_read(&folder))? {
            let entry = entry.with_context(|| cannot_read(&folder))?;
            let path = entry.path();
            let Ok(part) = entry.file_name().into_string() else {
                bail!("`{}` has a name that is not Unicode", path.display());
            };
            let name = if prefix.is_empty() {
                part
            } else {
                format!("{prefix}/{part}")
            };
            let kind = entry.file_type().with_context(|| cannot_read(&path))?;
            if kind.is_dir() {
                open.push((name, path));
            } else if kind.is_file() {
                files.push((name, path));
            } else {
                bail!("`{name}` is neither a file nor a folder");
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}
