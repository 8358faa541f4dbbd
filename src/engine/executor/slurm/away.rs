//! Jobs on nodes that don't see the store: their tasks go to the remote, and what they tell and make is brought from there into the job's
//! folder, as if they had written it there.

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

/// The pause between two looks into the remote; each is longer by half, up to [`LONGEST_TICK`], until something comes.
const TICK: Duration = Duration::from_millis(300);
const LONGEST_TICK: Duration = Duration::from_secs(5);
/// The most bytes of a message.
const LONGEST: usize = 256 << 20;

/// The remote that lies between a runner and nodes that don't see its store.
pub struct Away {
    shared: Shared,
    /// Variables by which a job reaches the remote.
    variables: BTreeMap<String, String>,
    /// The runner's store.
    store: Store,
    /// Held while something is sent: a hundred combinations of a matrix would send the same model.
    sending: Mutex<()>,
}

impl Away {
    /// Jobs find this remote by these variables of their environment; what they make is put into this store.
    pub fn new(shared: Shared, variables: BTreeMap<String, String>, store: Store) -> Self {
        Self {
            shared,
            variables,
            store,
            sending: Mutex::default(),
        }
    }

    /// Whether jobs can take what they read from the remote and give what they make to it.
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

    /// Sends a task with what it reads, and gives its digest.
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

    /// Looks after what a job tells.
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

/// What came of a job so far.
pub(super) struct Mirror {
    mailbox: Mailbox,
    start: u32,
    /// The messages of that start that were read.
    piece: u64,
    pause: Duration,
    next: Instant,
    /// Why nothing comes, and since when.
    trouble: Option<(Instant, String)>,
}

impl Mirror {
    /// Brings what is new, unless it has just been looked for.
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

    /// The same at once: the job is over, or may be.
    pub(super) fn hurry(&mut self) {
        if self.trouble.is_none() {
            self.next = Instant::now();
        }
    }

    /// Why nothing comes, and since when.
    pub(super) fn trouble(&self) -> Option<&(Instant, String)> {
        self.trouble.as_ref()
    }

    /// Nobody wants it any more.
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
        // Asked first: what was told before it is there then.
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
