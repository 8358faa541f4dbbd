//! Puts results where people want them: whole or not at all, and never over somebody's own files.
//!
//! A result is made ready beside its output folder, under a name nobody can guess, and then exchanged with what is there in one step. The
//! store remembers for each output folder what was put there and the names in use beside it, before anything happens under them: whatever
//! is left after a kill is known as ours, and nothing else is ever removed.
//!
//! Files that people edit are copies. Large files are copies only where the file system shares their blocks; elsewhere they are hard
//! links to the store's read-only files, because a model must not lie on the disk twice.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::digest::digest_file;
use super::files::{
    exchange, outlast, read_sealed, remove, rename_new, sync_files, sync_folder, write_sealed,
};
use super::links::{Linked, unedited};
use super::manifest::{Check, Manifest, walk};
use super::stat::Stat;
use super::store::{Store, take_lock};

/// Larger files are hard links where they can't share blocks. Configurations, logs and tokenizers are smaller (the largest
/// `tokenizer.json` in wide use has 34 MB) and copied in a blink; weights, whose second copy would cost, are larger.
const LARGE: u64 = 64 << 20;

/// Bytes between two looks whether somebody wants the run to stop.
const COPIED_AT_A_TIME: u64 = 256 << 20;

/// What the names of folders in the making begin with.
const PREFIX: &str = ".pipeline-";

/// How a result is put in its output folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// Replaces whatever is there.
    pub overwrite: bool,
    /// Reads what is there and compares it, instead of trusting unchanged times and sizes.
    pub verify: bool,
}

/// A result in its output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Whether anything was changed there.
    pub changed: bool,
    /// How many of its files are read-only links into the store.
    pub links: usize,
}

/// What the store knows of an output folder.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// What was put there last. During an exchange also what was there before, so that a crash in the middle locks nobody out.
    #[serde(rename = "placed")]
    published: Vec<PublishedFiles>,
    /// Names beside the output folder that are ours.
    beside: BTreeSet<String>,
}

/// What was put in an output folder, so that it can be told from what people put there.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct PublishedFiles {
    artifact: Digest,
    manifest: Manifest,
    /// The files that are hard links into the store.
    links: BTreeSet<String>,
}

/// What is in an output folder.
enum Found {
    Nothing,
    /// A folder without contents, which nobody misses.
    Empty,
    /// What was put there.
    Ours(PublishedFiles),
    /// The same, but bytes that it shares with the store were damaged.
    Damaged(PublishedFiles),
    /// Something else; what to say of it.
    Theirs(String),
}

/// Puts the artifact's files into `folder`, whose parent folders are real ones. What the runner did not put there stays, with
/// an error, unless it may be overwritten. `waiting` is called, with the holder, when another run is filling the same folder; `cancel` ends the
/// waiting.
pub fn publish(
    store: &Store,
    artifact: &str,
    folder: &Path,
    how: PublishOptions,
    cancel: &AtomicBool,
    waiting: &mut dyn FnMut(&str),
) -> anyhow::Result<Published> {
    let target = Target::open(store, folder, cancel)?;
    let lock = target.lock(waiting);
    target.put(artifact, how, lock, exchange)
}

/// An output folder and what is known of it.
struct Target<'a> {
    store: &'a Store,
    folder: &'a Path,
    /// The folder around it.
    parent: &'a Path,
    cancel: &'a AtomicBool,
    /// The file of `state`.
    path: PathBuf,
    state: State,
    /// The same as it is in that file.
    written: State,
}

impl<'a> Target<'a> {
    fn open(store: &'a Store, folder: &'a Path, cancel: &'a AtomicBool) -> anyhow::Result<Self> {
        let (Some(parent), Some(_)) = (folder.parent(), folder.file_name()) else {
            bail!("`{}` can not be an output folder", folder.display());
        };
        let key = blake3::hash(folder.as_os_str().as_encoded_bytes()).to_hex();
        let path = store.state(&format!("outputs/{key}.json"));
        Ok(Self {
            store,
            folder,
            parent,
            cancel,
            path,
            state: State::default(),
            written: State::default(),
        })
    }

    fn put(
        mut self,
        artifact: &str,
        how: PublishOptions,
        lock: anyhow::Result<File>,
        swap: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> anyhow::Result<Published> {
        self.state = read_sealed(&self.path).unwrap_or_default();
        self.written = self.state.clone();
        if lock.is_ok() {
            self.recover()?;
        }
        let found = self.look(artifact, how.verify)?;
        if let Found::Ours(published) = &found
            && published.artifact == artifact
        {
            let links = published.links.len();
            if lock.is_ok() {
                // New times only spare work next time.
                let _ = self.settle(published.clone());
            }
            return Ok(Published {
                changed: false,
                links,
            });
        }
        // A store that can't be written has no lock. What it published is good all the same, but nothing new can be.
        let _lock = lock.with_context(|| {
            format!(
                "could not reserve `{}`, which other runs may want to fill as well",
                self.folder.display()
            )
        })?;
        if let Found::Theirs(what) = &found
            && !how.overwrite
        {
            bail!(
                "`{}` {what}; move it away, or run with --overwrite-outputs",
                self.folder.display()
            );
        }
        let published = self.replace(artifact, &found, how.overwrite, swap)?;
        Ok(Published {
            changed: true,
            links: published.links.len(),
        })
    }

    /// One at a time: another run would take what this one is putting there for somebody else's.
    fn lock(&self, waiting: &mut dyn FnMut(&str)) -> anyhow::Result<File> {
        take_lock(&self.path.with_extension("lock"), self.cancel, waiting)
    }

    /// Clears away what a run that was killed left beside the output folder. Where it was killed between two renames the whole result goes
    /// (back) into its folder.
    fn recover(&mut self) -> anyhow::Result<()> {
        for name in std::mem::take(&mut self.state.beside) {
            // Sealed, and still not to be trusted with a path.
            if !name.starts_with(PREFIX) || name.contains('/') {
                continue;
            }
            let left = self.parent.join(&name);
            let whole = |published: &PublishedFiles| published.is_in(&left);
            if fs::symlink_metadata(self.folder).is_err() && self.state.published.iter().any(whole)
            {
                rename_new(&left, self.folder)
                    .with_context(|| format!("could not make `{}`", self.folder.display()))?;
            } else {
                remove(&left)?;
            }
        }
        Ok(())
    }

    fn look(&self, artifact: &str, verify: bool) -> anyhow::Result<Found> {
        let folder = self.folder;
        match fs::symlink_metadata(folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("could not read `{}`", folder.display()));
            }
            Ok(found) if found.is_symlink() => {
                return Ok(Found::Theirs("is a link that pipeline did not make".into()));
            }
            Ok(found) if !found.is_dir() => {
                return Ok(Found::Theirs(
                    "is a file that pipeline did not put there".into(),
                ));
            }
            Ok(_) => {}
        }
        let mut change = None;
        for published in &self.state.published {
            match published.manifest.check(folder, verify) {
                Check::Sound => return Ok(Found::Ours(published.clone())),
                Check::Touched(manifest) => return Ok(Found::Ours(published.now(manifest))),
                Check::Damaged(what) => change = change.or(Some(what)),
                Check::Missing => {}
                Check::Unreadable(error) => bail!("{error}"),
            }
        }
        if let Some(published) = self
            .state
            .published
            .iter()
            .find(|it| only_links_rot(it, folder))
        {
            return Ok(Found::Damaged(published.clone()));
        }
        if is_empty_folder(folder) {
            return Ok(Found::Empty);
        }
        // Published there from another store, or by a copy of the whole project: it is what is wanted.
        if let Some(published) = holds(folder, self.store, artifact) {
            return Ok(Found::Ours(published));
        }
        let what = "holds files that pipeline did not put there, or that were changed since";
        Ok(Found::Theirs(match change {
            Some(change) => format!("{what} ({change})"),
            None => what.into(),
        }))
    }

    /// Remembers that only this is in the output folder, and nothing beside it.
    fn settle(&mut self, published: PublishedFiles) -> anyhow::Result<()> {
        self.state.published = vec![published];
        self.state.beside.clear();
        self.save()
    }

    fn save(&mut self) -> anyhow::Result<()> {
        if self.state != self.written {
            write_sealed(&self.path, &self.state)?;
            self.written = self.state.clone();
        }
        Ok(())
    }

    /// A new name beside the output folder, known as ours before anything is there.
    fn reserve(&mut self, make: impl Fn(&Path) -> io::Result<()>) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(self.parent)
            .with_context(|| format!("could not make `{}`", self.parent.display()))?;
        let (folder, parent) = (self.folder, self.parent);
        let mut names = tempfile::Builder::new();
        let reserved = names.prefix(PREFIX).rand_bytes(16).make_in(parent, |path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            self.state.beside.insert(name.into_owned());
            self.save().map_err(io::Error::other)?;
            make(path)
        });
        let reserved =
            reserved.with_context(|| format!("could not write beside `{}`", folder.display()))?;
        Ok(reserved.into_temp_path().keep()?)
    }

    fn replace(
        &mut self,
        artifact: &str,
        found: &Found,
        overwrite: bool,
        swap: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> anyhow::Result<PublishedFiles> {
        let next = self.reserve(|path| fs::create_dir(path))?;
        let done = self.exchange(artifact, &next, found, overwrite, swap);
        if done.is_err() {
            // The error that is told is the first one; what stays is known, and removed by the next run.
            let _ = remove(&next);
        }
        let published = done?;
        match found {
            Found::Ours(old) | Found::Damaged(old) => {
                let links = [(old.artifact.clone(), old.links.clone())];
                let links = Linked::before(self.store, links.into());
                let removed = remove(&next);
                links.after();
                removed?;
            }
            _ => remove(&next)?,
        }
        let mut published = published;
        // From this time on every change shows.
        published.manifest.remember_folders(self.folder);
        outlast(self.parent, published.manifest.newest())
            .with_context(|| format!("could not read `{}`", self.parent.display()))?;
        self.settle(published.clone())?;
        Ok(published)
    }

    /// Fills `next` and puts it in the output folder. Afterwards `next` is what was there before, or nothing.
    fn exchange(
        &mut self,
        artifact: &str,
        next: &Path,
        found: &Found,
        overwrite: bool,
        swap: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> anyhow::Result<PublishedFiles> {
        let published = fill(self.store, artifact, next, self.cancel)?;
        self.state.published = vec![published.clone()];
        if let Found::Ours(old) | Found::Damaged(old) = found {
            self.state.published.push(old.clone());
        }
        self.save()?;
        let folder = self.folder;
        let cannot = || format!("could not make `{}`", folder.display());
        if matches!(found, Found::Nothing) {
            rename_new(next, folder).with_context(cannot)?;
            sync_folder(self.parent).with_context(cannot)?;
            return Ok(published);
        }
        match swap(next, folder) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.exchange_slowly(next)?;
            }
            Err(error) => return Err(error).with_context(cannot),
        }
        sync_folder(self.parent).with_context(cannot)?;
        // What somebody put there in the meantime goes back.
        let as_found = match found {
            Found::Empty => is_empty_folder(next),
            Found::Ours(old) => old.is_in(next),
            Found::Damaged(old) => old.is_in(next) || only_links_rot(old, next),
            Found::Nothing | Found::Theirs(_) => true,
        };
        if !as_found && !overwrite {
            match swap(next, folder) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    self.exchange_slowly(next)?;
                }
                result => result.with_context(cannot)?,
            }
            bail!(
                "`{}` was changed while the result was put there; it stays as it is",
                folder.display()
            );
        }
        Ok(published)
    }

    /// Where there is no exchange: the folder is missing between two renames, and [`Target::recover`] knows what to do after a kill.
    fn exchange_slowly(&mut self, next: &Path) -> anyhow::Result<()> {
        let folder = self.folder;
        let cannot = || format!("could not replace `{}`", folder.display());
        // Only a free name: it is made by the rename.
        let old = self.reserve(|path| match fs::symlink_metadata(path) {
            Ok(_) => Err(ErrorKind::AlreadyExists.into()),
            Err(_) => Ok(()),
        })?;
        rename_new(folder, &old).with_context(cannot)?;
        if let Err(error) = rename_new(next, folder) {
            // The error that is told is the first one.
            let _ = rename_new(&old, folder);
            return Err(error).with_context(cannot);
        }
        rename_new(&old, next).with_context(cannot)
    }
}

impl PublishedFiles {
    /// The same with new stats.
    fn now(&self, manifest: Manifest) -> Self {
        Self {
            manifest,
            ..self.clone()
        }
    }

    /// Whether a folder has exactly what was published.
    fn is_in(&self, folder: &Path) -> bool {
        let check = self.manifest.check(folder, false);
        matches!(check, Check::Sound | Check::Touched(_))
    }
}

/// Whether the folder differs from what was published only in the bytes of links, and in no size, time or inode of theirs: nobody edited
/// them, so the store's own bytes were damaged. An edit leaves a new time, and a copy belongs to whoever edits it.
fn only_links_rot(published: &PublishedFiles, folder: &Path) -> bool {
    let Ok(files) = walk(folder) else {
        return false;
    };
    let expected = &published.manifest.files;
    files.len() == expected.len()
        && files.iter().all(|(name, path)| {
            let Some(entry) = expected.get(name) else {
                return false;
            };
            let unedited = fs::symlink_metadata(path)
                .is_ok_and(|found| unedited(&Stat::from_metadata(&found), &entry.stat));
            (published.links.contains(name) && unedited)
                || digest_file(path).is_ok_and(|found| found == entry.blake3)
        })
}

/// A folder that has exactly the artifact's files. Reads them only where all sizes agree.
fn holds(folder: &Path, store: &Store, artifact: &str) -> Option<PublishedFiles> {
    let kept = store.manifest(artifact)?;
    let same_size = |(name, entry): (&String, &super::manifest::Entry)| {
        fs::symlink_metadata(folder.join(name)).is_ok_and(|found| found.len() == entry.stat.size)
    };
    if !kept.files.iter().all(same_size) {
        return None;
    }
    let manifest = Manifest::read(folder).ok()?;
    if manifest.digest() != artifact {
        return None;
    }
    let folder = store.artifact(artifact);
    let id = |path: &Path| {
        let found = fs::symlink_metadata(path).ok()?;
        Some((found.dev(), found.ino()))
    };
    let linked = |name: &&String| {
        let mine = id(&folder.join(name));
        mine.is_some() && mine == id(&folder.join(name))
    };
    Some(PublishedFiles {
        artifact: artifact.to_owned(),
        links: manifest.files.keys().filter(linked).cloned().collect(),
        manifest,
    })
}

/// Makes the artifact's files in an empty folder, and makes them durable.
fn fill(
    store: &Store,
    artifact: &str,
    folder: &Path,
    cancel: &AtomicBool,
) -> anyhow::Result<PublishedFiles> {
    let from = store.artifact(artifact);
    let kept = store
        .manifest(artifact)
        .context("the artifact's manifest is gone")?;
    let names: Vec<&String> = kept.files.keys().collect();
    let parents: BTreeSet<PathBuf> = names
        .iter()
        .filter_map(|name| Some(folder.join(name).parent()?.to_owned()))
        .collect();
    for parent in &parents {
        fs::create_dir_all(parent)
            .with_context(|| format!("could not make `{}`", parent.display()))?;
    }
    let large = |name: &&&String| kept.files[**name].stat.size > LARGE;
    let maybe_links = names.iter().filter(large).map(|name| (**name).clone());
    let maybe_links: BTreeSet<String> = maybe_links.collect();
    let shares = AtomicBool::new(true);
    let linking = [(artifact.to_owned(), maybe_links.clone())];
    let linking = Linked::before(store, linking.into());
    let made = names.par_iter().map(|name| {
        let (source, target) = (from.join(name), folder.join(name));
        let linked = give(
            &source,
            &target,
            maybe_links.contains(*name),
            &shares,
            cancel,
        )
        .and_then(|linked| Ok((linked, Stat::from_metadata(&fs::symlink_metadata(&target)?))));
        linked.with_context(|| {
            format!(
                "could not copy `{}` to `{}`",
                source.display(),
                target.display()
            )
        })
    });
    let made: anyhow::Result<Vec<(bool, Stat)>> = made.collect();
    linking.after();
    let made = made?;
    let mut copies: Vec<PathBuf> = Vec::new();
    let mut manifest = kept.clone();
    let mut links = BTreeSet::new();
    for ((name, entry), (linked, stat)) in manifest.files.iter_mut().zip(made) {
        entry.stat = stat;
        if linked {
            links.insert(name.clone());
        } else {
            copies.push(folder.join(name));
        }
    }
    sync_files(folder, &copies)?;
    for parent in &parents {
        sync_folder(parent).with_context(|| format!("could not write `{}`", parent.display()))?;
    }
    manifest.remember_folders(folder);
    Ok(PublishedFiles {
        artifact: artifact.to_owned(),
        manifest,
        links,
    })
}

/// Gives `to` the contents of `from`: a writable copy, or a link if it may be one. Whether it is a link.
fn give(
    from: &Path,
    to: &Path,
    may_link: bool,
    shares: &AtomicBool,
    cancel: &AtomicBool,
) -> io::Result<bool> {
    let mode = fs::metadata(from)?.permissions().mode();
    // Asked until it fails once: all files of an artifact are on one file system.
    let shared = shares.load(Ordering::Relaxed) && reflink_copy::reflink(from, to).is_ok();
    if !shared {
        shares.store(false, Ordering::Relaxed);
        // What can be written may be somebody else's, such as the hub's cache; an edit here must not reach it.
        if may_link && mode & 0o222 == 0 && fs::hard_link(from, to).is_ok() {
            return Ok(true);
        }
        let source = File::open(from)?;
        let mut target = File::create_new(to)?;
        while io::copy(&mut (&source).take(COPIED_AT_A_TIME), &mut target)? > 0 {
            if cancel.load(Ordering::Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
        }
    }
    fs::set_permissions(to, Permissions::from_mode(mode | 0o200))?;
    Ok(false)
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests;
