//! Files that are made from the code are current. `UPDATE_GENERATED=1 cargo test generated` writes them anew.

use std::collections::BTreeSet;
use std::fs;

use pipeline::stages::KINDS;
use serde_json::Value;

use crate::support::program::{Project, repository, update_wanted};

fn files() -> [(&'static str, String); 6] {
    let schema = serde_json::to_string_pretty(&pipeline::recipe::schema(KINDS)).unwrap();
    let events = serde_json::to_string_pretty(&pipeline::report::events_schema()).unwrap();
    [
        ("schemas/recipe.schema.json", schema + "\n"),
        (
            "docs/reference/stages.md",
            pipeline::recipe::reference(KINDS),
        ),
        ("docs/reference/cli.md", pipeline::cli::reference()),
        ("schemas/events.schema.json", events + "\n"),
        (
            "docs/reference/events.md",
            pipeline::report::events_reference(),
        ),
        ("docs/reference/support.md", pipeline::stages::support()),
    ]
}

#[test]
fn generated_files_are_current() {
    for (name, text) in files() {
        let path = repository().join(name);
        if update_wanted() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let there = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == text,
            "`{name}` is not current: UPDATE_GENERATED=1 cargo test generated"
        );
    }
}

/// ajv's strict mode, by which editors and checkers read schemas, wants a property that is required to be defined in the same place, and a
/// type where properties are.
#[test]
fn strict_readers_take_the_schemas() {
    fn walk(schema: &Value, at: &str, wrong: &mut Vec<String>) {
        let children: Vec<(String, &Value)> = match schema {
            Value::Object(map) => {
                let required = map.get("required").and_then(Value::as_array);
                let names = required.into_iter().flatten().filter_map(Value::as_str);
                let lacking = names.filter(|name| schema["properties"].get(name).is_none());
                wrong.extend(lacking.map(|name| format!("{at}: {name}")));
                let is_value = at.ends_with("/additionalProperties") || at.ends_with("/items");
                if is_value && map.contains_key("properties") && !map.contains_key("type") {
                    wrong.push(format!("{at}: no type"));
                }
                let schemas = map.iter().filter(|(key, _)| {
                    !["examples", "default", "const", "enum"].contains(&key.as_str())
                });
                schemas.map(|(key, child)| (key.clone(), child)).collect()
            }
            Value::Array(list) => (0..).map(|n: usize| n.to_string()).zip(list).collect(),
            _ => Vec::new(),
        };
        for (key, child) in children {
            walk(child, &format!("{at}/{key}"), wrong);
        }
    }
    for (name, text) in files() {
        if name.ends_with(".json") {
            let mut wrong = Vec::new();
            walk(&serde_json::from_str(&text).unwrap(), "#", &mut wrong);
            assert!(wrong.is_empty(), "{name}: {wrong:#?}");
        }
    }
}

#[test]
fn every_recipe_fits_the_schema() {
    let schema: Value = serde_json::from_str(&files()[0].1).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut seen = 0;
    for entry in fs::read_dir(repository().join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        seen += 1;
        let text = fs::read_to_string(&path).unwrap();
        let recipe: Value = serde_yaml::from_str(&text).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&recipe)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        assert!(
            text.starts_with("# yaml-language-server: $schema=../schemas/recipe.schema.json\n")
        );
        pipeline::recipe::load(&path, &[], KINDS).unwrap_or_else(|errors| panic!("{errors}"));
    }
    assert!(seen >= 3);
    let wrong: Value =
        serde_yaml::from_str("{version: 1, stages: {a: {merge: {modle: b}}}}").unwrap();
    assert!(!validator.is_valid(&wrong));
}

/// A strict reader refuses a keyword that nobody announced to it: `tests/python/check_schema.py` does.
#[test]
fn keywords_of_our_own_are_known_to_the_check_with_a_strict_reader() {
    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                if key.starts_with("x-") {
                    found.insert(format!("\"{key}\""));
                }
                collect(value, found);
            }),
            Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let check = fs::read_to_string(repository().join("tests/python/check_schema.py")).unwrap();
    let vocabulary = check
        .lines()
        .find(|line| line.starts_with("VOCABULARY = "))
        .unwrap();
    let mut found = BTreeSet::new();
    collect(&serde_json::from_str(&files()[0].1).unwrap(), &mut found);
    assert!(found.contains("\"x-artifact\""));
    for keyword in found {
        assert!(
            vocabulary.contains(&keyword),
            "{keyword} is not in {vocabulary}"
        );
    }
}

/// What a run really says.
#[test]
fn every_event_of_a_run_fits_its_schema() {
    let project = Project::with_recipes();
    let run = ["run", "--json", "recipes/quickstart.yaml"];
    let short = [
        "tuned",
        "--set",
        "stages.base.train_sft.max_steps=1",
        "--set",
        "stages.tuned.train_orpo.max_steps=1",
    ];
    let first = project.succeeds(&[&run[..], &short[..]].concat());
    let again = project.succeeds(&[&run[..], &short[..]].concat());
    let failing = ["--set", "stages.pairs.import_dataset.path=absent.jsonl"];
    let failed = project.run(&[&run[..], &failing[..]].concat());
    let schema = pipeline::report::events_schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for line in [first, again, failed.stdout]
        .iter()
        .flat_map(|text| text.lines())
    {
        let event: Value = serde_json::from_str(line).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&event)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{line}: {errors:?}");
        seen.insert(event["event"].as_str().unwrap().to_owned());
    }
    for expected in [
        "run_started",
        "stage_started",
        "stage_fresh",
        "stage_done",
        "metrics",
        "run_finished",
    ] {
        assert!(seen.contains(expected), "{expected} of {seen:?}");
    }
    let wrong = serde_json::json!({ "time": "2026-01-01T00:00:00Z", "event": "stage_flew" });
    assert!(!validator.is_valid(&wrong));
}
