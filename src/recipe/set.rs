//! `--set path=value` and the recipe's profiles, applied to the YAML value.

use serde_yaml::{Mapping, Value};

use super::draft::{Draft, TOP};
use super::hints;
use super::pieces::{Change, Origin};
use super::read::read;
use super::sentence::noun;
use super::source_map::{PathStep, RecipePath, child, display, keys, parse};
use super::stage::is_beside;
use super::{Override, PROFILE};

/// The key with changes to the recipe that this one extends.
pub(crate) const OVERRIDES: &str = "overrides";

/// Applies the overrides in their order.
pub(crate) fn apply(draft: &mut Draft, recipe: &mut Value, overrides: &[Override]) {
    check_profiles(draft, recipe);
    for Override { path, value } in overrides {
        if path == PROFILE {
            apply_profile(draft, recipe, value);
            continue;
        }
        let origin = format!("--set {path}={value}");
        if let Err((message, hint)) = apply_one(draft, recipe, path, value, &origin) {
            draft.push(message, None, Some(origin), hint);
        }
    }
}

/// Applies what an including recipe changes.
pub(crate) fn apply_changes(draft: &mut Draft, recipe: &mut Value, changes: Vec<Change>) {
    for change in changes {
        let text = change.origin.text.clone();
        if let Err((message, hint)) = apply_change(draft, recipe, change) {
            draft.push(message, None, Some(text), hint);
        }
    }
}

/// Tells what can't be set in any profile, whether it is used or not.
fn check_profiles(draft: &mut Draft, recipe: &Value) {
    for (_, path, values) in draft.section(recipe, "profiles") {
        let Value::Mapping(values) = values else {
            let message = format!("a profile must be a map, not {}", noun(values));
            let hint =
                "from paths to values, as in `smoke: { stages.tuned.train_orpo.max_steps: 3 }`";
            draft.value_error(&path, message, Some(hint.to_owned()));
            continue;
        };
        check_paths(draft, recipe, &path, values);
    }
}

/// Tells which keys of a map are paths that can't be set.
fn check_paths(draft: &mut Draft, recipe: &Value, path: &RecipePath, values: &Mapping) {
    for key in values.keys().filter_map(Value::as_str) {
        let example = || Some("as in `stages.tuned.train_orpo.beta: 0.2`".to_owned());
        let steps = parse(key).map_err(|message| (message, example()));
        if let Err((message, hint)) = steps.and_then(|steps| check(draft, recipe, &steps)) {
            draft.key_error(&child(path, key), message, hint);
        }
    }
}

/// Puts the values of a profile into the recipe. They keep the places where they are written.
fn apply_profile(draft: &mut Draft, recipe: &mut Value, name: &str) {
    let origin = format!("--profile {name}");
    let profiles = recipe.get("profiles").and_then(Value::as_mapping);
    let Some(profile) = profiles.and_then(|profiles| profiles.get(name)).cloned() else {
        let known = profiles.into_iter().flat_map(Mapping::keys);
        let known: Vec<&str> = known.filter_map(Value::as_str).collect();
        let hint = match hints::nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None if known.is_empty() => "the recipe has no `profiles`".to_owned(),
            None => format!("the recipe has {}", hints::list(known)),
        };
        let message = format!("there is no profile `{name}`");
        return draft.push(message, None, Some(origin), Some(hint));
    };
    if let Value::Mapping(values) = &profile {
        put_written(draft, recipe, &keys(&["profiles", name]), values);
    }
}

/// Puts the values of `overrides` into what a recipe extends, and tells those that can't be.
pub(crate) fn apply_overrides(draft: &mut Draft, recipe: &mut Value, overrides: &Value) {
    let path = keys(&[OVERRIDES]);
    let Value::Mapping(values) = overrides else {
        let message = format!("`{OVERRIDES}` must be a map, not {}", noun(overrides));
        let hint = "from paths to values, as in `overrides: { stages.tuned.train_orpo.beta: 0.2 }`";
        return draft.value_error(&path, message, Some(hint.to_owned()));
    };
    check_paths(draft, recipe, &path, values);
    put_written(draft, recipe, &path, values);
}

/// Puts values by path that are written at `from`.
fn put_written(draft: &mut Draft, recipe: &mut Value, from: &RecipePath, values: &Mapping) {
    for (path, value) in values {
        let Some(path) = path.as_str() else { continue };
        let written = child(from, path);
        // What is wrong with a path is told already.
        let Ok(steps) = parse(path) else { continue };
        if check(draft, recipe, &steps).is_err() {
            continue;
        }
        if let Some((include, steps)) = routed(recipe, &steps) {
            let span = draft.source_map.value(&written);
            let origin = Origin {
                text: span.map_or_else(|| path.to_owned(), |span| draft.place(span)),
                file: Some(span.map_or(draft.file, |span| span.file)),
            };
            let change = Change {
                steps,
                value: value.clone(),
                origin,
                levels: 1,
            };
            draft.routed.entry(include).or_default().push(change);
            continue;
        }
        let put = draft
            .spend(value)
            .and_then(|()| put(recipe, &steps, value.clone()));
        match put {
            Ok(()) => {
                draft.source_map.written_in_place(&steps);
                draft.source_map.written_elsewhere(steps, written);
            }
            Err(message) => draft.key_error(&written, message, None),
        }
    }
}

/// The include that a path leads into, and the path in it.
fn routed(recipe: &Value, steps: &RecipePath) -> Option<(String, RecipePath)> {
    let [
        PathStep::Key(top),
        PathStep::Key(name),
        PathStep::Key(_),
        ..,
    ] = &steps[..]
    else {
        return None;
    };
    let is_stage = || recipe.get("stages").and_then(|all| all.get(name)).is_some();
    recipe.get("include")?.get(name)?;
    (top == "stages" && !is_stage()).then(|| (name.clone(), [&steps[..1], &steps[2..]].concat()))
}

type Refusal = (String, Option<String>);

fn apply_one(
    draft: &mut Draft,
    recipe: &mut Value,
    path: &str,
    value: &str,
    origin: &str,
) -> Result<(), Refusal> {
    let example = || Some("as in `--set stages.tuned.train_orpo.beta=0.2`".to_owned());
    let steps = parse(path).map_err(|message| (message, example()))?;
    let value = match read(&value.into(), draft.file) {
        Ok(read) => match read.mistakes.into_iter().next() {
            None => read.value,
            Some(mistake) => return Err((mistake.message, mistake.hint)),
        },
        // An empty text has no YAML document in it.
        Err(_) if value.trim().is_empty() => Value::Null,
        Err(mistake) => return Err((mistake.message, mistake.hint)),
    };
    let origin = Origin {
        text: origin.to_owned(),
        file: None,
    };
    let change = Change {
        steps,
        value,
        origin,
        levels: 1,
    };
    apply_change(draft, recipe, change)
}

fn apply_change(draft: &mut Draft, recipe: &mut Value, change: Change) -> Result<(), Refusal> {
    let Change {
        steps,
        value,
        origin,
        levels,
    } = change;
    check(draft, recipe, &steps)?;
    draft.spend(&value).map_err(|message| {
        (
            message,
            Some("keep data and long texts in files of their own".to_owned()),
        )
    })?;
    if let Some((include, steps)) = routed(recipe, &steps) {
        let change = Change {
            steps,
            value,
            origin,
            levels,
        };
        draft.routed.entry(include).or_default().push(change);
        return Ok(());
    }
    put(recipe, &steps, value).map_err(|message| (message, None))?;
    // This also replaces what earlier overrides put inside the value.
    draft.set.retain(|path, _| !path.starts_with(&steps));
    draft.source_map.written_in_place(&steps);
    draft.set.insert(steps, origin);
    Ok(())
}

/// Refuses paths that don't exist, except those of new parameters and runner settings of a stage.
fn check(draft: &Draft, recipe: &Value, steps: &RecipePath) -> Result<(), Refusal> {
    let mut names = steps.iter().map(|step| match step {
        PathStep::Key(key) => Some(key.as_str()),
        PathStep::Index(_) => None,
    });
    let top = names.next().flatten().unwrap_or_default();
    if !matches!(
        top,
        "include" | "vars" | "defaults" | "stages" | "outputs" | "publish" | "description"
    ) || steps.len() < 2 && top != "description"
    {
        let hint = match hints::nearest(top, TOP) {
            Some(known) => format!("did you mean `{known}`?"),
            None => "a path begins with `stages.`, `vars.`, `defaults.`, `outputs.` or `publish.`"
                .to_owned(),
        };
        let message = format!("`{}` can not be set", display(steps));
        return Err((message, Some(hint)));
    }
    // What `defaults` may have is told where it is filled in.
    if ["defaults", "outputs", "publish", "description"].contains(&top)
        || routed(recipe, steps).is_some()
    {
        return Ok(());
    }
    let Some(Some(name)) = names.next() else {
        return Err((format!("`{}` can not be set", display(steps)), None));
    };
    let known = recipe.get(top).and_then(Value::as_mapping);
    let known: Vec<&str> = known
        .into_iter()
        .flat_map(Mapping::keys)
        .filter_map(Value::as_str)
        .collect();
    if !known.contains(&name) {
        let word = match top {
            "vars" => "var",
            "include" => "include",
            _ => "stage",
        };
        let hint = match hints::nearest(name, known.iter().copied()) {
            Some(known) => format!("did you mean `{known}`?"),
            None if known.is_empty() => format!("the recipe has no {word}s"),
            None => format!("the recipe has {}", hints::list(known)),
        };
        return Err((format!("there is no {word} `{name}`"), Some(hint)));
    }
    if let ("stages", Some(Some(kind))) = (top, names.next()) {
        let stage = recipe.get(top).and_then(|stages| stages.get(name));
        let map = stage.and_then(Value::as_mapping);
        let there: Vec<&str> = map
            .into_iter()
            .flat_map(Mapping::keys)
            .filter_map(Value::as_str)
            .collect();
        if !there.contains(&kind) && !is_beside(kind) {
            let own = there
                .iter()
                .find(|key| draft.kinds.iter().any(|kind| kind.name == **key));
            let Some(own) = own else {
                // The stage itself is wrong, which is reported elsewhere.
                return Err((format!("the stage `{name}` has no `{kind}`"), None));
            };
            let rest = display(steps.get(2..).unwrap_or_default());
            let hint = if draft.kinds.iter().any(|known| known.name == kind)
                || hints::nearest(kind, [*own]).is_some()
            {
                let rest = display(steps.get(3..).unwrap_or_default());
                format!("did you mean `stages.{name}.{own}.{rest}`?")
            } else {
                format!("did you mean `stages.{name}.{own}.{rest}`?")
            };
            let message = format!("the stage `{name}` is a `{own}`, and has no `{kind}`");
            return Err((message, Some(hint)));
        }
    }
    Ok(())
}

/// Puts a value at a path, and creates missing maps along it.
fn put(recipe: &mut Value, steps: &[PathStep], value: Value) -> Result<(), String> {
    let mut at = recipe;
    for (depth, step) in steps.iter().enumerate() {
        let so_far = display(steps.get(..depth).unwrap_or_default());
        match step {
            PathStep::Key(key) => {
                if at.is_null() {
                    *at = Value::Mapping(Mapping::new());
                }
                let Value::Mapping(map) = at else {
                    return Err(format!("`{so_far}` is not a map, so it has no `{key}`"));
                };
                at = map.entry(key.as_str().into()).or_insert(Value::Null);
            }
            PathStep::Index(index) => {
                let Value::Sequence(list) = at else {
                    return Err(format!(
                        "`{so_far}` is not a list, so it has no `[{index}]`"
                    ));
                };
                let length = list.len();
                if *index == length {
                    list.push(Value::Null);
                }
                at = list.get_mut(*index).ok_or_else(|| {
                    format!("`{so_far}` has {length} elements, so it has no `[{index}]`")
                })?;
            }
        }
    }
    *at = value;
    Ok(())
}
