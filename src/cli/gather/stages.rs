//! The stages of a recipe with their states, parameters and results, for the report.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{moment, plain};
use crate::cli::project::Project;
use crate::engine::{Event, Level, LoggedEvent, Record, State, short};
use crate::report::page::{Fact, Stage, Table};
use crate::report::{bytes, duration};

/// The most messages of a stage.
const MOST_MESSAGES: usize = 20;

/// A stage as it stands now.
pub(in crate::cli) struct Standing {
    /// Its place in the recipe.
    pub(in crate::cli) index: usize,
    /// Its state.
    pub(in crate::cli) state: State,
    /// The record of its result: of the fresh one, or else of the last.
    pub(in crate::cli) record: Option<Record>,
}

/// The stages of the recipe, in the order of their work.
pub(in crate::cli) fn standings(project: &Project) -> Vec<Standing> {
    let session = project.session(&[]);
    let needed = vec![true; project.graph.nodes.len()];
    let mut inspections = session.inspect(&needed, &mut session.sources());
    let order = project.recipe.order();
    order
        .into_iter()
        .filter_map(|index| {
            let inspection = inspections.get_mut(index)?.take()?;
            let fresh = inspection.content.as_ref().and(inspection.fingerprint);
            let fresh = fresh.and_then(|fingerprint| project.store.record(&fingerprint));
            Some(Standing {
                index,
                state: inspection.state,
                record: fresh.or_else(|| project.record_of(index)),
            })
        })
        .collect()
}

/// What a run in progress, or the last one, told of a stage.
#[derive(Default)]
struct Told {
    started: bool,
    done: bool,
    failed: Option<String>,
    messages: Vec<String>,
}

fn told(events: &[LoggedEvent]) -> BTreeMap<&str, Told> {
    let mut stages: BTreeMap<&str, Told> = BTreeMap::new();
    for logged in events {
        match &logged.event {
            Event::StageStarted { stage, .. } => {
                *stages.entry(stage).or_default() = Told {
                    started: true,
                    ..Told::default()
                };
            }
            Event::StageDone { stage, .. } => stages.entry(stage).or_default().done = true,
            Event::StageFailed { stage, error, .. } => {
                stages.entry(stage).or_default().failed = Some(error.clone());
            }
            Event::Message { stage, level, text } => {
                let messages = &mut stages.entry(stage).or_default().messages;
                if messages.len() < MOST_MESSAGES {
                    messages.push(match level {
                        Level::Warning => format!("warning: {text}"),
                        Level::Info => text.clone(),
                    });
                }
            }
            _ => {}
        }
    }
    stages
}

/// The stages for the page. `events` are those of the run in progress, or of the last one.
pub(super) fn stages(
    project: &Project,
    standings: &[Standing],
    events: &[LoggedEvent],
    live: bool,
) -> Vec<Stage> {
    let told = told(events);
    let place = |name: &str| {
        standings.iter().position(|standing| {
            project
                .recipe
                .stages
                .get(standing.index)
                .is_some_and(|stage| stage.name == name)
        })
    };
    let mut stages = Vec::new();
    for standing in standings {
        let Some(stage) = project.recipe.stages.get(standing.index) else {
            continue;
        };
        let told = told.get(stage.name.as_str());
        let (state, label, text) = state(&standing.state, told, live);
        let inputs = stage.edges.iter().filter_map(|edge| {
            Some((
                edge.parameter.clone(),
                place(&edge.stage)?,
                edge.stage.clone(),
            ))
        });
        let reasons = match &standing.state {
            State::Runs { reasons }
            | State::WaitsOn { reasons, .. }
            | State::Fresh {
                frozen: Some(reasons),
                ..
            } if state != "running" => reasons.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
        let record = standing.record.as_ref();
        let params = match record {
            Some(record) => Some(record.params.clone()),
            None => stage.stage.params().ok().map(Arc::unwrap_or_clone),
        };
        stages.push(Stage {
            name: stage.name.clone(),
            kind: stage.kind.name.to_owned(),
            state,
            state_label: label,
            state_text: text,
            reasons,
            inputs: inputs.collect(),
            seconds: record.map(|record| duration(record.seconds)),
            facts: record.map_or_else(Vec::new, |record| facts(project, record)),
            parameters: Table {
                head: vec!["parameter".into(), "value".into()],
                rows: params.iter().flat_map(parameters).collect(),
            },
            notes: record.map_or_else(Vec::new, |record| notes(record, &|_| true)),
            messages: told.map_or_else(Vec::new, |told| told.messages.clone()),
        });
    }
    stages
}

/// The class of a state, the state in a word or two, and a sentence where there is more to say.
fn state(state: &State, told: Option<&Told>, live: bool) -> (&'static str, String, Option<String>) {
    if let Some(told) = told {
        if let Some(error) = &told.failed
            && !matches!(state, State::Fresh { .. } | State::Fails { .. })
        {
            return ("failed", "failed".into(), Some(error.clone()));
        }
        if live && told.started && !told.done && told.failed.is_none() {
            return ("running", "running".into(), None);
        }
    }
    match state {
        State::Fresh {
            frozen: Some(reasons),
            ..
        } => {
            let text = match reasons[..] {
                [] => "It is frozen, and nothing changed since it was made.",
                _ => "It is frozen: its last result is taken though something changed.",
            };
            let class = if reasons.is_empty() { "fresh" } else { "waits" };
            (class, "frozen".into(), Some(text.to_owned()))
        }
        State::Fresh {
            restored, remote, ..
        } => {
            let text = match (restored, remote) {
                (_, true) => {
                    Some("Its result is in the remote; its files are fetched when they are needed.")
                }
                (true, false) => Some("Its result is that of an earlier state."),
                (false, false) => None,
            };
            ("fresh", "up to date".into(), text.map(str::to_owned))
        }
        State::Fails { error, .. } => ("failed", "fails".into(), Some(error.clone())),
        State::Runs { .. } => ("runs", "to run".into(), None),
        State::WaitsOn { stages, .. } => (
            "waits",
            "waits".into(),
            Some(format!("It waits on {}.", stages.join(", "))),
        ),
        State::Unknown { error } => ("unknown", "unknown".into(), Some(error.clone())),
    }
}

fn facts(project: &Project, record: &Record) -> Vec<Fact> {
    let manifest = project.store.manifest(&record.artifact);
    let mut facts = vec![
        ("made".to_owned(), moment(record.started)),
        ("took".to_owned(), duration(record.seconds)),
        (
            "result".to_owned(),
            format!("{} {}", record.output, short(Some(&record.artifact))),
        ),
    ];
    if let Some(manifest) = manifest {
        facts.push(("size".to_owned(), bytes(manifest.size())));
    }
    let fingerprint = record.fingerprint.digest();
    facts.push(("fingerprint".to_owned(), short(Some(&fingerprint))));
    facts.push((
        "version".to_owned(),
        format!(
            "{} of pipeline {}",
            record.fingerprint.version, record.pipeline
        ),
    ));
    for output in &project.recipe.outputs {
        if project.recipe.stage(&output.stage).is_some() && output.stage == record.stage {
            facts.push(("output".to_owned(), output.path.clone()));
        }
    }
    let outside = record.fingerprint.outside.iter();
    facts.extend(outside.map(|(name, value)| (name.clone(), value.clone())));
    facts
}

/// What a stage wrote down, but for what a part of the report of its own shows.
pub(super) fn notes(record: &Record, wanted: &dyn Fn(&str) -> bool) -> Vec<Fact> {
    let notes = record.notes.iter();
    notes
        .filter(|(name, _)| name.as_str() != "intervals" && wanted(name))
        .map(|(name, value)| (name.replace('_', " "), plain(value)))
        .collect()
}

/// Parameters as they stand in the recipe: marks of inputs, files and neutral settings are taken off.
fn parameters(params: &Value) -> Vec<Vec<String>> {
    let Value::Object(params) = params else {
        return Vec::new();
    };
    params
        .iter()
        .map(|(name, value)| vec![name.clone(), plain(&unmarked(value))])
        .collect()
}

/// A parameter without the engine's marks.
pub(in crate::cli) fn unmarked(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            for mark in [
                crate::engine::STAGE_KEY,
                crate::engine::FILE_KEY,
                crate::engine::NEUTRAL_KEY,
            ] {
                if let Some(inner) = map.get(mark) {
                    return unmarked(inner);
                }
            }
            let parts = map.iter();
            Value::Object(
                parts
                    .map(|(name, value)| (name.clone(), unmarked(value)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(unmarked).collect()),
        plain => plain.clone(),
    }
}
