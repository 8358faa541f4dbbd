//! The reference of stages in Markdown, from the params structs.

use std::fmt::Write as _;

use schemars::{JsonSchema as _, SchemaGenerator};
use serde_json::{Map, Value};

use crate::engine::{Bounds, Handling, Kind, Resources};

use super::parameters::{Parameter, Parameters, description, paragraphs, params, resolve};
use super::words::{constant, type_name};

/// The reference of these kinds, one section each.
pub fn reference(kinds: &[Kind]) -> String {
    let mut text = String::from("# Stages\n\nGenerated from the parameter structs; do not edit.\n");
    text.push_str(
        "\nA setting marked *neutral* can't change the result, so changing it re-runs nothing. A parameter marked *implied* may be left \
         out where the rest of the recipe says which stage is meant ([the recipe format](../recipe.md#what-can-be-left-out)).\n\n",
    );
    for kind in kinds {
        let name = kind.name;
        _ = writeln!(text, "- [`{name}`](#{name}) makes `{}`", kind.output);
    }
    text.push_str("\n## Beside the kind\n\n");
    text.push_str(
        "Settings of the runner stand beside a stage's kind, and changing them re-runs nothing:\n\n",
    );
    text.push_str(
        "```yaml\ntuned:\n  train_orpo: { .. }\n  retries: 2\n  timeout: 8h\n  resources:\n    memory: 20GiB\n```\n",
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
        section(&mut text, kind);
    }
    text
}

/// The section of one kind.
fn section(text: &mut String, kind: &Kind) {
    let mut generator = SchemaGenerator::default();
    let schema = params(kind, &mut generator);
    let definitions = generator.take_definitions(true);
    let about = paragraphs(&description(&schema));
    let (name, output) = (kind.name, kind.output);
    _ = writeln!(text, "\n## {name}\n\n{about}\n\nMakes: `{output}`.");
    let parameters = Parameters::from_kind(kind).0;
    let examples = schema.get("examples").and_then(Value::as_array);
    for example in examples.into_iter().flatten() {
        _ = write!(text, "\n```yaml\n{}```\n", yaml(name, example, &parameters));
    }
    if parameters.is_empty() {
        text.push_str("\nNo parameters.\n");
        return;
    }
    text.push_str("\n| parameter | type | default | meaning |\n|---|---|---|---|\n");
    for parameter in &parameters {
        row(text, "", parameter, &definitions);
    }
}

/// An example as it stands in a recipe: inputs first, then what is needed, then the rest by name.
fn yaml(kind: &str, example: &Value, parameters: &[Parameter]) -> String {
    let mut text = format!("{kind}:\n");
    let mut order: Vec<&Parameter> = parameters.iter().collect();
    order.sort_by_key(|parameter| (parameter.artifact().is_none(), !parameter.required));
    for parameter in order {
        if let Some(value) = example.get(&parameter.name) {
            _ = writeln!(text, "  {}: {}", parameter.name, flow(value));
        }
    }
    text
}

/// A value on one line, with quotes only where YAML needs them.
fn flow(value: &Value) -> String {
    match value {
        Value::Array(list) => {
            let list: Vec<String> = list.iter().map(flow).collect();
            format!("[{}]", list.join(", "))
        }
        Value::Object(map) => {
            let mut entries: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{key}: {}", flow(value)))
                .collect();
            entries.sort();
            format!("{{ {} }}", entries.join(", "))
        }
        Value::String(text) => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-./ ".contains(c);
            let same = serde_yaml::from_str::<Value>(text).is_ok_and(|read| read == *value);
            if same && text.chars().all(plain) {
                text.clone()
            } else {
                value.to_string()
            }
        }
        other => other.to_string(),
    }
}

/// One row of a table of parameters.
fn row(text: &mut String, prefix: &str, parameter: &Parameter, definitions: &Map<String, Value>) {
    let schema = &parameter.schema;
    let default = match schema.get("default") {
        Some(Value::Null | Value::Object(_)) => String::new(),
        Some(default) => constant(default),
        None if parameter.implied => "*implied*".to_owned(),
        None if parameter.required => "*required*".to_owned(),
        None => String::new(),
    };
    let mut meaning = parameter.description.replace("\n\n", " ");
    meaning.push_str(&meanings(schema, definitions));
    if schema.get("x-neutral").is_some() {
        meaning.push_str(" *Neutral.*");
    }
    let mut kind = type_name(schema, definitions);
    if let Some(words) = Bounds::of(schema).map(Bounds::words)
        && !words.is_empty()
    {
        kind = format!("{kind} {words}");
    }
    _ = writeln!(
        text,
        "| `{prefix}{}` | {} | {} | {} |",
        parameter.name,
        cell(&kind),
        cell(&default),
        cell(meaning.trim()),
    );
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// What each value of an enum means.
fn meanings(schema: &Value, definitions: &Map<String, Value>) -> String {
    let mut text = String::new();
    let schema = resolve(schema, definitions);
    for key in ["anyOf", "oneOf"] {
        let parts = schema.get(key).and_then(Value::as_array);
        for part in parts.into_iter().flatten() {
            let meaning = paragraphs(&description(part)).replace("\n\n", " ");
            match part.get("const") {
                Some(value) if !meaning.is_empty() => {
                    _ = write!(text, " {}: {meaning}", constant(value));
                }
                Some(_) => {}
                None => text.push_str(&meanings(part, definitions)),
            }
        }
    }
    text
}
