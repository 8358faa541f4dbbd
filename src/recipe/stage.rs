//! The stages of a recipe, each typed on its own, so that a mistake in one hides none in another.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_yaml::{Mapping, Value};

use crate::engine::{AnyStage, DeviceChoice, Handling, Kind, Marker, markers, read_parameters};

use super::draft::Draft;
use super::hints;
use super::matrix::MATRIX;
use super::pieces::namespace;
use super::sentence::noun;
use super::source_map::{PathStep, RecipePath, child, display, keys};
use super::typing::{self, Typed, below, json, not_finite, read_all};
use super::when::WHEN;
use super::words;
use super::{Edge, SourceFile};

/// Keys beside the kind that are kept free for what is to come.
const RESERVED: [&str; 6] = ["cache", "description", "env", "for_each", "launch", "where"];

/// The fields of [`Handling`].
pub(super) const HANDLING: [&str; 6] = [
    "device",
    "executor",
    "frozen",
    "resources",
    "retries",
    "timeout",
];

/// Whether a key stands beside the kind and is none.
pub(super) fn is_beside(key: &str) -> bool {
    HANDLING.contains(&key) || [MATRIX, WHEN].contains(&key)
}

/// A stage as far as it could be read.
pub(crate) struct DraftStage {
    pub(crate) name: String,
    /// The path of its parameters.
    pub(crate) path: RecipePath,
    pub(crate) kind: Option<&'static Kind>,
    pub(crate) typed: Option<Arc<dyn AnyStage>>,
    pub(crate) handling: Handling,
    pub(crate) edges: Vec<Edge>,
    pub(crate) files: Vec<SourceFile>,
}

impl DraftStage {
    /// The noun of what it makes; a stage that could not be typed counts as making what its kind usually makes.
    pub(crate) fn output(&self) -> Option<&'static str> {
        match &self.typed {
            Some(stage) => Some(stage.output()),
            None => self.kind.map(|kind| kind.output),
        }
    }
}

/// Reads every stage.
pub(crate) fn read(draft: &mut Draft, recipe: &Value) -> Vec<DraftStage> {
    let before = draft.errors.len();
    let section = draft.section(recipe, "stages");
    if section.is_empty() && draft.errors.len() == before && !draft.has_unknown_keys {
        let hint = "as in `stages: { pairs: { import_dataset: { path: pairs.jsonl } } }`";
        draft.key_error(
            &keys(&["stages"]),
            "the recipe has no stages".to_owned(),
            Some(hint.to_owned()),
        );
    }
    section
        .into_iter()
        .map(|(name, path, value)| stage(draft, name, &path, value))
        .collect()
}

fn stage(draft: &mut Draft, name: String, path: &RecipePath, value: &Value) -> DraftStage {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    let is_made = draft.expanded.contains_key(&name)
        || namespace(&name).is_some_and(|included| draft.namespaces.contains_key(included));
    if (name.is_empty() || !name.chars().all(plain)) && !is_made {
        let message = format!("`{name}` is not a valid name of a stage");
        let hint = "a name consists of letters, digits, `_` and `-`".to_owned();
        draft.key_error(path, message, Some(hint));
    }
    let mut staged = DraftStage {
        name,
        path: path.clone(),
        kind: None,
        typed: None,
        handling: Handling::default(),
        edges: Vec::new(),
        files: Vec::new(),
    };
    let Some(kind) = kind(draft, &staged.name, path, value) else {
        return staged;
    };
    staged.kind = Some(kind);
    staged.handling = handling(draft, &staged.name, path, value);
    staged.path = child(path, kind.name);
    let params = match value.get(kind.name) {
        Some(Value::Mapping(map)) => map,
        None | Some(Value::Null) => &Mapping::new(),
        Some(other) => {
            let message = format!(
                "the parameters of `{}` must be a map, not {}",
                kind.name,
                noun(other)
            );
            draft.value_error(&staged.path, message, None);
            return staged;
        }
    };
    if let Some(typed) = typing::parameters(draft, kind, &staged.path, params) {
        let empty = empty(draft, kind, &staged.path, params);
        typed.check(draft, kind, &staged.path, &empty);
        match typed.stage.params() {
            Ok(params) => edges_and_files(draft, &mut staged, &params, &typed),
            Err(error) => {
                let message = format!("the parameters of `{}` can not be kept: {error}", kind.name);
                draft.value_error(&staged.path, message, None);
            }
        }
        if staged.handling.device != DeviceChoice::Cpu && !typed.stage.exclusive() {
            let message = format!(
                "`{}` computes on the processor: `device` is for trainings and evaluations",
                kind.name
            );
            draft.value_error(&child(path, "device"), message, None);
        }
        check_processes(draft, &staged.handling, path, &*typed.stage);
        check_shards(draft, &staged.handling, path, &*typed.stage);
        staged.typed = Some(typed.stage);
    }
    staged
}

/// Tells whether a stage can't run as so many processes as `resources` says.
fn check_processes(
    draft: &mut Draft,
    handling: &Handling,
    path: &RecipePath,
    stage: &dyn AnyStage,
) {
    let resources = &handling.resources;
    let processes = resources.processes();
    if processes == 1 {
        return;
    }
    let found = if let Err(problem) = stage.check_processes(processes) {
        Some((problem.message, problem.hint))
    } else if !resources.isolated {
        let message = "with `isolated: false` there is one process alone, the runner's".to_owned();
        Some((message, None))
    } else if handling.device != DeviceChoice::Cpu {
        let message = "several processes compute on processors: `device` is for one".to_owned();
        Some((message, None))
    } else {
        None
    };
    if let Some((message, hint)) = found {
        let at = child(&child(path, "resources"), "processes");
        draft.value_error(&at, message, hint);
    }
}

/// Tells whether a stage can't be made in shards that `resources` asks for.
fn check_shards(draft: &mut Draft, handling: &Handling, path: &RecipePath, stage: &dyn AnyStage) {
    if handling
        .resources
        .shards
        .is_some_and(|shards| shards.get() > 1)
        && !stage.shards()
    {
        let message = format!(
            "`{}` is one task: `shards` is for stages that make rows of rows, `apply_chat_template` and `tokenize`",
            stage.kind()
        );
        let at = child(&child(path, "resources"), "shards");
        draft.value_error(&at, message, None);
    }
}

/// Reads the runner's own keys beside the kind, telling every mistake in them.
fn handling(draft: &mut Draft, name: &str, path: &RecipePath, value: &Value) -> Handling {
    let mut given = serde_json::Map::new();
    for key in HANDLING {
        let Some(setting) = value.get(key) else {
            continue;
        };
        match json(setting, || child(path, key)) {
            Ok(setting) => _ = given.insert(key.to_owned(), setting),
            Err(at) => not_finite(draft, path, name, &at),
        }
    }
    if given.is_empty() {
        return Handling::default();
    }
    let read = read_all(
        draft,
        (name, path),
        &mut given,
        &mut BTreeSet::new(),
        &words::allowed_beside,
        read_parameters::<Handling>,
    );
    read.unwrap_or_default()
}

/// Finds the one kind of a stage; everything else beside it is a mistake.
fn kind(draft: &mut Draft, name: &str, path: &RecipePath, value: &Value) -> Option<&'static Kind> {
    let kinds = draft.kinds;
    let by_name = |name: &str| kinds.iter().find(|kind| kind.name == name);
    let map = match value {
        Value::Mapping(map) if !map.is_empty() => map,
        other => {
            let hint = match other.as_str().and_then(by_name) {
                Some(kind) => format!("write `{name}: {{ {}: {{ .. }} }}`", kind.name),
                None => "a stage is its kind and the kind's parameters, as in `chats: { apply_chat_template: { dataset: pairs } }`".to_owned(),
            };
            let message = match other {
                Value::Mapping(_) | Value::Null => format!("the stage `{name}` has no kind"),
                other => format!("the stage `{name}` must be a map, not {}", noun(other)),
            };
            draft.value_error(path, message, Some(hint));
            return None;
        }
    };
    let there: Vec<&str> = map.keys().filter_map(Value::as_str).collect();
    let mut found: Option<&'static Kind> = None;
    let mut unknown = Vec::new();
    for key in &there {
        match (by_name(key), found) {
            (Some(kind), None) => found = Some(kind),
            (Some(kind), Some(first)) => {
                let message = format!(
                    "the stage `{name}` has two kinds, `{}` and `{}`",
                    first.name, kind.name
                );
                let hint = "a stage has one kind; make two stages".to_owned();
                draft.key_error(&child(path, key), message, Some(hint));
            }
            (None, _) if RESERVED.contains(key) => {
                let message = format!("`{key}` is not supported yet");
                draft.key_error(&child(path, key), message, None);
            }
            (None, _) if HANDLING.contains(key) => {}
            (None, _) => unknown.push(*key),
        }
    }
    if let Some(kind) = found {
        let own = draft.parameters(kind);
        for key in unknown {
            let message = format!("unknown key `{key}` beside `{}`", kind.name);
            let hint = if own.has(key) {
                format!("it is a parameter: put it inside `{}`", kind.name)
            } else {
                match key {
                    "needs" | "depends_on" | "inputs" => {
                        "an edge is a parameter that names a stage, such as `dataset: chats`"
                            .to_owned()
                    }
                    _ => format!("the parameters stand inside `{}`", kind.name),
                }
            };
            draft.key_error(&child(path, key), message, Some(hint));
        }
    } else {
        let style = ["kind", "type", "uses", "stage"];
        if let Some(key) = unknown.iter().find(|key| style.contains(key)) {
            let word = map.get(*key).and_then(Value::as_str).unwrap_or("its kind");
            let hint = format!("the kind is the key: `{name}: {{ {word}: {{ .. }} }}`");
            let message = format!("the stage `{name}` has no kind");
            draft.key_error(&child(path, key), message, Some(hint));
        } else if unknown.is_empty() {
            let message = format!("the stage `{name}` has no kind");
            draft.key_error(path, message, None);
        } else if let [key] = unknown[..] {
            let message = format!("unknown kind `{key}`");
            let hint = hints::kind(key, kinds);
            draft.key_error(&child(path, key), message, Some(hint));
        } else {
            let likely = unknown
                .iter()
                .find_map(|key| hints::nearest(key, kinds.iter().map(|kind| kind.name)));
            let hint = match likely {
                Some(known) => format!("did you mean `{known}`?"),
                None => hints::kind("", kinds),
            };
            let message = format!(
                "the stage `{name}` has no kind: it has {}",
                hints::list(unknown)
            );
            draft.key_error(path, message, Some(hint));
        }
    }
    found
}

/// Tells every empty text and name among the parameters: none of them means anything, but what stands between two texts may be white space
/// or nothing. Returns where they are.
fn empty(draft: &mut Draft, kind: &Kind, path: &RecipePath, params: &Mapping) -> Vec<RecipePath> {
    if !has_empty(params) {
        return Vec::new();
    }
    let value = &Value::Mapping(params.clone());
    let mut found = Vec::new();
    let mut open = vec![(path.clone(), value)];
    while let Some((at, value)) = open.pop() {
        match value {
            // A tab may stand between the values of a line.
            Value::String(text) if text.trim().is_empty() && text != "\t" => found.push(at),
            Value::Sequence(values) => {
                let values = values.iter().enumerate();
                open.extend(values.map(|(index, value)| {
                    let mut at = at.clone();
                    at.push(PathStep::Index(index));
                    (at, value)
                }));
            }
            Value::Mapping(map) => {
                for (key, value) in map {
                    let Some(key) = key.as_str() else { continue };
                    let at = child(&at, key);
                    if key.trim().is_empty() {
                        let parameter = display(at.get(path.len()..).unwrap_or_default());
                        let message = format!("an empty name in `{}`: `{parameter}`", kind.name);
                        draft.key_error(&at, message, None);
                    }
                    if key.ends_with("_delimiter") && value.is_string() {
                        continue;
                    }
                    open.push((at, value));
                }
            }
            _ => {}
        }
    }
    found.sort_unstable();
    for at in &found {
        let parameter = display(at.get(path.len()..).unwrap_or_default());
        let message = format!("`{parameter}` of `{}` is empty", kind.name);
        let own = draft.parameters(kind);
        let first = parameter.split(['.', '[']).next().unwrap_or_default();
        let meaning = own.0.iter().find(|own| own.name == first);
        let hint = meaning.map(|own| format!("`{first}`: {}", own.summary()));
        draft.value_error(at, message, hint);
    }
    found
}

/// Whether a text or a name in a map may be one that [`empty`] tells.
fn has_empty(map: &Mapping) -> bool {
    fn is_empty(value: &Value) -> bool {
        match value {
            Value::String(text) => text.trim().is_empty(),
            Value::Sequence(values) => values.iter().any(is_empty),
            Value::Mapping(map) => has_empty(map),
            _ => false,
        }
    }
    map.iter()
        .any(|(key, value)| is_empty(key) || is_empty(value))
}

/// The edges and files among serialised parameters.
fn edges_and_files(
    draft: &Draft,
    stage: &mut DraftStage,
    params: &serde_json::Value,
    typed: &Typed,
) {
    for (parameter, marker) in markers(params) {
        if typed.stand_ins.contains(&parameter) {
            continue;
        }
        match marker {
            Marker::Stage {
                stage: producer,
                artifact,
            } => stage.edges.push(Edge {
                implied: !draft.implied.is_empty()
                    && draft.implied.contains(&below(&stage.path, &parameter)),
                parameter,
                stage: producer,
                artifact,
            }),
            Marker::File(path) => {
                let at = below(&stage.path, &parameter);
                stage.files.push(SourceFile {
                    parameter,
                    path,
                    start: match draft.origin(&at) {
                        Some(origin) => origin.file,
                        None => Some(draft.source_map.file(&at)),
                    },
                });
            }
            Marker::Neutral => {}
        }
    }
}
