//! The folder of a job: a task that a scheduler starts on some machine, and what each start of it makes.
//!
//! ```text
//! v1/jobs/<fingerprint>/<job>/   one job; its name is never used again
//!   task.json      the task; without it nothing starts any more
//!   environment    variables for the stage, readable by the owner only
//!   script.sh      what the scheduler starts
//!   submitted.json the scheduler's number for it
//!   job.log        what the script printed
//!   refused        why the script did not start the stage
//!   result.json    how the first start that came to an end ended
//!   1/             the first start: `out`, `scratch`, `events.jsonl`, and `stopped` if it was told to stop and did
//! ```
//!
//! A scheduler may start a job again while processes of the start before are still alive, on a machine that it counts as lost. So
//! each start has folders of its own, made by an atomic "create if it is not there", and of their results the first one counts. The
//! scratch folder is moved to the next start where nobody can write there any more, and copied where somebody may: a rename would
//! take along whoever has it as the current folder.
//!
//! On nodes that don't see this folder a job works in folders of its own, and what it tells comes by the remote (`engine::far`); it is
//! then written down here as if the job had done so, and read from here.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::event::Event;
use super::files::{read_small, remove, sync_folder, write_atomically};
use super::part::Part;
use super::task::Task;

const TASK: &str = "task.json";
/// The file with variables of the stage's environment, in the syntax of a shell.
pub(super) const ENVIRONMENT: &str = "environment";
/// What the scheduler starts.
pub(super) const SCRIPT: &str = "script.sh";
/// What the script prints.
pub(super) const LOG: &str = "job.log";
/// Why the script did not start the stage.
pub(super) const REFUSED: &str = "refused";
const SUBMITTED: &str = "submitted.json";
const RESULT: &str = "result.json";
const EVENTS: &str = "events.jsonl";
const OUT: &str = "out";
const SCRATCH: &str = "scratch";
const STOPPED: &str = "stopped";

/// The most bytes of a task or a result.
const LONGEST: usize = 256 << 20;
/// The most bytes of a sentence or of the end of a log.
const LONGEST_WORDS: usize = 16 << 10;
/// The most bytes of events that are read at a time.
const PIECE: u64 = 4 << 20;
/// The longest time that events may wait before they are written through to a file server.
const BETWEEN_SYNCS: Duration = Duration::from_secs(1);

/// The folder of one job.
#[derive(Debug, Clone)]
pub(super) struct JobFolder(PathBuf);

/// What a scheduler calls a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Submitted {
    /// The name of the executor that submitted it.
    pub(super) executor: String,
    /// The scheduler's number; none while it is being submitted.
    pub(super) id: Option<u64>,
    /// The name in the scheduler's lists, which no other job has; of an array of jobs all elements have it.
    pub(super) name: String,
    /// The element, if it is one of an array of jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) element: Option<u32>,
}

/// How a start of a job ended by itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct JobResult {
    /// The number of the start.
    pub(super) start: u32,
    /// [`Event::WorkDone`] or [`Event::WorkFailed`].
    pub(super) event: Event,
    /// What it made, if that is an artifact of the store by now and no folder of the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<Digest>,
}

/// One start of a job, on the machine where it runs.
pub(super) struct Start {
    folder: JobFolder,
    number: u32,
    /// The task, which writes into the folders of this start.
    pub(super) task: Task,
}

impl JobFolder {
    /// The job in a folder.
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// A new job below a folder.
    pub(super) fn create(below: &Path) -> anyhow::Result<Self> {
        let create = || {
            fs::create_dir_all(below)?;
            let folder = tempfile::Builder::new()
                .prefix("")
                .rand_bytes(8)
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(below)?;
            std::io::Result::Ok(folder.keep())
        };
        let path = create()
            .with_context(|| format!("could not make a folder in `{}`", below.display()))?;
        Ok(Self(path))
    }

    /// The jobs below a folder that are still wanted: submitted, and not settled yet.
    pub(super) fn wanted(below: &Path) -> anyhow::Result<Vec<Self>> {
        let list = || -> std::io::Result<Vec<Self>> {
            let entries = match fs::read_dir(below) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut found = Vec::new();
            for entry in entries {
                let job = Self(entry?.path());
                if job.0.join(TASK).is_file() {
                    found.push(job);
                }
            }
            found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
            Ok(found)
        };
        list().with_context(|| format!("could not list `{}`", below.display()))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Its own name, which no other job has.
    pub(super) fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Writes the task. From now on the job may start.
    pub(super) fn write_task(&self, task: &Task) -> anyhow::Result<()> {
        write_atomically(&self.0.join(TASK), &serde_json::to_vec(task)?)
    }

    /// Reads the task.
    pub(super) fn task(&self) -> anyhow::Result<Task> {
        let path = self.0.join(TASK);
        let json = match read_small(&path, LONGEST) {
            Err(error) if error.kind() == ErrorKind::NotFound => bail!(
                "the job has no task (`{}`): it is not wanted any more, or the folder of results is not the same here as where the \
                 job was submitted",
                path.display()
            ),
            json => json.with_context(|| format!("could not read `{}`", path.display()))?,
        };
        Task::read(&json).with_context(|| format!("could not read the task `{}`", path.display()))
    }

    /// Writes a file that only its owner may read.
    pub(super) fn write_private(&self, name: &str, text: &[u8]) -> anyhow::Result<()> {
        let path = self.0.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
            file.write_all(text)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().with_context(|| format!("could not write `{}`", path.display()))
    }

    /// Remembers what the scheduler calls it.
    pub(super) fn write_submitted(&self, submitted: &Submitted) -> anyhow::Result<()> {
        write_atomically(&self.0.join(SUBMITTED), &serde_json::to_vec(submitted)?)
    }

    /// What the scheduler calls it, if it was submitted.
    pub(super) fn submitted(&self) -> Option<Submitted> {
        let json = read_small(&self.0.join(SUBMITTED), LONGEST_WORDS).ok()?;
        serde_json::from_slice(&json).ok()
    }

    /// How it ended, if it came to an end by itself.
    pub(super) fn result(&self) -> anyhow::Result<Option<JobResult>> {
        let path = self.0.join(RESULT);
        let json = match read_small(&path, LONGEST) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            json => json.with_context(|| format!("could not read `{}`", path.display()))?,
        };
        let result = serde_json::from_slice(&json);
        result
            .map(Some)
            .with_context(|| format!("`{}` is damaged", path.display()))
    }

    /// Why the script did not start the stage, if it did not.
    pub(super) fn refused(&self) -> Option<String> {
        let words = read_small(&self.0.join(REFUSED), LONGEST_WORDS).ok()?;
        Some(String::from_utf8_lossy(&words).trim().to_owned())
    }

    /// The last line that the script printed; none if it printed nothing.
    pub(super) fn last_words(&self) -> Option<String> {
        let mut file = File::open(self.0.join(LOG)).ok()?;
        let end = file.seek(SeekFrom::End(0)).ok()?;
        let start = end.saturating_sub(LONGEST_WORDS as u64);
        file.seek(SeekFrom::Start(start)).ok()?;
        let mut words = Vec::new();
        file.take(LONGEST_WORDS as u64)
            .read_to_end(&mut words)
            .ok()?;
        let words = String::from_utf8_lossy(&words);
        let mut lines = words.lines().map(str::trim);
        lines.rfind(|line| !line.is_empty()).map(str::to_owned)
    }

    /// Notes a start that happens elsewhere, where nobody sees this folder, with no events yet.
    pub(super) fn note_start(&self, number: u32) -> anyhow::Result<()> {
        let own = self.start_folder(number);
        fs::create_dir_all(&own)
            .and_then(|()| File::create(own.join(EVENTS)).map(drop))
            .with_context(|| format!("could not make `{}`", own.display()))
    }

    /// Notes events of such a start.
    pub(super) fn note_events(&self, number: u32, lines: &[u8]) -> anyhow::Result<()> {
        let path = self.start_folder(number).join(EVENTS);
        let append = || -> std::io::Result<()> {
            let mut file = File::options().append(true).open(&path)?;
            file.write_all(lines)
        };
        append().with_context(|| format!("could not write `{}`", path.display()))
    }

    /// Notes how such a start ended.
    pub(super) fn note_result(&self, result: &JobResult) -> anyhow::Result<()> {
        write_atomically(&self.0.join(RESULT), &serde_json::to_vec(result)?)
    }

    fn start_folder(&self, number: u32) -> PathBuf {
        self.0.join(number.to_string())
    }

    /// The number of its last start; 0 if it never started.
    pub(super) fn last_start(&self) -> u32 {
        let mut last = 0;
        while self.start_folder(last + 1).is_dir() {
            last += 1;
        }
        last
    }

    /// Starts it here: takes the next number, and the scratch folder from whoever had it.
    pub(super) fn start(&self) -> anyhow::Result<Start> {
        let mut task = self.task()?;
        let mut number = 1;
        let own = loop {
            let own = self.start_folder(number);
            match fs::create_dir(&own) {
                Ok(()) => break own,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("could not make `{}`", own.display()));
                }
            }
        };
        let (out, scratch) = (own.join(OUT), own.join(SCRATCH));
        let before = self.start_folder(number - 1);
        let (from, copy) = if before.is_dir() {
            let copy = !before.join(STOPPED).exists();
            (before.join(SCRATCH), copy)
        } else {
            (PathBuf::from(&task.scratch), false)
        };
        if from.is_dir() {
            let taken = if copy {
                copy_folder(&from, &scratch)
            } else {
                fs::rename(&from, &scratch)
            };
            taken.with_context(|| format!("could not take over `{}`", from.display()))?;
        }
        fs::create_dir(&out).with_context(|| format!("could not make `{}`", out.display()))?;
        if let Part::Joined(folders) = &mut task.part {
            // What shards made lies in the scratch folder, and moved with it.
            for folder in folders {
                if let Ok(below) = Path::new(folder).strip_prefix(&task.scratch) {
                    *folder = scratch.join(below).into_os_string();
                }
            }
        }
        task.out = out.into_os_string();
        task.scratch = scratch.into_os_string();
        Ok(Start {
            folder: self.clone(),
            number,
            task,
        })
    }

    /// Keeps the job from starting, or from starting again, and removes what may be secret.
    pub(super) fn retire(&self) -> anyhow::Result<()> {
        remove(&self.0.join(TASK))?;
        remove(&self.0.join(ENVIRONMENT))
    }

    /// Puts the scratch folder of a start back to where the next attempt looks for it; as a copy if somebody may still write there.
    pub(super) fn give_back_scratch(
        &self,
        start: u32,
        to: &OsString,
        copy: bool,
    ) -> anyhow::Result<()> {
        let (from, to) = (self.start_folder(start).join(SCRATCH), Path::new(to));
        if !copy || !from.is_dir() {
            return self.give_back(start, SCRATCH, to);
        }
        remove(to)?;
        copy_folder(&from, to)
            .with_context(|| format!("could not copy `{}` to `{}`", from.display(), to.display()))
    }

    /// Moves the output of a start to where the runner wants it.
    pub(super) fn give_back_output(&self, start: u32, to: &OsString) -> anyhow::Result<()> {
        self.give_back(start, OUT, Path::new(to))
    }

    fn give_back(&self, start: u32, name: &str, to: &Path) -> anyhow::Result<()> {
        let from = self.start_folder(start).join(name);
        if !from.is_dir() {
            return Ok(());
        }
        remove(to)?;
        let parent = to.parent().unwrap_or(to);
        fs::create_dir_all(parent)
            .and_then(|()| fs::rename(&from, to))
            .with_context(|| format!("could not move `{}` to `{}`", from.display(), to.display()))
    }

    /// Removes it, as far as nobody writes there any more.
    pub(super) fn discard(&self) {
        // `gc` removes what is left.
        let _ = fs::remove_dir_all(&self.0);
        if let Some(parent) = self.0.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// Copies a folder, in which files may come and go meanwhile, without copying bytes where the file system can share them.
fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    let there = |result: std::io::Result<()>| match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    };
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        there(if kind.is_dir() {
            copy_folder(&from, &to)
        } else if kind.is_file() {
            reflink_copy::reflink_or_copy(&from, &to).map(drop)
        } else {
            Ok(())
        })?;
    }
    Ok(())
}

impl Start {
    /// The file for its events.
    pub(super) fn events(&self) -> anyhow::Result<EventFile> {
        let path = self.folder.start_folder(self.number).join(EVENTS);
        let file = File::create(&path);
        let file = file.with_context(|| format!("could not make `{}`", path.display()))?;
        Ok(EventFile {
            file,
            synced: Instant::now(),
        })
    }

    /// Tells that it was stopped from outside, and that nothing writes into its folders any more. It is no result: the scheduler may
    /// start the job again.
    pub(super) fn stop(&self) -> anyhow::Result<()> {
        let path = self.folder.start_folder(self.number).join(STOPPED);
        File::create(&path)
            .map(drop)
            .with_context(|| format!("could not make `{}`", path.display()))
    }

    /// Tells how it ended, unless another start did before. Everything it wrote has to be complete. What may be secret is removed.
    pub(super) fn finish(&self, event: Event) -> anyhow::Result<()> {
        let folder = &self.folder.0;
        let result = JobResult {
            start: self.number,
            event,
            content: None,
        };
        let finish = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(&serde_json::to_vec(&result)?)?;
            file.as_file().sync_all()?;
            match file.persist_noclobber(folder.join(RESULT)) {
                Err(error) if error.error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error.error);
                }
                _ => {}
            }
            sync_folder(folder)
        };
        finish().with_context(|| format!("could not write into `{}`", folder.display()))?;
        remove(&folder.join(ENVIRONMENT))
    }
}

/// The events of one start as they are written.
pub(super) struct EventFile {
    file: File,
    synced: Instant,
}

impl EventFile {
    /// Adds an event. On a shared file system others see it within [`BETWEEN_SYNCS`] of the next one.
    pub(super) fn write(&mut self, event: &Event) {
        let mut line = Vec::new();
        event.write_line(&mut line);
        // What was made counts more than what was told.
        let _ = self.file.write_all(&line);
        if self.synced.elapsed() >= BETWEEN_SYNCS {
            let _ = self.file.sync_data();
            self.synced = Instant::now();
        }
    }
}

/// Reads the events of a job while it writes them, those of all its starts in turn.
#[derive(Default)]
pub(super) struct EventReader {
    /// The starts that were read to their end.
    read: u32,
    offset: u64,
    /// The beginning of a line.
    rest: Vec<u8>,
}

impl EventReader {
    /// Hands on what is new, and tells whether there was anything.
    pub(super) fn read(&mut self, job: &JobFolder, each: &mut dyn FnMut(Event)) -> bool {
        let mut any = false;
        loop {
            // Opened anew each time, so that a file server tells what others wrote.
            let piece = self.piece(&job.start_folder(self.read + 1).join(EVENTS));
            if piece.is_empty() {
                if !job.start_folder(self.read + 2).is_dir() {
                    return any;
                }
                self.read += 1;
                self.offset = 0;
                self.rest.clear();
                continue;
            }
            any = true;
            self.offset += piece.len() as u64;
            self.rest.extend(piece);
            let whole = self.rest.iter().rposition(|byte| *byte == b'\n');
            let lines: Vec<u8> = self.rest.drain(..whole.map_or(0, |end| end + 1)).collect();
            for line in lines.split(|byte| *byte == b'\n') {
                if let Ok(event) = serde_json::from_slice(line) {
                    each(event);
                }
            }
        }
    }

    fn piece(&self, path: &Path) -> Vec<u8> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(self.offset))?;
            let mut piece = Vec::new();
            file.take(PIECE).read_to_end(&mut piece)?;
            Ok(piece)
        };
        read().unwrap_or_default()
    }
}
