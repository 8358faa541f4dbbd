//! What the engine and the stages tell while they work. Rendering is elsewhere (`report`).

use std::collections::BTreeMap;

use serde::Serialize;

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
