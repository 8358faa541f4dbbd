//! Bounds of numbers: what the schema refuses the reader refuses, with the same words, and the other way round.

use std::path::Path;

use pipeline::stages::KINDS;
use serde_json::{Value, json};

/// A bounded parameter: its kind, its name, and numbers at the bounds and just beyond.
struct Bounded {
    kind: &'static str,
    name: String,
    good: Vec<Value>,
    bad: Vec<Value>,
}

fn bounded(kind: &'static str, name: &str, schema: &Value) -> Option<Bounded> {
    let schema = schema.get("anyOf").map_or(schema, |parts| &parts[0]);
    if schema.get("enum").is_some() {
        return None;
    }
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

/// What examples refer to.
const USUAL: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  questions: { import_dataset: { path: questions.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: 0.1 } }
  base: { import_model: { path: m } }
  chats: { apply_chat_template: { dataset: split, tokenizer: base } }
  tokens: { tokenize: { dataset: chats } }
  base4: { quantize: { model: base } }
  lora: { attach_lora: { model: base4 } }
  tuned: { train_orpo: { adapter: lora, dataset: tokens } }
  merged: { merge: { adapter: tuned } }
";

/// A recipe with one more stage of the kind, `it`.
fn recipe(kind: &str, parameters: &Value) -> Value {
    let mut recipe: Value = serde_yaml::from_str(USUAL).unwrap();
    recipe["stages"]["it"] = json!({ kind: parameters });
    recipe
}

/// The first example of each kind, with its name.
fn examples(schema: &Value) -> Vec<(&'static str, Value)> {
    let example = |kind: &'static str| (kind, schema["$defs"][kind]["examples"][0].clone());
    KINDS.iter().map(|kind| example(kind.name)).collect()
}

/// What the reader says of a recipe.
fn told(recipe: &Value) -> Vec<String> {
    let text = serde_json::to_string(recipe).unwrap();
    let read = pipeline::recipe::parse(Path::new("r.yaml"), &text, &[], KINDS);
    let errors = read.err().map(|errors| errors.0).unwrap_or_default();
    errors.into_iter().map(|error| error.message).collect()
}

#[test]
fn every_kind_has_an_example_that_is_right() {
    let schema = pipeline::recipe::schema(KINDS);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut wrong = Vec::new();
    for (kind, example) in examples(&schema) {
        assert!(example.is_object(), "{kind} has no example");
        let recipe = recipe(kind, &example);
        let told = told(&recipe);
        if !told.is_empty() || !validator.is_valid(&recipe) {
            wrong.push(format!("{kind}: {told:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Examples of parameters have the type of the parameter.
#[test]
fn examples_of_parameters_fit_them() {
    let schema = pipeline::recipe::schema(KINDS);
    let mut seen = 0;
    for kind in KINDS {
        let properties = schema["$defs"][kind.name]["properties"].as_object();
        for (name, property) in properties.into_iter().flatten() {
            let mut alone = property.clone();
            alone["$defs"] = schema["$defs"].clone();
            let validator = jsonschema::validator_for(&alone).unwrap();
            for example in property["examples"].as_array().into_iter().flatten() {
                seen += 1;
                assert!(
                    validator.is_valid(example),
                    "{}.{name}: {example}",
                    kind.name
                );
            }
        }
    }
    assert!(seen > 90, "only {seen} examples");
}

#[test]
fn the_schema_and_the_reader_refuse_the_same_numbers() {
    let schema = pipeline::recipe::schema(KINDS);
    let validator = jsonschema::validator_for(&schema).unwrap();
    let examples = examples(&schema);
    let all = all(&schema);
    let mut wrong = Vec::new();
    assert!(all.len() > 60, "only {} bounds", all.len());
    for Bounded {
        kind,
        name,
        good,
        bad,
    } in all
    {
        let with = |value: &Value| {
            let example = examples.iter().find(|(of, _)| *of == kind);
            let mut parameters = example.unwrap().1.clone();
            parameters[&name] = value.clone();
            recipe(kind, &parameters)
        };
        // Rules between parameters may be broken as well.
        let refused = |value: &Value| {
            let told = told(&with(value)).into_iter();
            let start = format!("`{name}` of `{kind}`");
            let mut told = told.filter(|message| message.starts_with(&start));
            told.any(|message| {
                message.contains("expected a number")
                    || message.contains("expected at least")
                    || message.contains("must be")
            })
        };
        let judged = bad.iter().map(|value| (value, false));
        for (value, is_good) in judged.chain(good.iter().map(|value| (value, true))) {
            if validator.is_valid(&with(value)) != is_good {
                wrong.push(format!("the schema on {kind}.{name}: {value}"));
            }
            if refused(value) == is_good {
                wrong.push(format!("the reader on {kind}.{name}: {value}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
