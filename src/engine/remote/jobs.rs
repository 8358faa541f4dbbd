//! How a runner and a job exchange data through the remote if the job's node does not see the store: folders as artifacts, and small messages.
//!
//! ```text
//! v1/jobs/<job>/task.json             the task of the job
//! v1/jobs/<job>/<n>/started           marks its n-th start, and is created only once
//! v1/jobs/<job>/<n>/events-<k>.jsonl  the events of that start, in numbered parts
//! v1/jobs/<job>/<n>/stopped           that start was stopped from outside, and has no result
//! v1/jobs/<job>/result.json           the result of the first start that came to an end
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow};
use serde::Deserialize;

use super::super::canonical::Digest;
use super::super::manifest::Manifest;
use super::super::store::Store;
use super::layout::{JOBS, get_up_to};
use super::{Object, Remote, Shared};

/// The message with the task of a job.
pub(in crate::engine) const TASK: &str = "task.json";
/// The largest task, in bytes.
pub(in crate::engine) const LONGEST_TASK: usize = 256 << 20;

/// The messages of one job.
#[derive(Clone)]
pub(in crate::engine) struct Mailbox {
    remote: Arc<dyn Remote>,
    folder: String,
}

impl Mailbox {
    /// Writes a message.
    pub(in crate::engine) fn put(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let mut source = bytes;
        self.remote
            .write(&self.key(name), bytes.len() as u64, &mut source)
    }

    /// Writes a message if there is none of that name. Returns whether it was written.
    pub(in crate::engine) fn create(&self, name: &str, bytes: Vec<u8>) -> anyhow::Result<bool> {
        self.remote.create(&self.key(name), bytes)
    }

    /// Reads a message of at most `longest` bytes. Returns `None` if it does not exist.
    pub(in crate::engine) fn get(
        &self,
        name: &str,
        longest: usize,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        get_up_to(self.remote.as_ref(), &self.key(name), longest)
    }

    /// Removes all messages of the job.
    pub(in crate::engine) fn clear(&self) -> anyhow::Result<()> {
        let all = self.remote.list(&self.folder)?;
        let keys: Vec<String> = all.into_iter().map(|object| object.key).collect();
        self.remote.delete(&keys)
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }
}

impl Shared {
    /// The messages of a job.
    pub(in crate::engine) fn mailbox(&self, job: &str) -> anyhow::Result<Mailbox> {
        let remote = self.remote.as_ref().context("there is no remote")?;
        Ok(Mailbox {
            remote: Arc::clone(remote),
            folder: format!("{JOBS}/{job}"),
        })
    }

    /// Whether results can be both fetched from the remote and sent to it.
    pub(in crate::engine) fn goes_both_ways(&self) -> bool {
        self.pulls() && self.pushes()
    }

    /// Sends the files below a folder that the remote lacks, and returns the content digest. `manifest` is that of the folder.
    pub(in crate::engine) fn send_folder(
        &self,
        folder: &Path,
        manifest: &Manifest,
        cancel: &AtomicBool,
    ) -> anyhow::Result<Digest> {
        let content = manifest.digest();
        self.send_artifact(folder.to_owned(), &content, manifest, cancel)?;
        Ok(content)
    }

    /// Fetches what a store lacks of an artifact, and returns the artifact's folder.
    pub(in crate::engine) fn fetch_artifact(
        &self,
        store: &Store,
        content: &str,
        stage: &str,
        cancel: &AtomicBool,
    ) -> anyhow::Result<PathBuf> {
        // A remote that did not answer before may answer now.
        self.forget_silence();
        let (events, _unheard) = channel();
        let pulled = self.pull(store, content, (stage, &events), cancel);
        pulled.map_err(|trouble| anyhow!(trouble.in_words()))?;
        Ok(store.artifact(content))
    }
}

/// The objects of jobs that have not changed for `age`, so that no job works on them.
pub(super) fn forgotten(remote: &dyn Remote, age: Duration) -> anyhow::Result<Vec<Object>> {
    let now = SystemTime::now();
    let objects = remote.list(JOBS)?.into_iter();
    let old = |object: &Object| {
        let since = now.duration_since(object.modified);
        since.is_ok_and(|since| since >= age)
    };
    Ok(objects.filter(old).collect())
}

/// The contents that waiting and running jobs read. They have to be kept even if no record names them.
pub(super) fn awaited(remote: &dyn Remote, age: Duration) -> anyhow::Result<BTreeSet<Digest>> {
    #[derive(Deserialize)]
    struct Reads {
        reads: BTreeSet<Digest>,
    }
    let old: BTreeSet<String> = forgotten(remote, age)?
        .into_iter()
        .map(|object| object.key)
        .collect();
    let mut all = BTreeSet::new();
    for object in remote.list(JOBS)? {
        let is_task = object.key.ends_with(&format!("/{TASK}"));
        if !is_task || old.contains(&object.key) {
            continue;
        }
        let Some(bytes) = get_up_to(remote, &object.key, LONGEST_TASK)? else {
            continue;
        };
        // What can't be read can't be started either.
        if let Ok(Reads { reads }) = serde_json::from_slice(&bytes) {
            all.extend(reads);
        }
    }
    Ok(all)
}
