//! What a running stage is given: the folders of its inputs and output, and the means to report progress, metrics and messages.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use serde::Serialize;

use super::canonical::{Digest, is_digest};
use super::control::Control;
use super::device::DeviceChoice;
use super::fingerprint::Fingerprint;
use super::manifest::Entry;
use super::part::{Part, Shard};
use super::position::Pace;
use super::stage_events::StageEvents;
use super::stat::Stat;
use super::store::CONTINUATION;
use super::task::Task;
use super::{Event, Input, Level, RunEnv, SourcePath};

/// The shortest time between two reports of progress.
const BETWEEN_REPORTS: Duration = Duration::from_millis(100);

/// Everything a [`super::Stage::run`] may use.
pub struct Context {
    pub(crate) stage: String,
    pub(crate) inputs: BTreeMap<String, PathBuf>,
    pub(crate) sources: BTreeMap<String, PathBuf>,
    pub(crate) external_facts: BTreeMap<String, String>,
    pub(crate) out: PathBuf,
    pub(crate) scratch: PathBuf,
    /// The note written beside the scratch folder, which says to which fingerprint the folder belongs.
    pub(crate) scratch_note: Vec<u8>,
    /// The folder with the continuations of the stage's family, if it has one.
    pub(crate) continuations: Option<PathBuf>,
    /// The part of the stage's work that is to be done.
    pub(crate) part: Part,
    pub(crate) env: Arc<RunEnv>,
    pub(crate) events: Arc<StageEvents>,
    pub(crate) control: Control,
    pub(crate) gpus: Vec<usize>,
    pub(crate) device: DeviceChoice,
    pub(crate) notes: Mutex<BTreeMap<String, serde_json::Value>>,
    /// When progress was last reported, and in which unit.
    pub(crate) reported: Mutex<Option<(Instant, &'static str)>>,
    /// Digests of local files by path.
    pub(crate) known: BTreeMap<PathBuf, Entry>,
    /// Digests of files that are known already, by their names in the output.
    pub(crate) written: Mutex<BTreeMap<String, Entry>>,
}

impl Context {
    /// What a task is given.
    pub(super) fn new(
        task: &Task,
        env: Arc<RunEnv>,
        events: Arc<StageEvents>,
        control: Control,
    ) -> Self {
        let paths = |paths: &BTreeMap<String, OsString>| {
            let entries = paths.iter();
            entries
                .map(|(name, path)| (name.clone(), path.into()))
                .collect()
        };
        let known = task.known.iter();
        Self {
            stage: task.stage.clone(),
            inputs: paths(&task.inputs),
            sources: paths(&task.sources),
            external_facts: task.outside.clone(),
            out: (&task.out).into(),
            scratch: (&task.scratch).into(),
            scratch_note: task.scratch_note.clone(),
            continuations: task.continuations.as_ref().map(Into::into),
            part: task.part.clone(),
            env,
            events,
            control,
            gpus: task.gpus.clone(),
            device: task.device,
            notes: Mutex::default(),
            reported: Mutex::default(),
            known: known
                .map(|(path, entry)| (path.into(), entry.clone()))
                .collect(),
            written: Mutex::default(),
        }
    }

    /// The stage's name in the recipe, for messages only: it must not change the result.
    pub fn stage(&self) -> &str {
        &self.stage
    }

    /// The folder of an input artifact. Read-only.
    pub fn input<A>(&self, input: &Input<A>) -> anyhow::Result<&Path> {
        let path = self.inputs.get(input.stage()).map(PathBuf::as_path);
        path.ok_or_else(|| anyhow!("the input `{}` was not prepared", input.stage()))
    }

    /// The resolved path of a local file or folder of the recipe. Read-only.
    pub fn source(&self, path: &SourcePath) -> anyhow::Result<&Path> {
        let found = self.sources.get(path.as_written()).map(PathBuf::as_path);
        found.ok_or_else(|| anyhow!("the file `{}` was not prepared", path.as_written()))
    }

    /// A fact that [`super::Stage::external_facts`] found, as it stands in the fingerprint.
    pub fn external_fact(&self, name: &str) -> anyhow::Result<&str> {
        let value = self.external_facts.get(name).map(String::as_str);
        value.ok_or_else(|| anyhow!("the external fact `{name}` was not recorded"))
    }

    /// The digest of the stage's fingerprint, which stands for its parameters and for all that its inputs are made of; `None` where the task
    /// doesn't say it.
    pub fn fingerprint(&self) -> Option<Digest> {
        let fingerprint: Fingerprint = serde_json::from_slice(&self.scratch_note).ok()?;
        Some(fingerprint.digest())
    }

    /// The output folder. It exists and is empty, and becomes the artifact if the stage succeeds.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Copies a local file of the recipe into the output, under a relative `name`. On file systems with shared extents the copy takes
    /// no space. The digest of the file is already known, so that it is not read again to compute it.
    pub fn copy_in(&self, source: &Path, name: &str) -> anyhow::Result<()> {
        let target = self.out.join(name);
        let copy = || -> std::io::Result<()> {
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let stat =
                |path: &Path| std::fs::metadata(path).map(|found| Stat::from_metadata(&found));
            let before = stat(source)?;
            std::fs::copy(source, &target)?;
            if let Some(known) = self.known.get(source)
                && known.stat == before
                && known.stat == stat(source)?
            {
                self.remember(name, known.blake3.clone(), stat(&target)?);
            }
            Ok(())
        };
        copy().with_context(|| format!("could not copy `{}`", source.display()))
    }

    /// Records the BLAKE3 digest, in hex, of a file that the stage wrote into the output under a relative `name`, so that the file need
    /// not be read again to compute it. The digest must be that of the bytes written, and the file must be complete.
    pub fn written(&self, name: &str, blake3: &str) -> anyhow::Result<()> {
        let path = self.out.join(name);
        let metadata = std::fs::symlink_metadata(&path);
        let metadata = metadata.with_context(|| format!("could not read `{}`", path.display()))?;
        if is_digest(blake3) {
            self.remember(name, blake3.to_owned(), Stat::from_metadata(&metadata));
        }
        Ok(())
    }

    /// Does `work` while complete files of the output are flushed to the disk. The commit has to flush them in any case; this way
    /// the disk is busy while the stage computes.
    pub fn while_synced<T>(
        &self,
        names: impl IntoIterator<Item = impl AsRef<Path>>,
        work: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let paths: Vec<PathBuf> = names.into_iter().map(|name| self.out.join(name)).collect();
        std::thread::scope(|scope| {
            let sync = || -> anyhow::Result<()> {
                paths.iter().try_for_each(|path| {
                    let synced = std::fs::File::open(path).and_then(|file| file.sync_data());
                    synced.with_context(|| format!("could not make `{}` durable", path.display()))
                })
            };
            let syncing = std::thread::Builder::new().spawn_scoped(scope, sync);
            let syncing = syncing.context("could not start a thread")?;
            let done = work();
            // The system reports a write error only once, so an error here must not be lost.
            let synced = syncing.join().map_err(|_| anyhow!("a thread stopped"))?;
            let done = done?;
            synced?;
            Ok(done)
        })
    }

    fn remember(&self, name: &str, blake3: Digest, stat: Stat) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.insert(name.to_owned(), Entry { blake3, stat });
    }

    /// The scratch folder. It survives a crash, and the next attempt with the same fingerprint finds it again. It is created on first
    /// use and removed on success.
    pub fn scratch(&self) -> anyhow::Result<&Path> {
        std::fs::create_dir_all(&self.scratch).with_context(|| {
            format!(
                "could not make the scratch folder `{}`",
                self.scratch.display()
            )
        })?;
        self.note_scratch();
        Ok(&self.scratch)
    }

    /// Saves the pace of the stage and its total number of units, so that the time left can be estimated before a stopped stage resumes.
    pub fn keep_pace(&self, total: u64, seconds_a_unit: f64) {
        let pace = Pace {
            total,
            seconds: seconds_a_unit,
        };
        pace.write(&self.scratch);
    }

    /// A folder for the end state of the stage, from which a longer stage of the same family can start (see
    /// [`super::Stage::LENGTH_PARAMETERS`]). It is created on first use, and kept on success until another stage of the family succeeds
    /// or `gc` removes the result.
    pub fn continuation(&self) -> anyhow::Result<PathBuf> {
        let end = self.scratch.join(CONTINUATION);
        std::fs::create_dir_all(&end)
            .with_context(|| format!("could not make the folder `{}`", end.display()))?;
        self.note_scratch();
        Ok(end)
    }

    /// Writes the note beside the scratch folder. Without it `gc` can't tell to which stage the folder belongs, and keeps it longer.
    fn note_scratch(&self) {
        let note = self.scratch.with_extension("json");
        if !self.scratch_note.is_empty() && !note.exists() {
            let _ = std::fs::write(note, &self.scratch_note);
        }
    }

    /// The end states of finished stages of the same family. They are read-only, may be damaged, and may disappear at any time.
    pub fn continuations(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Some(folder) = &self.continuations else {
            return Ok(Vec::new());
        };
        let list = || -> std::io::Result<Vec<PathBuf>> {
            let entries = match std::fs::read_dir(folder) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let own = self.scratch.file_name();
            let mut continuations = Vec::new();
            for entry in entries {
                let path = entry?.path();
                if path.file_name() != own {
                    continuations.push(path);
                }
            }
            continuations.sort_unstable();
            Ok(continuations)
        };
        list().with_context(|| format!("could not read `{}`", folder.display()))
    }

    /// The shard that is to be made, if this is not the whole stage ([`super::Stage::SHARDS`]). Its rows go into the output folder in whatever
    /// form the stage reads in [`Context::shards`].
    pub fn shard(&self) -> Option<Shard> {
        match self.part {
            Part::Shard(shard) => Some(shard),
            Part::Whole | Part::Joined(_) => None,
        }
    }

    /// The output folders of all shards, in order, if there are any to be joined.
    pub fn shards(&self) -> Option<Vec<&Path>> {
        match &self.part {
            Part::Joined(folders) => Some(folders.iter().map(Path::new).collect()),
            Part::Whole | Part::Shard(_) => None,
        }
    }

    /// Settings of the run.
    pub fn env(&self) -> &RunEnv {
        &self.env
    }

    /// Where the stage is told to compute (`device: gpu`).
    pub fn device(&self) -> DeviceChoice {
        self.device
    }

    /// The ids of the devices that the stage has to itself (`resources: { gpus: n }`).
    pub fn gpus(&self) -> &[usize] {
        &self.gpus
    }

    /// Whether the run was interrupted or the stage's time is over. Long loops check this often and return the error of
    /// [`Context::check_cancelled`].
    pub fn cancelled(&self) -> bool {
        self.check_cancelled().is_err()
    }

    /// An error when the run was interrupted or the stage's time is over.
    pub fn check_cancelled(&self) -> anyhow::Result<()> {
        self.control.check()
    }

    /// Reports the progress of the stage in `unit`s. It may be called as often as convenient: a report that comes soon after the last one
    /// is dropped, unless it is the final one.
    pub fn progress(&self, done: u64, total: Option<u64>, unit: &'static str) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_soon =
            reported.is_some_and(|(last, before)| before == unit && now - last < BETWEEN_REPORTS);
        if is_soon && total != Some(done) {
            return;
        }
        *reported = Some((now, unit));
        drop(reported);
        self.progress_now(done, total, unit);
    }

    /// Like [`Context::progress`], but the report is never dropped. For stages that end early.
    pub fn progress_now(&self, done: u64, total: Option<u64>, unit: &'static str) {
        self.emit(Event::Progress {
            stage: self.stage.clone(),
            done,
            total,
            unit: unit.into(),
            memory: resident_memory(),
        });
    }

    /// Reports the metrics of one optimiser step out of `total`.
    pub fn metrics(&self, step: u64, total: Option<u64>, values: BTreeMap<String, f64>) {
        self.emit(Event::Metrics {
            stage: self.stage.clone(),
            step,
            total,
            values,
        });
    }

    /// Reports something worth reading once.
    pub fn info(&self, text: impl Into<String>) {
        self.message(Level::Info, text.into());
    }

    /// Reports something the user should act on.
    pub fn warn(&self, text: impl Into<String>) {
        self.message(Level::Warning, text.into());
    }

    fn message(&self, level: Level, text: String) {
        self.emit(Event::Message {
            stage: self.stage.clone(),
            level,
            text,
        });
    }

    /// Puts a fact into the stage's record (rows read, rows dropped and why), where `show` finds it.
    pub fn note(&self, name: &str, value: impl Serialize) {
        if let Ok(value) = serde_json::to_value(value) {
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            notes.insert(name.to_owned(), value);
        }
    }

    fn emit(&self, event: Event) {
        self.events.send(event);
    }
}

/// The resident memory of this process in bytes; `None` if the system does not report it.
fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
impl Context {
    /// The texts of the messages of this level, in order.
    pub(crate) fn messages(&self, wanted: Level) -> Vec<String> {
        let told = self.events.last().into_iter();
        let texts = told.filter_map(|event| match event {
            Event::Message { level, text, .. } if level == wanted => Some(text),
            _ => None,
        });
        texts.collect()
    }

    /// A context for testing one stage alone: `inputs` by stage name, local files by the path as written.
    pub(crate) fn for_test(
        folder: &Path,
        inputs: &[(&str, &Path)],
        sources: &[(&str, &Path)],
    ) -> Self {
        let out = folder.join("out");
        std::fs::create_dir_all(&out).unwrap();
        let owned = |pairs: &[(&str, &Path)]| {
            pairs
                .iter()
                .map(|(name, path)| ((*name).to_owned(), path.to_path_buf()))
                .collect()
        };
        Self {
            stage: "test".into(),
            inputs: owned(inputs),
            sources: owned(sources),
            external_facts: BTreeMap::new(),
            out,
            scratch: folder.join("scratch"),
            scratch_note: Vec::new(),
            continuations: None,
            part: Part::Whole,
            env: Arc::default(),
            events: Arc::new(StageEvents::new(std::sync::mpsc::channel().0)),
            control: Control::default(),
            gpus: Vec::new(),
            device: DeviceChoice::default(),
            known: BTreeMap::new(),
            written: Mutex::default(),
            notes: Mutex::default(),
            reported: Mutex::default(),
        }
    }
}
