//! A stage as a task: everything needed to run it, in any process or on any machine, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::num::NonZeroUsize;

use anyhow::{Context as _, anyhow, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::device::DeviceChoice;
use super::manifest::Entry;
use super::params::{ARTIFACT_KEY, FILE_KEY, NEUTRAL_KEY, STAGE_KEY};
use super::part::Part;
use super::{Resources, Span, Stat};

/// The memory limit, in bytes, of a stage that reads untrusted files and holds little of them at a time ([`super::Stage::BOUNDED`]),
/// unless its `resources` allow more. It is many times what real data needs.
const BOUNDED_MEMORY: u64 = 4 << 30;

/// The largest number of characters of a message from a stage.
const LONGEST_TEXT: usize = 8000;

/// One attempt at one stage. It contains no secrets; those are passed in the environment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    /// [`TASK_VERSION`].
    pub version: u32,
    /// The version of the program that made the task.
    pub pipeline: String,
    /// The stage's name in the recipe, for messages.
    pub stage: String,
    /// Its kind.
    pub kind: String,
    /// Its parameters as a recipe has them, with defaults.
    pub params: Value,
    /// Whether it is a long computation that runs alone on the machine ([`super::Stage::EXCLUSIVE`]). When stopped, it gets the time to
    /// save its state, while other stages are killed after a moment.
    pub exclusive: bool,
    /// Never touch the network.
    pub offline: bool,
    /// Threads it may compute with.
    pub cpus: Option<NonZeroUsize>,
    /// The number of processes that share the work, 1 where it doesn't say. They share `cpus`, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<NonZeroUsize>,
    /// Which part of the stage's work it is, all of it where it doesn't say.
    #[serde(default, skip_serializing_if = "Part::is_whole")]
    pub part: Part,
    /// The largest number of bytes of private memory of the process. Mapped files and stacks don't count.
    pub memory: Option<u64>,
    /// The devices it has to itself.
    pub gpus: Vec<usize>,
    /// Where it computes.
    #[serde(default)]
    pub device: DeviceChoice,
    /// What it needs of a machine, for an executor that looks for one.
    #[serde(default)]
    pub resources: Resources,
    /// The longest time that it may take, for an executor whose scheduler wants to know.
    #[serde(default)]
    pub timeout: Option<Span>,
    /// Environment variables that it reads beside those of the run. Their values are not here.
    #[serde(default)]
    pub variables: Vec<String>,
    /// The folders of inputs by stage.
    pub inputs: BTreeMap<String, OsString>,
    /// Local files by the path as it was written.
    pub sources: BTreeMap<String, OsString>,
    /// External facts (see [`super::Stage::external_facts`]).
    pub outside: BTreeMap<String, String>,
    /// The output folder, which is empty.
    pub out: OsString,
    /// The scratch folder, which survives a crash.
    pub scratch: OsString,
    /// What to write beside the scratch folder when it is made.
    pub scratch_note: Vec<u8>,
    /// The folder with the end states of finished stages of its family.
    pub continuations: Option<OsString>,
    /// Digests of local files by path.
    pub known: Vec<(OsString, Entry)>,
    /// What local files looked like, without the numbers of files: if one was touched since, the task may have read something else.
    #[serde(default)]
    pub seen: Vec<(OsString, Stat)>,
    /// The warnings that the user has already seen.
    pub warned: BTreeSet<String>,
}

/// The version of [`Task`] as JSON.
pub const TASK_VERSION: u32 = 1;

impl Task {
    /// Reads a task. Errors say which versions don't fit.
    pub fn read(json: &[u8]) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Versions {
            version: u32,
            pipeline: String,
        }
        let Versions { version, pipeline } =
            serde_json::from_slice(json).context("this is not a task")?;
        ensure!(
            version == TASK_VERSION,
            "the task has version {version}, of pipeline {pipeline}, and pipeline {} reads version {TASK_VERSION}; hint: install the \
             same version in both places",
            env!("CARGO_PKG_VERSION")
        );
        serde_json::from_slice(json).context("this is not a task")
    }
}

/// The limit of a stage's process.
pub(super) fn memory(bounded: bool, resources: &Resources) -> Option<u64> {
    bounded.then(|| BOUNDED_MEMORY.max(resources.memory.0))
}

/// Parameters as a recipe has them: without the marks of edges, files and neutral settings.
pub(crate) fn unmarked(params: Value) -> Value {
    match params {
        Value::Array(items) => items.into_iter().map(unmarked).collect(),
        Value::Object(mut map) => {
            let one = map.len() == 1;
            if map.contains_key(ARTIFACT_KEY)
                && map.len() == 2
                && let Some(stage) = map.remove(STAGE_KEY)
            {
                return stage;
            }
            for mark in [FILE_KEY, NEUTRAL_KEY] {
                if one && let Some(value) = map.remove(mark) {
                    return unmarked(value);
                }
            }
            let entries = map.into_iter();
            Value::Object(entries.map(|(key, value)| (key, unmarked(value))).collect())
        }
        scalar => scalar,
    }
}

/// The causes of an error as texts of limited length, since a template may raise a text of any length.
pub(super) fn causes(error: &anyhow::Error) -> Vec<String> {
    error
        .chain()
        .map(|cause| short(cause.to_string()))
        .collect()
}

/// A text of at most some pages.
pub(super) fn short(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(LONGEST_TEXT) {
        text.truncate(end);
        text.push_str(" ..");
    }
    text
}

/// The first cause of an error that would recur in every further attempt, because it lies in what the stage reads. Any other error may
/// be temporary.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Lasting(String);

/// Marks an error of a stage as lasting, unless the system caused it (a disk, a connection, a process). What a stage reads stays what it is.
pub(super) fn lasting(failed: anyhow::Error) -> anyhow::Error {
    let passes = |cause: &std::io::Error| {
        !matches!(
            cause.kind(),
            ErrorKind::NotFound
                | ErrorKind::PermissionDenied
                | ErrorKind::InvalidData
                | ErrorKind::InvalidInput
                | ErrorKind::UnexpectedEof
                | ErrorKind::IsADirectory
                | ErrorKind::NotADirectory
        )
    };
    if failed
        .chain()
        .any(|cause| cause.downcast_ref().is_some_and(passes))
    {
        return failed;
    }
    error(causes(&failed), false, true)
}

/// The error of texts.
pub(super) fn error(causes: Vec<String>, full: bool, lasting: bool) -> anyhow::Error {
    let mut causes = causes.into_iter().rev();
    let first = causes.next().unwrap_or_default();
    let first = if full {
        anyhow::Error::from(std::io::Error::new(ErrorKind::StorageFull, first))
    } else if lasting {
        anyhow::Error::from(Lasting(first))
    } else {
        anyhow!(first)
    };
    causes.fold(first, anyhow::Error::context)
}

/// Whether an error says that the disk is full.
pub(super) fn is_full(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<std::io::Error>();
        cause.is_some_and(|cause| cause.kind() == ErrorKind::StorageFull)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parameters_lose_their_marks_only() {
        let params = json!({
            "model": {STAGE_KEY: "base", ARTIFACT_KEY: "model"},
            "files": [{FILE_KEY: "a.jsonl"}, {FILE_KEY: "b.jsonl"}],
            "jobs": {NEUTRAL_KEY: {"n": 3}},
            "columns": {"prompt": "question"},
            "rate": 1e-5,
        });
        let expected = json!({
            "model": "base",
            "files": ["a.jsonl", "b.jsonl"],
            "jobs": {"n": 3},
            "columns": {"prompt": "question"},
            "rate": 1e-5,
        });
        assert_eq!(unmarked(params), expected);
    }

    #[test]
    fn errors_keep_their_causes_on_the_way() {
        let first = std::io::Error::new(std::io::ErrorKind::StorageFull, "no space");
        let sent = anyhow::Error::from(first)
            .context("could not write")
            .context("row 3");
        let came = error(causes(&sent), is_full(&sent), false);
        assert_eq!(format!("{came:#}"), format!("{sent:#}"));
        assert!(is_full(&came));
        assert!(!is_full(&error(vec!["a".into(), "b".into()], false, false)));
    }

    #[test]
    fn what_lies_in_the_data_lasts_and_what_the_system_did_may_pass() {
        let told = |error| format!("{:#}", lasting(error));
        let data = || anyhow!("no such column").context("row 3");
        assert!(lasting(data()).is::<Lasting>());
        assert_eq!(told(data()), "row 3: no such column");
        let system = |kind| anyhow::Error::from(std::io::Error::new(kind, "x")).context("row 3");
        for (kind, lasts) in [
            (ErrorKind::NotFound, true),
            (ErrorKind::UnexpectedEof, true),
            (ErrorKind::StorageFull, false),
            (ErrorKind::TimedOut, false),
            (ErrorKind::ConnectionReset, false),
            (ErrorKind::Other, false),
        ] {
            assert_eq!(lasting(system(kind)).is::<Lasting>(), lasts, "{kind:?}");
        }
        let far = error(causes(&lasting(data())), false, true);
        assert!(far.is::<Lasting>() && format!("{far:#}") == "row 3: no such column");
    }

    #[test]
    fn no_text_is_longer_than_anybody_reads() {
        let error = anyhow!("é".repeat(1_000_000)).context("row 3");
        let [row, text] = &causes(&error)[..] else {
            panic!("two causes")
        };
        assert_eq!(row, "row 3");
        assert!(text.chars().count() == LONGEST_TEXT + 3 && text.ends_with("é .."));
    }

    #[test]
    fn floats_travel_to_the_bit() {
        for value in [
            0.1_f64 + 0.2,
            5e-324,
            1.797_693_134_862_315_7e308,
            8.41e21,
            2e-4,
        ] {
            let text = json!({ "value": value }).to_string();
            let back: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(back["value"].as_f64().unwrap().to_bits(), value.to_bits());
        }
    }
}
