//! The state of a remote during one run: which answers are known, what is damaged, and whether the remote answers at all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::bail;

use super::super::Event;
use super::super::canonical::Digest;
use super::super::record::Record;
use super::super::store::Store;
use super::Remote;
use super::layout::{get, parse_record, record_key};

/// How a remote is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Whether results are taken from it.
    pub pull: bool,
    /// Whether new results are given to it.
    pub push: bool,
    /// Whether a remote that can't be used is an error, and not only a warning.
    pub required: bool,
}

/// A run's side of the remote; without one it only knows which results were left there.
pub struct Shared {
    pub(super) remote: Option<Arc<dyn Remote>>,
    settings: Settings,
    /// The variables of the environment by which another process finds the remote.
    variables: BTreeMap<String, String>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    /// Why the remote is not used any more, for reading or for writing.
    unreachable: Option<String>,
    unwritable: Option<String>,
    /// The remote's answers about fingerprints.
    records: BTreeMap<Digest, Option<Record>>,
    /// Fingerprints whose result in the remote can't be used.
    distrusted: BTreeSet<Digest>,
    /// Damaged records, manifests and blobs, which have to be written again.
    pub(super) bad: BTreeSet<Digest>,
    /// Fingerprints whose files may stay in the remote: nobody needs them here.
    remote_only: BTreeSet<Digest>,
    /// Files of the store by digest.
    pub(super) here: Option<BTreeMap<Digest, PathBuf>>,
    /// The receiver of warnings during a run. Before and after a run, warnings are kept.
    events: Option<Sender<Event>>,
    warnings: Vec<String>,
    /// Fingerprints to push.
    queue: Option<Sender<Digest>>,
}

impl Shared {
    /// No remote.
    pub fn none() -> Self {
        Self {
            remote: None,
            settings: Settings {
                pull: false,
                push: false,
                required: false,
            },
            variables: BTreeMap::new(),
            state: Mutex::default(),
        }
    }

    /// A remote, which is not contacted yet.
    pub fn new(remote: Arc<dyn Remote>, settings: Settings) -> Self {
        Self {
            remote: Some(remote),
            settings,
            variables: BTreeMap::new(),
            state: Mutex::default(),
        }
    }

    /// The same, which other processes find by these variables of their environment.
    #[must_use]
    pub fn found_by(self, variables: BTreeMap<String, String>) -> Self {
        Self { variables, ..self }
    }

    /// The same remote for jobs on other machines, with the variables by which they find it; none without a remote.
    pub fn for_jobs(&self) -> Option<(Self, BTreeMap<String, String>)> {
        let remote = self.remote.as_ref()?;
        let shared = Self::new(Arc::clone(remote), self.settings);
        Some((shared, self.variables.clone()))
    }

    /// A remote that could not even be opened: the same as one that does not answer.
    pub fn broken(why: &str, required: bool) -> Self {
        let shared = Self {
            settings: Settings {
                pull: false,
                push: false,
                required,
            },
            ..Self::none()
        };
        if !required {
            shared.warn(&format!("{why}; going on without the remote"));
        }
        shared.state().unreachable = Some(why.to_owned());
        shared
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether results can be taken from the remote, as far as is known.
    pub(crate) fn pulls(&self) -> bool {
        self.remote.is_some() && self.settings.pull && self.state().unreachable.is_none()
    }

    pub(super) fn pushes(&self) -> bool {
        let state = self.state();
        let open = state.unreachable.is_none() && state.unwritable.is_none();
        let writable = |remote: &Arc<dyn Remote>| !remote.read_only();
        open && self.settings.push && self.remote.as_ref().is_some_and(writable)
    }

    /// Where the remote is.
    pub fn address(&self) -> Option<&str> {
        self.remote.as_ref().map(|remote| remote.address())
    }

    /// The remote did not answer: it is not asked again in this run, and that is said once.
    pub(super) fn unreachable(&self, error: &anyhow::Error) {
        let why = format!(
            "the remote `{}` can't be used: {error:#}",
            self.address().unwrap_or_default()
        );
        // Where it is required, this is the error that ends the command.
        if self.state().unreachable.replace(why.clone()).is_none() && !self.settings.required {
            self.warn(&format!("{why}; going on without it"));
        }
    }

    /// Asks it again, whatever became of the last question.
    pub(super) fn forget_silence(&self) {
        self.state().unreachable = None;
    }

    /// The remote could not be written: nothing more is sent in this run, and that is said once.
    pub(super) fn unwritable(&self, error: &anyhow::Error) {
        let why = format!(
            "the remote `{}` can't be written: {error:#}",
            self.address().unwrap_or_default()
        );
        if self.state().unwritable.replace(why.clone()).is_none() && !self.settings.required {
            self.warn(&format!(
                "{why}; results stay here, and the next run sends them (`--no-push` sends nothing)"
            ));
        }
    }

    /// An error if the remote is required and failed.
    pub fn check(&self) -> anyhow::Result<()> {
        let state = self.state();
        let failed = state.unreachable.as_ref().or(state.unwritable.as_ref());
        match failed {
            Some(why) if self.settings.required => {
                bail!(
                    "{why}; hint: without `--remote-required` (or `required: true` in the project's settings) it goes on without the remote"
                )
            }
            _ => Ok(()),
        }
    }

    pub(super) fn warn(&self, text: &str) {
        let mut state = self.state();
        let event = Event::Warning {
            text: text.to_owned(),
        };
        let unheard = match &state.events {
            Some(events) => events.send(event).is_err(),
            None => true,
        };
        if unheard {
            state.warnings.push(text.to_owned());
        }
    }

    /// The warnings that no run has reported yet.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.state().warnings)
    }

    /// What is known elsewhere about a fingerprint that has no usable result here. `missing` is a record of this store whose files
    /// are not here.
    pub(crate) fn offer(
        &self,
        store: &Store,
        fingerprint: &str,
        missing: Option<&Record>,
    ) -> anyhow::Result<Option<Record>> {
        if self.state().distrusted.contains(fingerprint) {
            return Ok(None);
        }
        if let Some(record) = missing
            && store.is_remote_only(fingerprint)?
        {
            return Ok(Some(record.clone()));
        }
        Ok(self.record(fingerprint))
    }

    /// The remote's record of a fingerprint, asked for once.
    fn record(&self, fingerprint: &str) -> Option<Record> {
        if let Some(known) = self.state().records.get(fingerprint) {
            return known.clone();
        }
        let remote = self.remote.as_ref().filter(|_| self.pulls())?;
        let record = match get(remote.as_ref(), &record_key(fingerprint)) {
            Ok(bytes) => bytes.and_then(|bytes| match parse_record(fingerprint, &bytes) {
                Ok(record) => Some(record),
                Err(error) => {
                    self.bad(fingerprint, &format!("the record `{fingerprint}`"), &error);
                    None
                }
            }),
            Err(error) => {
                self.unreachable(&error);
                return None;
            }
        };
        let known = record.clone();
        self.state().records.insert(fingerprint.to_owned(), known);
        record
    }

    /// Something in the remote is damaged: it is told, counts as absent, and is written again when there is something better.
    pub(super) fn bad(&self, digest: &str, what: &str, error: &anyhow::Error) {
        if self.state().bad.insert(digest.to_owned()) {
            self.warn(&format!(
                "{what} in the remote is damaged and counts as absent: {error:#}"
            ));
        }
    }

    /// The result of this fingerprint can't be had: it counts as absent.
    pub(crate) fn distrust(&self, fingerprint: &str) {
        self.state().distrusted.insert(fingerprint.to_owned());
    }

    pub(super) fn is_distrusted(&self, fingerprint: &str) -> bool {
        self.state().distrusted.contains(fingerprint)
    }

    /// The files of this result may stay where they are.
    pub(super) fn set_remote_only(&self, fingerprint: &str) {
        self.state().remote_only.insert(fingerprint.to_owned());
    }

    /// Whether a result counts as fresh without its files.
    pub(crate) fn is_set_remote_only(&self, fingerprint: &str) -> bool {
        self.state().remote_only.contains(fingerprint)
    }

    /// Begins a run: warnings become events, and results can be queued for sending.
    pub(crate) fn open(
        &self,
        store: &Store,
        events: &Sender<Event>,
    ) -> (Open<'_>, Receiver<Digest>) {
        let (queue, queued) = channel();
        let kept = self.take_warnings();
        if self.pushes() {
            for fingerprint in self.unsent(store) {
                // The other end is in our hands.
                let _ = queue.send(fingerprint);
            }
        }
        let mut state = self.state();
        state.events = Some(events.clone());
        state.queue = Some(queue);
        drop(state);
        for text in kept {
            self.warn(&text);
        }
        (Open(self), queued)
    }

    /// A new result: it is sent when its turn comes.
    pub(crate) fn made(&self, store: &Store, fingerprint: &str) {
        if !self.pushes() {
            return;
        }
        // Only for the next run, should this one end early.
        let _ = store.set_unsent(&self.place(), fingerprint, true);
        if let Some(queue) = &self.state().queue {
            let _ = queue.send(fingerprint.to_owned());
        }
    }

    fn unsent(&self, store: &Store) -> Vec<Digest> {
        store.unsent(&self.place())
    }

    /// A name for the remote in the store.
    pub(super) fn place(&self) -> String {
        let address = self.address().unwrap_or_default();
        blake3::hash(address.as_bytes()).to_hex()[..16].to_owned()
    }
}

/// A run in progress. Dropping it ends the queue, even after a panic.
pub(crate) struct Open<'a>(&'a Shared);

impl Open<'_> {
    /// No more results come: the sender may end.
    pub(crate) fn close(&self) {
        self.0.state().queue = None;
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.queue = None;
        state.events = None;
    }
}
