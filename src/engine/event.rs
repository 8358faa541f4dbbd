//! What the engine and the stages tell while they work. Rendering is elsewhere (`report`).

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use serde::{Deserialize, Serialize};

use super::reason::Reason;

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Worth reading once.
    Info,
    /// Something to act on; the stage goes on.
    Warning,
}

/// One thing that happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run begins.
    RunStarted {
        /// The recipe.
        recipe: String,
        /// How many stages it needs.
        stages: usize,
    },
    /// Nothing can begin: somebody has the store to themselves, and the run waits for them.
    RunWaiting {
        /// Who holds the lock.
        holder: String,
    },
    /// A stage's result is in the store already.
    StageFresh {
        /// The stage's name in the recipe.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// Whether it is an earlier state that came back.
        restored: bool,
        /// Whether it was made elsewhere and is in the remote; its files are here only if they are needed.
        remote: bool,
        /// Seconds the stage took when it ran.
        saved: f64,
    },
    /// A stage begins to run.
    StageStarted {
        /// The stage's name in the recipe.
        stage: String,
        /// Its kind.
        kind: String,
        /// Every reason for running it.
        reasons: Vec<Reason>,
    },
    /// Another runner is making the same result; this one waits for it.
    StageWaiting {
        /// The stage's name in the recipe.
        stage: String,
        /// Who holds the lock.
        holder: String,
    },
    /// A stage succeeded.
    StageDone {
        /// The stage's name in the recipe.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// Whether the bytes are those of its last result, so that nothing below it changes.
        same_bytes: bool,
        /// Seconds it took.
        seconds: f64,
    },
    /// A try of a stage failed, and there is another after a pause.
    StageRetried {
        /// The stage's name in the recipe.
        stage: String,
        /// What happened, with its causes.
        error: String,
        /// Seconds until the next try.
        pause: f64,
        /// Further tries after the next one.
        left: u32,
    },
    /// A stage failed. Nothing of its output counts.
    StageFailed {
        /// The stage's name in the recipe.
        stage: String,
        /// What happened, with its causes.
        error: String,
        /// The folder with what it wrote and told, until it succeeds or `gc` runs.
        kept: Option<String>,
    },
    /// A stage was not started because one before it failed or the run was interrupted.
    StageSkipped {
        /// The stage's name in the recipe.
        stage: String,
    },
    /// The files of a result begin to come from the remote.
    StageFetching {
        /// The stage's name in the recipe.
        stage: String,
    },
    /// The files of a result are here.
    StageFetched {
        /// The stage's name in the recipe.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// The files that came over; those that another artifact here has did not.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// A result is in the remote.
    StageSent {
        /// The stage's name when it ran.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// The files that went over; those that the remote has did not.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// Something about the whole run to act on; it goes on.
    Warning {
        /// The sentence.
        text: String,
    },
    /// A result was put where the recipe wants it.
    OutputPlaced {
        /// The stage's name in the recipe.
        stage: String,
        /// The place.
        path: String,
        /// Whether it was not there yet.
        changed: bool,
        /// How many of its files are read-only links into the store.
        links: usize,
    },
    /// The run is over.
    RunFinished {
        /// Stages whose result was there.
        fresh: usize,
        /// Stages that ran.
        ran: usize,
        /// Stages that failed.
        failed: usize,
        /// Stages that were not started.
        skipped: usize,
        /// Seconds in all.
        seconds: f64,
        /// Seconds that the fresh stages took when they ran.
        saved: f64,
    },
    /// How far a stage is, in `unit`s (`rows`, `bytes`, `steps`).
    Progress {
        /// The stage's name in the recipe.
        stage: String,
        /// Units done so far.
        done: u64,
        /// Units in all, when known.
        total: Option<u64>,
        /// What is counted.
        unit: &'static str,
    },
    /// Numbers of one training or evaluation step, under the reference's names.
    Metrics {
        /// The stage's name in the recipe.
        stage: String,
        /// The optimiser step the numbers belong to.
        step: u64,
        /// Metric name to value.
        values: BTreeMap<String, f64>,
    },
    /// A sentence from a stage.
    Message {
        /// The stage's name in the recipe.
        stage: String,
        /// How much it matters.
        level: Level,
        /// The sentence.
        text: String,
    },
}

/// Sends an event. That nobody listens any more is no reason to stop.
pub(super) fn send(events: &Sender<Event>, event: Event) {
    let _ = events.send(event);
}
