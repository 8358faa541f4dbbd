//! The JSON Schema of events, as `--json` writes them, and their reference in Markdown.

use std::fmt::Write as _;

use schemars::SchemaGenerator;
use serde_json::{Value, json};

use crate::engine::{EVENT_VERSION, Event, sorted_keys};

/// The name of the schema, by which others may refer to it. It is not an address.
const ID: &str = "urn:pipeline:events:1";

/// The schema of one line (draft 2020-12).
pub fn events_schema() -> Value {
    let mut generator = SchemaGenerator::default();
    let mut schema = <Event as schemars::JsonSchema>::json_schema(&mut generator).to_value();
    let mut definitions = Value::Object(generator.take_definitions(true));
    plain(&mut definitions);
    plain(&mut schema);
    let variants = schema.get_mut("oneOf").and_then(Value::as_array_mut);
    for variant in variants.into_iter().flatten() {
        let properties = variant.get_mut("properties").and_then(Value::as_object_mut);
        if let Some(properties) = properties {
            properties.insert("time".to_owned(), time());
        }
        let required = variant.get_mut("required").and_then(Value::as_array_mut);
        if let Some(required) = required {
            required.insert(0, json!("time"));
        }
    }
    if let Some(map) = schema.as_object_mut() {
        let text = format!("One line of `--json`: an event of a run. Version {EVENT_VERSION}.");
        map.insert("description".to_owned(), json!(text));
        map.insert("title".to_owned(), json!("pipeline event"));
        let draft = "https://json-schema.org/draft/2020-12/schema";
        map.insert("$schema".to_owned(), json!(draft));
        map.insert("$id".to_owned(), json!(ID));
        map.insert("$defs".to_owned(), definitions);
    }
    sorted_keys(schema)
}

fn time() -> Value {
    json!({ "type": "string", "format": "date-time", "description": "When it happened, in UTC." })
}

/// Takes Rust's formats of numbers out, and line ends out of texts.
fn plain(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            let format = map.get("format").and_then(Value::as_str);
            if format.is_some_and(|format| format != "date-time") {
                map.remove("format");
            }
            if let Some(text) = map.get("description").and_then(Value::as_str) {
                let text = json!(text.replace('\n', " "));
                map.insert("description".to_owned(), text);
            }
            map.values_mut().for_each(plain);
        }
        Value::Array(list) => list.iter_mut().for_each(plain),
        _ => {}
    }
}

/// The contents of `docs/reference/events.md`.
pub fn events_reference() -> String {
    let mut text = String::from("# Events as JSON\n\nGenerated from the events; do not edit.\n\n");
    _ = write!(
        text,
        "`pipeline run RECIPE --json` writes what happens to standard output, one JSON object a line, and nothing else; warnings and errors of the program itself \
         go to standard error. `pipeline history RECIPE --events RUN --json` writes the events of an earlier run. Each line has `time` (UTC) and `event`, the name of \
         what happened, beside the fields below. `schemas/events.schema.json` in the repository has the same as JSON Schema.\n\n\
         `run_started` comes first and has `version`, now {EVENT_VERSION}: it rises when a reader of the last version would misread an event. New events and new fields \
         may come without that, so leave aside what you don't know. In `values`, numbers that are not finite are the texts `NaN`, `Infinity` and `-Infinity`.\n\n\
         ```json\n\
         {{\"time\":\"2026-03-01T12:00:00.123Z\",\"event\":\"stage_skipped\",\"stage\":\"merged\"}}\n\
         ```\n"
    );
    let schema = events_schema();
    let definitions = schema.get("$defs").cloned().unwrap_or_default();
    variants(&mut text, &schema, "event", "##");
    if let Some(reason) = definitions.get("Reason") {
        text.push_str(
            "\n## Reasons\n\nEach of `reasons` has `reason` and the fields of its kind.\n",
        );
        variants(&mut text, reason, "reason", "###");
    }
    text
}

/// A section for each variant of a tagged enum.
fn variants(text: &mut String, schema: &Value, tag: &str, heading: &str) {
    let variants = schema.get("oneOf").and_then(Value::as_array);
    for variant in variants.into_iter().flatten() {
        let properties = variant.get("properties").and_then(Value::as_object);
        let name = properties
            .and_then(|properties| properties.get(tag)?.get("const")?.as_str())
            .unwrap_or_default();
        let about = variant.get("description").and_then(Value::as_str);
        _ = write!(
            text,
            "\n{heading} {name}\n\n{}\n",
            about.unwrap_or_default()
        );
        let required = variant.get("required").and_then(Value::as_array);
        let always = |field: &str| required.is_some_and(|all| all.iter().any(|one| one == field));
        let fields = properties.into_iter().flatten();
        let fields: Vec<_> = fields
            .filter(|(field, _)| *field != tag && *field != "time")
            .collect();
        if fields.is_empty() {
            continue;
        }
        text.push_str("\n| field | type | meaning |\n|---|---|---|\n");
        for (field, schema) in fields {
            let about = schema.get("description").and_then(Value::as_str);
            let sometimes = if always(field) {
                ""
            } else {
                " May be missing."
            };
            _ = writeln!(
                text,
                "| `{field}` | {} | {}{sometimes} |",
                kind(schema),
                about.unwrap_or_default().replace('|', "\\|")
            );
        }
    }
}

/// A type in words.
fn kind(schema: &Value) -> String {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let name = reference.rsplit('/').next().unwrap_or(reference);
        return match name {
            "Level" => "`info` or `warning`".to_owned(),
            "Reason" => "map, see [Reasons](#reasons)".to_owned(),
            "Number" => "number or text".to_owned(),
            other => other.to_owned(),
        };
    }
    let types = match schema.get("type") {
        Some(Value::Array(types)) => types.iter().filter_map(Value::as_str).collect(),
        Some(Value::String(one)) => vec![one.as_str()],
        _ => return "any".to_owned(),
    };
    let words = types.into_iter().map(|one| match one {
        "integer" => "whole number".to_owned(),
        "boolean" => "`true` or `false`".to_owned(),
        "string" => "text".to_owned(),
        "null" => "`null`".to_owned(),
        "array" => match schema.get("items") {
            Some(items) => format!("list of {}", kind(items)),
            None => "list".to_owned(),
        },
        "object" => match schema.get("additionalProperties") {
            Some(values) if values.is_object() => format!("map of {}", kind(values)),
            _ => "map".to_owned(),
        },
        other => other.to_owned(),
    });
    words.collect::<Vec<_>>().join(" or ")
}
