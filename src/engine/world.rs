//! What a stage may know of the world outside its inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::bail;

/// Settings of the whole run that are no recipe's business: handed in by the command line, never read from the process.
#[derive(Clone, Default)]
pub struct World {
    /// Never touch the network.
    pub offline: bool,
    /// The home folder, for caches that other programs share.
    pub home: Option<PathBuf>,
    /// Chosen environment variables (`HF_ENDPOINT`, `HF_TOKEN`, ...). May hold secrets: never logged, recorded or hashed.
    pub environment: BTreeMap<String, String>,
    /// Set when the user interrupts.
    pub cancel: Arc<AtomicBool>,
    /// Where warnings go that belong to no running stage.
    pub teller: Option<fn(&str)>,
    /// The warnings so far.
    pub told: Arc<Mutex<BTreeSet<String>>>,
    /// The program that runs a stage in a process of its own (`pipeline work`), so that whatever ends it ends only this
    /// stage. Without one stages run in this process.
    pub program: Option<PathBuf>,
}

impl World {
    /// An error when the run was interrupted.
    pub fn check_cancelled(&self) -> anyhow::Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Whether a warning is a new one; asked once, it is none any more.
    pub fn is_news(&self, text: &str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.insert(text.to_owned())
    }

    /// The warnings so far, for another process.
    pub(super) fn warned(&self) -> BTreeSet<String> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.clone()
    }

    /// Tells a warning that belongs to no running stage, the same one once.
    pub fn warn(&self, text: &str) {
        if let Some(tell) = self.teller
            && self.is_news(text)
        {
            tell(text);
        }
    }

    /// The value of an environment variable that is set and not empty.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.environment.keys().collect();
        f.debug_struct("World")
            .field("offline", &self.offline)
            .field("variables", &names)
            .finish_non_exhaustive()
    }
}
