//! Content digests of local files and folders, remembered by stat so that an unchanged file is not read again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::canonical::{Digest, digest_json};
use super::digest::digest_file;
use super::files::{behind, read_sealed, write_sealed};
use super::glob::Pattern;
use super::manifest::Entry;
use super::one_look::OneLook;
use super::stat::{Stat, nanoseconds_now};
use super::store::Store;

/// The deepest folder below a source.
const DEEPEST: usize = 32;

/// Digests of local files, with a memo in the store.
pub(crate) struct Sources {
    path: PathBuf,
    memo: Memo,
    /// Whether what earlier runs remembered is not trusted.
    anew: bool,
    /// The files that were read since this was opened.
    read: BTreeSet<String>,
    /// The links on the way to folders that were looked at since.
    ways: BTreeMap<PathBuf, Vec<(PathBuf, Identity)>>,
    /// The files and folders that were looked at.
    looked: OneLook<PathBuf, (Digest, Seen)>,
}

#[derive(Default, Serialize, Deserialize)]
struct Memo {
    files: BTreeMap<String, Known>,
}

/// The digest of a file, and what the file has to look like for it to hold.
#[derive(Clone, Serialize, Deserialize)]
struct Known {
    entry: Entry,
    device: u64,
    /// When it was read, in nanoseconds since 1970; told only of what was read since the memo was opened.
    #[serde(skip)]
    read: i64,
}

/// Which file it is, and in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    stat: Stat,
    device: u64,
}

impl Identity {
    fn from_metadata(metadata: &Metadata) -> Self {
        Self {
            stat: Stat::from_metadata(metadata),
            device: metadata.dev(),
        }
    }

    /// The parts of the stat that every change of the contents changes.
    fn state(&self) -> (u64, i64, i64) {
        (self.stat.size, self.stat.modified, self.stat.changed)
    }
}

/// What a source looked like before its contents were digested: its files, and the links on the way to them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    files: BTreeMap<PathBuf, SeenFile>,
    links: BTreeMap<PathBuf, Identity>,
}

#[derive(Debug, Clone)]
struct SeenFile {
    identity: Identity,
    blake3: Digest,
    /// Whether it had not been changed so shortly before that a further change may not show.
    settled: bool,
}

impl Seen {
    /// The files with their sizes and times. Their numbers are left out: on file systems of other machines they may change.
    pub(crate) fn stats(&self) -> impl Iterator<Item = (&Path, Stat)> {
        self.files.iter().map(|(path, seen)| {
            let stat = Stat {
                inode: 0,
                ..seen.identity.stat
            };
            (path.as_path(), stat)
        })
    }

    /// The first path below or on the way to a source at which something is not as it was, if there is one. Reads only what was
    /// written just before it was digested, and what got another number on its file system.
    pub(crate) fn changed(&self, source: &Path) -> Option<PathBuf> {
        let (moved, found) = self.compare(source);
        moved.or_else(|| {
            let differs = |(path, identity): &(&PathBuf, &Identity)| {
                self.files.get(*path).is_none_or(|seen| {
                    let proven = seen.settled && seen.identity == **identity;
                    !proven && digest_file(path).map_or(true, |now| now != seen.blake3)
                })
            };
            Some(found.iter().find(differs)?.0.clone())
        })
    }

    /// [`Seen::changed`] by sizes and times alone.
    pub(crate) fn moved(&self, source: &Path) -> Option<PathBuf> {
        self.compare(source).0
    }

    /// The first path at which something is not as it was by sizes and times, and the files there are.
    fn compare(&self, source: &Path) -> (Option<PathBuf>, BTreeMap<PathBuf, Identity>) {
        let Ok(listed) = Listed::read(source) else {
            return (Some(source.to_owned()), BTreeMap::new());
        };
        let mut links = listed.links;
        links.extend(links_on_the_way(source));
        let files = listed.files.into_iter();
        let files: BTreeMap<_, _> = files.map(|(_, path, identity)| (path, identity)).collect();
        let paths = self.files.keys().chain(files.keys());
        let moved = paths.filter(|path| {
            let (old, new) = (self.files.get(*path), files.get(*path));
            // The number alone may change on file systems of other machines.
            old.map(|old| old.identity.state()) != new.map(Identity::state)
        });
        let turned = self.links.keys().chain(links.keys());
        let turned = turned.filter(|path| self.links.get(*path) != links.get(*path));
        let first = moved.min().cloned();
        (first.or_else(|| turned.min().cloned()), files)
    }
}

/// The links among a path and the folders above it, as they are themselves.
fn links_on_the_way(path: &Path) -> Vec<(PathBuf, Identity)> {
    let link = |path: &Path| {
        let metadata = fs::symlink_metadata(path).ok()?;
        let is_link = metadata.is_symlink();
        is_link.then(|| (path.to_owned(), Identity::from_metadata(&metadata)))
    };
    path.ancestors().filter_map(link).collect()
}

/// The files of a source.
struct Listed {
    is_file: bool,
    /// The name relative to the source, the path and the identity of each file, sorted by name.
    files: Vec<(String, PathBuf, Identity)>,
    /// The links below the source, as they are themselves.
    links: BTreeMap<PathBuf, Identity>,
}

impl Listed {
    /// Lists a file, or all files below a folder except hidden ones. Links are followed, so that a snapshot folder made of links is read
    /// as the files they point to.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let cannot_read = |path: &Path| format!("could not read `{}`", path.display());
        if let Some(pattern) = Pattern::parse(path) {
            let listed = Self::below(pattern.folder(), Some(&pattern))?;
            ensure!(
                !listed.files.is_empty(),
                "no file fits `{}`",
                path.display()
            );
            return Ok(listed);
        }
        let metadata = fs::metadata(path).with_context(|| cannot_read(path))?;
        if metadata.is_file() {
            let identity = Identity::from_metadata(&metadata);
            return Ok(Self {
                is_file: true,
                files: vec![(String::new(), path.to_owned(), identity)],
                links: BTreeMap::new(),
            });
        }
        ensure!(
            metadata.is_dir(),
            "`{}` is neither a file nor a folder",
            path.display()
        );
        Self::below(path, None)
    }

    /// Lists the files below a folder: those that fit the pattern if there is one, else all. A pattern of any depth doesn't follow links
    /// to folders, which may lead anywhere.
    fn below(path: &Path, pattern: Option<&Pattern>) -> anyhow::Result<Self> {
        let cannot_read = |path: &Path| format!("could not read `{}`", path.display());
        let mut listed = Self {
            is_file: false,
            files: Vec::new(),
            links: BTreeMap::new(),
        };
        let mut open = vec![(String::new(), path.to_path_buf())];
        while let Some((prefix, folder)) = open.pop() {
            for entry in fs::read_dir(&folder).with_context(|| cannot_read(&folder))? {
                let entry = entry.with_context(|| cannot_read(&folder))?;
                let path = entry.path();
                let Some(part) = path.file_name().and_then(|name| name.to_str()) else {
                    bail!("`{}` has a name that is not Unicode", path.display());
                };
                if part.starts_with('.') {
                    continue;
                }
                let name = if prefix.is_empty() {
                    part.to_owned()
                } else {
                    format!("{prefix}/{part}")
                };
                let kind = entry.file_type().with_context(|| cannot_read(&path))?;
                if pattern.is_some_and(|pattern| !pattern.matches(&name) && !pattern.reaches(&name))
                {
                    continue;
                }
                let mut is_followed = true;
                if kind.is_symlink() {
                    is_followed = !pattern.is_some_and(Pattern::is_deep);
                    let link = fs::symlink_metadata(&path).with_context(|| cannot_read(&path))?;
                    listed
                        .links
                        .insert(path.clone(), Identity::from_metadata(&link));
                }
                let metadata = fs::metadata(&path).with_context(|| cannot_read(&path))?;
                if metadata.is_dir() {
                    if !is_followed || pattern.is_some_and(|pattern| !pattern.reaches(&name)) {
                        continue;
                    }
                    ensure!(
                        prefix.matches('/').count() <= DEEPEST,
                        "`{}` is nested too deeply; is there a link to a folder above it?",
                        path.display()
                    );
                    open.push((name, path));
                } else if metadata.is_file() && pattern.is_none_or(|pattern| pattern.matches(&name))
                {
                    listed
                        .files
                        .push((name, path, Identity::from_metadata(&metadata)));
                }
            }
        }
        listed.files.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(listed)
    }
}

/// The files at a path of a recipe, with their names below it, in order: the file itself without one, those in the folder, or those that
/// fit the pattern. They are those whose contents count in the fingerprint.
pub fn files_at(path: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let files = Listed::read(path)?.files.into_iter();
    Ok(files.map(|(name, path, _)| (name, path)).collect())
}

impl Sources {
    /// The memo of a store; an unreadable one is empty. With `anew` every file is read, whatever earlier runs remembered.
    pub(crate) fn open(store: &Store, anew: bool) -> Self {
        let path = store.state("sources.json");
        let memo = read_sealed(&path).unwrap_or_default();
        Self {
            path,
            memo,
            anew,
            read: BTreeSet::new(),
            ways: BTreeMap::new(),
            looked: OneLook::new(),
        }
    }

    /// The digest of a file's contents, or of a folder's files and names, and what they looked like before they were read. With
    /// `anew` every file is read.
    pub(crate) fn digest(&mut self, path: &Path, anew: bool) -> anyhow::Result<(Digest, Seen)> {
        if !anew && let Some((digest, seen)) = self.looked.get(path) {
            return Ok((digest.clone(), seen.clone()));
        }
        let now = Instant::now();
        let (digest, seen) = self.look(path, anew)?;
        let found = (digest.clone(), seen.clone());
        self.looked.note(now, path.to_owned(), found);
        Ok((digest, seen))
    }

    fn look(&mut self, path: &Path, anew: bool) -> anyhow::Result<(Digest, Seen)> {
        let mut seen = Seen::default();
        let folder = path.parent().unwrap_or(path);
        if !self.ways.contains_key(folder) {
            let links = links_on_the_way(folder);
            self.ways.insert(folder.to_owned(), links);
        }
        let links = self.ways.get(folder).into_iter().flatten();
        seen.links.extend(links.cloned());
        if let Ok(metadata) = fs::symlink_metadata(path)
            && metadata.is_symlink()
        {
            let identity = Identity::from_metadata(&metadata);
            seen.links.insert(path.to_owned(), identity);
        }
        let listed = Listed::read(path)?;
        seen.links.extend(listed.links);
        let mut digests = Vec::with_capacity(listed.files.len());
        for (name, path, identity) in listed.files {
            let (blake3, settled) = self.file(&path, identity, anew)?;
            digests.push((name, blake3.clone()));
            let file = SeenFile {
                identity,
                blake3,
                settled,
            };
            seen.files.insert(path, file);
        }
        let digest = match digests.pop() {
            Some((_, digest)) if listed.is_file => digest,
            last => {
                digests.extend(last);
                digest_json(&json!(digests))
            }
        };
        Ok((digest, seen))
    }

    /// What is remembered of a file, or of the files in a folder: digests with the stats under which they hold.
    pub(crate) fn known(&self, path: &Path) -> BTreeMap<PathBuf, Entry> {
        let start = path.to_string_lossy().into_owned();
        let below = self.memo.files.range(start..);
        below
            .map(|(name, known)| (PathBuf::from(name), known))
            .take_while(|(name, _)| name.starts_with(path))
            .map(|(name, known)| (name, known.entry.clone()))
            .collect()
    }

    /// Remembers a digest of a file as it looks now.
    #[cfg(test)]
    pub(crate) fn pretend(&mut self, path: &Path, digest: &str) {
        let identity = Identity::from_metadata(&fs::metadata(path).unwrap());
        let known = Known {
            entry: Entry {
                blake3: digest.into(),
                stat: identity.stat,
            },
            device: identity.device,
            read: i64::MAX,
        };
        let name = path.to_string_lossy().into_owned();
        self.memo.files.insert(name.clone(), known);
        self.read.insert(name);
    }

    /// Forgets where links led and what was looked at: from now on all is looked at again.
    pub(crate) fn look_again(&mut self) {
        self.ways.clear();
        self.looked.end();
    }

    /// Writes the memo back, if there is anything new in it.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        if self.read.is_empty() {
            return Ok(());
        }
        // Files beside the store have its clock, which may be a server's and behind ours.
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)
            .with_context(|| format!("could not make `{}`", folder.display()))?;
        let device = fs::metadata(folder).map(|found| found.dev()).ok();
        let behind = behind(folder);
        let read = std::mem::take(&mut self.read);
        self.memo.files.retain(|name, known| {
            let settled = known.entry.stat.settled_at(known.read - behind);
            settled || Some(known.device) != device || !read.contains(name)
        });
        write_sealed(&self.path, &self.memo)
    }

    /// The digest of a file, and whether every later change to it will show.
    fn file(
        &mut self,
        path: &Path,
        before: Identity,
        anew: bool,
    ) -> anyhow::Result<(Digest, bool)> {
        let name = path.to_string_lossy();
        let trusted = !(anew || self.anew) || self.read.contains(&*name);
        if let Some(known) = self.memo.files.get(&*name).filter(|_| trusted)
            && (known.entry.stat, known.device) == (before.stat, before.device)
        {
            return Ok((known.entry.blake3.clone(), true));
        }
        let time = nanoseconds_now();
        let blake3 = digest_file(path)?;
        let after =
            fs::metadata(path).with_context(|| format!("could not read `{}`", path.display()))?;
        let settled = before == Identity::from_metadata(&after) && before.stat.settled_at(time);
        if settled {
            let entry = Entry {
                blake3: blake3.clone(),
                stat: before.stat,
            };
            let known = Known {
                entry,
                device: before.device,
                read: time,
            };
            self.memo.files.insert(name.clone().into_owned(), known);
            self.read.insert(name.into_owned());
        }
        Ok((blake3, settled))
    }
}
