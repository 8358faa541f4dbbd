//! What is said of wrong recipes, word for word: `tests/golden/messages` has a recipe for each kind of mistake and what `validate` says
//! of it. `UPDATE_GENERATED=1 cargo test messages` writes the texts anew; read them then as a stranger would.

use std::fs;

use unicode_width::UnicodeWidthStr as _;

use crate::support::program::{Project, copy, repository, update_wanted};

fn messages() -> (Project, Vec<String>) {
    let project = Project::empty();
    let folder = repository().join("tests/golden/messages");
    copy(&folder, &project.path("."));
    let names = fs::read_dir(&folder).unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.strip_suffix(".yaml").map(str::to_owned)
    });
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    (project, names)
}

#[test]
fn every_message_is_as_it_was_read() {
    let (mut project, names) = messages();
    project.variable("COLUMNS", "100");
    let mut differ = Vec::new();
    for name in &names {
        let ended = project.run(&["validate", &format!("{name}.yaml")]);
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (Some(2), ""),
            "{name}: {}",
            ended.stderr
        );
        let golden = repository().join(format!("tests/golden/messages/{name}.txt"));
        if update_wanted() {
            fs::write(&golden, &ended.stderr).unwrap();
        }
        if fs::read_to_string(&golden).unwrap_or_default() != ended.stderr {
            differ.push(format!("{name}:\n{}", ended.stderr));
        }
    }
    assert!(names.len() >= 35, "{names:?}");
    assert!(
        differ.is_empty(),
        "UPDATE_GENERATED=1 cargo test messages\n{}",
        differ.join("\n")
    );
}

/// No source line, caret or sentence is wider than the terminal, but for a word that is.
#[test]
fn messages_fit_every_width() {
    let (mut project, names) = messages();
    for columns in [20, 40, 50, 80, 200] {
        project.variable("COLUMNS", &columns.to_string());
        for name in &names {
            let told = project.run(&["validate", &format!("{name}.yaml")]).stderr;
            for line in told.lines() {
                let is_one_word = line
                    .trim()
                    .split(' ')
                    .filter(|word| !word.is_empty())
                    .count()
                    <= 2;
                // Where a mistake is stays on one line.
                let is_location = line.trim_start().starts_with("--> ");
                assert!(
                    line.width() <= columns || is_one_word || is_location,
                    "{name} at {columns}: {line}"
                );
            }
            let carets = told
                .lines()
                .filter(|line| line.trim_start_matches([' ', '|']).starts_with('^'));
            let sources = told.lines().filter(|line| {
                let line = line.trim_start();
                line.split_once(" | ")
                    .is_some_and(|(number, _)| number.parse::<usize>().is_ok())
            });
            assert_eq!(
                carets.count(),
                sources.count(),
                "{name} at {columns}: {told}"
            );
        }
    }
}
