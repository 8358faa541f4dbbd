//! `defaults:`: parameters for every stage of a kind, filled in where a stage does not give its own.
//!
//! Filling happens before stages are typed, so fingerprints know nothing of it: moving a value into `defaults` changes nothing.

use serde_yaml::{Mapping, Value};

use crate::engine::Kind;

use super::draft::Draft;
use super::hints;
use super::pieces::namespace;
use super::sentence::noun;
use super::source_map::{RecipePath, child, keys};

/// Gives each stage the parameters that stand under `defaults:` and its kind. A parameter that a stage has of its own is left as it is.
pub(crate) fn fill(draft: &mut Draft, recipe: &mut Value) {
    let mut defaults = Vec::new();
    for (name, path, value) in draft.section(recipe, "defaults") {
        if let Some(kind) = kind(draft, &name, &path)
            && let Some(parameters) = parameters(draft, kind, &path, value)
        {
            defaults.push((kind, path, parameters));
        }
    }
    let Some(Value::Mapping(stages)) = recipe.get_mut("stages") else {
        return;
    };
    for (name, stage) in stages {
        let (Some(name), Some(kind)) = (name.as_str(), kind_of(draft.kinds, stage)) else {
            continue;
        };
        // An included recipe has its own.
        if namespace(name).is_some() {
            continue;
        }
        for (_, from, parameters) in defaults.iter().filter(|(of, ..)| of.name == kind.name) {
            fill_stage(draft, name, kind, stage, from, parameters);
        }
    }
}

/// The kind of a stage that has exactly one.
pub(crate) fn kind_of(kinds: &'static [Kind], stage: &Value) -> Option<&'static Kind> {
    let names = stage.as_mapping()?.keys().filter_map(Value::as_str);
    let mut found = names.filter_map(|name| kinds.iter().find(|kind| kind.name == name));
    found.next().filter(|_| found.next().is_none())
}

/// The kind called `name`; another name is a mistake.
fn kind(draft: &mut Draft, name: &str, path: &RecipePath) -> Option<&'static Kind> {
    let kind = draft.kinds.iter().find(|kind| kind.name == name);
    if kind.is_none() {
        let message = format!("`defaults` is by kinds of stages, and `{name}` is none");
        let hint = hints::kind(name, draft.kinds);
        draft.key_error(path, message, Some(hint));
    }
    kind
}

/// The parameters under a kind; unknown ones are mistakes, told here because no stage may have the kind.
fn parameters(
    draft: &mut Draft,
    kind: &'static Kind,
    path: &RecipePath,
    value: &Value,
) -> Option<Mapping> {
    let mut map = match value {
        Value::Null => return None,
        Value::Mapping(map) => map.clone(),
        other => {
            let found = noun(other);
            let message = format!("the defaults of `{}` must be a map, not {found}", kind.name);
            draft.value_error(path, message, None);
            return None;
        }
    };
    let own = draft.parameters(kind);
    map.retain(|key, _| {
        let Some(key) = key.as_str() else {
            return false;
        };
        let known = own.has(key);
        if !known {
            let message = format!("unknown parameter `{key}` of `{}`", kind.name);
            let advice = draft.gives_advice();
            let hint = advice.then(|| hints::parameter(key, kind, draft.kinds));
            draft.key_error(&child(path, key), message, hint);
        }
        known
    });
    Some(map)
}

fn fill_stage(
    draft: &mut Draft,
    name: &str,
    kind: &Kind,
    stage: &mut Value,
    from: &RecipePath,
    parameters: &Mapping,
) {
    let Some(own) = parameters_of(stage, kind) else {
        return;
    };
    for (key, value) in parameters {
        let Some(parameter) = key.as_str().filter(|_| !own.contains_key(key)) else {
            continue;
        };
        let to = keys(&["stages", name, kind.name, parameter]);
        let from = child(from, parameter);
        if let Err(message) = draft.spend(value) {
            draft.value_error(&from, message, None);
            return;
        }
        let inner: Vec<RecipePath> = draft
            .broken
            .range(from.clone()..)
            .take_while(|broken| broken.starts_with(&from))
            .map(|broken| [&to[..], broken.get(from.len()..).unwrap_or_default()].concat())
            .collect();
        draft.broken.extend(inner);
        draft.source_map.written_elsewhere(to, from);
        own.insert(key.clone(), value.clone());
    }
}

/// The parameters of a stage as they are given. A stage that has none gets an empty map; `None` when there is something else.
pub(crate) fn parameters_of<'v>(stage: &'v mut Value, kind: &Kind) -> Option<&'v mut Mapping> {
    let parameters = stage.get_mut(kind.name)?;
    if parameters.is_null() {
        *parameters = Value::Mapping(Mapping::new());
    }
    parameters.as_mapping_mut()
}
