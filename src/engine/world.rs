//! What a stage may know of the world outside its inputs.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Settings of the whole run that are no recipe's business: handed in by the command line, never read from the process.
#[derive(Clone, Default)]
pub struct World {
    /// Never touch the network.
    pub offline: bool,
    /// The home folder, for caches that other programs share.
    pub home: Option<PathBuf>,
    /// Chosen environment variables (`HF_ENDPOINT`, `HF_TOKEN`, ...). May hold secrets: never logged, recorded or hashed.
    pub environment: BTreeMap<String, String>,
    /// The program that runs a stage in a process of its own (`pipeline work`), so that whatever ends it ends only this
    /// stage. Without one stages run in this process.
    pub program: Option<PathBuf>,
}

impl World {
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
