//! The store: artifacts by content, records by fingerprint, and the only way to add them.
//!
//! ```text
//! .gitignore                    so that git ignores all of it
//! v1/artifacts/<content>/       the files, read-only
//! v1/artifacts/<content>.json   their manifest with stats
//! v1/records/<fingerprint>.json
//! v1/last/<recipe>/<stage>      the fingerprint of that stage's last result, for reasons
//! v1/partial/<fingerprint>/     what a running stage writes into
//! v1/scratch/<fingerprint>/     what survives a crash
//! v1/jobs/<fingerprint>/        jobs of schedulers that work on it
//! v1/scratch/<fingerprint>.json the whole fingerprint, for `gc`
//! v1/ends/<family>/<fingerprint>/   what a finished stage left for one that goes further
//! v1/failed/<fingerprint>/      what a failed stage wrote and told, until it succeeds
//! v1/incoming/<content>/        files on their way from a remote
//! v1/left/<fingerprint>         a result of which only the record was taken from a remote
//! v1/state/                     memos of what was read before, by recipe, and the history
//! v1/unsent/<remote>/<fingerprint>
//! v1/locks/<fingerprint>
//! ```
//!
//! The result of a stage enters the store by one rename, and only through a [`Miss`], which holds the stage's lock.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::canonical::{Digest, is_digest};
use super::files::{is_io_trouble, outlast, read_small, remove, sync_folder, write_atomically};
use super::manifest::{Check, Entry, LONGEST_MANIFEST, Manifest, walk};
use super::record::{FORMAT, LONGEST_RECORD, Record};
use super::stat::Stat;

/// The folder of one format of the store.
const VERSION: &str = "v1";

/// The folder in a scratch folder that outlives the stage's success.
pub(super) const CONTINUATION: &str = "end";

/// A folder with artifacts and records, possibly shared with other runners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    root: PathBuf,
}

/// The state of a fingerprint's result in the store.
#[derive(Debug)]
pub enum Found {
    /// There is a record, and its artifact is as recorded. Holds a new manifest if only times changed.
    Hit(Box<Record>, Option<Manifest>),
    /// No record.
    Nothing,
    /// There is a record, but its artifact is missing.
    Missing(Box<Record>),
    /// There is a record, but its artifact differs from it.
    Damaged(Box<Record>, String),
}

impl Store {
    /// The store in `folder`, which is created on the first write.
    pub fn new(folder: &Path) -> Self {
        Self {
            root: folder.join(VERSION),
        }
    }

    /// Makes git ignore a new store. One in a folder of another name that has something in it is left to its owner.
    pub(super) fn ignore_in_git(&self) {
        let Some(folder) = self.root.parent().filter(|_| !self.root.exists()) else {
            return;
        };
        let own = folder.file_name().is_some_and(|name| name == ".pipeline");
        let empty = fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
        if !(own || empty) {
            return;
        }
        // Only a convenience: whatever is in the way, the run itself will meet and tell it.
        let _ =
            fs::create_dir_all(folder).and_then(|()| fs::write(folder.join(".gitignore"), "*\n"));
    }

    /// The folder of an artifact.
    pub fn artifact(&self, content: &str) -> PathBuf {
        self.root.join("artifacts").join(content)
    }

    /// The manifest of an artifact. An unreadable one is none.
    pub fn manifest(&self, content: &str) -> Option<Manifest> {
        self.read_manifest(content).ok()?
    }

    fn read_manifest(&self, content: &str) -> anyhow::Result<Option<Manifest>> {
        let bytes = read_or_absent(&self.manifest_path(content), LONGEST_MANIFEST)?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// The record of a fingerprint, whatever became of its artifact. An unreadable record is no record.
    pub fn record(&self, fingerprint: &str) -> Option<Record> {
        self.read_record(fingerprint).ok()?
    }

    /// The record of a fingerprint. A damaged one is none; one that is there and can't be read is an error.
    fn read_record(&self, fingerprint: &str) -> anyhow::Result<Option<Record>> {
        let bytes = read_or_absent(&self.record_path(fingerprint), LONGEST_RECORD)?;
        let record = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        // A record under the name of another fingerprint was moved or altered. A text that is not a digest must not become a path.
        Ok(record.filter(|record: &Record| {
            record.format == FORMAT
                && record.fingerprint.digest() == fingerprint
                && is_digest(&record.artifact)
        }))
    }

    /// Looks a fingerprint up and checks its artifact. Reads file contents only where a stat differs, or all when
    /// `thorough`. Writes nothing. An error where something is there and can't be read, for a reason that is no damage: to make
    /// it again would be no answer to that.
    pub fn find(&self, fingerprint: &str, thorough: bool) -> anyhow::Result<Found> {
        let Some(record) = self.read_record(fingerprint)? else {
            return Ok(Found::Nothing);
        };
        let record = Box::new(record);
        Ok(match self.check(&record.artifact, thorough) {
            Check::Sound => Found::Hit(record, None),
            Check::Touched(manifest) => Found::Hit(record, Some(manifest)),
            Check::Missing => Found::Missing(record),
            Check::Damaged(what) => Found::Damaged(record, what),
            Check::Unreadable(why) => bail!(
                "the result of `{}` is in the store but can't be read: {why}; when it is lost for good, remove `{1}` and `{1}.json`, \
                 and it is made again",
                record.stage,
                self.artifact(&record.artifact).display()
            ),
        })
    }

    /// Makes sure that an artifact still is what it was: reads files whose stat differs, and remembers new stats.
    pub(super) fn still_holds(&self, content: &str) -> Result<(), String> {
        match self.check(content, false) {
            Check::Sound => Ok(()),
            Check::Touched(manifest) => {
                // Only spares work next time.
                let _ = self.write_manifest(content, &manifest);
                Ok(())
            }
            Check::Missing => Err("it is gone".into()),
            Check::Damaged(what) | Check::Unreadable(what) => Err(what),
        }
    }

    fn check(&self, content: &str, thorough: bool) -> Check {
        let manifest = match self.read_manifest(content) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return Check::Missing,
            Err(error) => return Check::Unreadable(format!("{error:#}")),
        };
        if manifest.digest() != content {
            return Check::Damaged("its manifest was changed".into());
        }
        manifest.check(&self.artifact(content), thorough)
    }

    /// The fingerprint of the last result of a recipe's stage.
    pub fn last(&self, recipe: &str, stage: &str) -> Option<Digest> {
        fs::read_to_string(self.last_path(recipe, stage)).ok()
    }

    /// Remembers the last result of a recipe's stage.
    pub fn set_last(&self, recipe: &str, stage: &str, fingerprint: &str) -> anyhow::Result<()> {
        if self.last(recipe, stage).as_deref() == Some(fingerprint) {
            return Ok(());
        }
        write_atomically(&self.last_path(recipe, stage), fingerprint.as_bytes())
    }

    /// One of the folders above.
    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A place for small state of our own, such as the memo of local files.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.root.join("state").join(name)
    }

    /// Where the leavings of a fingerprint's last failure are.
    fn failed(&self, fingerprint: &str) -> PathBuf {
        self.root.join("failed").join(fingerprint)
    }

    /// The scratch folder of a fingerprint.
    pub fn scratch(&self, fingerprint: &str) -> PathBuf {
        self.root.join("scratch").join(fingerprint)
    }

    /// Where the whole fingerprint of a scratch folder stands.
    pub(super) fn scratch_note(&self, fingerprint: &str) -> PathBuf {
        self.root
            .join("scratch")
            .join(format!("{fingerprint}.json"))
    }

    /// The folder with what finished stages of a family left (see [`super::Stage::LENGTH_PARAMETERS`]).
    pub(super) fn continuations(&self, family: &str) -> PathBuf {
        self.root.join("ends").join(family)
    }

    /// Takes the lock of a fingerprint. `waiting` is called once, with the holder, when somebody else has it; `cancel` ends the
    /// waiting.
    pub fn lock(
        &self,
        fingerprint: &str,
        cancel: &AtomicBool,
        waiting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Miss<'_>> {
        Ok(Miss {
            store: self,
            fingerprint: fingerprint.to_owned(),
            _lock: take_lock(&self.lock_path(fingerprint), cancel, waiting)?,
        })
    }

    /// Removes what crashed runners left half-written: every partial folder whose lock nobody holds.
    pub fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("partial")) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Ok(lock) = open_lock(&self.lock_path(&name)) else {
                continue;
            };
            if lock.try_lock().is_ok() {
                // If a folder can't be removed now, the next start tries again.
                let _ = remove(&entry.path());
            }
        }
    }

    /// Writes the manifest of an artifact, which may remember new stats.
    pub(super) fn write_manifest(&self, content: &str, manifest: &Manifest) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(manifest)?;
        ensure!(
            bytes.len() <= LONGEST_MANIFEST,
            "the result has {} files, which are more than one result may have; write fewer and larger ones",
            manifest.files.len()
        );
        write_atomically(&self.manifest_path(content), &bytes)
    }

    /// Takes a folder of sealed files, of which this is the manifest, as an artifact. Returns its content digest and whether it
    /// was new.
    pub(super) fn admit(
        &self,
        folder: &Path,
        mut manifest: Manifest,
        cancel: &AtomicBool,
        waiting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<(Digest, bool)> {
        let content = manifest.digest();
        let target = self.artifact(&content);
        // Two stages may produce the same contents at the same time.
        let _held = take_lock(&self.lock_path(&content), cancel, waiting)?;
        // Read whole: the stage may have run because somebody asked to verify, and found what no time tells.
        let new = !matches!(self.check(&content, true), Check::Sound | Check::Touched(_));
        if new {
            let artifacts = self.root.join("artifacts");
            let commit = || format!("could not commit `{}`", target.display());
            remove(&target)?;
            fs::create_dir_all(&artifacts).with_context(commit)?;
            fs::rename(folder, &target).with_context(commit)?;
            sync_folder(&artifacts).with_context(commit)?;
            // With the manifest it becomes a result, and from its time on every change shows.
            manifest.remember_folders(&target);
            outlast(&artifacts, manifest.newest()).with_context(commit)?;
            self.write_manifest(&content, &manifest)?;
        } else {
            remove(folder)?;
        }
        Ok((content, new))
    }

    /// Whether an artifact is here as recorded, by its stats.
    pub(super) fn is_sound(&self, content: &str) -> bool {
        matches!(self.check(content, false), Check::Sound | Check::Touched(_))
    }

    pub(super) fn write_record(&self, fingerprint: &str, record: &Record) -> anyhow::Result<()> {
        write_atomically(
            &self.record_path(fingerprint),
            &serde_json::to_vec_pretty(record)?,
        )
    }

    pub(super) fn manifest_path(&self, content: &str) -> PathBuf {
        self.root.join("artifacts").join(format!("{content}.json"))
    }

    pub(super) fn record_path(&self, fingerprint: &str) -> PathBuf {
        self.root
            .join("records")
            .join(format!("{fingerprint}.json"))
    }

    pub(super) fn lock_path(&self, fingerprint: &str) -> PathBuf {
        self.root.join("locks").join(fingerprint)
    }

    fn last_path(&self, recipe: &str, stage: &str) -> PathBuf {
        self.root.join("last").join(recipe).join(file_name(stage))
    }
}

/// The exclusive right to make the result of one fingerprint.
pub struct Miss<'a> {
    store: &'a Store,
    fingerprint: Digest,
    // Dropping the file frees the lock, and so does the kernel when the process dies.
    _lock: File,
}

impl Miss<'_> {
    /// An empty folder to write the result into.
    pub fn partial(&self) -> anyhow::Result<PathBuf> {
        let folder = self.store.root.join("partial").join(&self.fingerprint);
        remove(&folder)?;
        fs::create_dir_all(&folder)
            .with_context(|| format!("could not make `{}`", folder.display()))?;
        Ok(folder)
    }

    /// Removes what a failed stage wrote. Its scratch stays.
    pub fn discard(&self) -> anyhow::Result<()> {
        remove(&self.store.root.join("partial").join(&self.fingerprint))
    }

    /// Keeps what a failed stage wrote and told, for people to look at, in place of an earlier failure. Returns the place.
    pub fn keep_failure(&self, log: &[u8]) -> anyhow::Result<PathBuf> {
        let partial = self.store.root.join("partial").join(&self.fingerprint);
        let kept = self.store.failed(&self.fingerprint);
        remove(&kept)?;
        write_atomically(&kept.join("log.jsonl"), log)?;
        let wrote = fs::read_dir(&partial).is_ok_and(|mut entries| entries.next().is_some());
        if wrote {
            let output = kept.join("output");
            fs::rename(&partial, &output)
                .with_context(|| format!("could not make `{}`", output.display()))?;
        } else {
            remove(&partial)?;
        }
        Ok(kept)
    }

    /// Keeps what the stage left in its scratch for one of its family that goes further, in place of what others left: only
    /// the last one is kept, because it may be large.
    pub(super) fn keep_continuation(&self, family: &str) -> anyhow::Result<()> {
        let left = self.store.scratch(&self.fingerprint).join(CONTINUATION);
        if !left.is_dir() {
            return Ok(());
        }
        let continuations = self.store.continuations(family);
        let kept = continuations.join(&self.fingerprint);
        remove(&kept)?;
        fs::create_dir_all(&continuations)
            .and_then(|()| fs::rename(&left, &kept))
            .with_context(|| format!("could not make `{}`", kept.display()))?;
        for entry in fs::read_dir(&continuations).into_iter().flatten().flatten() {
            if entry.path() != kept {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Takes the partial folder into the store and writes the record, whose `artifact` is filled in. Files with
    /// `known` digests are not read. Returns whether the contents were new.
    pub fn commit(
        self,
        mut record: Record,
        known: &BTreeMap<String, Entry>,
        cancel: &AtomicBool,
        waiting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<(Record, bool)> {
        let store = self.store;
        let partial = store.root.join("partial").join(&self.fingerprint);
        let mut digests = BTreeMap::new();
        for (name, path) in walk(&partial)? {
            let sealing = || format!("could not seal `{}`", path.display());
            let found = fs::symlink_metadata(&path).with_context(sealing)?;
            // The stat is compared before sealing, which changes it.
            let holds = known
                .get(&name)
                .filter(|known| known.stat == Stat::from_metadata(&found));
            if let Some(known) = holds {
                digests.insert(name, known.blake3.clone());
            }
            seal(&path).with_context(sealing)?;
        }
        let manifest = Manifest::read_with(&partial, &digests)?;
        let (content, new) = store.admit(&partial, manifest, cancel, waiting)?;
        record.artifact = content;
        self.close(&record)?;
        Ok((record, new))
    }

    /// Writes the record of a result that is in the store already, as the artifact `content`.
    pub(super) fn commit_artifact(
        self,
        mut record: Record,
        content: Digest,
    ) -> anyhow::Result<Record> {
        ensure!(
            self.store.is_sound(&content),
            "the result of `{}` is not whole in the store",
            record.stage
        );
        record.artifact = content;
        self.close(&record)?;
        self.discard()?;
        Ok(record)
    }

    /// Writes the record, and removes what the work on it left.
    fn close(&self, record: &Record) -> anyhow::Result<()> {
        let store = self.store;
        store.write_record(&self.fingerprint, record)?;
        remove(&store.scratch(&self.fingerprint))?;
        remove(&store.scratch_note(&self.fingerprint))?;
        remove(&store.failed(&self.fingerprint))?;
        // Of jobs there may be something that nobody waits for any more, on a node that was lost.
        let _ = remove(&store.root.join("jobs").join(&self.fingerprint));
        Ok(())
    }
}

/// Makes a file durable, and read-only unless it has another name: then it is a link to somebody else's file, such as one of the
/// hub's shared cache, and its mode is theirs.
pub(super) fn seal(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    let found = file.metadata()?;
    let mode = found.permissions().mode();
    if found.nlink() > 1 || mode & 0o222 == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode & !0o222))
}

/// A small file of the store; none where there is no such file, or something else.
fn read_or_absent(path: &Path, longest: usize) -> anyhow::Result<Option<Vec<u8>>> {
    match read_small(path, longest) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_io_trouble(&error) => {
            Err(error).with_context(|| format!("could not read `{}`", path.display()))
        }
        Err(_) => Ok(None),
    }
}

/// The interval at which a lock held by another process is tried.
const PATIENCE: Duration = Duration::from_millis(20);

/// Takes a lock alone, and writes into it who has it. `waiting` is called once, with the holder, when somebody else has it.
pub(super) fn take_lock(
    path: &Path,
    cancel: &AtomicBool,
    waiting: &mut dyn FnMut(&str),
) -> anyhow::Result<File> {
    let mut file = open_lock(path)?;
    wait_for(
        &mut file,
        path,
        File::try_lock,
        Duration::ZERO,
        cancel,
        waiting,
    )?;
    sign(&mut file, "");
    Ok(file)
}

/// Tries a lock until it is there. After `quiet`, `waiting` hears once who holds it; `cancel` ends the waiting with an error.
pub(super) fn wait_for(
    file: &mut File,
    path: &Path,
    attempt: impl Fn(&File) -> Result<(), TryLockError>,
    quiet: Duration,
    cancel: &AtomicBool,
    waiting: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut reported = false;
    loop {
        match attempt(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("could not lock `{}`", path.display()));
            }
        }
        if !reported && start.elapsed() >= quiet {
            reported = true;
            let mut holder = String::new();
            // The holder may be writing its name at this moment, but the name is only used in a message.
            let _ = file
                .rewind()
                .and_then(|()| file.read_to_string(&mut holder));
            let holder = holder.trim();
            waiting(if holder.is_empty() {
                "another process"
            } else {
                holder
            });
        }
        ensure!(
            !cancel.load(Ordering::Relaxed),
            "interrupted while it waited for the lock `{}`",
            path.display()
        );
        std::thread::sleep(PATIENCE);
    }
}

/// Writes into a lock who holds it.
pub(super) fn sign(file: &mut File, what: &str) {
    let holder = format!("{what}process {}{}", std::process::id(), host());
    // Only for others' messages; another user's lock file can be taken, but not written.
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(holder.as_bytes()));
}

pub(super) fn open_lock(path: &Path) -> anyhow::Result<File> {
    let open = || {
        fs::create_dir_all(path.parent().unwrap_or_else(|| Path::new(".")))?;
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
    };
    // A file that may only be read can be locked all the same: it belongs to another user of the store.
    open()
        .or_else(|error| File::open(path).map_err(|_| error))
        .with_context(|| format!("could not open the lock `{}`", path.display()))
}

/// ` on <host>` if the system has a host name, since two machines may share a store.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        String::new()
    } else {
        format!(" on {name}")
    }
}

/// Two hex digits.
fn hex(byte: u8) -> String {
    format!("{byte:02x}")
}

/// The longest name of a file that is made of a stage's name; file systems have 255 bytes.
const LONGEST_NAME: usize = 200;

/// The file name for the name of a stage. Special characters are written in hex; a long name is cut off and completed with a digest.
fn file_name(stage: &str) -> String {
    let mut name = String::with_capacity(stage.len());
    for byte in stage.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-' {
            name.push(char::from(byte));
        } else {
            name.push('%');
            name.push_str(&hex(byte));
        }
    }
    if name.len() > LONGEST_NAME {
        // All of it is ASCII. No short name has a `.`.
        name.truncate(100);
        name = format!("{name}.{}", blake3::hash(stage.as_bytes()).to_hex());
    }
    name
}
