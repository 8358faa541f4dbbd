//! Describes recipes from the parameter structs of the kinds: the JSON Schema and the reference of stages.

use std::fmt::Write as _;

use schemars::{JsonSchema as _, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::source_map::PathStep;
use crate::engine::{FILE_KEY, Handling, Kind, NEUTRAL_KEY, Resources, STAGE_KEY};

/// One parameter, as the schema describes it.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) required: bool,
    pub(crate) description: String,
    pub(crate) schema: Value,
}

/// The parameters of a kind.
pub(crate) struct Parameters(pub(crate) Vec<Parameter>);

impl Parameters {
    /// The parameters in the order of the struct.
    pub(crate) fn from_kind(kind: &Kind) -> Self {
        Self::read(&params(kind, &mut SchemaGenerator::default()))
    }

    fn read(schema: &Value) -> Self {
        let required = schema.get("required").and_then(Value::as_array);
        let properties = schema.get("properties").and_then(Value::as_object);
        let mut parameters: Vec<Parameter> = properties
            .into_iter()
            .flatten()
            .map(|(name, schema)| Parameter {
                name: name.clone(),
                required: required.is_some_and(|all| all.iter().any(|one| one == name)),
                description: description(schema),
                schema: schema.clone(),
            })
            .collect();
        // The order of serde_json's maps depends on the features of other crates.
        parameters.sort_by(|a, b| (!a.required, &a.name).cmp(&(!b.required, &b.name)));
        Self(parameters)
    }

    /// Whether there is a parameter called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|parameter| parameter.name == name)
    }
}

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
        if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
            schema = definitions.get(name.rsplit('/').next()?)?.clone();
        }
        schema = match step {
            PathStep::Key(key) => schema.get("properties")?.get(key)?.clone(),
            PathStep::Index(_) => schema.get("items")?.clone(),
        };
    }
    Some(type_name(&schema, definitions))
}

/// The schema of a kind's parameters, with defaults as people write them.
fn params(kind: &Kind, generator: &mut SchemaGenerator) -> Value {
    let mut schema = (kind.schema)(generator).to_value();
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for property in properties.into_iter().flat_map(Map::values_mut) {
        if let Some(default) = property.get_mut("default") {
            unmark(default);
        }
    }
    schema
}

/// Removes the engine's markers from a default value.
fn unmark(value: &mut Value) {
    for key in [NEUTRAL_KEY, STAGE_KEY, FILE_KEY] {
        if let Some(inner) = value.get_mut(key) {
            *value = inner.take();
        }
    }
}

fn description(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

/// The JSON Schema of recipes with these kinds (draft 2020-12). The same kinds give the same text.
pub fn schema(kinds: &[Kind]) -> Value {
    let mut generator = SchemaGenerator::default();
    let mut variants = Vec::new();
    let handling = Handling::json_schema(&mut generator).to_value();
    let handling = handling.get("properties").and_then(Value::as_object);
    let mut handling = handling.cloned().unwrap_or_default();
    handling.values_mut().for_each(allow_vars);
    for kind in kinds {
        let mut params = params(kind, &mut generator);
        if let Some(properties) = params.get_mut("properties").and_then(Value::as_object_mut) {
            properties.values_mut().for_each(allow_vars);
        }
        let about = description(&params);
        let needs = params.get("required").and_then(Value::as_array);
        let bare = needs.is_none_or(Vec::is_empty);
        let params = if bare {
            json!({ "anyOf": [params, { "type": "null" }] })
        } else {
            params
        };
        let mut properties = handling.clone();
        properties.insert(kind.name.to_owned(), params);
        variants.push(json!({
            "type": "object",
            "description": format!("{about} Makes: {}.", kind.output),
            "properties": properties,
            "required": [kind.name],
            "additionalProperties": false,
        }));
    }
    let mut definitions = generator.take_definitions(true);
    definitions.values_mut().for_each(allow_vars_inside);
    definitions.insert(
        "stage".to_owned(),
        json!({ "description": "One stage: its kind, and the kind's parameters.", "oneOf": variants }),
    );
    let mut published = publish();
    allow_vars_inside(&mut published);
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pipeline recipe",
        "description": "Stages of a fine-tuning pipeline. A parameter that names a stage is an edge of the graph.",
        "type": "object",
        "properties": {
            "version": { "description": "The version of the recipe language.", "const": 1 },
            "description": { "description": "What the recipe is for.", "type": "string" },
            "vars": {
                "description": "Values to use as `${name}` in stages and outputs; `--set vars.name=value` replaces one.",
                "type": ["object", "null"],
                "propertyNames": { "pattern": r"^[\p{L}_][\p{L}\p{N}_]*$" },
            },
            "stages": {
                "description": "The stages by name. The key under the name is the kind.",
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": r"^[\p{L}\p{N}_-]+$" },
                "additionalProperties": { "$ref": "#/$defs/stage" },
            },
            "outputs": {
                "description": "Where results are published: the name of a stage and a folder inside the project.",
                "type": ["object", "null"],
                "additionalProperties": { "type": "string", "minLength": 1 },
            },
            "publish": published,
        },
        "required": ["version", "stages"],
        "additionalProperties": false,
        "$defs": definitions,
    });
    sorted(schema)
}

/// The section `publish`.
fn publish() -> Value {
    json!({
        "description": "Where `pipeline publish` puts results: the name of a stage that makes a model, an adapter or a dataset, and a repository of the Hugging Face hub. `run` publishes nothing.",
        "type": ["object", "null"],
        "additionalProperties": {
            "type": "object",
            "properties": {
                "repo": { "description": "The repository, as `owner/name`. It is made if it isn't there.", "type": "string", "minLength": 3 },
                "private": { "description": "Whether only its owner may see it.", "type": "boolean", "default": false },
                "revision": { "description": "The branch. It is made if it isn't there.", "type": "string", "minLength": 1, "default": "main" },
                "license": { "description": "The licence, by the hub's word for it, such as `apache-2.0`. By default that of the base model.", "type": "string", "minLength": 1 },
                "create_pr": { "description": "Whether the change is proposed instead of made.", "type": "boolean", "default": false },
            },
            "required": ["repo"],
            "additionalProperties": false,
        },
    })
}

/// The same value with the keys of every map sorted, whichever map `serde_json` was built with.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            let entries = entries.into_iter().map(|(key, value)| (key, sorted(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(sorted).collect()),
        scalar => scalar,
    }
}

/// Allows `${name}` wherever the schema wants something other than an arbitrary text.
fn allow_vars(schema: &mut Value) {
    allow_vars_inside(schema);
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    let text = |kind: &Value| kind == "string";
    let any_text = match map.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(text),
        Some(kind) => text(kind),
        None => !["enum", "const", "$ref", "anyOf", "oneOf", "allOf"]
            .iter()
            .any(|key| map.contains_key(*key)),
    };
    if any_text
        && !["enum", "const", "pattern", "format"]
            .iter()
            .any(|key| map.contains_key(*key))
    {
        return;
    }
    // Title, description and default stay in the outer schema, where editors look for them.
    let mut outer = Map::new();
    for key in ["description", "default", "x-neutral"] {
        if let Some(value) = map.remove(key) {
            outer.insert(key.to_owned(), value);
        }
    }
    let inner = Value::Object(std::mem::take(map));
    let var = json!({ "type": "string", "pattern": r"\$\{" });
    outer.insert("anyOf".to_owned(), json!([inner, var]));
    *map = outer;
}

/// [`allow_vars`] for the elements and fields of a schema.
fn allow_vars_inside(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key).filter(|inner| inner.is_object()) {
            allow_vars(inner);
        }
    }
    if let Some(properties) = map.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(allow_vars);
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(parts) = map.get_mut(key).and_then(Value::as_array_mut) {
            parts.iter_mut().for_each(allow_vars_inside);
        }
    }
}

/// The reference of stages in Markdown, from the same structs.
pub fn reference(kinds: &[Kind]) -> String {
    let mut text = String::from("# Stages\n\nGenerated from the parameter structs; do not edit.\n");
    _ = writeln!(
        text,
        "\nA setting marked *neutral* can't change the result, so changing it makes nothing stale.\n"
    );
    for kind in kinds {
        let name = kind.name;
        _ = writeln!(text, "- [`{name}`](#{name}) makes `{}`", kind.output);
    }
    text.push_str("\n## Beside the kind\n\n");
    text.push_str(
        "Settings of the runner stand beside a stage's kind, and changing them makes nothing stale: ",
    );
    text.push_str(
        "`tuned: { train_orpo: { .. }, retries: 2, timeout: 8h, resources: { memory: 20GiB } }`.\n",
    );
    let mut generator = SchemaGenerator::default();
    let handling = Handling::json_schema(&mut generator).to_value();
    let resources = Resources::json_schema(&mut generator).to_value();
    let definitions = generator.take_definitions(true);
    text.push_str("\n| key | type | default | meaning |\n|---|---|---|---|\n");
    for (prefix, schema) in [("", handling), ("resources.", resources)] {
        for parameter in Parameters::read(&schema).0 {
            row(&mut text, prefix, &parameter, &definitions);
        }
    }
    for kind in kinds {
        let mut generator = SchemaGenerator::default();
        let schema = params(kind, &mut generator);
        let definitions = generator.take_definitions(true);
        let about = description(&schema);
        _ = writeln!(
            text,
            "\n## {}\n\n{about}\n\nMakes: `{}`.",
            kind.name, kind.output
        );
        let parameters = Parameters::read(&schema).0;
        if parameters.is_empty() {
            text.push_str("\nNo parameters.\n");
            continue;
        }
        text.push_str("\n| parameter | type | default | meaning |\n|---|---|---|---|\n");
        for parameter in parameters {
            row(&mut text, "", &parameter, &definitions);
        }
    }
    text
}

/// One row of a table of parameters.
fn row(text: &mut String, prefix: &str, parameter: &Parameter, definitions: &Map<String, Value>) {
    let default = match parameter.schema.get("default") {
        Some(Value::Null | Value::Object(_)) => String::new(),
        Some(default) => constant(default),
        None if parameter.required => "*required*".to_owned(),
        None => String::new(),
    };
    let neutral = parameter.schema.get("x-neutral").is_some();
    let mut meaning = parameter.description.replace('\n', " ");
    if neutral {
        meaning.push_str(" *Neutral.*");
    }
    _ = writeln!(
        text,
        "| `{prefix}{}` | {} | {} | {} |",
        parameter.name,
        cell(&type_name(&parameter.schema, definitions)),
        cell(&default),
        cell(meaning.trim()),
    );
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// A type in words.
fn type_name(schema: &Value, definitions: &Map<String, Value>) -> String {
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
        let name = name.rsplit('/').next().unwrap_or(name);
        return match definitions.get(name) {
            Some(definition) if definition.get("$ref").is_none() => {
                type_name(definition, definitions)
            }
            _ => name.to_owned(),
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

fn constant(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// The parameters of a kind as people read them at a terminal: name, type, default and the first sentence.
pub fn described(kind: &Kind) -> Vec<[String; 4]> {
    let mut generator = SchemaGenerator::default();
    let schema = params(kind, &mut generator);
    let definitions = generator.take_definitions(true);
    let parameters = Parameters::read(&schema).0.into_iter();
    let rows = parameters.map(|parameter| {
        let default = match parameter.schema.get("default") {
            Some(Value::Null | Value::Object(_)) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(default) => default.to_string(),
            None if parameter.required => "required".to_owned(),
            None => String::new(),
        };
        let meaning = parameter.description.replace('\n', " ");
        let type_name = type_name(&parameter.schema, &definitions).replace('`', "");
        [parameter.name, type_name, default, meaning]
    });
    rows.collect()
}

/// What a kind does, in its own words.
pub fn about(kind: &Kind) -> String {
    description(&params(kind, &mut SchemaGenerator::default()))
}
