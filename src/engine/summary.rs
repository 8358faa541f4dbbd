//! What a run is told, and what came of it.

use std::collections::BTreeMap;

use super::canonical::Digest;
use super::handling::Machine;
use super::reason::Reason;

/// The settings of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The number of stages that may run at the same time.
    pub jobs: usize,
    /// The resources that they may use together.
    pub machine: Machine,
    /// Whether stages that don't need a failed stage still run after the failure.
    pub keep_going: bool,
}

/// The outcome of a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    /// Stages whose result already existed.
    pub fresh: usize,
    /// Stages that ran.
    pub ran: usize,
    /// Stages that failed.
    pub failed: usize,
    /// Stages that were not started.
    pub skipped: usize,
    /// Whether the run was interrupted.
    pub interrupted: bool,
    /// The content digest of each stage's artifact, where there is one; in the order of the recipe.
    pub artifacts: Vec<Option<Digest>>,
    /// Seconds that the fresh stages took when they ran.
    pub saved: f64,
    /// The run's number in the history, if it left a trace there.
    pub run: Option<u64>,
    /// The frozen stages, by their positions in the recipe, and what would make them run if they were not frozen.
    pub frozen: BTreeMap<usize, Vec<Reason>>,
}
