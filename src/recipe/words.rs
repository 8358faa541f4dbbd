//! What parameters may be, in words: for mistakes, for people at a terminal, and for the reference.

use schemars::{JsonSchema as _, SchemaGenerator};
use serde_json::{Map, Value};

use crate::engine::{Handling, Kind};

use super::parameters::{Parameters, description, paragraphs, params, resolve};
use super::source_map::PathStep;

/// What may stand at a path below a kind's parameters, in words; nothing where no parameter is.
pub(crate) fn allowed(kind: &Kind, path: &[PathStep]) -> Option<String> {
    let mut generator = SchemaGenerator::default();
    let schema = params(kind, &mut generator);
    words_at(schema, path, &generator.take_definitions(true))
}

/// [`allowed`] for the runner's keys beside a kind.
pub(crate) fn allowed_beside(path: &[PathStep]) -> Option<String> {
    let mut generator = SchemaGenerator::default();
    let schema = Handling::json_schema(&mut generator).to_value();
    words_at(schema, path, &generator.take_definitions(true))
}

fn words_at(
    mut schema: Value,
    path: &[PathStep],
    definitions: &Map<String, Value>,
) -> Option<String> {
    if path.is_empty() {
        return None;
    }
    for step in path {
        schema = match step {
            PathStep::Key(key) => resolve(&schema, definitions)
                .get("properties")?
                .get(key)?
                .clone(),
            PathStep::Index(_) => resolve(&schema, definitions).get("items")?.clone(),
        };
    }
    Some(type_name(&schema, definitions))
}

/// The parameters of a kind as people read them at a terminal: name, type, default and what it means.
pub fn described(kind: &Kind) -> Vec<[String; 4]> {
    let mut generator = SchemaGenerator::default();
    _ = params(kind, &mut generator);
    let definitions = generator.take_definitions(true);
    let parameters = Parameters::from_kind(kind).0.into_iter();
    let rows = parameters.map(|parameter| {
        let default = match parameter.schema.get("default") {
            Some(Value::Null | Value::Object(_)) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(default) => default.to_string(),
            None if parameter.implied => "implied".to_owned(),
            None if parameter.required => "required".to_owned(),
            None => String::new(),
        };
        let type_name = type_name(&parameter.schema, &definitions).replace('`', "");
        let meaning = parameter.description.replace("\n\n", " ");
        [parameter.name, type_name, default, meaning]
    });
    rows.collect()
}

/// What a kind does, in its own words.
pub fn about(kind: &Kind) -> String {
    paragraphs(&description(&params(kind, &mut SchemaGenerator::default())))
}

/// A type in words.
pub(crate) fn type_name(schema: &Value, definitions: &Map<String, Value>) -> String {
    if let Some(artifact) = schema.get("x-artifact").and_then(Value::as_str) {
        return format!("stage that makes `{artifact}`");
    }
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        let values = values.iter().filter(|value| !value.is_null());
        let values: Vec<String> = values.map(constant).collect();
        return values.join(" or ");
    }
    if let Some(value) = schema.get("const") {
        return constant(value);
    }
    if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
        let definition = resolve(schema, definitions);
        return if definition.get("$ref").is_none() {
            type_name(definition, definitions)
        } else {
            name.rsplit('/').next().unwrap_or(name).to_owned()
        };
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(parts) = schema.get(key).and_then(Value::as_array) {
            let parts = parts
                .iter()
                .filter(|part| part.get("type").is_none_or(|kind| kind != "null"));
            let parts: Vec<String> = parts.map(|part| type_name(part, definitions)).collect();
            return parts.join(" or ");
        }
    }
    let kinds = match schema.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(kind)) => vec![kind.as_str()],
        _ => vec!["any"],
    };
    let words = kinds.into_iter().filter(|kind| *kind != "null");
    let words: Vec<String> = words
        .map(|kind| match kind {
            "integer" => "whole number".to_owned(),
            "boolean" => "`true` or `false`".to_owned(),
            "string" => "text".to_owned(),
            "object" => "map".to_owned(),
            "array" => match schema.get("items") {
                Some(items) => format!("list of {}", type_name(items, definitions)),
                None => "list".to_owned(),
            },
            other => other.to_owned(),
        })
        .collect();
    words.join(" or ")
}

pub(crate) fn constant(value: &Value) -> String {
    match value {
        Value::String(text) if !text.contains(char::is_control) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}
