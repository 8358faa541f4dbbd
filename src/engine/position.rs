//! Where a stage stands that was stopped on its way, and how fast it was.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where an interrupted stage goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// What is done, in `unit`s.
    pub done: u64,
    /// Units in all, where they are known.
    pub total: Option<u64>,
    /// What is counted.
    pub unit: String,
    /// Seconds that the rest takes at the pace so far, where it is known.
    pub seconds_left: Option<f64>,
}

/// Where the pace of a stage that can go on is kept in its scratch folder.
const PACE: &str = "pace.json";

/// The pace of a stage.
#[derive(Serialize, Deserialize)]
pub(super) struct Pace {
    /// Units in all.
    pub(super) total: u64,
    /// Seconds a unit.
    pub(super) seconds: f64,
}

impl Pace {
    /// Reads the pace from a scratch folder.
    pub(super) fn read(scratch: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(scratch.join(PACE)).ok()?).ok()
    }

    /// Keeps it in a scratch folder. It is only for a forecast.
    pub(super) fn write(&self, scratch: &Path) {
        if let Ok(bytes) = serde_json::to_vec(self) {
            let _ = std::fs::write(scratch.join(PACE), bytes);
        }
    }
}

impl Position {
    /// Where a stage goes on that has so many `unit`s behind it, with what its scratch folder tells of its pace.
    pub fn at(done: u64, unit: &str, scratch: &Path) -> Self {
        let pace = Pace::read(scratch);
        Self {
            done,
            total: pace.as_ref().map(|pace| pace.total),
            unit: unit.to_owned(),
            seconds_left: pace
                .filter(|pace| pace.seconds > 0.0)
                .map(|pace| pace.total.saturating_sub(done) as f64 * pace.seconds),
        }
    }
}
