//! `when:` beside a stage's kind: whether the stage is part of the recipe, by an expression over vars and the values of its matrix.
//!
//! It is known before anything runs: no result can be asked. The language is minijinja's expressions without filters, tests and functions.

use minijinja::{Environment, UndefinedBehavior};
use serde_yaml::Value;

use super::draft::Draft;
use super::sentence::{noun, scalar};
use super::source_map::RecipePath;
use super::vars::Scope;

/// The key beside the kind.
pub(crate) const WHEN: &str = "when";
/// The longest expression, in bytes, and the most steps that one may take.
const LONGEST: usize = 4096;
const FUEL: u64 = 10_000;

/// Whether the expression at `path` is true. Nothing where that can't be told; why not is told as a mistake.
pub(crate) fn holds(
    draft: &mut Draft,
    scope: Scope<'_>,
    path: &RecipePath,
    when: &Value,
) -> Option<bool> {
    let example = || Some("as in `when: beta > 0.1 and not smoke`".to_owned());
    let text = match when {
        Value::Bool(holds) => return Some(*holds),
        Value::String(text) => text,
        other => {
            let message = format!(
                "`when` must be an expression or `true` or `false`, not {}",
                noun(other)
            );
            draft.value_error(path, message, example());
            return None;
        }
    };
    if text.len() > LONGEST {
        let message = format!("`when` has {} bytes; the limit is {LONGEST}", text.len());
        draft.value_error(path, message, None);
        return None;
    }
    let plain = names_alone(text);
    let mut environment = Environment::empty();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    let expression = match environment.compile_expression(&plain) {
        Ok(expression) => expression,
        Err(error) => {
            let why = error.detail().unwrap_or("it is no expression");
            let message = format!("`when` can't be read: {why}");
            draft.value_error(path, message, example());
            return None;
        }
    };
    let mut names: Vec<String> = expression.undeclared_variables(false).into_iter().collect();
    names.sort_unstable();
    let mut values = Vec::new();
    for name in &names {
        let Some(value) = scope.get(name) else {
            let others = "names in `when` are those of vars and axes";
            let (message, hint) = scope.unknown(name, "_", others, draft.gives_advice());
            draft.value_error(path, message, Some(hint));
            return None;
        };
        scope.uses(draft, name);
        if scope.is_broken(draft, name) {
            return None;
        }
        values.push((
            name.as_str(),
            minijinja::Value::from(minijinja::value::Serde(value.clone())),
        ));
    }
    match expression.eval(minijinja::Value::from_pairs(values)) {
        Ok(value) if value.kind() == minijinja::value::ValueKind::Bool => Some(value.is_true()),
        Ok(value) => {
            let message = format!("`when` must be true or false, and is {}", kind_of(&value));
            let compared = names.first().filter(|_| names.len() == 1);
            let hint = match (compared, scope.get(&plain)) {
                (Some(name), Some(Value::String(value))) => {
                    Some(format!("compare it, as in `{name} == \"{value}\"`"))
                }
                (Some(name), Some(value)) => {
                    scalar(value).map(|value| format!("compare it, as in `{name} == {value}`"))
                }
                _ => example(),
            };
            draft.value_error(path, message, hint);
            None
        }
        Err(error) => {
            let why = error
                .detail()
                .map_or_else(|| error.kind().to_string(), str::to_owned);
            draft.value_error(path, format!("`when` can't be computed: {why}"), None);
            None
        }
    }
}

/// The expression for people.
pub(crate) fn shown(when: &Value) -> String {
    scalar(when).unwrap_or_default()
}

/// An expression in which `${name}` is written as the name alone, which is the same.
fn names_alone(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            break;
        };
        plain.push_str(before);
        plain.push_str(name.trim());
        rest = after;
    }
    plain.push_str(rest);
    plain.trim().to_owned()
}

fn kind_of(value: &minijinja::Value) -> &'static str {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::Number => "a number",
        ValueKind::String => "a text",
        ValueKind::Seq | ValueKind::Iterable => "a list",
        ValueKind::Map => "a map",
        _ => "nothing",
    }
}
