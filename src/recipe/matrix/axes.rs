//! The axes of a matrix, their values, and the names of the stages that they make.

use serde_yaml::Value;

use crate::recipe::combination::{AxisValue, Combination};
use crate::recipe::draft::Draft;
use crate::recipe::hints;
use crate::recipe::pieces::Vars;
use crate::recipe::sentence::{noun, scalar};
use crate::recipe::source_map::{PathStep, RecipePath, child};
use crate::recipe::vars::is_name;

/// The longest label of a value and the longest name of a stage that a matrix makes, in bytes: outputs and logs are called so, and file
/// systems take 255.
const LONGEST_LABEL: usize = 64;
pub(super) const LONGEST_NAME: usize = 200;

/// Reads the matrix at `path`, whose vars are substituted: the values of each axis. Mistakes are told.
pub(super) fn read(
    draft: &mut Draft,
    vars: &Vars,
    path: &RecipePath,
    matrix: &Value,
) -> Option<Vec<Vec<AxisValue>>> {
    let example = || Some("as in `matrix: { beta: [0.05, 0.1], seed: [1, 2] }`".to_owned());
    let map = match matrix {
        Value::Mapping(map) if !map.is_empty() => map,
        other => {
            let message = match other {
                Value::Mapping(_) | Value::Null => "the matrix has no axes".to_owned(),
                other => format!("a matrix must be a map, not {}", noun(other)),
            };
            draft.value_error(path, message, example());
            return None;
        }
    };
    let mut axes = Vec::new();
    let mut right = true;
    for (name, values) in map {
        let Some(name) = name.as_str() else { continue };
        let at = child(path, name);
        if !is_name(name) {
            let message = format!("`{name}` is not a valid name of an axis");
            let hint = "a name consists of letters, digits and `_`, and begins with a letter";
            draft.key_error(&at, message, Some(hint.to_owned()));
            right = false;
        } else if vars.contains_key(name) {
            let message = format!("`{name}` is a var and an axis");
            let hint = format!("`${{{name}}}` must mean one of them; rename the other");
            draft.key_error(&at, message, Some(hint));
            right = false;
        } else {
            match read_axis(draft, name, &at, values) {
                Some(values) => axes.push(values),
                None => right = false,
            }
        }
    }
    right.then_some(axes)
}

fn read_axis(
    draft: &mut Draft,
    axis: &str,
    path: &RecipePath,
    values: &Value,
) -> Option<Vec<AxisValue>> {
    if draft.is_broken(path) {
        return None;
    }
    let given: Vec<(RecipePath, Option<String>, &Value)> = match values {
        Value::Sequence(list) => {
            let list = list.iter().enumerate().map(|(index, value)| {
                let mut at = path.clone();
                at.push(PathStep::Index(index));
                (at, scalar(value), value)
            });
            list.collect()
        }
        Value::Mapping(map) => {
            let map = map.iter().filter_map(|(name, value)| {
                let name = name.as_str()?;
                Some((child(path, name), Some(name.to_owned()), value))
            });
            map.collect()
        }
        other => {
            let message = format!(
                "the values of the axis `{axis}` must be a list, not {}",
                noun(other)
            );
            let hint = "a list of values, or a map from names to values".to_owned();
            draft.value_error(path, message, Some(hint));
            return None;
        }
    };
    if given.is_empty() {
        let message = format!("the axis `{axis}` has no values");
        draft.value_error(path, message, None);
        return None;
    }
    let naming = || {
        Some(format!(
            "give the values names: `{axis}: {{ small: .., large: .. }}`"
        ))
    };
    let mut read: Vec<AxisValue> = Vec::with_capacity(given.len());
    let mut right = true;
    for (at, text, value) in given {
        let label = text.as_deref().map(label).unwrap_or_default();
        let message = if text.is_none() {
            format!("a value of the axis `{axis}` is {}", noun(value))
        } else if label.is_empty() {
            format!("a value of the axis `{axis}` is empty")
        } else if label.len() > LONGEST_LABEL {
            format!("a value of the axis `{axis}` has more than {LONGEST_LABEL} bytes")
        } else if read.iter().any(|other| other.label == label) {
            format!("two values of the axis `{axis}` would both be called `{label}`")
        } else {
            read.push(AxisValue {
                axis: axis.to_owned(),
                label,
                value: value.clone(),
            });
            continue;
        };
        draft.value_error(&at, message, naming());
        right = false;
    }
    right.then_some(read)
}

/// A text as a part of a name that stages, folders and command lines can have.
fn label(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let label = text.trim().chars();
    label.map(|c| if plain(c) { c } else { '_' }).collect()
}

/// The name of what `stage` makes for a combination, as in `tuned[beta=0.1,seed=2]`.
pub(super) fn name(stage: &str, combination: &[AxisValue]) -> String {
    if combination.is_empty() {
        return stage.to_owned();
    }
    format!("{stage}[{}]", labels(combination))
}

/// The labels of a combination, as in `beta=0.1,seed=2`.
pub(super) fn labels(combination: &[AxisValue]) -> String {
    let parts = combination
        .iter()
        .map(|value| format!("{}={}", value.axis, value.label));
    parts.collect::<Vec<_>>().join(",")
}

/// A name of stages: that of the recipe, and the values that are picked.
pub(crate) struct Picked<'t> {
    pub(crate) stage: &'t str,
    pub(crate) picks: Vec<(&'t str, &'t str)>,
}

/// Reads a name such as `tuned[beta=0.1]`.
pub(crate) fn picked(text: &str) -> Option<Picked<'_>> {
    let Some((stage, rest)) = text.trim().split_once('[') else {
        let stage = text.trim();
        let picks = Vec::new();
        return Some(Picked { stage, picks });
    };
    let inside = rest.strip_suffix(']')?;
    let pairs = inside.split(',').map(|pair| {
        let (axis, value) = pair.split_once('=')?;
        Some((axis.trim(), value.trim()))
    });
    Some(Picked {
        stage: stage.trim(),
        picks: pairs.collect::<Option<_>>()?,
    })
}

impl Picked<'_> {
    /// Whether a combination has the values that are picked.
    pub(crate) fn fits(&self, combination: &[AxisValue]) -> bool {
        self.picks.iter().all(|(axis, wanted)| {
            let mut values = combination.iter();
            values.any(|value| value.axis == *axis && is_called(value, wanted))
        })
    }

    /// Whether the axis is picked.
    pub(super) fn has(&self, axis: &str) -> bool {
        self.picks.iter().any(|(picked, _)| *picked == axis)
    }

    /// What is wrong with the picks, where they fit none of these combinations.
    pub(super) fn wrong(&self, combinations: &[&Combination]) -> (String, String) {
        let stage = self.stage;
        let mut axes: Vec<&str> = Vec::new();
        for value in combinations.iter().flat_map(|all| all.iter()) {
            if !axes.contains(&value.axis.as_str()) {
                axes.push(&value.axis);
            }
        }
        if axes.is_empty() {
            let message = format!("the stage `{stage}` has no matrix to pick from");
            return (message, format!("write `{stage}`"));
        }
        for (axis, wanted) in &self.picks {
            if !axes.contains(axis) {
                let message = format!("the matrix of `{stage}` has no axis `{axis}`");
                return (message, format!("its axes are {}", hints::list(axes)));
            }
            let mut labels: Vec<&str> = Vec::new();
            for value in combinations.iter().flat_map(|all| all.iter()) {
                if value.axis == *axis && !labels.contains(&value.label.as_str()) {
                    labels.push(&value.label);
                }
            }
            let known = |label: &&str| {
                let mut all = combinations.iter().flat_map(|all| all.iter());
                all.any(|value| value.label == **label && is_called(value, wanted))
            };
            if !labels.iter().any(known) {
                let message = format!("`{axis}` of `{stage}` is never {wanted}");
                let hint = format!("`{axis}` is {}", hints::either(labels));
                return (message, hint);
            }
        }
        let message = format!("no stage of `{stage}` has all these values");
        (message, "pick fewer".to_owned())
    }
}

/// Whether a value is meant by a text: its label, or the same number in another spelling.
fn is_called(value: &AxisValue, wanted: &str) -> bool {
    if value.label == wanted || value.label == label(wanted) {
        return true;
    }
    let numbers = value.label.parse::<f64>().ok().zip(wanted.parse().ok());
    numbers.is_some_and(|(one, other): (f64, f64)| one.total_cmp(&other).is_eq())
}
