//! The shape of the sources: which layer may use which, how long a file may be, and that each says what it is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::program::repository;

/// A layer and those it may use (docs/architecture.md).
const LAYERS: [(&str, &[&str]); 10] = [
    ("engine", &[]),
    ("ml", &[]),
    ("data", &[]),
    ("text", &[]),
    ("hub", &[]),
    ("remote", &["engine"]),
    ("stages", &["engine", "ml", "data", "text", "hub"]),
    ("recipe", &["engine"]),
    ("report", &["engine"]),
    (
        "cli",
        &[
            "engine", "ml", "data", "text", "hub", "stages", "recipe", "remote", "report",
        ],
    ),
];
const LONGEST: usize = 600;

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The modules after `crate::` in a text; `crate::{a, b}` is not written here.
fn uses(text: &str) -> Vec<&str> {
    text.split("crate::")
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
                .unwrap_or_default()
        })
        .collect()
}

#[test]
fn imports_run_in_one_direction() {
    let root = repository().join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 100);
    let mut wrong = Vec::new();
    for path in files {
        let inside = path.strip_prefix(&root).unwrap();
        let layer = inside
            .iter()
            .next()
            .unwrap()
            .to_str()
            .unwrap()
            .trim_end_matches(".rs");
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            assert!(
                ["lib", "main"].contains(&layer),
                "{} belongs to no layer",
                inside.display()
            );
            continue;
        };
        // Tests may look further.
        let test = inside
            .iter()
            .any(|part| ["tests", "tests.rs"].contains(&part.to_str().unwrap_or_default()));
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        if test {
            continue;
        }
        for used in uses(code) {
            if LAYERS.iter().any(|(name, _)| *name == used)
                && used != layer
                && !allowed.contains(&used)
            {
                wrong.push(format!("{}: {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "imports against the layers: {wrong:#?}");
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let mut files = Vec::new();
    sources(&repository().join("src"), &mut files);
    sources(&repository().join("tests/it"), &mut files);
    sources(&repository().join("kernels/src"), &mut files);
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("//! "),
            "{} has no module docs",
            path.display()
        );
        let lines = text.lines().count();
        assert!(
            lines <= LONGEST,
            "{} has {lines} lines; split it",
            path.display()
        );
    }
}
