//! Substitutes vars (`${name}`) in defaults, stages and outputs, with their types. The inserted values are not substituted again.

use serde_yaml::Value;

use super::draft::Draft;
use super::hints;
use super::pieces::Vars;
use super::sentence::{noun, scalar};
use super::source_map::{PathStep, RecipePath, child, keys};

/// What `${name}` means at a place: a value of the matrix around it, or a var.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'v> {
    pub(crate) vars: &'v Vars,
    /// Where the vars are in the source map.
    pub(crate) at: &'v RecipePath,
    /// The values of the matrix by axis.
    pub(crate) axes: &'v Vars,
}

impl Scope<'_> {
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.axes.get(name).or_else(|| self.vars.get(name))
    }

    /// Notes that a name is used.
    pub(crate) fn uses(&self, draft: &mut Draft, name: &str) {
        // Those of an included recipe are not this one's.
        if self.at.len() == 1 && !self.axes.contains_key(name) {
            draft.used_vars.insert(name.to_owned());
        }
    }

    /// Whether the value of a name is known to be wrong.
    pub(crate) fn is_broken(&self, draft: &Draft, name: &str) -> bool {
        !self.axes.contains_key(name)
            && !draft.broken.is_empty()
            && draft.broken.contains(&child(self.at, name))
    }

    /// What is wrong with a name that there is not, and what to do. `written` is how another name is written in its place, with `_` for it.
    pub(crate) fn unknown(
        &self,
        name: &str,
        written: &str,
        otherwise: &str,
        advice: bool,
    ) -> (String, String) {
        let nearest = advice.then(|| hints::nearest(name, self.names()));
        let hint = match nearest.flatten() {
            Some(known) => format!("did you mean `{}`?", written.replace('_', known)),
            None if self.names().next().is_none() => {
                format!("the recipe has no vars; {otherwise}")
            }
            None => format!("the vars are {}; {otherwise}", hints::list(self.names())),
        };
        (format!("there is no var `{name}`"), hint)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.axes.keys().chain(self.vars.keys());
        names.map(String::as_str)
    }

    /// A text with its names replaced; `None` where that is not possible, which [`walk`] tells.
    pub(crate) fn text(&self, text: &str) -> Option<String> {
        let mut made = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                made.push_str(before);
                made.push_str("${");
                rest = after;
                continue;
            }
            made.push_str(before);
            let (name, after) = after.split_once('}')?;
            made.push_str(&scalar(self.get(name)?)?);
            rest = after;
        }
        made.push_str(rest);
        Some(made)
    }
}

/// Reads the vars; a mistake in one is told.
pub(crate) fn read(draft: &mut Draft, recipe: &Value) -> Vars {
    let mut vars = Vars::new();
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
    vars
}

/// Replaces every `${name}` in some sections of a recipe. A text that consists only of `${name}` becomes the var's value, whatever its
/// type; inside a longer text the value must be a scalar. `$${` stands for `${`. Below `columns`, a name that is not a var is left
/// unchanged.
pub(crate) fn substitute(draft: &mut Draft, vars: &Vars, recipe: &mut Value, sections: &[&str]) {
    let (axes, at) = (Vars::new(), keys(&["vars"]));
    let scope = Scope {
        vars,
        at: &at,
        axes: &axes,
    };
    for section in sections {
        if let Some(value) = recipe.get_mut(*section) {
            walk(draft, scope, &mut keys(&[section]), value);
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

/// Whether a var or an axis may be called so.
pub(crate) fn is_name(name: &str) -> bool {
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

/// Replaces every `${name}` in a value.
pub(crate) fn walk(draft: &mut Draft, scope: Scope<'_>, path: &mut RecipePath, value: &mut Value) {
    if !has_dollar(value) {
        return;
    }
    replace_in(draft, scope, path, value);
}

fn replace_in(draft: &mut Draft, scope: Scope<'_>, path: &mut RecipePath, value: &mut Value) {
    match value {
        Value::String(text) if text.contains("${") => match replace(draft, scope, path, text) {
            Some(replaced) => *value = replaced,
            None => _ = draft.broken.insert(path.clone()),
        },
        Value::Sequence(list) => {
            for (index, value) in list.iter_mut().enumerate() {
                path.push(PathStep::Index(index));
                replace_in(draft, scope, path, value);
                path.pop();
            }
        }
        Value::Mapping(map) => {
            for (key, value) in map.iter_mut() {
                path.push(PathStep::Key(key.as_str().unwrap_or_default().to_owned()));
                replace_in(draft, scope, path, value);
                path.pop();
            }
        }
        _ => {}
    }
}

/// The text with its vars substituted; `None` if that is not possible.
fn replace(draft: &mut Draft, scope: Scope<'_>, path: &RecipePath, text: &str) -> Option<Value> {
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
        let Some(value) = scope.get(name) else {
            if in_columns(path) {
                // In `columns`, `${name}` may also refer to a column of a row.
                made.push_str("${");
                made.push_str(name);
                made.push('}');
                rest = after;
                continue;
            }
            let (message, hint) = scope.unknown(name, "${_}", escape, draft.gives_advice());
            draft.value_error(path, message, Some(hint));
            return None;
        };
        scope.uses(draft, name);
        if scope.is_broken(draft, name) {
            return None;
        }
        if !scope.axes.contains_key(name)
            && let Some(origin) = draft.origin(&child(scope.at, name)).cloned()
        {
            let written = draft.source_map.written(path);
            draft.through_vars.insert(written, origin);
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
