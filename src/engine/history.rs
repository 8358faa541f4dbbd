//! The runs of each recipe with the fingerprints of their stages, so that any two runs can be compared later.
//!
//! A run that changed nothing since the last one is not recorded. Small text files that stages read (templates) are kept by content,
//! so that a change can be shown line by line.

use std::borrow::{Borrow, Cow};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::files::{is_io_trouble, write_atomically};
use super::fingerprint::{Origin, content};
use super::graph::{Graph, Node};
use super::plan::{Prepared, Session};
use super::reason::{Reason, differences};
use super::record::{FORMAT, Record};
use super::store::{Store, open_lock, sign};

/// The largest text file that is kept, in bytes.
const LONGEST_TEXT: u64 = 64 * 1024;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Everything requested was made or already existed.
    Done,
    /// A stage failed.
    Failed,
    /// It was stopped.
    Interrupted,
    /// It is in progress.
    Running,
    /// The process was killed or the machine went down, so the run recorded no end.
    Killed,
}

/// A stage in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStage {
    /// The digest of its fingerprint, which names its record.
    pub fingerprint: Digest,
    /// The content digest of its result; none if it failed or was stopped.
    pub artifact: Option<Digest>,
    /// Whether it ran, as opposed to being fresh.
    pub ran: bool,
}

/// What people call a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunLabel {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<String>,
}

impl RunLabel {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.name.is_none() && self.tags.is_empty()
    }
}

/// One run of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The format of this record.
    pub format: u32,
    /// The number of the run, from 1.
    pub number: u64,
    /// Seconds since 1970 when it started.
    pub started: u64,
    /// Seconds it took.
    pub seconds: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// The stages whose fingerprint became known.
    pub stages: BTreeMap<String, RunStage>,
    /// What people call it. It has a file of its own, so that a run in progress can be named.
    #[serde(default, skip_serializing_if = "RunLabel::is_empty")]
    pub label: RunLabel,
}

/// How a stage differs between two runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "difference", rename_all = "snake_case")]
pub enum Difference {
    /// Only the second run has it.
    Added,
    /// Only the first run has it.
    Removed,
    /// Its result has other contents, or its fingerprint differs.
    Changed {
        /// What differs in the fingerprint.
        reasons: Vec<Reason>,
        /// Whether the results nevertheless have the same bytes.
        same_bytes: bool,
    },
}

impl Store {
    /// The runs of a recipe, the oldest first. Unreadable ones are left out.
    pub fn runs(&self, recipe: &str) -> Vec<Run> {
        self.collect_runs(recipe, |path| Ok(fs::read(path).unwrap_or_default()))
            .unwrap_or_default()
    }

    /// The runs of a recipe, the oldest first. Damaged ones are left out; what can't be read is an error.
    pub(super) fn read_runs(&self, recipe: &str) -> anyhow::Result<Vec<Run>> {
        self.collect_runs(recipe, fs::read)
            .with_context(|| format!("could not read the history of `{recipe}`"))
    }

    fn collect_runs(
        &self,
        recipe: &str,
        read: impl Fn(PathBuf) -> std::io::Result<Vec<u8>>,
    ) -> std::io::Result<Vec<Run>> {
        let folder = self.runs_folder(recipe);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if is_io_trouble(&error) => return Err(error),
            Err(_) => return Ok(Vec::new()),
        };
        let mut runs = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = match read(path) {
                Ok(bytes) => bytes,
                Err(error) if is_io_trouble(&error) => return Err(error),
                Err(_) => continue,
            };
            let run = serde_json::from_slice(&bytes).ok();
            let Some(mut run) = run.filter(|run: &Run| run.format == FORMAT) else {
                continue;
            };
            if let Ok(label) = fs::read(self.label_path(recipe, run.number)) {
                run.label = serde_json::from_slice(&label).unwrap_or_default();
            }
            if run.outcome == Outcome::Running && is_free(&lock_path(&folder, run.number)) {
                run.outcome = Outcome::Killed;
            }
            runs.push(run);
        }
        runs.sort_by_key(|run| run.number);
        Ok(runs)
    }

    fn label_path(&self, recipe: &str, number: u64) -> std::path::PathBuf {
        self.runs_folder(recipe).join(format!("{number:06}.label"))
    }

    /// Names and tags a run, in place of what it was called before.
    pub fn label_run(&self, recipe: &str, number: u64, label: &RunLabel) -> anyhow::Result<()> {
        let path = self.label_path(recipe, number);
        write_atomically(&path, &serde_json::to_vec(label)?)
    }

    /// Records that a run is in progress, so that it is in the history even if its process is killed. Sets its number.
    pub(crate) fn begin_run(&self, recipe: &str, mut run: Run) -> anyhow::Result<RunInProgress> {
        let folder = self.runs_folder(recipe);
        fs::create_dir_all(&folder)
            .with_context(|| format!("could not make `{}`", folder.display()))?;
        run.outcome = Outcome::Running;
        run.number = self
            .last_run(recipe, None)
            .and_then(|last| Recorded::of(&last).map(|last| last.number + 1))
            .unwrap_or(1);
        loop {
            let path = lock_path(&folder, run.number);
            let lock = open_lock(&path)?;
            // Another run may begin at the same time, or have taken the number just now.
            if lock.try_lock().is_ok() && !run_path(&folder, run.number).exists() {
                sign(&mut { lock.try_clone()? }, "");
                write_atomically(
                    &run_path(&folder, run.number),
                    &serde_json::to_vec_pretty(&run)?,
                )?;
                return Ok(RunInProgress {
                    folder,
                    number: run.number,
                    _lock: lock,
                });
            }
            run.number += 1;
        }
    }

    /// Records a finished run, unless nothing changed since the last one. Sets its number and returns it.
    pub(crate) fn remember(
        &self,
        recipe: &str,
        mut run: Run,
        begun: Option<RunInProgress>,
    ) -> anyhow::Result<Option<u64>> {
        let folder = self.runs_folder(recipe);
        let last = self.last_run(recipe, begun.as_ref().map(|begun| begun.number));
        let last = last.as_deref().and_then(Recorded::of);
        if let Some(last) = &last {
            let same = |(name, stage): (&String, &RunStage)| {
                last.stages.get(name.as_str()).is_some_and(|old| {
                    old.fingerprint.0 == stage.fingerprint
                        && old.artifact.as_ref().map(|text| &*text.0) == stage.artifact.as_deref()
                })
            };
            let ran = run.stages.values().any(|stage| stage.ran);
            // A run in which a stage began is recorded, since its log may be wanted.
            let began = ran || begun.is_some();
            if !began && run.outcome == last.outcome && run.stages.iter().all(same) {
                return Ok(None);
            }
        }
        if let Some(begun) = begun {
            run.number = begun.number;
            begun.update(&run)?;
            begun.end();
            return Ok(Some(run.number));
        }
        run.number = last.map_or(1, |last| last.number + 1);
        // If two runs end at the same time, the first gets the number.
        loop {
            let path = run_path(&folder, run.number);
            if !path.exists() {
                write_atomically(&path, &serde_json::to_vec_pretty(&run)?)?;
                return Ok(Some(run.number));
            }
            run.number += 1;
        }
    }

    /// The file of the newest run other than `but`, by the number in its name.
    fn last_run(&self, recipe: &str, but: Option<u64>) -> Option<Vec<u8>> {
        let folder = self.runs_folder(recipe);
        let but = but.map(|number| run_path(&folder, number));
        let entries = fs::read_dir(folder).ok()?;
        let paths = entries.flatten().map(|entry| entry.path());
        let runs = paths.filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
                && Some(path) != but.as_ref()
        });
        fs::read(runs.max()?).ok()
    }

    pub(super) fn runs_folder(&self, recipe: &str) -> PathBuf {
        self.state("runs").join(recipe)
    }

    /// The kept text with this content digest, if there is one.
    pub fn text(&self, content: &str) -> Option<String> {
        fs::read_to_string(self.state("texts").join(content)).ok()
    }

    /// Keeps the text of a small file under its content digest.
    pub(crate) fn keep_text(&self, file: &Path, content: &str) -> anyhow::Result<()> {
        let kept = self.state("texts").join(content);
        let small =
            fs::metadata(file).is_ok_and(|found| found.is_file() && found.len() <= LONGEST_TEXT);
        if !small || kept.exists() {
            return Ok(());
        }
        let bytes =
            fs::read(file).with_context(|| format!("could not read `{}`", file.display()))?;
        // The file changed just now or is not text. It is only kept for display, so that is no error.
        if blake3::hash(&bytes).to_hex().as_str() != content || std::str::from_utf8(&bytes).is_err()
        {
            return Ok(());
        }
        write_atomically(&kept, &bytes)
    }

    /// The differences between two runs, by stage. Stages without a difference are left out.
    pub fn compare(&self, old: &Run, new: &Run) -> BTreeMap<String, Difference> {
        let mut found = BTreeMap::new();
        for name in old
            .stages
            .keys()
            .filter(|name| !new.stages.contains_key(*name))
        {
            found.insert(name.clone(), Difference::Removed);
        }
        for (name, stage) in &new.stages {
            let Some(before) = old.stages.get(name) else {
                found.insert(name.clone(), Difference::Added);
                continue;
            };
            let same_bytes = before.artifact == stage.artifact;
            if before.fingerprint == stage.fingerprint && same_bytes {
                continue;
            }
            let records = (
                self.record(&before.fingerprint),
                self.record(&stage.fingerprint),
            );
            // A stage that failed has no record, only the digest of its fingerprint.
            let reasons = match records {
                (Some(before), Some(after)) => differences_of(&before, &after),
                _ => Vec::new(),
            };
            found.insert(
                name.clone(),
                Difference::Changed {
                    reasons,
                    same_bytes,
                },
            );
        }
        found
    }
}

/// A recorded run, as far as a new one is compared with it. Its texts stay in what was read.
#[derive(Deserialize)]
struct Recorded<'a> {
    number: u64,
    outcome: Outcome,
    #[serde(borrow)]
    stages: BTreeMap<Text<'a>, RecordedStage<'a>>,
}

#[derive(Deserialize)]
struct RecordedStage<'a> {
    #[serde(borrow)]
    fingerprint: Text<'a>,
    #[serde(borrow)]
    artifact: Option<Text<'a>>,
}

/// A text that is borrowed where it is written without escapes.
#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Borrow<str> for Text<'_> {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl<'a> Recorded<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// A run that is recorded as being in progress until this is dropped.
pub(crate) struct RunInProgress {
    folder: PathBuf,
    pub(crate) number: u64,
    // Dropping the file frees the lock, and so does the kernel when the process dies.
    _lock: File,
}

impl RunInProgress {
    /// Records the state of the run so far.
    pub(crate) fn update(&self, run: &Run) -> anyhow::Result<()> {
        let run = Run {
            number: self.number,
            ..run.clone()
        };
        write_atomically(
            &run_path(&self.folder, self.number),
            &serde_json::to_vec_pretty(&run)?,
        )
    }

    /// Removes its lock file, which is not needed any more.
    fn end(self) {
        let _ = fs::remove_file(lock_path(&self.folder, self.number));
    }
}

fn run_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:06}.json"))
}

fn lock_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:06}.lock"))
}

/// Whether nobody holds a lock.
fn is_free(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => file.try_lock_shared().is_ok(),
        Err(_) => true,
    }
}

impl Session<'_> {
    /// Keeps the small text files that a stage reads, so that a later change can be shown line by line. This includes stages whose result
    /// was made elsewhere or by an earlier recipe.
    pub(super) fn keep_texts(&self, node: &Node, prepared: &Prepared) {
        let leaves = prepared.fingerprint.leaves();
        for (parameter, origin) in &prepared.origins {
            let content = leaves.get(parameter).and_then(content);
            if let (Origin::File(written), Some(content)) = (origin, content)
                && let Some(file) = node.sources.get(written)
            {
                let _ = self.store.keep_text(file, content);
            }
        }
    }
}

/// What differs between two records of a stage.
fn differences_of(old: &Record, new: &Record) -> Vec<Reason> {
    differences(&old.fingerprint, &new.fingerprint, &new.origins)
}

/// The stages of a run whose fingerprints are known, by name.
pub(crate) fn stages(
    graph: &Graph,
    fingerprints: &[Option<Digest>],
    artifacts: &[Option<Digest>],
    ran: &[bool],
) -> BTreeMap<String, RunStage> {
    graph
        .nodes
        .iter()
        .zip(fingerprints.iter().zip(artifacts))
        .zip(ran)
        .filter_map(|((node, (fingerprint, artifact)), ran)| {
            let stage = RunStage {
                fingerprint: fingerprint.clone()?,
                artifact: artifact.clone(),
                ran: *ran,
            };
            Some((node.name.clone(), stage))
        })
        .collect()
}
