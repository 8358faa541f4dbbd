//! Finds the inputs among the parameters of a stage that is not typed yet, by the schema of its kind.

use std::collections::BTreeMap;
use std::rc::Rc;

use schemars::SchemaGenerator;
use serde_json::{Map, Value as Json};
use serde_yaml::{Mapping, Value};

use crate::engine::Kind;
use crate::recipe::parameters::{params, resolve};
use crate::recipe::source_map::{PathStep, RecipePath, child};

/// The deepest that a schema is followed without going deeper into the value.
const DEEPEST: usize = 64;

/// An input: where it is below the parameters, and what it names.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    pub(crate) path: RecipePath,
    pub(crate) names: Names,
}

/// What an input names.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Names {
    /// One stage; where it is several, the stage that names it is several too.
    One(String),
    /// All stages of these names.
    Collect(Vec<String>),
}

/// The schemas of kinds that occurred.
#[derive(Default)]
pub(crate) struct Schemas(BTreeMap<&'static str, Rc<WithDefinitions>>);

/// A schema and the definitions that it refers to.
type WithDefinitions = (Json, Map<String, Json>);

impl Schemas {
    /// The inputs among parameters.
    pub(crate) fn inputs(&mut self, kind: &'static Kind, parameters: &Mapping) -> Vec<Found> {
        let known = self.0.entry(kind.name).or_insert_with(|| {
            let mut generator = SchemaGenerator::default();
            let schema = params(kind, &mut generator);
            Rc::new((schema, generator.take_definitions(true)))
        });
        let known = Rc::clone(known);
        let finder = Finder {
            definitions: &known.1,
        };
        let mut found = Vec::new();
        finder.map(&known.0, parameters, &Vec::new(), &mut found);
        found
    }
}

struct Finder<'s> {
    definitions: &'s Map<String, Json>,
}

impl Finder<'_> {
    fn value(
        &self,
        schema: &Json,
        value: &Value,
        path: &RecipePath,
        depth: usize,
        found: &mut Vec<Found>,
    ) {
        if depth > DEEPEST {
            return;
        }
        let schema = resolve(schema, self.definitions);
        let before = found.len();
        match value {
            Value::String(name) if schema.get("x-artifact").is_some() => found.push(Found {
                path: path.clone(),
                names: Names::One(name.clone()),
            }),
            Value::Mapping(map) if schema.get("x-collect").is_some() => {
                if let Some(names) = collected(map) {
                    let path = path.clone();
                    found.push(Found {
                        path,
                        names: Names::Collect(names),
                    });
                }
            }
            Value::Mapping(map) => self.map(schema, map, path, found),
            Value::Sequence(list) => {
                if let Some(items) = schema.get("items") {
                    for (index, value) in list.iter().enumerate() {
                        let mut path = path.clone();
                        path.push(PathStep::Index(index));
                        self.value(items, value, &path, 0, found);
                    }
                }
            }
            _ => {}
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            let parts = schema.get(key).and_then(Json::as_array);
            for part in parts.into_iter().flatten() {
                if found.len() == before {
                    self.value(part, value, path, depth + 1, found);
                }
            }
        }
    }

    fn map(&self, schema: &Json, map: &Mapping, path: &RecipePath, found: &mut Vec<Found>) {
        let properties = schema.get("properties").and_then(Json::as_object);
        let others = schema.get("additionalProperties");
        for (key, value) in map {
            let Some(key) = key.as_str() else { continue };
            let own = properties.and_then(|properties| properties.get(key));
            if let Some(schema) = own.or(others) {
                self.value(schema, value, &child(path, key), 0, found);
            }
        }
    }
}

/// The names in `collect: [..]`, if a map is that.
fn collected(map: &Mapping) -> Option<Vec<String>> {
    match map.get("collect").filter(|_| map.len() == 1)? {
        Value::String(name) => Some(vec![name.clone()]),
        Value::Sequence(names) => {
            let names = names.iter().map(|name| name.as_str().map(str::to_owned));
            names.collect()
        }
        _ => None,
    }
}

/// Puts a value at a path that is there.
pub(crate) fn put(parameters: &mut Value, path: &[PathStep], value: Value) {
    let mut at = parameters;
    for step in path {
        let next = match (step, at) {
            (PathStep::Key(key), Value::Mapping(map)) => map.get_mut(key.as_str()),
            (PathStep::Index(index), Value::Sequence(list)) => list.get_mut(*index),
            _ => None,
        };
        match next {
            Some(next) => at = next,
            None => return,
        }
    }
    *at = value;
}
