//! What a stage may know of its surroundings besides its inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::bail;

/// Settings of the whole run that are no recipe's business: handed in by the command line, never read from the process.
#[derive(Clone, Default)]
pub struct RunEnv {
    /// Never touch the network.
    pub offline: bool,
    /// The most memory that a process may have, in bytes, where that is known.
    pub memory: Option<u64>,
    /// The home folder, for caches that other programs share.
    pub home: Option<PathBuf>,
    /// Chosen environment variables (`HF_ENDPOINT`, `HF_TOKEN`, ...). May hold secrets: never logged, recorded or hashed.
    pub variables: BTreeMap<String, String>,
    /// The value of any other environment variable, for programs that a recipe runs. It may be a secret, too.
    pub lookup: Option<fn(&str) -> Option<String>>,
    /// Set when the user interrupts.
    pub cancel: Arc<AtomicBool>,
    /// Where warnings go that belong to no running stage.
    pub on_warning: Option<fn(&str)>,
    /// The warnings so far.
    pub warned: Arc<Mutex<BTreeSet<String>>>,
}

impl RunEnv {
    /// An error when the run was interrupted.
    pub fn check_cancelled(&self) -> anyhow::Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Whether nobody asked about this warning before; from now on somebody has.
    pub fn is_first_warning(&self, text: &str) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        warned.insert(text.to_owned())
    }

    /// The warnings so far, for another process.
    pub(super) fn warnings(&self) -> BTreeSet<String> {
        let warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        warned.clone()
    }

    /// Reports a warning that belongs to no running stage, each only once.
    pub fn warn(&self, text: &str) {
        if let Some(show) = self.on_warning
            && self.is_first_warning(text)
        {
            show(text);
        }
    }

    /// The value of an environment variable that is set and not empty.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }
}

impl std::fmt::Debug for RunEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.variables.keys().collect();
        f.debug_struct("RunEnv")
            .field("offline", &self.offline)
            .field("variables", &names)
            .finish_non_exhaustive()
    }
}
