//! Frees space by removing results that are not needed any more.
//!
//! Records and the history stay (a few KB each), so that reasons can still be given; a removed result is made again when it is needed.
//! Unfinished work of a stopped run is kept if one of the given recipes would, or might, resume it. Runs and collections exclude each
//! other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, bail};

use super::canonical::Digest;
use super::files::{TEMPORARY, read_small, remove};
use super::fingerprint::{Fingerprint, Origin};
use super::plan::{Session, State};
use super::reason::{Reason, differences};
use super::record::LONGEST_RECORD;
use super::store::{Store, sign, wait_for};

/// How long a run waits for a collection before it reports that it waits.
const QUIET: Duration = Duration::from_millis(500);

/// What to keep besides the results that are needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// The number of last runs of each recipe whose results are kept.
    pub keep_runs: usize,
    /// The bytes of other results that may stay; the newest are kept.
    pub max_size: u64,
}

/// What recipes need from a store.
#[derive(Debug, Default)]
pub struct Needs {
    /// Contents of results.
    pub(super) results: BTreeSet<Digest>,
    /// Fingerprints whose unfinished work would be resumed.
    pub(super) fingerprints: BTreeSet<Digest>,
    /// The known parts of the fingerprints of stages that wait for others.
    pub(super) open: Vec<(Fingerprint, BTreeMap<String, Origin>)>,
    /// The kinds of stages whose fingerprints are entirely unknown.
    pub(super) open_kinds: BTreeSet<String>,
}

impl Needs {
    /// Whether unfinished work may belong to a stage whose fingerprint is not known yet.
    fn may_need(&self, work: Option<&Fingerprint>) -> bool {
        let Some(work) = work else {
            // Nobody knows whose it is.
            return !(self.open.is_empty() && self.open_kinds.is_empty());
        };
        self.open_kinds.contains(&work.kind)
            || self
                .open
                .iter()
                .any(|(open, origins)| differences(work, open, origins).iter().all(Reason::is_open))
    }
}

impl Session<'_> {
    /// Adds what the recipe needs: the results that are fresh, those that may be fresh again when what they wait for is made, and
    /// the unfinished work of stages that would run, or might.
    pub fn needs(&self, needs: &mut Needs) {
        let everything = vec![true; self.graph.nodes.len()];
        let mut sources = self.sources();
        let inspections = self.inspect(&everything, &mut sources);
        let content = |index: usize| inspections[index].as_ref()?.content.clone();
        for (index, inspection) in inspections.iter().enumerate() {
            let Some(inspection) = inspection else {
                continue;
            };
            needs.fingerprints.extend(inspection.fingerprint.clone());
            let node = &self.graph.nodes[index];
            let undecided = match &inspection.state {
                State::Fresh { artifact, .. } | State::Fails { artifact, .. } => {
                    needs.results.insert(artifact.clone());
                    false
                }
                State::Runs { .. } => false,
                State::WaitsOn { reasons, .. } => {
                    let inputs = self.graph.inputs[index].iter().map(|&input| {
                        let name = self.graph.nodes[input].name.clone();
                        (name, content(input).unwrap_or_default())
                    });
                    match self.prepare_with(index, inputs.collect(), &mut sources) {
                        Ok(open) => needs.open.push((open.fingerprint, open.origins)),
                        Err(_) => _ = needs.open_kinds.insert(node.stage.kind().to_owned()),
                    }
                    reasons.is_empty()
                }
                State::Unknown { .. } => {
                    needs.open_kinds.insert(node.stage.kind().to_owned());
                    true
                }
            };
            if undecided && let Some(record) = self.record(index) {
                needs.results.insert(record.artifact);
            }
        }
    }
}

/// Something that can be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// What it is: `result`, `unfinished work`, `end state` (from which a longer stage could start), `events of a run`.
    pub what: &'static str,
    /// The stage that made it, if a record tells.
    pub stage: Option<String>,
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// A lock on a store's results, which runs hold together and a collection holds alone.
pub(crate) struct InUse(
    #[expect(dead_code, reason = "dropping the file frees the lock")] Option<File>,
);

impl Store {
    /// Takes the shared lock of a run, so that nothing is collected meanwhile. A store that can't be written can't be locked, but its
    /// results can still be used. `waiting` is called with the holder if the wait is long; `cancel` ends the wait.
    pub(crate) fn use_results(
        &self,
        cancel: &AtomicBool,
        waiting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<InUse> {
        let mut file = match self.use_lock() {
            Ok(file) => file,
            Err(error) if is_unwritable(&error) => return Ok(InUse(None)),
            Err(error) => return Err(error),
        };
        let path = self.lock_path(IN_USE);
        let shared = File::try_lock_shared;
        wait_for(&mut file, &path, shared, QUIET, cancel, waiting)?;
        Ok(InUse(Some(file)))
    }

    /// The lock of a collection, if nobody uses the store.
    pub(super) fn alone(&self) -> Option<InUse> {
        let lock = self.use_lock().ok()?;
        lock.try_lock().ok()?;
        Some(InUse(Some(lock)))
    }

    fn use_lock(&self) -> anyhow::Result<File> {
        self.ignore_in_git();
        super::store::open_lock(&self.lock_path(IN_USE))
    }

    /// Finds what can be removed, and removes it if `remove_it`. Kept are the results in `needs`, those of the last runs, and the newest
    /// of the others up to a total size. Fails while a run uses the store.
    pub fn collect(
        &self,
        needs: &Needs,
        limits: Limits,
        remove_it: bool,
    ) -> anyhow::Result<Vec<Garbage>> {
        let mut lock = self.use_lock()?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("a run uses the store; try again when it is done")
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).context("could not lock the store");
            }
        }
        sign(&mut lock, "`pipeline gc`, ");
        let mut keep = needs.results.clone();
        let mut unfinished = needs.fingerprints.clone();
        // If a run can't be read, the results it needs are unknown, so nothing may be removed.
        for recipe in self.list("state/runs")? {
            let runs = self.read_runs(&recipe)?;
            for run in runs.iter().rev().take(limits.keep_runs) {
                for stage in run.stages.values() {
                    keep.extend(stage.artifact.clone());
                    unfinished.insert(stage.fingerprint.clone());
                }
            }
        }
        let made_by = self.made_by();
        let mut results = Vec::new();
        for content in self.list("artifacts")? {
            if content.contains('.') || keep.contains(&content) {
                continue;
            }
            let path = self.artifact(&content);
            let made = fs::metadata(&path)
                .and_then(|found| found.modified())
                .unwrap_or(UNIX_EPOCH);
            let garbage = Garbage {
                what: "result",
                stage: made_by.get(&content).cloned(),
                size: size(&path),
                path,
            };
            results.push((made, content, garbage));
        }
        results.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        let mut garbage = Vec::new();
        let mut room = limits.max_size;
        for (_, content, result) in results {
            if let Some(left) = room.checked_sub(result.size) {
                room = left;
                continue;
            }
            room = 0;
            if remove_it {
                // The manifest is removed first: without it the rest of the folder does not count as a result.
                remove(&self.artifact(&format!("{content}.json")))?;
                remove(&result.path)?;
            }
            garbage.push(result);
        }
        let mut discard = |what, stage, path: PathBuf| -> anyhow::Result<()> {
            garbage.push(Garbage {
                what,
                stage,
                size: size(&path),
                path: path.clone(),
            });
            if remove_it {
                remove(&path)?;
            }
            Ok(())
        };
        for family in self.names("ends") {
            let continuations = self.continuations(&family);
            for fingerprint in self.names(&format!("ends/{family}")) {
                let record = self.record(&fingerprint);
                if record
                    .as_ref()
                    .is_some_and(|record| keep.contains(&record.artifact))
                {
                    continue;
                }
                let stage = record.map(|record| record.stage);
                discard("end state", stage, continuations.join(&fingerprint))?;
            }
            if remove_it {
                // Only when nothing is left in it.
                let _ = fs::remove_dir(&continuations);
            }
        }
        for kind in ["partial", "scratch", "jobs", "failed", "incoming"] {
            for name in self.list(kind)? {
                let kept = match kind {
                    // A job that was left may be at work.
                    "scratch" | "jobs" => {
                        let name = name.strip_suffix(".json").unwrap_or(&name);
                        unfinished.contains(name)
                            || needs.may_need(self.whole_fingerprint(name).as_ref())
                    }
                    "incoming" => keep.contains(&name),
                    _ => false,
                };
                if kept {
                    continue;
                }
                discard("unfinished work", None, self.folder(kind).join(&name))?;
            }
        }
        for recipe in self.list("state/runs")? {
            let runs = self.read_runs(&recipe)?;
            let kept = runs.iter().rev().take(limits.keep_runs);
            let kept: BTreeSet<u64> = kept.map(|run| run.number).collect();
            for (_, path) in self
                .event_logs(&recipe)
                .into_iter()
                .filter(|(number, _)| !kept.contains(number))
            {
                discard("events of a run", None, path)?;
            }
        }
        // Nothing is being written now, so these files were left by killed programs.
        for path in self.temporary() {
            discard("unfinished work", None, path)?;
        }
        Ok(garbage)
    }

    /// The store's unfinished files. They lie beside results, never in them.
    fn temporary(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.folder("artifacts"), self.folder("records")];
        let deep = ["left", "last", "state", "unsent", "locks"];
        open.extend(deep.map(|name| self.folder(name)));
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let name = entry.file_name();
                if is_folder && folder != self.folder("artifacts") {
                    open.push(entry.path());
                } else if !is_folder && name.to_string_lossy().starts_with(TEMPORARY) {
                    found.push(entry.path());
                }
            }
        }
        found.sort_unstable();
        found
    }

    /// The fingerprint to which unfinished work belongs, if it was noted.
    fn whole_fingerprint(&self, fingerprint: &str) -> Option<Fingerprint> {
        let bytes = read_small(&self.scratch_note(fingerprint), LONGEST_RECORD).ok()?;
        let found: Fingerprint = serde_json::from_slice(&bytes).ok()?;
        (found.digest() == fingerprint).then_some(found)
    }

    /// The stage that made each content, from the records.
    fn made_by(&self) -> BTreeMap<Digest, String> {
        let mut made = BTreeMap::new();
        for name in self.names("records") {
            if let Some(record) = name
                .strip_suffix(".json")
                .and_then(|name| self.record(name))
            {
                made.insert(record.artifact, record.stage);
            }
        }
        made
    }

    /// The names in one of the store's folders, as far as they can be read.
    pub(super) fn names(&self, folder: &str) -> Vec<String> {
        self.list(folder).unwrap_or_default()
    }

    /// The names in one of the store's folders; none where it is not there.
    pub(super) fn list(&self, folder: &str) -> anyhow::Result<Vec<String>> {
        let folder = self.folder(folder);
        let list = || -> std::io::Result<Vec<String>> {
            let entries = match fs::read_dir(&folder) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut names = Vec::new();
            for entry in entries {
                names.extend(entry?.file_name().into_string().ok());
            }
            names.sort_unstable();
            Ok(names)
        };
        list().with_context(|| format!("could not list `{}`", folder.display()))
    }
}

/// The name of the lock file.
const IN_USE: &str = "in-use";

/// Whether taking a lock failed because the store can't be written.
fn is_unwritable(error: &anyhow::Error) -> bool {
    let kind = |cause: &std::io::Error| {
        matches!(
            cause.kind(),
            ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::NotFound
                | ErrorKind::StorageFull
        )
    };
    let mut causes = error.chain();
    causes.any(|cause| cause.downcast_ref().is_some_and(kind))
}

/// The bytes of all files below a path.
fn size(path: &Path) -> u64 {
    let mut size = 0;
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {
                open.extend(
                    fs::read_dir(&path)
                        .into_iter()
                        .flatten()
                        .flatten()
                        .map(|entry| entry.path()),
                );
            }
            Ok(found) => size += found.len(),
            Err(_) => {}
        }
    }
    size
}
