//! Files that are made from the code are current. `UPDATE_GENERATED=1 cargo test generated` writes them anew.

use std::fs;

use pipeline::stages::KINDS;
use serde_json::Value;

use crate::support::program::{repository, update_wanted};

fn files() -> [(&'static str, String); 4] {
    let schema = serde_json::to_string_pretty(&pipeline::recipe::schema(KINDS)).unwrap();
    [
        ("schemas/recipe.schema.json", schema + "\n"),
        (
            "docs/reference/stages.md",
            pipeline::recipe::reference(KINDS),
        ),
        ("docs/reference/cli.md", pipeline::cli::reference()),
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
