//! Downloads an artifact from the remote: its manifest, then only the files that no local artifact has, each checked by its digest.
//!
//! Files arrive in `incoming/<content>/`, which survives an interruption: complete files are not fetched again, and incomplete ones are
//! resumed. A result may have very many small files, which are downloaded into memory, many at a time, and made durable together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use anyhow::{Context as _, anyhow, ensure};
use rayon::prelude::*;

use super::super::Event;
use super::super::canonical::Digest;
use super::super::digest::digest_file;
use super::super::files::{link_or_copy, remove, rename_new, sync_files, sync_folder};
use super::super::links::Linked;
use super::super::manifest::Manifest;
use super::super::record::Record;
use super::super::stat::Stat;
use super::super::store::{Store, take_lock};
use super::layout::{blob_key, get, manifest_key, parse_manifest};
use super::{Remote, Shared};

/// The number of files that are downloaded at the same time.
pub(super) const PARALLEL: usize = 8;
/// The number of small files that are downloaded at the same time. Almost all of their time is spent waiting for answers.
const PARALLEL_SMALL: usize = 32;
/// The largest size in bytes of a small file, which is downloaded into memory.
const SMALL: u64 = 256 << 10;
/// The size in bytes above which the remote is asked for a file's size first.
const HUGE: u64 = 64 << 20;
/// How many times an interrupted download is resumed before the remote counts as unreachable.
const TRIES: usize = 3;

/// Why an artifact could not be downloaded.
pub(super) enum Trouble {
    /// What is there is not what it should be, or not all of it: another result has to do.
    Damaged {
        digest: Digest,
        error: anyhow::Error,
    },
    /// The remote does not answer.
    Unreachable(anyhow::Error),
    /// A local problem: a full disk, an interruption.
    Here(anyhow::Error),
}

impl Trouble {
    /// What it is, in words.
    pub(super) fn in_words(&self) -> String {
        let (Self::Damaged { error, .. } | Self::Unreachable(error) | Self::Here(error)) = self;
        format!("{error:#}")
    }
}

impl Shared {
    /// Makes the result of a fingerprint whole here, from what the remote has. `None` if that can't be; an error where this store
    /// can't be read.
    pub(crate) fn restore(
        &self,
        store: &Store,
        fingerprint: &str,
        (stage, events): (&str, &Sender<Event>),
        cancel: &AtomicBool,
    ) -> anyhow::Result<Option<Record>> {
        let known = store.record(fingerprint);
        let Some(record) = self.offer(store, fingerprint, known.as_ref())? else {
            return Ok(None);
        };
        if let Err(trouble) = self.pull(store, &record.artifact, (stage, events), cancel) {
            if !cancel.load(Ordering::Relaxed) {
                self.tell(stage, &record.artifact, trouble);
            }
            self.distrust(fingerprint);
            return Ok(None);
        }
        Ok(match store.adopt(fingerprint, &record) {
            Ok(()) => Some(record),
            Err(error) => {
                self.warn(&format!(
                    "`{stage}` from the remote was not kept: {error:#}"
                ));
                None
            }
        })
    }

    fn tell(&self, stage: &str, content: &str, trouble: Trouble) {
        match trouble {
            Trouble::Damaged { digest, error } => {
                self.bad(&digest, &format!("the result of `{stage}`"), &error);
                self.state().bad.insert(content.to_owned());
            }
            Trouble::Unreachable(error) => self.unreachable(&error),
            Trouble::Here(error) => self.warn(&format!("could not fetch `{stage}`: {error:#}")),
        }
    }

    /// Makes an artifact whole here.
    pub(super) fn pull(
        &self,
        store: &Store,
        content: &str,
        (stage, events): (&str, &Sender<Event>),
        cancel: &AtomicBool,
    ) -> Result<(), Trouble> {
        // Two runners that want the same files: the second finds them.
        let waiting = &mut |holder: &str| {
            // A reporter that is gone misses nothing else.
            let _ = events.send(Event::StageWaiting {
                stage: stage.to_owned(),
                holder: holder.to_owned(),
            });
        };
        let path = store.lock_path(&format!("{content}.pull"));
        let _held = take_lock(&path, cancel, waiting).map_err(Trouble::Here)?;
        if store.is_sound(content) {
            return Ok(());
        }
        let Some(remote) = self.remote.as_ref().filter(|_| self.pulls()) else {
            let error =
                anyhow!("the files of `{stage}` are elsewhere, and there is no remote to ask");
            return Err(Trouble::Here(error));
        };
        let damaged = |error| Trouble::Damaged {
            digest: content.to_owned(),
            error,
        };
        let manifest = get(remote.as_ref(), &manifest_key(content))
            .map_err(Trouble::Unreachable)?
            .context("its manifest is missing")
            .and_then(|bytes| parse_manifest(content, &bytes).context("its manifest"))
            .map_err(damaged)?;
        let folder = store.folder("incoming").join(content);
        let arrival = Arrival {
            shared: self,
            remote: remote.as_ref(),
            folder: &folder,
            cancel,
            stage,
            events,
            fetched: AtomicU64::new(0),
            files: AtomicUsize::new(0),
            size: manifest.size(),
        };
        fs::create_dir_all(&folder)
            .with_context(|| format!("could not make `{}`", folder.display()))
            .map_err(Trouble::Here)?;
        let mut blobs = BTreeMap::new();
        for entry in manifest.files.values() {
            blobs.insert(entry.blake3.clone(), entry.stat.size);
        }
        take_apart(&folder, &manifest).map_err(Trouble::Here)?;
        let here = self.here(store);
        let lent = Linked::before(store, lenders(store, &blobs, &here));
        let mut put_together = || -> anyhow::Result<_> {
            let whole = assemble(&folder, &manifest)?;
            store.admit(&folder.join("files"), whole, cancel, waiting)
        };
        let arrived = arrival.all(&blobs, &here);
        let ready = arrived.and_then(|()| put_together().map_err(Trouble::Here));
        lent.after();
        let ready = ready?;
        debug_assert!(ready.0 == *content);
        // What is left there is only the empty folder.
        let _ = remove(&folder);
        self.remember(store, content, &manifest);
        // A reporter that is gone misses nothing else.
        let _ = events.send(Event::StageFetched {
            stage: stage.to_owned(),
            artifact: content.to_owned(),
            files: arrival.files.into_inner(),
            bytes: arrival.fetched.into_inner(),
        });
        Ok(())
    }

    /// The files of this store's artifacts by digest, read from their manifests once.
    fn here(&self, store: &Store) -> BTreeMap<Digest, PathBuf> {
        if let Some(here) = &self.state().here {
            return here.clone();
        }
        let here = store.blobs();
        self.state().here = Some(here.clone());
        here
    }

    fn remember(&self, store: &Store, content: &str, manifest: &Manifest) {
        let folder = store.artifact(content);
        if let Some(here) = &mut self.state().here {
            for (name, entry) in &manifest.files {
                here.insert(entry.blake3.clone(), folder.join(name));
            }
        }
    }
}

/// Files on their way into `folder`.
struct Arrival<'a> {
    shared: &'a Shared,
    remote: &'a dyn Remote,
    folder: &'a Path,
    cancel: &'a AtomicBool,
    stage: &'a str,
    events: &'a Sender<Event>,
    fetched: AtomicU64,
    files: AtomicUsize,
    size: u64,
}

impl Arrival<'_> {
    fn all(
        &self,
        blobs: &BTreeMap<Digest, u64>,
        here: &BTreeMap<Digest, PathBuf>,
    ) -> Result<(), Trouble> {
        // The largest first, so that the end is not one slow file.
        let mut order: Vec<_> = blobs.iter().collect();
        order.sort_by(|a, b| b.1.cmp(a.1));
        let (large, small) = order.split_at(order.partition_point(|(_, size)| **size > SMALL));
        let one = |(blake3, size): &(&Digest, &u64)| {
            let known = here.get(*blake3).map(PathBuf::as_path);
            self.fetch_blob(blake3, **size, known)
        };
        let trouble = in_parallel(large, PARALLEL, one);
        let trouble = trouble.or_else(|| in_parallel(small, PARALLEL_SMALL, one));
        trouble.map_or(Ok(()), Err)
    }

    fn fetch_blob(&self, blake3: &str, size: u64, known: Option<&Path>) -> Result<(), Trouble> {
        let whole = self.folder.join(blake3);
        let is = |path: &Path| digest_file(path).is_ok_and(|found| found == blake3);
        if whole.exists() {
            if is(&whole) {
                return Ok(());
            }
            remove(&whole).map_err(Trouble::Here)?;
        }
        if let Some(known) = known
            && is(known)
        {
            return lend(known, &whole).map_err(Trouble::Here);
        }
        if !self.shared.pulls() {
            return Err(Trouble::Here(anyhow!("the remote is not asked any more")));
        }
        if size > HUGE {
            // Hours later would be late to find it out.
            let found = self.remote.size(&blob_key(blake3));
            let found = found.map_err(Trouble::Unreachable)?;
            if found != Some(size) {
                return Err(Trouble::Damaged {
                    digest: blake3.to_owned(),
                    error: match found {
                        Some(found) => {
                            anyhow!("the file `{blake3}` has {found} bytes, expected {size}")
                        }
                        None => anyhow!("the file `{blake3}` is missing"),
                    },
                });
            }
        }
        let mut part = if size > SMALL {
            Part::open(&self.folder.join(format!("{blake3}.part"))).map_err(Trouble::Here)?
        } else {
            Part::in_memory(size)
        };
        self.fill(&mut part, blake3, size)?;
        part.keep(&whole).map_err(Trouble::Here)?;
        self.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Fetches what a part lacks, and checks the whole.
    fn fill(&self, part: &mut Part, blake3: &str, size: u64) -> Result<(), Trouble> {
        let damaged = |error| Trouble::Damaged {
            digest: blake3.to_owned(),
            error,
        };
        if part.length > size {
            part.restart().map_err(Trouble::Here)?;
        }
        let mut resumed = part.length > 0;
        let mut tries = 0;
        loop {
            let before = part.length;
            let mut mine = None;
            let result = if part.length == size && size > 0 {
                Ok(true)
            } else {
                self.remote
                    .read(&blob_key(blake3), part.length, &mut |piece| {
                        let written = self.piece(part, piece, size);
                        written.map_err(|error| {
                            let text = format!("{error:#}");
                            mine = Some(error);
                            anyhow!(text)
                        })
                    })
            };
            if let Some(error) = mine {
                if part.length > size {
                    part.discard().map_err(Trouble::Here)?;
                    return Err(damaged(anyhow!("the file `{blake3}` is too long")));
                }
                return Err(Trouble::Here(error));
            }
            match result {
                Ok(true) if part.length == size && part.digest() == blake3 => return Ok(()),
                Ok(true) if resumed => {
                    // What lay here may be of another time; once more from the start.
                    resumed = false;
                    part.restart().map_err(Trouble::Here)?;
                }
                Ok(true) => {
                    // Nothing of it is of any use.
                    part.discard().map_err(Trouble::Here)?;
                    return Err(damaged(anyhow!("the file `{blake3}` has other contents")));
                }
                Ok(false) => return Err(damaged(anyhow!("the file `{blake3}` is missing"))),
                Err(error) => {
                    tries = if part.length > before { 0 } else { tries + 1 };
                    if tries == TRIES || !self.shared.pulls() {
                        return Err(Trouble::Unreachable(error));
                    }
                }
            }
        }
    }

    fn piece(&self, part: &mut Part, piece: &[u8], size: u64) -> anyhow::Result<()> {
        ensure!(!self.cancel.load(Ordering::Relaxed), "interrupted");
        // Stops at a file that is too long before it fills the disk.
        let room = size.saturating_add(1).saturating_sub(part.length);
        let piece = &piece[..piece.len().min(room as usize)];
        part.append(piece)?;
        ensure!(part.length <= size, "too long");
        let done = self
            .fetched
            .fetch_add(piece.len() as u64, Ordering::Relaxed);
        // Some times a second would do; a message a megabyte is cheap enough.
        if done >> 20 != (done + piece.len() as u64) >> 20 {
            let _ = self.events.send(Event::Progress {
                stage: self.stage.to_owned(),
                done: done + piece.len() as u64,
                total: Some(self.size),
                unit: "bytes".into(),
                memory: None,
            });
        }
        Ok(())
    }
}

/// A file that is not whole yet, with the digest of what there is.
struct Part {
    bytes: Bytes,
    length: u64,
    hasher: blake3::Hasher,
}

/// Where the bytes of a part are.
enum Bytes {
    Memory(Vec<u8>),
    File(PathBuf, File),
}

impl Part {
    fn in_memory(size: u64) -> Self {
        Self {
            bytes: Bytes::Memory(Vec::with_capacity(size.min(SMALL) as usize)),
            length: 0,
            hasher: blake3::Hasher::new(),
        }
    }

    fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> io::Result<Self> {
            let mut hasher = blake3::Hasher::new();
            if path.exists() {
                hasher.update_reader(File::open(path)?)?;
            }
            let file = File::options().append(true).create(true).open(path)?;
            Ok(Self {
                bytes: Bytes::File(path.to_owned(), file),
                length: hasher.count(),
                hasher,
            })
        };
        open().with_context(|| format!("could not open `{}`", path.display()))
    }

    fn append(&mut self, piece: &[u8]) -> anyhow::Result<()> {
        match &mut self.bytes {
            Bytes::Memory(bytes) => bytes.extend_from_slice(piece),
            Bytes::File(path, file) => file
                .write_all(piece)
                .with_context(|| format!("could not write `{}`", path.display()))?,
        }
        self.hasher.update(piece);
        self.length += piece.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        match &mut self.bytes {
            Bytes::Memory(bytes) => bytes.clear(),
            Bytes::File(path, file) => file
                .set_len(0)
                .with_context(|| format!("could not write `{}`", path.display()))?,
        }
        self.hasher.reset();
        self.length = 0;
        Ok(())
    }

    fn discard(&self) -> anyhow::Result<()> {
        match &self.bytes {
            Bytes::Memory(_) => Ok(()),
            Bytes::File(path, _) => remove(path),
        }
    }

    /// Gives the whole file its name. One that is cut off by a crash is noticed by its digest.
    fn keep(self, whole: &Path) -> anyhow::Result<()> {
        let kept = match self.bytes {
            Bytes::Memory(bytes) => fs::write(whole, bytes),
            Bytes::File(path, _) => fs::rename(path, whole),
        };
        kept.with_context(|| format!("could not keep `{}`", whole.display()))
    }

    fn digest(&self) -> Digest {
        self.hasher.finalize().to_hex().to_string()
    }
}

/// The artifacts of this store whose files will be linked, with those files.
fn lenders(
    store: &Store,
    blobs: &BTreeMap<Digest, u64>,
    here: &BTreeMap<Digest, PathBuf>,
) -> BTreeMap<Digest, BTreeSet<String>> {
    let artifacts = store.folder("artifacts");
    let mut lenders: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
    for path in blobs.keys().filter_map(|blake3| here.get(blake3)) {
        let parts = path.strip_prefix(&artifacts).ok().and_then(Path::to_str);
        if let Some((content, name)) = parts.and_then(|parts| parts.split_once('/')) {
            let names = lenders.entry(content.to_owned()).or_default();
            names.insert(name.to_owned());
        }
    }
    lenders
}

/// Takes a file of another artifact. What can be written may be somebody else's, such as the hub's cache: that is not linked, for it
/// would be sealed.
fn lend(from: &Path, to: &Path) -> anyhow::Result<()> {
    let sealed = fs::metadata(from).is_ok_and(|found| found.permissions().mode() & 0o222 == 0);
    if sealed {
        return link_or_copy(from, to);
    }
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("could not copy `{}` to `{}`", from.display(), to.display()))
}

/// Takes back the files that an attempt had put under their names when it was interrupted.
fn take_apart(folder: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    let files = folder.join("files");
    if !files.exists() {
        return Ok(());
    }
    for (name, entry) in &manifest.files {
        let (from, to) = (files.join(name), folder.join(&entry.blake3));
        if !to.exists() && from.is_file() {
            fs::rename(&from, &to).with_context(|| format!("could not keep `{}`", to.display()))?;
        }
    }
    remove(&files)
}

/// Gives the blobs in a folder the names that the manifest has for them, below `files`, read-only and durable; returns the manifest
/// with their stats.
fn assemble(folder: &Path, manifest: &Manifest) -> anyhow::Result<Manifest> {
    let files = folder.join("files");
    let parents: BTreeSet<PathBuf> = manifest
        .files
        .keys()
        .filter_map(|name| Some(files.join(name).parent()?.to_owned()))
        .chain([files.clone()])
        .collect();
    for parent in &parents {
        fs::create_dir_all(parent)
            .with_context(|| format!("could not make `{}`", parent.display()))?;
    }
    let mut names: BTreeMap<&Digest, Vec<&String>> = BTreeMap::new();
    for (name, entry) in &manifest.files {
        names.entry(&entry.blake3).or_default().push(name);
    }
    names.into_par_iter().try_for_each(|(blake3, names)| {
        let blob = folder.join(blake3);
        let seal = || -> io::Result<()> {
            let mode = fs::metadata(&blob)?.permissions().mode();
            // What is read-only may be a file of another artifact, which is left as it is.
            if mode & 0o222 == 0 {
                return Ok(());
            }
            fs::set_permissions(&blob, Permissions::from_mode(mode & !0o222))
        };
        seal().with_context(|| format!("could not seal `{}`", blob.display()))?;
        // A rename and no link: dropping a link would change the file's ctime.
        let Some((last, others)) = names.split_last() else {
            return Ok(());
        };
        for name in others {
            link_or_copy(&blob, &files.join(name))?;
        }
        let to = files.join(last);
        // Not over another file: some file systems don't tell `A` from `a`.
        rename_new(&blob, &to).with_context(|| format!("could not make `{}`", to.display()))
    })?;
    let paths: Vec<PathBuf> = manifest.files.keys().map(|name| files.join(name)).collect();
    sync_files(&files, &paths)?;
    for parent in &parents {
        sync_folder(parent).with_context(|| format!("could not write `{}`", parent.display()))?;
    }
    let mut whole = manifest.clone();
    for (entry, path) in whole.files.values_mut().zip(&paths) {
        let metadata = fs::symlink_metadata(path)
            .with_context(|| format!("could not read `{}`", path.display()))?;
        entry.stat = Stat::from_metadata(&metadata);
    }
    Ok(whole)
}

/// Works on items with some threads until all are done or one is in trouble; the first trouble.
pub(super) fn in_parallel<T: Sync, E: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Option<E> {
    let next = AtomicUsize::new(0);
    let trouble = Mutex::new(None);
    let told = || {
        let trouble = trouble.lock();
        trouble.map_or(true, |trouble| trouble.is_some())
    };
    let all = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed))
            && !told()
        {
            if let Err(error) = work(item)
                && let Ok(mut trouble) = trouble.lock()
            {
                trouble.get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(items.len()) {
            // Without it there are fewer.
            let _ = std::thread::Builder::new().spawn_scoped(scope, all);
        }
        all();
    });
    trouble.into_inner().ok().flatten()
}
