//! Reads the markers in serialised parameters by which the engine finds edges, local files and neutral settings (`engine::params`
//! writes them).

use std::fmt::Write as _;

use serde_json::Value;

use super::params::{ARTIFACT_KEY, FILE_KEY, NEUTRAL_KEY, STAGE_KEY};

/// A marker in serialised parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Marker {
    /// An edge: the producer's name and the artifact that is wanted.
    Stage {
        /// The name of the producing stage.
        stage: String,
        /// The noun the parameter wants.
        artifact: String,
    },
    /// A local file, as written.
    File(String),
    /// A setting outside the fingerprint.
    Neutral,
}

/// Every marker with its path (`dataset`, `models[1]`, `eval.dataset`), in the order of the parameters.
pub fn markers(params: &Value) -> Vec<(String, Marker)> {
    let mut found = Vec::new();
    collect(params, &mut String::new(), &mut found);
    found
}

/// The producer's names of every marker of an edge, in the order of the parameters.
pub(super) fn producers(params: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![params];
    while let Some(value) = open.pop() {
        match (marker(value), value) {
            (Some(Marker::Stage { stage, .. }), _) => found.push(stage),
            (None, Value::Object(map)) => open.extend(map.values().rev()),
            (None, Value::Array(items)) => open.extend(items.iter().rev()),
            _ => {}
        }
    }
    found
}

/// The marker that `value` is, if it is one.
pub(crate) fn marker(value: &Value) -> Option<Marker> {
    let map = value.as_object()?;
    if let Some(Value::String(stage)) = map.get(STAGE_KEY) {
        let artifact = map
            .get(ARTIFACT_KEY)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        return Some(Marker::Stage {
            stage: stage.clone(),
            artifact,
        });
    }
    if let Some(Value::String(path)) = map.get(FILE_KEY) {
        return Some(Marker::File(path.clone()));
    }
    map.contains_key(NEUTRAL_KEY).then_some(Marker::Neutral)
}

fn collect(value: &Value, path: &mut String, found: &mut Vec<(String, Marker)>) {
    if let Some(marker) = marker(value) {
        found.push((path.clone(), marker));
        return;
    }
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                below(path, key, |path| collect(value, path, found));
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let above = path.len();
                let _ = write!(path, "[{index}]");
                collect(item, path, found);
                path.truncate(above);
            }
        }
        _ => {}
    }
}

/// Calls a function with the path to a key below `path`.
pub(super) fn below<T>(path: &mut String, key: &str, then: impl FnOnce(&mut String) -> T) -> T {
    let above = path.len();
    if above > 0 {
        path.push('.');
    }
    path.push_str(key);
    let result = then(path);
    path.truncate(above);
    result
}

/// `path.key`, or `key` at the top.
pub(crate) fn child(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}
