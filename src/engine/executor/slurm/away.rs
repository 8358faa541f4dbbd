//! Jobs on nodes that don't see the store: their tasks are sent to the remote, and their events and results are fetched from there into the
//! job's folder, as if the job had written them there.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::super::super::canonical::{Digest, is_digest};
use super::super::super::control::Control;
use super::super::super::far::FarTask;
use super::super::super::job::{JobFolder, JobResult};
use super::super::super::remote::{Mailbox, Shared, TASK};
use super::super::super::store::Store;
use super::super::super::task::Task;

/// The first pause between two reads of the remote. Each next one is longer by half, up to [`LONGEST_TICK`], until there is news.
const TICK: Duration = Duration::from_millis(300);
const LONGEST_TICK: Duration = Duration::from_secs(5);
/// The largest message, in bytes.
const LONGEST: usize = 256 << 20;

/// The remote through which a runner and nodes that don't see its store exchange tasks and results.
pub struct Away {
    shared: Shared,
    /// The environment variables that give a job access to the remote.
    variables: BTreeMap<String, String>,
    /// The runner's store.
    store: Store,
    /// Held while something is sent, so that the combinations of a matrix don't all send the same model at once.
    sending: Mutex<()>,
}

impl Away {
    /// A remote that jobs reach through these environment variables. Their results are put into `store`.
    pub fn new(shared: Shared, variables: BTreeMap<String, String>, store: Store) -> Self {
        Self {
            shared,
            variables,
            store,
            sending: Mutex::default(),
        }
    }

    /// Whether jobs can both read from the remote and write to it.
    pub(super) fn is_of_use(&self) -> bool {
        self.shared.goes_both_ways()
    }

    pub(super) fn variables(&self) -> &BTreeMap<String, String> {
        &self.variables
    }

    /// The name of a job in the remote.
    pub(super) fn name(folder: &JobFolder) -> String {
        let of = folder.path().parent().and_then(|parent| parent.file_name());
        let of = of.unwrap_or_default().to_string_lossy();
        let of: String = of.chars().take(16).collect();
        format!("{of}-{}", folder.name())
    }

    /// Sends a task and everything that it reads, and returns the digest of the task.
    pub(super) fn send(
        &self,
        task: &Task,
        folder: &JobFolder,
        control: &Control,
    ) -> anyhow::Result<Digest> {
        let _one = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let send = || -> anyhow::Result<Digest> {
            let far = FarTask::send(task, &self.store, &self.shared, control.flag())?;
            let json = serde_json::to_vec(&far)?;
            self.shared.mailbox(&Self::name(folder))?.put(TASK, &json)?;
            Ok(blake3::hash(&json).to_hex().to_string())
        };
        send().context("what the job reads could not be sent to the remote")
    }

    /// Starts following the events and the result of a job.
    pub(super) fn mirror(&self, folder: &JobFolder) -> anyhow::Result<Mirror> {
        Ok(Mirror {
            mailbox: self.shared.mailbox(&Self::name(folder))?,
            start: 0,
            piece: 0,
            pause: TICK,
            next: Instant::now(),
            trouble: None,
        })
    }
}

/// Copies the events and the result of a job from the remote into its folder.
pub(super) struct Mirror {
    mailbox: Mailbox,
    start: u32,
    /// How many event messages of that start have been read.
    piece: u64,
    pause: Duration,
    next: Instant,
    /// Why the remote could not be read, and since when.
    trouble: Option<(Instant, String)>,
}

impl Mirror {
    /// Fetches what is new, unless the last fetch was only a moment ago.
    pub(super) fn look(&mut self, away: &Away, folder: &JobFolder, stage: &str, control: &Control) {
        if Instant::now() < self.next {
            return;
        }
        let before = (self.start, self.piece);
        self.pause = match self.bring(away, folder, stage, control) {
            Ok(()) => {
                self.trouble = None;
                if before == (self.start, self.piece) {
                    (self.pause * 3 / 2).min(LONGEST_TICK)
                } else {
                    TICK
                }
            }
            Err(error) => {
                let since = self
                    .trouble
                    .take()
                    .map_or_else(Instant::now, |(since, _)| since);
                self.trouble = Some((since, format!("{error:#}")));
                LONGEST_TICK
            }
        };
        self.next = Instant::now() + self.pause;
    }

    /// Lets the next [`Mirror::look`] fetch at once, because the job may be over.
    pub(super) fn hurry(&mut self) {
        if self.trouble.is_none() {
            self.next = Instant::now();
        }
    }

    /// Why the remote could not be read, and since when.
    pub(super) fn trouble(&self) -> Option<&(Instant, String)> {
        self.trouble.as_ref()
    }

    /// Removes the messages of the job from the remote.
    pub(super) fn clear(&self) {
        // The remote's own collection removes what is left.
        let _ = self.mailbox.clear();
    }

    fn bring(
        &mut self,
        away: &Away,
        folder: &JobFolder,
        stage: &str,
        control: &Control,
    ) -> anyhow::Result<()> {
        // Read first: every event that was sent before the result is then there.
        let result = self.mailbox.get("result.json", LONGEST)?;
        loop {
            let next = format!("{}/started", self.start + 1);
            if self.start > 0 {
                let piece = format!("{}/events-{}.jsonl", self.start, self.piece + 1);
                if let Some(lines) = self.mailbox.get(&piece, LONGEST)? {
                    folder.note_events(self.start, &lines)?;
                    self.piece += 1;
                    continue;
                }
            }
            if self.mailbox.get(&next, LONGEST)?.is_none() {
                break;
            }
            folder.note_start(self.start + 1)?;
            self.start += 1;
            self.piece = 0;
        }
        let Some(result) = result else {
            return Ok(());
        };
        let result: JobResult =
            serde_json::from_slice(&result).context("the result of the job is damaged")?;
        if let Some(content) = &result.content {
            ensure!(
                is_digest(content),
                "the result of the job names no contents"
            );
            let fetched = (away.shared).fetch_artifact(&away.store, content, stage, control.flag());
            fetched.context("the result of the job could not be fetched")?;
        }
        folder.note_result(&result)
    }
}
