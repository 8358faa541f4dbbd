//! Bounds of numbers: what the schema refuses the reader refuses, with the same words, and the other way round.

use std::path::Path;

use pipeline::stages::KINDS;
use serde_json::{Map, Value, json};

/// A bounded parameter: its kind, its name, and numbers at the bounds and just beyond.
struct Bounded {
    kind: &'static str,
    name: String,
    good: Vec<Value>,
    bad: Vec<Value>,
}

fn bounded(kind: &'static str, name: &str, schema: &Value) -> Option<Bounded> {
    let schema = schema.get("anyOf").map_or(schema, |parts| &parts[0]);
    let whole = schema["type"] == "integer" || schema["type"][0] == "integer";
    let number = |value: f64| {
        if whole {
            #[expect(clippy::cast_possible_truncation, reason = "bounds of integers")]
            let whole = value as i64;
            json!(whole)
        } else {
            json!(value)
        }
    };
    let step = if whole { 1. } else { 1e-3 };
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    if let Some(bound) = schema["minimum"].as_f64() {
        good.push(number(bound));
        bad.push(number(bound - step));
    }
    if let Some(bound) = schema["exclusiveMinimum"].as_f64() {
        good.push(number(bound + step));
        bad.push(number(bound));
    }
    if let Some(bound) = schema["maximum"].as_f64() {
        good.push(number(bound));
        bad.push(number(bound + step));
    }
    if let Some(bound) = schema["exclusiveMaximum"].as_f64() {
        good.push(number(bound - step));
        bad.push(number(bound));
    }
    let name = name.to_owned();
    (!bad.is_empty()).then_some(Bounded {
        kind,
        name,
        good,
        bad,
    })
}

fn all(schema: &Value) -> Vec<Bounded> {
    let mut all = Vec::new();
    for kind in KINDS {
        let properties = schema["$defs"][kind.name]["properties"].as_object();
        for (name, schema) in properties.into_iter().flatten() {
            all.extend(bounded(kind.name, name, schema));
        }
    }
    all
}

/// A recipe with the one stage.
fn recipe(kind: &str, name: &str, value: &Value) -> Value {
    let parameters = Map::from_iter([(name.to_owned(), value.clone())]);
    let stage = Map::from_iter([(kind.to_owned(), Value::Object(parameters))]);
    // With `defaults`, a schema asks for no parameter.
    json!({ "version": 1, "defaults": {}, "stages": { "it": stage } })
}

#[test]
fn the_schema_and_the_reader_refuse_the_same_numbers() {
    let schema = pipeline::recipe::schema(KINDS);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let all = all(&schema);
    assert!(all.len() > 60, "only {} bounds", all.len());
    let mut told = 0;
    for Bounded {
        kind,
        name,
        good,
        bad,
    } in all
    {
        let errors = |value: &Value| {
            let text = serde_json::to_string(&recipe(kind, &name, value)).unwrap();
            let read = pipeline::recipe::parse(Path::new("r.yaml"), &text, &[], KINDS);
            let errors = read.err().map(|errors| errors.0).unwrap_or_default();
            let own = errors.into_iter().filter(|error| {
                error.message.starts_with(&format!("`{name}` of `{kind}`"))
                    && (error.message.contains("expected") || error.message.contains("must be"))
            });
            own.map(|error| error.message).collect::<Vec<_>>()
        };
        for value in &bad {
            let place = format!("{kind}.{name}: {value}");
            assert!(!validator.is_valid(&recipe(kind, &name, value)), "{place}");
            let errors = errors(value);
            // A stage that lacks what it needs is not typed, so its numbers are not looked at.
            if errors.is_empty() {
                continue;
            }
            told += 1;
            assert_eq!(errors.len(), 1, "{place}: {errors:?}");
        }
        for value in &good {
            let place = format!("{kind}.{name}: {value}");
            assert!(validator.is_valid(&recipe(kind, &name, value)), "{place}");
        }
    }
    assert!(told > 0);
}
