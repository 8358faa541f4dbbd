//! The position and pace of an interrupted stage.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Where an interrupted stage resumes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The number of `unit`s done.
    pub done: u64,
    /// The total number of units, if known.
    pub total: Option<u64>,
    /// What is counted.
    pub unit: String,
    /// The seconds that the rest takes at the pace so far, if known.
    pub seconds_left: Option<f64>,
}

/// The file in the scratch folder with the pace of a stage that can be resumed.
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

    /// Writes it into a scratch folder. Errors are ignored, since it is only used for a forecast.
    pub(super) fn write(&self, scratch: &Path) {
        if let Ok(bytes) = serde_json::to_vec(self) {
            let _ = std::fs::write(scratch.join(PACE), bytes);
        }
    }
}

impl Position {
    /// The position after `done` `unit`s, with the pace recorded in the scratch folder.
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
