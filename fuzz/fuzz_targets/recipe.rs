//! A recipe from anybody: it is read, or every mistake in it is told with a place inside the text.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use pipeline::recipe::{Override, parse};
use pipeline::stages::KINDS;

fuzz_target!(|text: &str| {
    // A first line `#set path=value` is an override, as from the command line.
    let first = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("#set "));
    let set = first.and_then(|line| line.split_once('='));
    let set: Vec<Override> = set
        .map(|(path, value)| Override {
            path: path.to_owned(),
            value: value.to_owned(),
        })
        .into_iter()
        .collect();
    match parse(Path::new("fuzz.yaml"), text, &set, KINDS) {
        Ok(recipe) => {
            assert_eq!(recipe.order().len(), recipe.stages.len());
            for stage in &recipe.stages {
                let params = stage.stage.params().expect("what was typed can be written");
                assert!(params.is_object());
                assert!(recipe.stage(&stage.name).is_some());
            }
        }
        Err(errors) => {
            assert!(!errors.0.is_empty());
            let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']);
            let lines = lines.count();
            for error in &errors.0 {
                if let Some(span) = error.span {
                    assert!((1..=lines).contains(&span.line), "{}", error.message);
                    assert!(span.column >= 1 && span.length >= 1);
                }
            }
            assert!(!errors.to_string().is_empty());
        }
    }
});
