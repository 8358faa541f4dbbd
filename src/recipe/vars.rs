//! Substitutes vars (`${name}`) in defaults, stages and outputs, with their types. The inserted values are not substituted again.

use std::collections::BTreeMap;

use serde_yaml::Value;

use super::draft::Draft;
use super::hints;
use super::sentence::{noun, scalar};
use super::source_map::{PathStep, RecipePath, keys};

/// Replaces every `${name}`. A text that consists only of `${name}` becomes the var's value, whatever its type; inside a longer text
/// the value must be a scalar. `$${` stands for `${`. Below `columns`, a name that is not a var is left unchanged.
pub(crate) fn substitute(draft: &mut Draft, recipe: &mut Value) {
    let mut vars = BTreeMap::new();
    for (name, path, value) in draft.section(recipe, "vars") {
        if !is_name(&name) {
            let message = format!("`{name}` is not a valid name of a var");
            let hint =
                "a name consists of letters, digits and `_`, and begins with a letter".to_owned();
            draft.key_error(&path, message, Some(hint));
        } else if let Some(inner) = reference_in(value) {
            let message = format!("the var `{name}` refers to `{inner}`");
            let hint = "vars are substituted once, so they can not refer to other vars; `$${` stands for `${`";
            draft.value_error(&path, message, Some(hint.to_owned()));
        }
        vars.insert(name, value.clone());
    }
    for section in ["defaults", "stages", "outputs", "publish"] {
        if let Some(value) = recipe.get_mut(section).filter(|value| has_dollar(value)) {
            walk(draft, &vars, &mut keys(&[section]), value);
        }
    }
}

/// Whether a value may contain a var.
fn has_dollar(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains("${"),
        Value::Sequence(list) => list.iter().any(has_dollar),
        Value::Mapping(map) => map.values().any(has_dollar),
        _ => false,
    }
}

fn is_name(name: &str) -> bool {
    let mut characters = name.chars();
    characters
        .next()
        .is_some_and(|first| first.is_alphabetic() || first == '_')
        && characters.all(|c| c.is_alphanumeric() || c == '_')
}

fn reference_in(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => {
            let start = text.replace("$${", "").find("${")?;
            let text = text.replace("$${", "");
            let name = text.get(start..)?.split_inclusive('}').next()?;
            Some(name.to_owned())
        }
        Value::Sequence(list) => list.iter().find_map(reference_in),
        Value::Mapping(map) => map.values().find_map(reference_in),
        _ => None,
    }
}

fn walk(
    draft: &mut Draft,
    vars: &BTreeMap<String, Value>,
    path: &mut RecipePath,
    value: &mut Value,
) {
    match value {
        Value::String(text) if text.contains("${") => match replace(draft, vars, path, text) {
            Some(replaced) => *value = replaced,
            None => _ = draft.broken.insert(path.clone()),
        },
        Value::Sequence(list) => {
            for (index, value) in list.iter_mut().enumerate() {
                path.push(PathStep::Index(index));
                walk(draft, vars, path, value);
                path.pop();
            }
        }
        Value::Mapping(map) => {
            for (key, value) in map.iter_mut() {
                path.push(PathStep::Key(key.as_str().unwrap_or_default().to_owned()));
                walk(draft, vars, path, value);
                path.pop();
            }
        }
        _ => {}
    }
}

/// The text with its vars substituted; `None` if that is not possible.
fn replace(
    draft: &mut Draft,
    vars: &BTreeMap<String, Value>,
    path: &RecipePath,
    text: &str,
) -> Option<Value> {
    let mut made = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let before = rest.get(..start)?;
        let after = rest.get(start + 2..)?;
        if let Some(before) = before.strip_suffix('$') {
            made.push_str(before);
            made.push_str("${");
            rest = after;
            continue;
        }
        made.push_str(before);
        let escape = "`$${` stands for `${`";
        let Some((name, after)) = after.split_once('}') else {
            let message = "`${` has no `}`".to_owned();
            draft.value_error(path, message, Some(escape.to_owned()));
            return None;
        };
        let Some(value) = vars.get(name) else {
            if in_columns(path) {
                // In `columns`, `${name}` may also refer to a column of a row.
                made.push_str("${");
                made.push_str(name);
                made.push('}');
                rest = after;
                continue;
            }
            let nearest = draft
                .gives_advice()
                .then(|| hints::nearest(name, vars.keys().map(String::as_str)));
            let hint = match nearest.flatten() {
                Some(known) => format!("did you mean `${{{known}}}`?"),
                None if vars.is_empty() => {
                    format!("the recipe has no vars; {escape}")
                }
                None => format!(
                    "the vars are {}; {escape}",
                    hints::list(vars.keys().map(String::as_str))
                ),
            };
            draft.value_error(path, format!("there is no var `{name}`"), Some(hint));
            return None;
        };
        if let Some(origin) = draft.set.get(&keys(&["vars", name])).cloned() {
            draft.through_vars.insert(path.clone(), origin);
        }
        let too_much = |draft: &mut Draft, message| {
            let hint = "keep data and long texts in files of their own".to_owned();
            draft.value_error(path, message, Some(hint));
        };
        if before.is_empty() && after.is_empty() && made.is_empty() {
            if let Err(message) = draft.spend(value) {
                too_much(draft, message);
                return None;
            }
            return Some(unescape(value));
        }
        let Some(value) = scalar(value) else {
            let message = format!(
                "the var `{name}` is {}, and can not stand in a text",
                noun(value)
            );
            let hint = format!("`\"${{{name}}}\"` alone takes any value");
            draft.value_error(path, message, Some(hint));
            return None;
        };
        if let Err(message) = draft.spend_on(0, value.len()) {
            too_much(draft, message);
            return None;
        }
        made.push_str(&value.replace("$${", "${"));
        rest = after;
    }
    made.push_str(rest);
    Some(made.into())
}

/// Whether a path leads into a `columns` parameter, which maps columns of a file to ours.
fn in_columns(path: &RecipePath) -> bool {
    path.iter()
        .any(|step| matches!(step, PathStep::Key(key) if key == "columns"))
}

fn unescape(value: &Value) -> Value {
    match value {
        Value::String(text) => text.replace("$${", "${").into(),
        other => other.clone(),
    }
}
