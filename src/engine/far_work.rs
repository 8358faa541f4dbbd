//! A job on a node that does not see the runner's store: takes what it reads from the remote into a store of its own, runs its task there,
//! and gives what it told and made to the remote.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, Permissions};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::control::{Control, is_ended_from_outside};
use super::event::{EVENT_VERSION, Event, Level, send};
use super::executor::{ChildProcess, Executor as _, TaskResult};
use super::far::{FarSource, FarTask};
use super::files::{remove, write_atomically};
use super::job::JobResult;
use super::manifest::{Manifest, walk};
use super::part::Part;
use super::remote::{LONGEST_TASK, Mailbox, Shared, TASK};
use super::stage_events::StageEvents;
use super::stat::Stat;
use super::store::Store;
use super::task::Task;
use super::work::{last_event, panicked};

/// The time between two messages with events.
const BETWEEN: Duration = Duration::from_secs(1);
/// The most events, in bytes, that wait for a remote that does not answer.
const MOST_WAITING: usize = 16 << 20;
/// How long a remote that does not answer is tried, and the pauses between two tries.
const LONGEST_SILENCE: Duration = Duration::from_mins(15);
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long an artifact that no job reads stays in the store of a node.
const UNUSED: Duration = Duration::from_hours(24 * 14);

/// A job as its node starts it.
pub struct FarJob {
    /// The remote.
    pub shared: Shared,
    /// The name of the job there.
    pub job: String,
    /// The digest of its task: the remote may be others', too.
    pub digest: String,
    /// The store of the node; without it there is one that goes away with the job.
    pub store: Option<PathBuf>,
    /// This program.
    pub program: PathBuf,
    /// Threads for a task that does not say how many it wants.
    pub cpus: Option<NonZeroUsize>,
    /// Reads the environment.
    pub lookup: fn(&str) -> Option<String>,
    /// Set to stop the job.
    pub cancel: Arc<AtomicBool>,
}

/// Runs a job to its end, and returns whether the stage succeeded. Fails if the remote could not be told how it ended.
pub fn run_far_job(job: &FarJob) -> anyhow::Result<bool> {
    let mailbox = job.shared.mailbox(&job.job)?;
    let far = job.task(&mailbox)?;
    let number = job.claim(&mailbox)?;
    let temporary = match &job.store {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("could not make a folder for the job")?),
    };
    let folder = job.store.as_deref();
    let folder = folder.or(temporary.as_ref().map(tempfile::TempDir::path));
    let store = Store::new(folder.context("the job has no store")?);
    let (sender, received) = channel();
    let voice = mailbox.clone();
    let writer = std::thread::Builder::new().name("events".to_owned());
    let writer = writer.spawn(move || tell(&received, &voice, number))?;
    let stage = far.task.stage.clone();
    send(
        &sender,
        Event::WorkStarted {
            version: EVENT_VERSION,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
        },
    );
    let events = Arc::new(StageEvents::new(sender));
    let run = Run {
        job,
        store: &store,
        folder: store.folder("jobs").join(format!("{}-{number}", job.job)),
        stage,
        kept: (job.store.as_ref()).and_then(|_| Some(store.scratch(far.scratch.as_ref()?))),
    };
    let ended = run.to_its_end(far, &events);
    // With the last sender the events end, and the result comes behind them.
    drop(events);
    writer.join().map_err(|_| panicked())?;
    let is_ok = ended.is_ok();
    let told = if !is_ok && is_ended_from_outside(&job.cancel) {
        // No result: the scheduler may start the job again.
        mailbox.put(&format!("{number}/stopped"), b"stopped\n")
    } else {
        let (event, content) = match ended {
            Ok((done, content)) => (last_event(Ok(done)), Some(content)),
            Err(error) => (last_event(Err(error)), None),
        };
        let result = serde_json::to_vec(&JobResult {
            start: number,
            event,
            content,
        })?;
        job.insist(|| mailbox.create("result.json", result.clone()).map(drop))
    };
    run.tidy_up(is_ok);
    told.context("the remote could not be told how the job ended")?;
    Ok(is_ok)
}

impl FarJob {
    /// The task.
    fn task(&self, mailbox: &Mailbox) -> anyhow::Result<FarTask> {
        #[derive(Deserialize)]
        struct Versions {
            task: serde_json::Value,
        }
        let mut found = None;
        self.insist(|| {
            found = mailbox.get(TASK, LONGEST_TASK)?;
            Ok(())
        })
        .context("the task of the job could not be read in the remote")?;
        let json = found.context("the job has no task in the remote: it is not wanted any more")?;
        ensure!(
            blake3::hash(&json).to_hex().as_str() == self.digest,
            "the task of the job in the remote is not the one that was submitted"
        );
        // Of another version it is refused in words.
        let versions: Versions = serde_json::from_slice(&json).context("this is not a task")?;
        Task::read(&serde_json::to_vec(&versions.task)?)?;
        serde_json::from_slice(&json).context("this is not a task")
    }

    /// Takes the next number of a start.
    fn claim(&self, mailbox: &Mailbox) -> anyhow::Result<u32> {
        let node = (self.lookup)("SLURMD_NODENAME").unwrap_or_default();
        let mut number = 1;
        self.insist(|| {
            while !mailbox.create(&format!("{number}/started"), node.clone().into_bytes())? {
                number += 1;
            }
            Ok(())
        })
        .context("the start of the job could not be noted in the remote")?;
        Ok(number)
    }

    /// Tries until it goes well, the remote was silent for long, or the job is to stop.
    fn insist(&self, mut attempt: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut pause = PAUSE;
        loop {
            let error = match attempt() {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if start.elapsed() > LONGEST_SILENCE || self.cancel.load(Ordering::Relaxed) {
                return Err(error);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// One start of a job.
struct Run<'a> {
    job: &'a FarJob,
    store: &'a Store,
    /// Its own folder.
    folder: PathBuf,
    stage: String,
    /// Where the scratch folder is kept for the next attempt, if this node gets it.
    kept: Option<PathBuf>,
}

impl Run<'_> {
    /// Runs the task; gives what it noted, and the contents of what it made, which is in the remote then.
    fn to_its_end(
        &self,
        far: FarTask,
        events: &Arc<StageEvents>,
    ) -> anyhow::Result<(TaskResult, String)> {
        let cancel = &self.job.cancel;
        let _in_use = self.store.use_results(cancel, &mut |_| {})?;
        let task = self.unpacked(far, events)?;
        let control = Control::new(Arc::clone(cancel), None);
        let process = ChildProcess::new(self.job.program.clone(), Some(self.job.lookup));
        let mut done = process.execute(&task, events, &control)?;
        let out = Path::new(&task.out);
        let mut digests = BTreeMap::new();
        for (name, path) in walk(out)? {
            let stat = fs::symlink_metadata(&path).map(|found| Stat::from_metadata(&found));
            let written = done.written.get(&name);
            if let (Some(written), Ok(stat)) = (written, stat)
                && written.stat == stat
            {
                digests.insert(name, written.blake3.clone());
            }
        }
        let manifest = Manifest::read_with(out, &digests)?;
        self.tell(
            events,
            format!("sends its result to the remote: {}", bytes(manifest.size())),
        );
        let mut content = String::new();
        self.job
            .insist(|| {
                content = self.job.shared.send_folder(out, &manifest, cancel)?;
                Ok(())
            })
            .context("the result could not be sent to the remote")?;
        done.written.clear();
        Ok((done, content))
    }

    fn tell(&self, events: &StageEvents, text: String) {
        events.send(Event::Message {
            stage: self.stage.clone(),
            level: Level::Info,
            text,
        });
    }

    /// An artifact, whole in the store of the node.
    fn artifact(&self, content: &str) -> anyhow::Result<PathBuf> {
        let mut folder = PathBuf::new();
        self.job.insist(|| {
            let shared = &self.job.shared;
            folder = shared.fetch_artifact(self.store, content, &self.stage, &self.job.cancel)?;
            Ok(())
        })?;
        // Only tells when it was used last.
        let _ = write_atomically(&self.store.state("used").join(content), b"");
        Ok(folder)
    }

    /// The task with folders of this node, in which everything is that it reads.
    fn unpacked(&self, far: FarTask, events: &StageEvents) -> anyhow::Result<Task> {
        let FarTask {
            reads,
            mut task,
            inputs,
            sources,
            shards,
            ..
        } = far;
        let (out, scratch) = (self.folder.join("out"), self.folder.join("scratch"));
        fs::create_dir_all(&out).with_context(|| format!("could not make `{}`", out.display()))?;
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.is_dir()) {
            fs::rename(kept, &scratch)
                .with_context(|| format!("could not take over `{}`", kept.display()))?;
        }
        let there = |content: &String| self.store.manifest(content).is_some();
        let new = reads.iter().filter(|content| !there(content)).count();
        if new > 0 {
            self.tell(
                events,
                format!(
                    "takes what it reads from the remote: {new} of {}",
                    reads.len()
                ),
            );
        }
        for (stage, content) in inputs {
            let folder = self.artifact(&content);
            let folder =
                folder.with_context(|| format!("the result of `{stage}` could not be fetched"))?;
            task.inputs.insert(stage, folder.into_os_string());
        }
        for (number, (written, source)) in sources.into_iter().enumerate() {
            let folder = self.source(&source, number);
            let folder = folder.with_context(|| format!("`{written}` could not be fetched"))?;
            let manifest = self.store.manifest(&source.content).unwrap_or_default();
            for (name, entry) in manifest.files {
                let path = folder.join(name);
                if fs::metadata(&path).is_ok_and(|found| Stat::from_metadata(&found) == entry.stat)
                {
                    task.known.push((path.into_os_string(), entry));
                }
            }
            let path = folder.join(&source.path);
            task.sources.insert(written, path.into_os_string());
        }
        if !shards.is_empty() {
            let folders = shards.iter().map(|content| self.artifact(content));
            let folders = folders.map(|folder| folder.map(PathBuf::into_os_string));
            task.part = Part::Joined(folders.collect::<anyhow::Result<_>>()?);
        }
        let processes = task.processes.map_or(1, NonZeroUsize::get);
        if processes == 1 {
            task.cpus = task.cpus.or(self.job.cpus);
        }
        task.out = out.into_os_string();
        task.scratch = scratch.into_os_string();
        Ok(task)
    }

    /// The folder in which a local file of the runner's machine is. Programs are copies: files of artifacts can't be started.
    fn source(&self, source: &FarSource, number: usize) -> anyhow::Result<PathBuf> {
        let folder = self.artifact(&source.content)?;
        if source.programs.is_empty() {
            return Ok(folder);
        }
        let own = self.folder.join("sources").join(number.to_string());
        for (name, path) in walk(&folder)? {
            let to = own.join(&name);
            let mode = if source.programs.contains(&name) {
                0o755
            } else {
                0o644
            };
            let copy = || -> std::io::Result<()> {
                fs::create_dir_all(to.parent().unwrap_or(&own))?;
                fs::copy(&path, &to)?;
                fs::set_permissions(&to, Permissions::from_mode(mode))
            };
            copy().with_context(|| format!("could not make `{}`", to.display()))?;
        }
        Ok(own)
    }

    /// Keeps what the next attempt may go on from, and removes the rest. What fails here costs room or time only.
    fn tidy_up(&self, succeeded: bool) {
        let scratch = self.folder.join("scratch");
        if let Some(kept) = self.kept.as_ref().filter(|_| !succeeded)
            && scratch.is_dir()
        {
            let made = fs::create_dir_all(kept.parent().unwrap_or(kept));
            let _ = made.and_then(|()| fs::rename(&scratch, kept));
        }
        let _ = remove(&self.folder);
        if self.job.store.is_some() {
            self.store.forget_unused(UNUSED);
        }
    }
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    super::Bytes(count).to_string()
}

/// Writes events into the mailbox, many at a time, until there are no more.
fn tell(received: &Receiver<Event>, mailbox: &Mailbox, number: u32) {
    let mut pieces: VecDeque<Vec<u8>> = VecDeque::new();
    let mut sent = 0;
    let mut lines = Vec::new();
    let mut last = Instant::now();
    let mut over = false;
    let mut silent: Option<Instant> = None;
    loop {
        if !over {
            match received.recv_timeout(BETWEEN) {
                Ok(event) => event.write_line(&mut lines),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => over = true,
            }
        }
        if !over && last.elapsed() < BETWEEN {
            continue;
        }
        last = Instant::now();
        if !lines.is_empty() {
            // What was tried once stays as it is: the answer may have been lost, and not the message.
            pieces.push_back(std::mem::take(&mut lines));
        }
        while pieces.iter().map(Vec::len).sum::<usize>() > MOST_WAITING && pieces.len() > 1 {
            // What was made counts more than what was told.
            pieces.remove(1);
        }
        while let Some(piece) = pieces.front() {
            let name = format!("{number}/events-{}.jsonl", sent + 1);
            if mailbox.put(&name, piece).is_err() {
                break;
            }
            sent += 1;
            silent = None;
            pieces.pop_front();
        }
        if !over {
            continue;
        }
        let since = *silent.get_or_insert_with(Instant::now);
        if pieces.is_empty() || since.elapsed() > Duration::from_mins(1) {
            return;
        }
        std::thread::sleep(BETWEEN);
    }
}

impl Store {
    /// Removes the artifacts of a node's store that no job has read for that long, unless a job uses the store.
    fn forget_unused(&self, age: Duration) {
        let Some(_alone) = self.alone() else {
            return;
        };
        let now = SystemTime::now();
        for content in self.names("artifacts") {
            if content.contains('.') {
                continue;
            }
            let used = self.state("used").join(&content);
            let since = fs::metadata(&used).and_then(|found| found.modified());
            let is_old = since.map_or(true, |since| {
                now.duration_since(since).is_ok_and(|since| since > age)
            });
            if is_old {
                // Without its manifest the rest does not count as an artifact.
                let manifest = self.artifact(&format!("{content}.json"));
                let _ = remove(&manifest).and_then(|()| remove(&self.artifact(&content)));
                let _ = remove(&used);
            }
        }
    }
}
