//! `include:`: the stages of other recipes under the name of the include, as in `prep.chats`.
//!
//! An included recipe is read with its own vars, defaults and implied parameters. What names a stage in it gets the name of the include
//! in front; a var that was passed in and names a stage means one of the recipe that passed it.

use std::collections::BTreeMap;

use serde_yaml::{Mapping, Value};

use super::{Changes, Composer, grafted_at};
use crate::recipe::defaults::{self, kind_of};
use crate::recipe::draft::Draft;
use crate::recipe::hints;
use crate::recipe::implied;
use crate::recipe::matrix::inputs::{self, Names, Schemas};
use crate::recipe::pieces::{Change, Namespace, Origin, Vars};
use crate::recipe::sentence::{noun, scalar};
use crate::recipe::source_map::{PathStep, RecipePath, child, keys};
use crate::recipe::vars::{self, Scope};

/// The section.
const INCLUDE: &str = "include";
/// Stands before the name of a stage that belongs to the recipe above. No name that is written has it.
const ABOVE: char = '\u{1}';

/// The vars that were passed in, and of how many recipes above each is.
pub(super) type Passed = BTreeMap<String, usize>;

/// The vars among changes from the recipe above.
pub(super) fn passed(changes: &[Change]) -> Passed {
    let vars = changes.iter().filter_map(|change| match &change.steps[..] {
        [PathStep::Key(vars), PathStep::Key(name)] if vars == "vars" => {
            Some((name.clone(), change.levels))
        }
        _ => None,
    });
    vars.collect()
}

/// Writes `prep: shared/prep.yaml` as `prep: { recipe: shared/prep.yaml }`.
pub(super) fn in_long_form(recipe: &mut Value) {
    let entries = recipe.get_mut(INCLUDE).and_then(Value::as_mapping_mut);
    for value in entries.into_iter().flat_map(Mapping::values_mut) {
        if value.is_string() {
            let source = std::mem::take(value);
            *value = Mapping::from_iter([("recipe".into(), source)]).into();
        }
    }
}

/// An entry of the section.
struct Entry {
    source: String,
    changes: Vec<Change>,
}

impl Composer<'_> {
    /// Reads all recipes of the section `include` and puts their stages beside the recipe's own. Nothing if one can't be read at all.
    pub(super) fn include_all(
        &mut self,
        draft: &mut Draft,
        vars: &Vars,
        own_passed: &Passed,
        recipe: &mut Value,
    ) -> Option<()> {
        let section: Vec<(String, RecipePath, Value)> = draft
            .section(recipe, INCLUDE)
            .into_iter()
            .map(|(name, path, value)| (name, path, value.clone()))
            .collect();
        let mut all_read = true;
        for (name, path, value) in section {
            if !is_free(draft, recipe, &name, &path) {
                continue;
            }
            let Some(mut entry) = entry(draft, vars, own_passed, &name, &path, value) else {
                all_read = false;
                continue;
            };
            let routed = draft.routed.remove(&name).unwrap_or_default();
            entry.changes.extend(routed);
            let source = child(&path, "recipe");
            let included = self
                .open(draft, &source, &entry.source)
                .and_then(|file| self.include(draft, &name, file, entry.changes));
            match included {
                Some(stages) => add(recipe, stages),
                None => all_read = false,
            }
        }
        if let Value::Mapping(recipe) = recipe {
            recipe.shift_remove(INCLUDE);
        }
        // What takes from stages that are not known can't be judged.
        all_read.then_some(())
    }

    /// The stages of one included recipe under their new names.
    fn include(
        &mut self,
        draft: &mut Draft,
        name: &str,
        file: usize,
        changes: Vec<Change>,
    ) -> Option<Mapping> {
        let passed = passed(&changes);
        let mut own = Draft::new(&self.files, draft.kinds);
        own.file = file;
        own.left = draft.left;
        let composed = self.compose(&mut own, Changes::Included(changes), true);
        let composed = composed.map(|mut composed| {
            defaults::fill(&mut own, &mut composed.value);
            implied::fill(&mut own, &mut composed.value);
            composed
        });
        draft.left = own.left;
        draft.errors.append(&mut own.errors);
        let mut composed = composed?;
        let at = grafted_at(file);
        let below = |path: &RecipePath| [&at[..], path].concat();
        // The paths of stages in this recipe, and of everything else where the file's positions are.
        let here = |path: &RecipePath| match &path[..] {
            [PathStep::Key(stages), PathStep::Key(stage), rest @ ..] if stages == "stages" => {
                [&keys(&["stages", &format!("{name}.{stage}")]), rest].concat()
            }
            _ => below(path),
        };
        draft.source_map.graft(&at, own.source_map);
        draft.broken.extend(own.broken.iter().map(here));
        draft.implied.extend(own.implied.iter().map(here));
        let set = own
            .set
            .into_iter()
            .map(|(path, origin)| (below(&path), origin));
        draft.set.extend(set);
        let through = own.through_vars.into_iter();
        draft
            .through_vars
            .extend(through.map(|(path, origin)| (below(&path), origin)));
        for (inner, space) in own.namespaces {
            let space = Namespace {
                at: below(&space.at),
                vars: space.vars,
            };
            draft.namespaces.insert(format!("{name}.{inner}"), space);
        }
        let mut stages = Mapping::new();
        let mut schemas = Schemas::default();
        let renamer = Renamer {
            name,
            passed: &passed,
            vars: &composed.vars,
        };
        let written = composed.value.get_mut("stages").map(std::mem::take);
        for (stage, mut value) in written
            .as_ref()
            .and_then(Value::as_mapping)
            .cloned()
            .into_iter()
            .flatten()
        {
            let Value::String(stage) = stage else {
                continue;
            };
            if let Some(kind) = kind_of(draft.kinds, &value)
                && let Some(parameters) = value.get_mut(kind.name)
                && let Some(given) = parameters.as_mapping()
            {
                for found in schemas.inputs(kind, given) {
                    let new = match &found.names {
                        Names::One(one) => renamer.renamed(one).into(),
                        Names::Collect(names) => {
                            let names = names.iter().map(|one| renamer.renamed(one).into());
                            let names = Value::Sequence(names.collect());
                            Mapping::from_iter([("collect".into(), names)]).into()
                        }
                    };
                    inputs::put(parameters, &found.path, new);
                }
            }
            let new = format!("{name}.{stage}");
            let to = keys(&["stages", &new]);
            let from = below(&keys(&["stages", &stage]));
            draft.source_map.written_elsewhere(to, from);
            stages.insert(new.into(), value);
        }
        let space = Namespace {
            at: below(&keys(&["vars"])),
            vars: composed.vars,
        };
        draft.namespaces.insert(name.to_owned(), space);
        Some(stages)
    }
}

/// Puts the stages of an included recipe beside a recipe's own.
fn add(recipe: &mut Value, stages: Mapping) {
    let Value::Mapping(recipe) = recipe else {
        return;
    };
    let all = recipe
        .entry("stages".into())
        .or_insert_with(|| Mapping::new().into());
    if all.is_null() {
        *all = Mapping::new().into();
    }
    if let Value::Mapping(all) = all {
        all.extend(stages);
    }
}

/// Gives names to stages of an included recipe as the recipe above knows them.
struct Renamer<'r> {
    name: &'r str,
    passed: &'r Passed,
    vars: &'r Vars,
}

impl Renamer<'_> {
    fn renamed(&self, written: &str) -> String {
        if let Some(above) = written.strip_prefix(ABOVE) {
            return above.to_owned();
        }
        if written.trim().is_empty() {
            return written.to_owned();
        }
        let var = written
            .strip_prefix("${")
            .and_then(|rest| rest.split_once('}'));
        if let Some((var, rest)) = var
            && let Some(levels) = self.passed.get(var)
            && let Some(value) = self.vars.get(var).and_then(scalar)
        {
            let above = levels.saturating_sub(1);
            return format!("{}{value}{rest}", String::from(ABOVE).repeat(above));
        }
        format!("{}.{written}", self.name)
    }
}

/// Whether a name can be that of an include; why not is told.
fn is_free(draft: &mut Draft, recipe: &Value, name: &str, path: &RecipePath) -> bool {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || !name.chars().all(plain) {
        let message = format!("`{name}` is not a valid name of an include");
        let hint = "a name consists of letters, digits, `_` and `-`";
        draft.key_error(path, message, Some(hint.to_owned()));
        return false;
    }
    let stages = recipe.get("stages").and_then(Value::as_mapping);
    if stages.is_some_and(|stages| stages.contains_key(name)) {
        let message = format!("`{name}` is the name of a stage and of an include");
        draft.key_error(path, message, Some("rename one of them".to_owned()));
        return false;
    }
    true
}

/// Reads an entry; why it can't be read is told.
fn entry(
    draft: &mut Draft,
    vars: &Vars,
    own_passed: &Passed,
    name: &str,
    path: &RecipePath,
    value: Value,
) -> Option<Entry> {
    let example =
        || Some("as in `prep: { recipe: shared/prep.yaml, vars: { seed: 1 } }`".to_owned());
    let Value::Mapping(map) = value else {
        let message = format!(
            "the include `{name}` must be the path of a recipe, not {}",
            noun(&value)
        );
        draft.value_error(path, message, example());
        return None;
    };
    let before = draft.errors.len();
    for key in map.keys().filter_map(Value::as_str) {
        if !["recipe", "vars"].contains(&key) {
            let message = format!("unknown key `{key}` of the include `{name}`");
            let place = ["path", "file", "source", "from", "url", "git", "include"];
            let known = hints::nearest(key, ["recipe", "vars"]);
            let hint = match known.or_else(|| place.contains(&key).then_some("recipe")) {
                Some(known) => Some(format!("did you mean `{known}`?")),
                None => example(),
            };
            draft.key_error(&child(path, key), message, hint);
        }
    }
    let source = match map.get("recipe") {
        Some(Value::String(source)) if !source.trim().is_empty() => source.clone(),
        _ => {
            // Perhaps the unknown key was to say it.
            if draft.errors.len() == before {
                let message = format!("the include `{name}` does not say which recipe");
                draft.key_error(path, message, example());
            }
            return None;
        }
    };
    let mut changes = Vec::new();
    let given = match map.get("vars") {
        None | Some(Value::Null) => Mapping::new(),
        Some(Value::Mapping(given)) => given.clone(),
        Some(other) => {
            let message = format!(
                "`vars` of the include `{name}` must be a map, not {}",
                noun(other)
            );
            draft.value_error(&child(path, "vars"), message, example());
            return None;
        }
    };
    let (axes, at) = (Vars::new(), keys(&["vars"]));
    let scope = Scope {
        vars,
        at: &at,
        axes: &axes,
    };
    for (var, mut value) in given {
        let Some(var) = var.as_str() else { continue };
        let at = child(&child(path, "vars"), var);
        let through = value
            .as_str()
            .and_then(|text| text.strip_prefix("${")?.split_once('}'));
        let above = through.and_then(|(through, _)| own_passed.get(through));
        let levels = above.map_or(1, |levels| levels + 1);
        vars::walk(draft, scope, &mut at.clone(), &mut value);
        if draft.is_broken(&at) {
            return None;
        }
        let origin = draft.origin(&at).cloned().unwrap_or_else(|| {
            let span = draft.source_map.value(&at);
            Origin {
                text: span.map_or_else(|| var.to_owned(), |span| draft.place(span)),
                file: Some(span.map_or(draft.file, |span| span.file)),
            }
        });
        changes.push(Change {
            steps: keys(&["vars", var]),
            value,
            origin,
            levels,
        });
    }
    Some(Entry { source, changes })
}
