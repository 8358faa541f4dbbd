//! Everything that the engine and the stages report while they work, as one enum with a version. Rendering is elsewhere (`report`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::manifest::Entry;
use super::reason::Reason;

/// The version of events as JSON: raised when a reader of the last version would misread one.
pub const EVENT_VERSION: u32 = 1;

/// An error if another version of the program runs a task.
pub(super) fn check_version(version: u32, pipeline: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        version == EVENT_VERSION,
        "the program that runs the stage, pipeline {pipeline}, writes version {version} of events, and this one, pipeline {}, reads \
         version {EVENT_VERSION}; hint: install the same version in both places",
        env!("CARGO_PKG_VERSION")
    );
    Ok(())
}

/// The importance of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Worth reading once.
    Info,
    /// Something to act on; the stage goes on.
    Warning,
}

/// One thing that happened.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run begins.
    RunStarted {
        /// The recipe.
        recipe: String,
        /// How many stages it needs.
        stages: usize,
        /// The version of events as JSON.
        version: u32,
    },
    /// The run was entered in the history, because a stage is about to run.
    RunNumbered {
        /// Its number, which `history` and `log` take.
        run: u64,
    },
    /// The run waits for another process that has exclusive use of the store.
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
        /// Whether it is the result of an earlier state of the recipe, to which the recipe returned.
        restored: bool,
        /// Whether it was made elsewhere and is in the remote. Its files are fetched only if they are needed.
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
        /// Seconds that its last result took, if there is one, as an estimate.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expected: Option<f64>,
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
        /// Whether the bytes are those of its last result, so that no stage after it changes.
        same_bytes: bool,
        /// Seconds it took.
        seconds: f64,
    },
    /// An attempt at a stage failed, and there is another one after a pause.
    StageRetried {
        /// The stage's name in the recipe.
        stage: String,
        /// What happened, with its causes.
        error: String,
        /// Seconds until the next attempt.
        pause: f64,
        /// Further attempts after the next one.
        left: u32,
    },
    /// A stage failed. Nothing of its output counts.
    StageFailed {
        /// The stage's name in the recipe.
        stage: String,
        /// What happened, with its causes.
        error: String,
        /// The folder with what it wrote and its log, kept until it succeeds or `gc` runs; none if it wrote nothing.
        kept: Option<String>,
        /// Whether the stage was stopped together with the whole run.
        #[serde(default)]
        interrupted: bool,
    },
    /// A stage was not started because one before it failed or the run was interrupted.
    StageSkipped {
        /// The stage's name in the recipe.
        stage: String,
    },
    /// The files of a result are being downloaded from the remote.
    StageFetching {
        /// The stage's name in the recipe.
        stage: String,
    },
    /// The files of a result were downloaded from the remote.
    StageFetched {
        /// The stage's name in the recipe.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// The number of files downloaded, without those that another local artifact already has.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// A result was uploaded to the remote.
    StageSent {
        /// The stage's name when it ran.
        stage: String,
        /// The content digest of its artifact.
        artifact: String,
        /// The number of files uploaded, without those that the remote already had.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// A warning about the whole run, which continues.
    Warning {
        /// The sentence.
        text: String,
    },
    /// A result was published as an output.
    OutputPlaced {
        /// The stage's name in the recipe.
        stage: String,
        /// The output folder.
        path: String,
        /// Whether anything in it changed.
        changed: bool,
        /// How many of its files are read-only links into the store.
        links: usize,
    },
    /// The run is over.
    RunFinished {
        /// Stages whose result already existed.
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
        /// Whether the user stopped it.
        #[serde(default)]
        interrupted: bool,
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
        unit: Cow<'static, str>,
        /// Bytes of memory that the stage's process holds now, where the system tells.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<u64>,
    },
    /// Numbers of one training or evaluation step, under the reference's names, with `epoch` and, of trainings, `tokens_per_second`:
    /// tokens without padding over the time since the last such numbers, evaluations left out.
    Metrics {
        /// The stage's name in the recipe.
        stage: String,
        /// The optimiser step the numbers belong to.
        step: u64,
        /// All steps of the training.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        total: Option<u64>,
        /// Metric name to value.
        #[serde(with = "numbers")]
        #[schemars(with = "BTreeMap<String, numbers::Number>")]
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
    /// The process of a stage begins. This and the two events below are for the executor that started it, and are not passed on.
    #[schemars(skip)]
    WorkStarted {
        /// The version of events as JSON.
        version: u32,
        /// The version of the program.
        pipeline: String,
    },
    /// The stage in that process succeeded.
    #[schemars(skip)]
    WorkDone {
        /// What goes into its record.
        notes: BTreeMap<String, Value>,
        /// Digests of files of its output, by name.
        written: BTreeMap<String, Entry>,
    },
    /// The stage in that process failed.
    #[schemars(skip)]
    WorkFailed {
        /// The causes, from the outermost to the first.
        causes: Vec<String>,
        /// Whether the disk is full.
        disk_full: bool,
        /// Whether every further attempt would fail in the same way.
        #[serde(default)]
        lasting: bool,
    },
}

impl Event {
    /// The stage that it is about, if it is about one.
    pub fn stage(&self) -> Option<&str> {
        match self {
            Self::StageFresh { stage, .. }
            | Self::StageStarted { stage, .. }
            | Self::StageWaiting { stage, .. }
            | Self::StageDone { stage, .. }
            | Self::StageRetried { stage, .. }
            | Self::StageFailed { stage, .. }
            | Self::StageSkipped { stage }
            | Self::StageFetching { stage }
            | Self::StageFetched { stage, .. }
            | Self::StageSent { stage, .. }
            | Self::OutputPlaced { stage, .. }
            | Self::Progress { stage, .. }
            | Self::Metrics { stage, .. }
            | Self::Message { stage, .. } => Some(stage),
            Self::RunStarted { .. }
            | Self::RunNumbered { .. }
            | Self::RunWaiting { .. }
            | Self::Warning { .. }
            | Self::RunFinished { .. }
            | Self::WorkStarted { .. }
            | Self::WorkDone { .. }
            | Self::WorkFailed { .. } => None,
        }
    }

    /// Adds the event as a line of JSON.
    pub fn write_line(&self, lines: &mut Vec<u8>) {
        let before = lines.len();
        // Events are plain data; lines with a hole are better than none.
        if serde_json::to_writer(&mut *lines, self).is_ok() {
            lines.push(b'\n');
        } else {
            lines.truncate(before);
        }
    }
}

/// Numbers in JSON, which has none that are not finite: these are the texts `NaN`, `Infinity` and `-Infinity`.
mod numbers {
    use std::collections::BTreeMap;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    /// A number, or a text for one that is not finite.
    #[derive(serde::Serialize, Deserialize, schemars::JsonSchema)]
    #[serde(untagged)]
    pub(super) enum Number {
        Finite(f64),
        Other(String),
    }

    const INFINITY: &str = "Infinity";
    const MINUS_INFINITY: &str = "-Infinity";
    const NAN: &str = "NaN";

    pub(super) fn serialize<S: Serializer>(
        values: &BTreeMap<String, f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(values.iter().map(|(name, value)| {
            let number = if value.is_finite() {
                Number::Finite(*value)
            } else if value.is_nan() {
                Number::Other(NAN.to_owned())
            } else if *value > 0.0 {
                Number::Other(INFINITY.to_owned())
            } else {
                Number::Other(MINUS_INFINITY.to_owned())
            };
            (name, number)
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let numbers = BTreeMap::<String, Number>::deserialize(deserializer)?;
        let value = |number| match number {
            Number::Finite(value) => Ok(value),
            Number::Other(text) => match text.as_str() {
                NAN => Ok(f64::NAN),
                INFINITY => Ok(f64::INFINITY),
                MINUS_INFINITY => Ok(f64::NEG_INFINITY),
                _ => Err(D::Error::custom(format!("`{text}` is not a number"))),
            },
        };
        let numbers = numbers.into_iter();
        numbers
            .map(|(name, number)| Ok((name, value(number)?)))
            .collect()
    }
}

/// Sends an event. Nothing happens if the receiver is gone.
pub(super) fn send(events: &Sender<Event>, event: Event) {
    let _ = events.send(event);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_travel_to_the_bit() {
        let values = [
            0.1_f64 + 0.2,
            5e-324,
            -0.0,
            1.797_693_134_862_315_7e308,
            8.41e21,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
            3.0,
        ];
        let named = values.iter().enumerate();
        let sent = Event::Metrics {
            stage: "a".into(),
            step: 1,
            total: None,
            values: named.map(|(at, value)| (at.to_string(), *value)).collect(),
        };
        let mut line = Vec::new();
        sent.write_line(&mut line);
        let came = serde_json::from_slice(&line).unwrap();
        let Event::Metrics { values: came, .. } = came else {
            panic!("{came:?}")
        };
        let bits =
            |values: &mut dyn Iterator<Item = f64>| values.map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&mut came.into_values()), bits(&mut values.into_iter()));
    }
}
