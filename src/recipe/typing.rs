//! Types values and tells every mistake in them: what does not fit is taken out, and the rest is read again.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value};
use serde_yaml::Mapping;

use crate::engine::{AnyStage, Fault, Kind, ParseError};

use super::draft::Draft;
use super::hints;
use super::parameters::Parameter;
use super::sentence;
use super::source_map::{PathStep, RecipePath, child, display, keys, parse};
use super::words::allowed;

/// How often a stage's parameters are read for the mistakes inside of them, and the most broken rules that are looked at one by one.
const MOST_READINGS: usize = 100;

/// A stage's parameters, as far as they could be read.
pub(crate) struct Typed {
    /// The stage. Where the recipe lacks parameters that it needs, others stand in their places.
    pub(crate) stage: Arc<dyn AnyStage>,
    /// The parameters that are in the recipe and fit.
    given: Map<String, Value>,
    /// Parameters that the recipe lacks or that don't fit, with something in their places.
    pub(crate) stand_ins: BTreeSet<String>,
    /// Whether all that the recipe gives is in the stage, and all that the stage needs is given.
    clean: bool,
}

/// Reads the parameters of a stage.
pub(crate) fn parameters(
    draft: &mut Draft,
    kind: &'static Kind,
    path: &RecipePath,
    params: &Mapping,
) -> Option<Typed> {
    let own = draft.parameters(kind);
    let mut dropped = BTreeSet::new();
    let mut unknown = BTreeSet::new();
    for key in params.keys().filter_map(serde_yaml::Value::as_str) {
        if !own.has(key) {
            let message = format!("unknown parameter `{key}` of `{}`", kind.name);
            let advice = draft.gives_advice();
            let hint = advice.then(|| hints::parameter(key, kind, draft.kinds));
            draft.key_error(&child(path, key), message, hint);
            unknown.insert(key.to_owned());
        } else if !draft.broken.is_empty() && draft.is_broken(&child(path, key)) {
            dropped.insert(keys(&[key]));
        }
    }
    let mut missing = Vec::new();
    for parameter in &own.0 {
        if parameter.required && !params.contains_key(&parameter.name) {
            if draft.broken.contains(&child(path, &parameter.name)) {
                // It was to be implied, and why it is not was told there.
                dropped.insert(keys(&[&parameter.name]));
                continue;
            }
            missing.push(parameter);
            dropped.insert(keys(&[&parameter.name]));
        }
    }
    if !missing.is_empty() {
        let names = missing.iter().map(|parameter| parameter.name.as_str());
        let message = format!("`{}` needs {}", kind.name, hints::list(names));
        let hint = match missing[..] {
            [one] => Some(one.summary())
                .filter(|first| !first.is_empty())
                .map(|first| format!("`{}`: {first}", one.name)),
            _ => Some(format!(
                "`pipeline kinds {}` says what each of them is",
                kind.name
            )),
        };
        draft.key_error(path, message, hint);
    }
    let mut given = Map::new();
    for (key, value) in params {
        let Some(key) = key.as_str() else {
            continue;
        };
        match json(value, || child(path, key)) {
            Ok(value) => _ = given.insert(key.to_owned(), value),
            Err(at) => {
                not_finite(draft, path, kind.name, &at);
                dropped.insert(keys(&[key]));
            }
        }
    }
    if !(dropped.is_empty() && unknown.is_empty()) {
        given.retain(|key, _| !dropped.contains(&keys(&[key])) && !unknown.contains(key));
    }
    let says = |path: &[PathStep]| allowed(kind, path);
    let read = read_all(
        draft,
        (kind.name, path),
        &mut given,
        &mut dropped,
        &says,
        kind.parse,
    );
    let clean = dropped.is_empty() && !draft.is_broken(path);
    let mut stand_ins = BTreeSet::new();
    if let Some(stage) = read {
        return Some(Typed {
            stage,
            given,
            stand_ins,
            clean,
        });
    }
    let mut values = given.clone();
    for parameter in own.0.iter().filter(|parameter| parameter.required) {
        if !values.contains_key(&parameter.name) {
            values.insert(parameter.name.clone(), stand_in(parameter));
            stand_ins.insert(parameter.name.clone());
        }
    }
    let stage = (kind.parse)(values.into()).ok()?;
    Some(Typed {
        stage,
        given,
        stand_ins,
        clean: false,
    })
}

impl Typed {
    /// Tells what breaks a rule of the stage. Where something could not be read, only what would break it whatever that is: a
    /// default in its place must not look like a mistake. Nothing is told of the parameters in `known`.
    pub(crate) fn check(
        &self,
        draft: &mut Draft,
        kind: &'static Kind,
        path: &RecipePath,
        known: &[RecipePath],
    ) {
        for (number, problem) in self.stage.check().into_iter().enumerate() {
            let at = below(path, &problem.parameter);
            if known.contains(&at) {
                continue;
            }
            let Some(PathStep::Key(first)) = at.get(path.len()) else {
                continue;
            };
            let mut alone = || {
                let first = first.as_str();
                self.given.contains_key(first)
                    && self.checks_alone(draft, kind, first, &problem.message)
            };
            if !self.clean && (number >= MOST_READINGS || !alone()) {
                continue;
            }
            let message = format!(
                "`{}` of `{}`: {}",
                problem.parameter, kind.name, problem.message
            );
            draft.value_error(&at, message, problem.hint);
        }
    }

    /// Whether a parameter breaks the rule without any other.
    fn checks_alone(
        &self,
        draft: &mut Draft,
        kind: &'static Kind,
        parameter: &str,
        told: &str,
    ) -> bool {
        let own = draft.parameters(kind);
        let mut values = Map::new();
        for needed in own.0.iter().filter(|needed| needed.required) {
            let value = self.given.get(&needed.name).cloned();
            let value = value.unwrap_or_else(|| stand_in(needed));
            values.insert(needed.name.clone(), value);
        }
        if let Some(value) = self.given.get(parameter) {
            values.insert(parameter.to_owned(), value.clone());
        }
        let Ok(stage) = (kind.parse)(values.into()) else {
            return false;
        };
        let mut problems = stage.check().into_iter();
        problems.any(|problem| problem.parameter.starts_with(parameter) && problem.message == told)
    }
}

/// Something of a parameter's type.
fn stand_in(parameter: &Parameter) -> Value {
    let is_number = |kind: &Value| kind == "integer" || kind == "number";
    match parameter.schema.get("type") {
        Some(kind) if is_number(kind) => 1.into(),
        Some(Value::Array(kinds)) if kinds.iter().any(is_number) => 1.into(),
        _ => "stand_in".into(),
    }
}

/// Reads `values`, telling each mistake. `owner` is the name in messages and the path in the recipe; `dropped` are the paths below it
/// that were taken out, `allowed` says in words what may stand at such a path. Nothing when something that is needed was taken out.
pub(crate) fn read_all<T>(
    draft: &mut Draft,
    owner: (&str, &RecipePath),
    values: &mut Map<String, Value>,
    dropped: &mut BTreeSet<RecipePath>,
    allowed: &dyn Fn(&[PathStep]) -> Option<String>,
    read: impl Fn(Value) -> Result<T, ParseError>,
) -> Option<T> {
    let (name, path) = owner;
    loop {
        let error = match read(Value::Object(values.clone())) {
            Ok(read) => return Some(read),
            Err(error) => error,
        };
        let at = below(path, &error.path);
        let parameter: RecipePath = at.get(path.len()..).unwrap_or_default().to_vec();
        let told = match &error.fault {
            Fault::Missing(missing) => dropped.contains(&child(&parameter, missing)),
            _ => false,
        };
        if !told {
            let words = || allowed(&parameter);
            let sentence = sentence::describe(&display(&parameter), name, &error.fault, &words);
            if matches!(error.fault, Fault::Unknown { .. }) {
                draft.key_error(&at, sentence.message, sentence.hint);
            } else {
                draft.value_error(&at, sentence.message, sentence.hint);
            }
        }
        // Each round reads everything anew: of many mistakes the later ones are told by parameters.
        let depth = if dropped.len() < MOST_READINGS {
            parameter.len()
        } else {
            parameter.len().min(1)
        };
        dropped.insert(take_out(values, parameter.get(..depth)?)?);
    }
}

/// Removes the value at a path, or the list that it is an element of. Gives the path of what was removed.
fn take_out(values: &mut Map<String, Value>, path: &[PathStep]) -> Option<RecipePath> {
    let names: Vec<&str> = path
        .iter()
        .map_while(|step| match step {
            PathStep::Key(key) => Some(key.as_str()),
            PathStep::Index(_) => None,
        })
        .collect();
    let (last, above) = names.split_last()?;
    let mut map = values;
    for name in above {
        map = map.get_mut(*name)?.as_object_mut()?;
    }
    map.remove(*last)?;
    Some(keys(&names))
}

/// The path of a parameter as a stage names it.
pub(crate) fn below(stage: &RecipePath, parameter: &str) -> RecipePath {
    let mut path = stage.clone();
    match parse(parameter) {
        Ok(steps) => path.extend(steps),
        Err(_) if parameter.is_empty() || parameter == "." => {}
        Err(_) => path.extend(keys(&[parameter])),
    }
    path
}

/// A value as JSON, which has no numbers but finite ones: where there is another, the error is its path below `at`.
pub(crate) fn json(
    value: &serde_yaml::Value,
    at: impl FnOnce() -> RecipePath,
) -> Result<Value, RecipePath> {
    finite(value).map_err(|way| {
        let mut path = at();
        path.extend(way.into_iter().rev());
        path
    })
}

/// [`json`]; the error is the way back from a number that is not finite.
fn finite(value: &serde_yaml::Value) -> Result<Value, RecipePath> {
    use serde_yaml::Value as Yaml;

    let step = |mut way: RecipePath, step| {
        way.push(step);
        way
    };
    Ok(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(value) => (*value).into(),
        Yaml::String(text) => text.clone().into(),
        Yaml::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), ..) => number.into(),
            (_, Some(number), _) => number.into(),
            (.., Some(number)) if number.is_finite() => number.into(),
            _ => return Err(RecipePath::new()),
        },
        Yaml::Sequence(values) => {
            let values = values.iter().enumerate();
            let values = values.map(|(index, value)| {
                finite(value).map_err(|way| step(way, PathStep::Index(index)))
            });
            Value::Array(values.collect::<Result<_, _>>()?)
        }
        Yaml::Mapping(map) => {
            // Reading refuses keys that are no texts, and tags.
            let entries = map
                .iter()
                .filter_map(|(key, value)| Some((key.as_str()?, value)));
            let entries = entries.map(|(key, value)| {
                let value = finite(value);
                let value = value.map_err(|way| step(way, PathStep::Key(key.to_owned())))?;
                Ok::<_, RecipePath>((key.to_owned(), value))
            });
            Value::Object(entries.collect::<Result<_, _>>()?)
        }
        Yaml::Tagged(_) => return Err(RecipePath::new()),
    })
}

/// Says of a number that it is not finite.
pub(crate) fn not_finite(draft: &mut Draft, stage: &RecipePath, kind: &str, at: &RecipePath) {
    let parameter = display(at.get(stage.len()..).unwrap_or_default());
    let message = format!("`{parameter}` of `{kind}` must be a finite number");
    draft.value_error(at, message, None);
}
