//! Parameters that the rest of the recipe implies ([`Implied`]): the base model of an adapter, the tokenizer of chats.
//!
//! They are filled in before stages are typed, so a stage and its fingerprint are the same as if the recipe gave them.

use std::collections::BTreeMap;

use serde_yaml::Value;

use crate::engine::{Implied, ImpliedBy, Kind};

use super::defaults::{kind_of, parameters_of};
use super::draft::Draft;
use super::hints;
use super::source_map::keys;

/// The stages of the recipe with one known kind.
type Stages<'v> = BTreeMap<&'v str, (&'static Kind, &'v Value)>;

/// What a source says.
enum Found {
    /// The name of a stage.
    One(String),
    /// Several stages could be meant.
    Several(Vec<String>),
    /// Nothing.
    Nothing,
}

/// Fills in what the recipe implies. Where several stages could be meant that is a mistake; where none could, the stage's own rules say
/// what is missing.
pub(crate) fn fill(draft: &mut Draft, recipe: &mut Value) {
    let mut filled = Vec::new();
    {
        let Some(Value::Mapping(map)) = recipe.get("stages") else {
            return;
        };
        let stages: Stages = map
            .iter()
            .filter_map(|(name, stage)| {
                Some((name.as_str()?, (kind_of(draft.kinds, stage)?, stage)))
            })
            .collect();
        let mut first = BTreeMap::new();
        for (name, (kind, stage)) in &stages {
            for implied in kind.implied {
                if !is_open(stage, kind, implied) {
                    continue;
                }
                match find(draft, &stages, &mut first, name, implied) {
                    Found::One(value) => {
                        filled.push(((*name).to_owned(), *kind, implied.parameter, value));
                    }
                    Found::Several(names) => {
                        let path = keys(&["stages", name, kind.name, implied.parameter]);
                        let message = format!(
                            "`{}` needs `{}`: the recipe does not say which of its models is meant",
                            kind.name, implied.parameter
                        );
                        let names = names.iter().map(String::as_str);
                        let hint = format!("name {}", hints::either(names));
                        draft.key_error(&path, message, Some(hint));
                        draft.broken.insert(path);
                    }
                    Found::Nothing => {}
                }
            }
        }
    }
    for (name, kind, parameter, value) in filled {
        let stage = recipe.get_mut("stages").and_then(|all| all.get_mut(&name));
        if let Some(own) = stage.and_then(|stage| parameters_of(stage, kind)) {
            own.insert(parameter.into(), value.into());
            let path = keys(&["stages", &name, kind.name, parameter]);
            draft.implied.insert(path);
        }
    }
}

/// Whether the stage leaves the parameter out, and what says the same in another way.
fn is_open(stage: &Value, kind: &Kind, implied: &Implied) -> bool {
    match stage.get(kind.name) {
        Some(Value::Null) => implied.with.is_empty(),
        Some(Value::Mapping(own)) => {
            let given = |name: &str| own.get(name).is_some();
            let wanted = implied.with.is_empty() || implied.with.iter().any(|name| given(name));
            wanted && !given(implied.parameter) && !implied.unless.iter().any(|name| given(name))
        }
        None | Some(_) => false,
    }
}

/// What a stage gives for a parameter; of a list the first one.
fn given<'v>(stages: &Stages<'v>, stage: &str, parameter: &str) -> Option<&'v str> {
    let (kind, value) = stages.get(stage)?;
    let value = value.get(kind.name)?.get(parameter)?;
    value
        .as_str()
        .or_else(|| value.as_sequence()?.first()?.as_str())
}

/// The stage that is meant by a parameter of the stage `name`.
fn find(
    draft: &mut Draft,
    stages: &Stages,
    first: &mut BTreeMap<String, Vec<String>>,
    name: &str,
    implied: &Implied,
) -> Found {
    for source in implied.sources {
        match *source {
            ImpliedBy::Input {
                input,
                parameter,
                before,
            } => {
                if let Some(found) = follow(stages, name, input, parameter, before) {
                    return Found::One(found.to_owned());
                }
            }
            ImpliedBy::OnlyFirst => {
                let artifact = stages
                    .get(name)
                    .and_then(|(kind, _)| draft.parameters(kind).artifact(implied.parameter));
                let Some(artifact) = artifact else { continue };
                let makers = first
                    .entry(artifact.clone())
                    .or_insert_with(|| makers(draft, stages, &artifact));
                match &makers[..] {
                    [] => {}
                    [one] => return Found::One(one.clone()),
                    several => return Found::Several(several.to_vec()),
                }
            }
        }
    }
    Found::Nothing
}

/// What the stage that `input` names has for `parameter`, through stages that leave it to theirs in the same way.
fn follow<'v>(
    stages: &Stages<'v>,
    name: &str,
    input: &str,
    parameter: &str,
    before: Option<&str>,
) -> Option<&'v str> {
    let mut at = given(stages, name, input)?;
    // A chain without an end is a cycle, which the wiring tells.
    for _ in 0..stages.len() {
        if let Some(found) = given(stages, at, parameter) {
            let over = stages
                .get(found)
                .is_some_and(|(kind, _)| Some(kind.name) == before);
            return Some(if over {
                given(stages, found, parameter).unwrap_or(found)
            } else {
                found
            });
        }
        let (kind, _) = stages.get(at)?;
        let implied = kind
            .implied
            .iter()
            .find(|implied| implied.parameter == parameter)?;
        let next = implied.sources.iter().find_map(|source| match *source {
            ImpliedBy::Input {
                input,
                parameter: same,
                ..
            } if same == parameter => given(stages, at, input),
            _ => None,
        })?;
        at = next;
    }
    None
}

/// The stages that make an artifact without taking one of the same sort.
fn makers(draft: &mut Draft, stages: &Stages, artifact: &str) -> Vec<String> {
    let mut makers = Vec::new();
    for (name, (kind, stage)) in stages {
        if kind.output != artifact {
            continue;
        }
        let own = stage.get(kind.name);
        let parameters = draft.parameters(kind);
        let takes = parameters.0.iter().any(|parameter| {
            parameter.artifact() == Some(artifact)
                && (parameter.required || own.is_some_and(|own| own.get(&parameter.name).is_some()))
        });
        if !takes {
            makers.push((*name).to_owned());
        }
    }
    makers
}
