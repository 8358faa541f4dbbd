//! Checks edges and outputs: every name refers to a stage, every stage makes the artifact that is wanted, and there are no cycles.

use std::collections::BTreeMap;
use std::path::Component;

use serde_yaml::Value;

use crate::engine::{Anything, Artifact as _, topological_order};

use super::Edge;
use super::draft::Draft;
use super::hints;
use super::publish::{self, Publish};
use super::sentence::noun;
use super::source_map::{RecipePath, parse};
use super::stage::DraftStage;

/// Stages and outputs after checking.
pub(crate) struct Wired {
    pub(crate) stages: Vec<DraftStage>,
    /// Stage and path.
    pub(crate) outputs: Vec<(String, String)>,
    pub(crate) publish: Vec<Publish>,
    /// Indices, producers first.
    pub(crate) order: Vec<usize>,
}

/// Checks edges and outputs.
pub(crate) fn wire(draft: &mut Draft, stages: Vec<DraftStage>, recipe: &Value) -> Wired {
    let names = stages.iter().enumerate();
    let names = names.map(|(index, stage)| (stage.name.as_str(), index));
    let names: BTreeMap<&str, usize> = names.collect();
    for stage in &stages {
        edges(draft, &stages, &names, stage);
    }
    let order = order(draft, &stages);
    let outputs = outputs(draft, &stages, recipe);
    let publish = publish::read(draft, &stages, recipe);
    Wired {
        stages,
        outputs,
        publish,
        order,
    }
}

fn parameter_path(stage: &DraftStage, parameter: &str) -> RecipePath {
    let mut path = stage.path.clone();
    path.extend(parse(parameter).unwrap_or_default());
    path
}

fn edges(
    draft: &mut Draft,
    stages: &[DraftStage],
    names: &BTreeMap<&str, usize>,
    stage: &DraftStage,
) {
    for edge in &stage.edges {
        // That it is empty is told elsewhere.
        if edge.stage.trim().is_empty() {
            continue;
        }
        let path = || parameter_path(stage, &edge.parameter);
        let makers = |wanted: &str| -> Vec<&str> {
            stages
                .iter()
                .filter(|other| other.name != stage.name)
                .filter(|other| wanted == Anything::NAME || other.output() == Some(wanted))
                .map(|other| other.name.as_str())
                .collect()
        };
        let producer = names.get(edge.stage.as_str()).map(|index| &stages[*index]);
        let Some(producer) = producer else {
            if draft.is_broken(&path()) {
                continue;
            }
            if let Some((message, hint)) = left_out(draft, stage, edge) {
                draft.value_error(&path(), message, Some(hint));
                continue;
            }
            let names = stages.iter().map(|other| other.name.as_str());
            let hint = match hints::nearest(&edge.stage, names) {
                Some(known) => format!("did you mean `{known}`?"),
                None => match makers(&edge.artifact)[..] {
                    [] => format!("no stage of the recipe makes `{}`", edge.artifact),
                    ref makers => made_by(makers, &edge.artifact),
                },
            };
            let message = format!("there is no stage `{}`", edge.stage);
            draft.value_error(&path(), message, Some(hint));
            continue;
        };
        if producer.name == stage.name {
            let message = format!("the stage `{}` takes its own result", stage.name);
            let hint = match makers(&edge.artifact)[..] {
                [] => None,
                ref makers => Some(made_by(makers, &edge.artifact)),
            };
            draft.value_error(&path(), message, hint);
        } else if let Some(output) = producer.output()
            && output != edge.artifact
            && edge.artifact != Anything::NAME
        {
            let message = format!(
                "`{}` of `{}` takes a stage that makes `{}`, but the stage `{}` makes `{}`",
                edge.parameter,
                stage.kind.map_or(stage.name.as_str(), |kind| kind.name),
                edge.artifact,
                producer.name,
                output
            );
            // A kind that makes one thing or another, by a parameter of that name.
            let mut given = producer.edges.iter();
            let given = given.any(|given| given.parameter == edge.artifact);
            let depends = !given
                && producer
                    .kind
                    .is_some_and(|kind| draft.parameters(kind).has(&edge.artifact));
            let hint = match makers(&edge.artifact)[..] {
                _ if depends => format!(
                    "without `{0}`, `{1}` trains the whole model and makes a `{output}`; with `{0}` it makes an `{0}`",
                    edge.artifact, producer.name
                ),
                [] => {
                    let kinds = draft.kinds.iter();
                    let kinds = kinds.filter(|kind| kind.output == edge.artifact);
                    format!(
                        "`{}` is made by {}",
                        edge.artifact,
                        hints::either(kinds.map(|kind| kind.name))
                    )
                }
                ref makers => made_by(makers, &edge.artifact),
            };
            draft.value_error(&path(), message, Some(hint));
        }
    }
}

/// That a stage takes one that its `when` leaves out.
fn left_out(draft: &Draft, stage: &DraftStage, edge: &Edge) -> Option<(String, String)> {
    let left = draft.left_out.iter().find(|left| left.name == edge.stage)?;
    let kind = stage.kind.map_or(stage.name.as_str(), |kind| kind.name);
    let message = format!(
        "`{}` of `{kind}` takes `{}`, which is left out: its `when` is false",
        edge.parameter, left.name
    );
    let place = left.span.map(|span| format!(" ({})", draft.place(span)));
    let hint = format!(
        "that is `when: {}`{}; give `{}` a `when` as well, or take both by `collect`",
        left.when,
        place.unwrap_or_default(),
        stage.name
    );
    Some((message, hint))
}

fn made_by(makers: &[&str], artifact: &str) -> String {
    let (noun, verb) = match makers {
        [_] => ("stage", "makes"),
        _ => ("stages", "make"),
    };
    format!(
        "the {noun} {} {verb} `{artifact}`",
        hints::list(makers.iter().copied())
    )
}

/// Sorts the stages so that producers come first. Reports each cycle once.
fn order(draft: &mut Draft, stages: &[DraftStage]) -> Vec<usize> {
    let index: BTreeMap<&str, usize> = stages
        .iter()
        .enumerate()
        .map(|(index, stage)| (stage.name.as_str(), index))
        .collect();
    // A stage that reads its own result is reported elsewhere.
    let inputs: Vec<Vec<usize>> = stages
        .iter()
        .map(|stage| {
            let other = stage.edges.iter().filter(|edge| edge.stage != stage.name);
            other
                .filter_map(|edge| index.get(edge.stage.as_str()).copied())
                .collect()
        })
        .collect();
    let (order, cycles) = topological_order(&inputs);
    for cycle in cycles {
        let ends = cycle.first().zip(cycle.last());
        let Some((first, last)) = ends.map(|(first, last)| (&stages[*first], &stages[*last]))
        else {
            continue;
        };
        let names = cycle
            .iter()
            .map(|stage| &stages[*stage].name)
            .chain([&first.name]);
        let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
        let message = format!("the stages wait on each other: {}", names.join(" -> "));
        let closing = last.edges.iter().find(|edge| edge.stage == first.name);
        let parameter = closing.map_or("", |edge| &edge.parameter);
        let path = parameter_path(last, parameter);
        let hint = "each arrow reads \"takes the result of\"; one of them must go";
        draft.value_error(&path, message, Some(hint.to_owned()));
    }
    order
}

fn outputs(draft: &mut Draft, stages: &[DraftStage], recipe: &Value) -> Vec<(String, String)> {
    let mut outputs: Vec<(String, String)> = Vec::new();
    let mut folders: Vec<(Vec<String>, String)> = Vec::new();
    for (stage, path, value) in draft.section(recipe, "outputs") {
        if !stages.iter().any(|other| other.name == stage) {
            let names = stages.iter().map(|other| other.name.as_str());
            let hint = match hints::nearest(&stage, names.clone()) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("the stages are {}", hints::list(names)),
            };
            draft.key_error(&path, format!("there is no stage `{stage}`"), Some(hint));
        }
        if draft.broken.contains(&path) {
            continue;
        }
        let Value::String(written) = value else {
            let message = format!(
                "the output of `{stage}` must be a path, not {}",
                noun(value)
            );
            draft.value_error(&path, message, None);
            continue;
        };
        let folder = match inside(written) {
            Ok(folder) => folder,
            Err(why) => {
                let hint = "outputs are folders inside the project, as in `out/merged`".to_owned();
                draft.value_error(&path, format!("the output `{written}` {why}"), Some(hint));
                continue;
            }
        };
        // Some file systems don't distinguish `A` from `a`.
        let lower: Vec<String> = folder.iter().map(|part| part.to_lowercase()).collect();
        let other = folders
            .iter()
            .find(|(other, _)| other.starts_with(&lower) || lower.starts_with(other));
        if let Some((_, other)) = other {
            let message = format!("the outputs of `{other}` and `{stage}` overlap");
            let hint = "give each a folder of its own, which differs in more than capital letters";
            draft.value_error(&path, message, Some(hint.to_owned()));
            continue;
        }
        folders.push((lower, stage.clone()));
        outputs.push((stage, written.clone()));
    }
    outputs
}

/// Folders that belong to other programs, or to this one.
const RESERVED: [&str; 6] = [".git", "git~1", ".hg", ".svn", ".jj", ".pipeline"];
/// The longest name of a folder on usual file systems, in bytes.
const LONGEST: usize = 255;

/// The parts of a relative path that stays inside its starting folder; otherwise the reason why it does not.
fn inside(path: &str) -> Result<Vec<String>, String> {
    let mut parts = Vec::new();
    if path.chars().any(char::is_control) {
        return Err("has a control character in it".into());
    }
    if path.contains('\\') {
        return Err("has a backslash in it, where folders are separated by `/`".into());
    }
    for component in std::path::Path::new(path).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::ParentDir if parts.pop().is_some() => {}
            Component::ParentDir => return Err("leaves the project".into()),
            Component::RootDir | Component::Prefix(_) => return Err("is an absolute path".into()),
        }
    }
    for part in &parts {
        if part.len() > LONGEST {
            return Err(format!("has a component of more than {LONGEST} bytes"));
        }
        // As file systems read it that don't tell capitals, or drop dots and spaces at the end.
        let plain = part.trim_end_matches(['.', ' ']).to_lowercase();
        if plain == ".pipeline" {
            return Err("lies in the store".into());
        }
        if RESERVED.contains(&plain.as_str()) {
            return Err(format!("lies in `{part}`, which is not for results"));
        }
    }
    match parts.first().map(String::as_str) {
        None => Err("is the project itself".into()),
        Some("~") => Err("begins with `~`, which is not expanded".into()),
        Some(_) => Ok(parts),
    }
}
