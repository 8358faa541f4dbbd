//! `matrix:` beside the kind of a stage: one stage for each combination of values, and the stages that take from them with them.
//!
//! Everything happens before stages are typed, so that a stage that a matrix made is like any other, its fingerprint too. Axes of one
//! name are one axis: a stage that takes from two stages with the axis `seed` takes both with the same seed.

mod axes;
pub(crate) mod inputs;
mod made;

use std::collections::BTreeMap;

use serde_yaml::{Mapping, Value};

use crate::engine::{Kind, topological_order};

pub(crate) use axes::picked;
use inputs::{Found, Names, Schemas};
use made::{Made, joined, picks, resolve};

use super::combination::{Combination, Expanded};
use super::defaults::kind_of;
use super::draft::Draft;
use super::pieces::{LeftOut, Namespace, Vars, namespace};
use super::source_map::{RecipePath, child, keys};
use super::vars::{self, Scope};
use super::when::{self, WHEN};

/// The key beside the kind.
pub(crate) const MATRIX: &str = "matrix";
/// The most stages of a recipe that has a matrix.
const MOST_STAGES: usize = 10_000;

/// A stage as it is written.
struct Declared {
    name: String,
    value: Value,
    kind: Option<&'static Kind>,
    /// Its `when`, if it has one.
    when: Option<Value>,
    /// The combinations of its own matrix; one without values if it has none.
    own: Vec<Combination>,
    inputs: Vec<Input>,
}

/// An input of a stage as it is written.
struct Input {
    found: Found,
    /// Whether it is among the kind's defaults and not in the stage.
    is_default: bool,
}

/// Replaces stages that have a matrix by one for each combination, with everything that takes from them, their outputs and where they
/// are published, and removes stages whose `when` is false. Substitutes vars in all of these.
pub(crate) fn expand(draft: &mut Draft, vars: &Vars, recipe: &mut Value) {
    let is_wanted = |stage: &Value| {
        stage.get(MATRIX).is_some() || stage.get(WHEN).is_some() || has_collect(stage)
    };
    let stages = match recipe.get("stages") {
        Some(Value::Mapping(stages))
            if !draft.namespaces.is_empty() || stages.values().any(is_wanted) =>
        {
            stages.clone()
        }
        _ => return vars::substitute(draft, vars, recipe, &["stages", "outputs", "publish"]),
    };
    let defaults = recipe.get("defaults").cloned().unwrap_or_default();
    let at = keys(&["vars"]);
    let namespaces = draft.namespaces.clone();
    let mut expander = Expander {
        vars,
        at: &at,
        namespaces: &namespaces,
        defaults: &defaults,
        schemas: Schemas::default(),
        declared: Vec::new(),
        made: Vec::new(),
    };
    let mut left = MOST_STAGES;
    for (name, value) in stages {
        if let Value::String(name) = name {
            let declared = expander.declare(draft, name, value, &mut left);
            expander.declared.push(declared);
        }
    }
    expander.combine(draft);
    let stages = expander.stages(draft);
    if let Some(all) = recipe.get_mut("stages") {
        *all = Value::Mapping(stages);
    }
    for section in ["outputs", "publish"] {
        if let Some(Value::Mapping(entries)) = recipe.get_mut(section) {
            expander.section(draft, section, entries);
        }
    }
}

/// Whether anything in a value is `collect: ..`.
fn has_collect(value: &Value) -> bool {
    match value {
        Value::Sequence(list) => list.iter().any(has_collect),
        Value::Mapping(map) => map
            .iter()
            .any(|(key, value)| key == "collect" || has_collect(value)),
        _ => false,
    }
}

struct Expander<'r> {
    vars: &'r Vars,
    at: &'r RecipePath,
    namespaces: &'r BTreeMap<String, Namespace>,
    defaults: &'r Value,
    schemas: Schemas,
    declared: Vec<Declared>,
    /// The stages that each declared one became; none while it is not looked at yet.
    made: Vec<Option<Vec<Made>>>,
}

impl<'r> Expander<'r> {
    /// What names mean in a stage with these values.
    fn scope<'v>(&self, stage: &str, axes: &'v Vars) -> Scope<'v>
    where
        'r: 'v,
    {
        let included = namespace(stage).and_then(|included| self.namespaces.get(included));
        let (vars, at) = match included {
            Some(included) => (&included.vars, &included.at),
            None => (self.vars, self.at),
        };
        Scope { vars, at, axes }
    }

    fn declare(
        &mut self,
        draft: &mut Draft,
        name: String,
        mut value: Value,
        left: &mut usize,
    ) -> Declared {
        let path = keys(&["stages", &name]);
        let mut take = |key| value.as_mapping_mut()?.shift_remove(key);
        let (matrix, when) = (take(MATRIX), take(WHEN));
        let own = match matrix {
            Some(matrix) => self.own(draft, &child(&path, MATRIX), matrix, &name, left),
            None => vec![Combination::new()],
        };
        *left = left.saturating_sub(own.len());
        let kind = kind_of(draft.kinds, &value);
        let mut inputs = Vec::new();
        if let Some(kind) = kind {
            let empty = Mapping::new();
            let given = value.get(kind.name).and_then(Value::as_mapping);
            let given = given.unwrap_or(&empty);
            let of_stage = self.schemas.inputs(kind, given).into_iter();
            inputs.extend(of_stage.map(|found| Input {
                found,
                is_default: false,
            }));
            let defaults = self.defaults.get(kind.name).and_then(Value::as_mapping);
            // The defaults of an included recipe are in its stages already.
            let defaults = defaults.filter(|_| namespace(&name).is_none());
            let defaults: Mapping = defaults
                .into_iter()
                .flatten()
                .filter(|(key, _)| !given.contains_key(*key))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            let of_kind = self.schemas.inputs(kind, &defaults).into_iter();
            inputs.extend(of_kind.map(|found| Input {
                found,
                is_default: true,
            }));
        }
        Declared {
            name,
            value,
            kind,
            when,
            own,
            inputs,
        }
    }

    /// The combinations of a stage's own matrix.
    fn own(
        &self,
        draft: &mut Draft,
        path: &RecipePath,
        mut matrix: Value,
        name: &str,
        left: &mut usize,
    ) -> Vec<Combination> {
        let none = Vars::new();
        let scope = self.scope(name, &none);
        vars::walk(draft, scope, &mut path.clone(), &mut matrix);
        let Some(axes) = (!draft.broken.contains(path))
            .then(|| axes::read(draft, scope.vars, path, &matrix))
            .flatten()
        else {
            // Whatever takes from it is looked at with any of its values.
            return vec![Combination::new()];
        };
        let count = axes
            .iter()
            .try_fold(1_usize, |count, axis| count.checked_mul(axis.len()));
        if count.is_none_or(|count| count > *left) {
            too_many(draft, path, name);
            return vec![Combination::new()];
        }
        let mut combinations = vec![Combination::new()];
        for axis in axes {
            let longer = combinations.iter().flat_map(|combination| {
                axis.iter()
                    .map(|value| [&combination[..], std::slice::from_ref(value)].concat())
            });
            combinations = longer.collect();
        }
        combinations
    }

    /// Finds the combinations of every stage, those of its inputs first.
    fn combine(&mut self, draft: &mut Draft) {
        let index: BTreeMap<&str, usize> = self
            .declared
            .iter()
            .enumerate()
            .map(|(index, stage)| (stage.name.as_str(), index))
            .collect();
        let reads: Vec<Vec<usize>> = self
            .declared
            .iter()
            .map(|stage| {
                let mut reads = Vec::new();
                for combination in &stage.own {
                    for name in stage.inputs.iter().flat_map(|input| input.found.all()) {
                        let Some(name) = self.text(&stage.name, combination, name) else {
                            continue;
                        };
                        let read = picked(&name).and_then(|name| index.get(name.stage).copied());
                        if let Some(read) = read
                            && !reads.contains(&read)
                        {
                            reads.push(read);
                        }
                    }
                }
                reads
            })
            .collect();
        // A cycle is told where stages are wired.
        let (order, _) = topological_order(&reads);
        let mut made: Vec<Option<Vec<Made>>> = self.declared.iter().map(|_| None).collect();
        let mut left = MOST_STAGES.saturating_sub(self.declared.len());
        for stage in order {
            let all = self.made_of(draft, stage, &index, &made, left);
            left = (left + 1).saturating_sub(all.len());
            made[stage] = Some(all);
        }
        self.made = made;
    }

    /// A text in a stage with vars and the values of a combination.
    fn text(&self, stage: &str, combination: &Combination, text: &str) -> Option<String> {
        self.scope(stage, &values(combination)).text(text)
    }

    /// Whether a stage with these values is left out by its `when`.
    fn leaves_out(&self, draft: &mut Draft, stage: &Declared, combination: &Combination) -> bool {
        let Some(when) = &stage.when else {
            return false;
        };
        let path = keys(&["stages", &stage.name, WHEN]);
        let axes = values(combination);
        when::holds(draft, self.scope(&stage.name, &axes), &path, when) == Some(false)
    }

    /// The stages that one is made into.
    fn made_of(
        &self,
        draft: &mut Draft,
        stage: usize,
        index: &BTreeMap<&str, usize>,
        made: &[Option<Vec<Made>>],
        left: usize,
    ) -> Vec<Made> {
        let declared = &self.declared[stage];
        let mut all: Vec<Made> = Vec::new();
        for own in &declared.own {
            let mut partial = vec![Made {
                combination: own.clone(),
                inputs: Vec::new(),
                left_out: false,
                lacks: false,
            }];
            for (position, input) in declared.inputs.iter().enumerate() {
                let Names::One(written) = &input.found.names else {
                    continue;
                };
                let Some(name) = self.text(&declared.name, own, written) else {
                    continue;
                };
                let Some((read, picked)) = resolve(&name, index) else {
                    continue;
                };
                let Some(there) = made[read].as_ref().filter(|_| read != stage) else {
                    continue;
                };
                let path = path_of(declared, input);
                let Some(taken) = picks(draft, &path, &picked, there) else {
                    continue;
                };
                if taken.iter().all(|(made, _)| made.combination.is_empty()) {
                    if taken.iter().all(|(made, _)| made.left_out) {
                        for one in &mut partial {
                            one.lacks = true;
                        }
                    }
                    continue;
                }
                let read = &self.declared[read].name;
                let room = left.saturating_sub(all.len()) + 1;
                match joined(partial, &taken, read, position, room) {
                    Some(joined) if joined.is_empty() => {
                        let message = format!(
                            "`{}` fits no combination of `{name}`: axes of one name are one axis, and there it never has this value",
                            axes::name(&declared.name, own)
                        );
                        let hint = "rename an axis, or pick a value, as in `tuned[seed=1]`";
                        draft.value_error(&path, message, Some(hint.to_owned()));
                        draft.broken.insert(path);
                        return Vec::new();
                    }
                    Some(joined) => partial = joined,
                    None => {
                        too_many(draft, &path, &declared.name);
                        return Vec::new();
                    }
                }
            }
            for one in &mut partial {
                one.left_out = self.leaves_out(draft, declared, &one.combination);
            }
            // Where there is nothing of all that it could take, that is told where stages are wired.
            let is_some_there = partial.iter().any(|one| !one.left_out && !one.lacks);
            for one in partial.iter_mut().filter(|one| one.lacks) {
                // What is made for each stage of a matrix is made for those that are there.
                one.left_out |= is_some_there;
            }
            for made_of in &mut partial {
                for (position, input) in declared.inputs.iter().enumerate() {
                    if let Names::Collect(names) = &input.found.names {
                        let path = path_of(declared, input);
                        let combination = &made_of.combination;
                        let names = names.iter().flat_map(|written| {
                            match self.text(&declared.name, combination, written) {
                                Some(name) => self.collected(draft, name, &path, index, made),
                                None => vec![written.clone()],
                            }
                        });
                        let names: Vec<Value> = names.map(Value::from).collect();
                        made_of.inputs.push((position, names.into()));
                    }
                }
            }
            all.extend(partial);
        }
        all
    }

    /// All stages that a name in `collect` means; the name itself where it means none, which is told where stages are wired.
    fn collected(
        &self,
        draft: &mut Draft,
        name: String,
        path: &RecipePath,
        index: &BTreeMap<&str, usize>,
        made: &[Option<Vec<Made>>],
    ) -> Vec<String> {
        let Some((read, picked)) = resolve(&name, index) else {
            return vec![name];
        };
        let Some(there) = &made[read] else {
            return vec![name];
        };
        let Some(taken) = picks(draft, path, &picked, there) else {
            return vec![name];
        };
        let taken = taken.iter().filter(|(made, _)| !made.left_out);
        taken
            .map(|(made, _)| axes::name(&self.declared[read].name, &made.combination))
            .collect()
    }

    /// The section `stages` with what was made.
    fn stages(&self, draft: &mut Draft) -> Mapping {
        let mut stages = Mapping::new();
        for (declared, made) in self.declared.iter().zip(&self.made) {
            for (number, one) in made.iter().flatten().enumerate() {
                let name = axes::name(&declared.name, &one.combination);
                let written = keys(&["stages", &declared.name]);
                let path = keys(&["stages", &name]);
                if one.left_out {
                    let left_out = Self::left_out(draft, declared, name);
                    draft.left_out.push(left_out);
                    continue;
                }
                if !one.combination.is_empty() {
                    let is_written = self.declared.iter().any(|other| other.name == name);
                    if name.len() > axes::LONGEST_NAME || is_written {
                        let message = if is_written {
                            format!(
                                "the matrix of `{}` makes `{name}`, which is there already",
                                declared.name
                            )
                        } else {
                            format!(
                                "the name `{name}` has more than {} bytes",
                                axes::LONGEST_NAME
                            )
                        };
                        let hint = "give the values short names: `base: { small: .., large: .. }`";
                        draft.key_error(&written, message, Some(hint.to_owned()));
                        continue;
                    }
                    draft
                        .source_map
                        .written_elsewhere(path.clone(), written.clone());
                    let expanded = Expanded {
                        declared: declared.name.clone(),
                        combination: one.combination.clone(),
                    };
                    draft.expanded.insert(name.clone(), expanded);
                }
                let mut value = declared.value.clone();
                if number > 0
                    && let Err(message) = draft.spend(&value)
                {
                    draft.key_error(&written, message, None);
                    return stages;
                }
                self.put_inputs(draft, declared, one, &path, &mut value);
                let axes = values(&one.combination);
                let scope = self.scope(&declared.name, &axes);
                vars::walk(draft, scope, &mut path.clone(), &mut value);
                stages.insert(name.into(), value);
            }
        }
        stages
    }

    /// What there is to say of a stage that is left out.
    fn left_out(draft: &Draft, declared: &Declared, name: String) -> LeftOut {
        let path = keys(&["stages", &declared.name, WHEN]);
        let when = declared.when.as_ref();
        LeftOut {
            name,
            kind: declared.kind.map(|kind| kind.name),
            when: when.map(when::shown).unwrap_or_default(),
            span: when.and_then(|_| draft.source_map.value(&path)),
        }
    }

    fn put_inputs(
        &self,
        draft: &mut Draft,
        declared: &Declared,
        made: &Made,
        path: &RecipePath,
        value: &mut Value,
    ) {
        let Some(kind) = declared.kind.filter(|_| !made.inputs.is_empty()) else {
            return;
        };
        let Some(parameters) = value.get_mut(kind.name) else {
            return;
        };
        if parameters.is_null() {
            *parameters = Value::Mapping(Mapping::new());
        }
        for (position, name) in &made.inputs {
            let input = &declared.inputs[*position];
            let first = input.found.path.first();
            if let Some(super::PathStep::Key(first)) = first.filter(|_| input.is_default)
                && let Value::Mapping(own) = parameters
                && !own.contains_key(first.as_str())
                && let Some(default) = self.defaults.get(kind.name).and_then(|all| all.get(first))
            {
                own.insert(first.as_str().into(), default.clone());
                let to = child(&child(path, kind.name), first);
                let from = keys(&["defaults", kind.name, first]);
                draft.source_map.written_elsewhere(to, from);
            }
            inputs::put(parameters, &input.found.path, name.clone());
        }
    }

    /// The entries of `outputs` or `publish` with one for each stage that a name means, and with vars and values substituted.
    fn section(&self, draft: &mut Draft, section: &str, entries: &mut Mapping) {
        let index: BTreeMap<&str, usize> = self
            .declared
            .iter()
            .enumerate()
            .map(|(index, stage)| (stage.name.as_str(), index))
            .collect();
        for (key, value) in std::mem::take(entries) {
            let Value::String(written) = key else {
                continue;
            };
            let from = keys(&[section, &written]);
            let found = resolve(&written, &index).and_then(|(stage, picked)| {
                let made = self.made.get(stage)?.as_ref()?;
                let taken = picks(draft, &from, &picked, made)?;
                Some((stage, taken))
            });
            if let Some((_, taken)) = &found
                && taken.iter().all(|(made, _)| made.left_out)
            {
                continue;
            }
            let several = found
                .filter(|(_, taken)| taken.iter().any(|(made, _)| !made.combination.is_empty()));
            let Some((stage, taken)) = several else {
                let mut value = value;
                let axes = Vars::new();
                vars::walk(draft, self.scope("", &axes), &mut from.clone(), &mut value);
                entries.insert(written.into(), value);
                continue;
            };
            for (made, _) in taken.into_iter().filter(|(made, _)| !made.left_out) {
                let name = axes::name(&self.declared[stage].name, &made.combination);
                let path = keys(&[section, &name]);
                draft
                    .source_map
                    .written_elsewhere(path.clone(), from.clone());
                let axes = values(&made.combination);
                let mut own = value.clone();
                // A folder in which nothing tells one from the other holds one folder for each.
                if section == "outputs"
                    && let Value::String(folder) = &mut own
                    && !axes
                        .keys()
                        .any(|axis| folder.contains(&format!("${{{axis}}}")))
                {
                    *folder = format!(
                        "{}/{}",
                        folder.trim_end_matches('/'),
                        axes::labels(&made.combination)
                    );
                }
                vars::walk(draft, self.scope("", &axes), &mut path.clone(), &mut own);
                if entries.insert(name.clone().into(), own).is_some() {
                    let message = format!("`{name}` has two entries in `{section}`");
                    let hint = format!("`{}` means all of its stages", self.declared[stage].name);
                    draft.key_error(&path, message, Some(hint));
                }
            }
        }
    }
}

impl Found {
    /// Every name of the input.
    fn all(&self) -> impl Iterator<Item = &str> {
        let names = match &self.names {
            Names::One(name) => std::slice::from_ref(name),
            Names::Collect(names) => names,
        };
        names.iter().map(String::as_str)
    }
}

/// The values of a combination by axis.
fn values(combination: &Combination) -> Vars {
    let values = combination.iter();
    values
        .map(|value| (value.axis.clone(), value.value.clone()))
        .collect()
}

/// Where an input is written.
fn path_of(declared: &Declared, input: &Input) -> RecipePath {
    let kind = declared.kind.map_or("", |kind| kind.name);
    let start = if input.is_default {
        keys(&["defaults", kind])
    } else {
        keys(&["stages", &declared.name, kind])
    };
    [start, input.found.path.clone()].concat()
}

fn too_many(draft: &mut Draft, path: &RecipePath, name: &str) {
    let message = format!("the matrix makes more stages of `{name}` than there may be");
    let hint = format!("the limit is {MOST_STAGES} stages in a recipe with a matrix");
    draft.key_error(path, message, Some(hint));
}
