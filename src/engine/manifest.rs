//! The contents of a folder: its files with sizes and digests, and a memo of their stat so that a second look reads nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::canonical::{Digest, digest_list};

/// Files above this size are hashed by mmap over all cores; below, plain reads are faster.
const LARGE: u64 = 1 << 20;

/// The most bytes of a manifest, which has some hundred a file. A longer file is none.
pub(super) const LONGEST_MANIFEST: usize = 256 << 20;

/// What a file looked like when its digest was taken. Equal stats mean an unread, equal file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub modified: i64,
    /// The inode number.
    pub inode: u64,
}

impl Stat {
    /// The stat of a file.
    pub fn of(metadata: &Metadata) -> Self {
        let modified = metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec());
        Self {
            size: metadata.len(),
            modified,
            inode: metadata.ino(),
        }
    }
}

/// One file of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Entry {
    /// BLAKE3 of the contents.
    pub blake3: Digest,
    /// The stat under which that digest is known to hold.
    pub stat: Stat,
}

/// An [`Entry`] as it is written: flat. `serde`'s own flattening takes three times as long to read.
#[derive(Serialize, Deserialize)]
struct Written {
    blake3: Digest,
    size: u64,
    modified: i64,
    inode: u64,
}

impl From<Written> for Entry {
    fn from(written: Written) -> Self {
        Self {
            blake3: written.blake3,
            stat: Stat {
                size: written.size,
                modified: written.modified,
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
            inode: entry.stat.inode,
        }
    }
}

/// The files of a folder by relative path, with `/` between parts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Path to entry.
    pub files: BTreeMap<String, Entry>,
    /// The modification time of each folder, by path, the whole under the empty one: while they stand, no name was added or
    /// removed, and nothing need be listed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub folders: BTreeMap<String, i64>,
}

/// How a folder compares with its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// Every file has the stat that is remembered.
    Sound,
    /// Some stats differ, but the contents are the same; the manifest with new stats.
    Touched(Manifest),
    /// The folder is not there.
    Missing,
    /// Something in it is not what was recorded.
    Damaged(String),
}

impl Manifest {
    /// Reads every file below `folder`. Links are refused: an artifact stands alone.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        Self::read_with(folder, &BTreeMap::new())
    }

    /// [`Manifest::read`], but for files whose digest is known under the stat they have.
    pub(super) fn read_with(
        folder: &Path,
        known: &BTreeMap<String, Entry>,
    ) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        let found = walk(folder)?;
        let folders = folders(folder, found.iter().map(|(name, _)| name.as_str()));
        for (name, path) in found {
            let metadata = fs::symlink_metadata(&path).with_context(|| cannot_read(&path))?;
            let stat = Stat::of(&metadata);
            let blake3 = match known.get(&name) {
                Some(known) if known.stat == stat => known.blake3.clone(),
                _ => digest_file(&path)?,
            };
            files.insert(name, Entry { blake3, stat });
        }
        Ok(Self { files, folders })
    }

    /// Remembers the folders of a copy in `folder`.
    pub(super) fn remember_folders(&mut self, folder: &Path) {
        self.folders = folders(folder, self.files.keys().map(String::as_str));
    }

    /// The name of the contents: paths, sizes and digests, no stats.
    pub fn digest(&self) -> Digest {
        let files = self.files.iter();
        let files = files.map(|(path, entry)| (path, entry.stat.size, &entry.blake3));
        digest_list(&files.collect::<Vec<_>>())
    }

    /// Bytes of all files. A manifest that was tampered with may speak of more than can be counted.
    pub fn size(&self) -> u64 {
        let sizes = self.files.values().map(|entry| entry.stat.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Compares a folder with this manifest. Reads only files whose stat differs, or all when `thorough`.
    pub fn check(&self, folder: &Path, thorough: bool) -> Check {
        if !thorough && self.is_as_remembered(folder) {
            return Check::Sound;
        }
        if !folder.is_dir() {
            return Check::Missing;
        }
        match self.compare(folder, thorough) {
            Ok(None) => Check::Sound,
            Ok(Some(touched)) => Check::Touched(touched),
            Err(what) => Check::Damaged(what.to_string()),
        }
    }

    /// Whether every folder and file has the stat that is remembered.
    fn is_as_remembered(&self, folder: &Path) -> bool {
        let mut path = folder.to_path_buf();
        let mut metadata = |name: &str| {
            path.clear();
            path.push(folder);
            if !name.is_empty() {
                path.push(name);
            }
            fs::symlink_metadata(&path).ok()
        };
        !self.folders.is_empty()
            && self.folders.iter().all(|(name, modified)| {
                metadata(name)
                    .is_some_and(|found| found.is_dir() && Stat::of(&found).modified == *modified)
            })
            && self.files.iter().all(|(name, entry)| {
                metadata(name)
                    .is_some_and(|found| found.is_file() && Stat::of(&found) == entry.stat)
            })
    }

    fn compare(&self, folder: &Path, thorough: bool) -> anyhow::Result<Option<Self>> {
        let found: BTreeMap<_, _> = walk(folder)?.into_iter().collect();
        if let Some(extra) = found.keys().find(|name| !self.files.contains_key(*name)) {
            bail!("`{extra}` does not belong there");
        }
        let mut touched = self.clone();
        touched.remember_folders(folder);
        let mut changed = touched.folders != self.folders;
        for (name, entry) in &mut touched.files {
            let Some(path) = found.get(name) else {
                bail!("`{name}` is missing")
            };
            let stat = Stat::of(&fs::symlink_metadata(path).with_context(|| cannot_read(path))?);
            if stat == entry.stat && !thorough {
                continue;
            }
            if stat.size != entry.stat.size || digest_file(path)? != entry.blake3 {
                bail!("`{name}` was changed");
            }
            changed |= stat != entry.stat;
            entry.stat = stat;
        }
        Ok(changed.then_some(touched))
    }
}

/// The modification times of a folder and of all folders that hold the files. What can't be read is left out, and then
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
    let modified = |name: &str| {
        let path = if name.is_empty() {
            folder.to_path_buf()
        } else {
            folder.join(name)
        };
        let metadata = fs::symlink_metadata(path).ok()?;
        Some((name.to_owned(), Stat::of(&metadata).modified))
    };
    names.into_iter().filter_map(modified).collect()
}

/// The BLAKE3 digest of a file.
pub(super) fn digest_file(path: &Path) -> anyhow::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let size = fs::metadata(path).with_context(|| cannot_read(path))?.len();
    if size >= LARGE {
        hasher
            .update_mmap_rayon(path)
            .with_context(|| cannot_read(path))?;
    } else {
        let file = File::open(path).with_context(|| cannot_read(path))?;
        hasher
            .update_reader(file)
            .with_context(|| cannot_read(path))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
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

fn cannot_read(path: &Path) -> String {
    format!("could not read `{}`", path.display())
}
