//! Recipes.

use std::fmt::Write as _;

use crate::support::program::Project;

#[track_caller]
fn refused(recipe: &str, more: &[&str], words: &str) {
    let project = Project::empty();
    project.write("recipe.yaml", recipe);
    let ended = project.run(&[&["validate", "recipe.yaml"], more].concat());
    assert_eq!(ended.code, Some(2), "{:.2000}", ended.stderr);
    assert!(ended.stderr.contains(words), "{:.2000}", ended.stderr);
    assert!(ended.stderr.len() < 1 << 20, "{}", ended.stderr.len());
}

#[test]
fn vars_and_aliases_expand_within_a_budget() {
    let long = "x".repeat(100_000);
    let uses = "${a}".repeat(20_000);
    let recipe = |vars: &str, text: &str| {
        format!(
            "version: 1\nvars:\n  a: {vars}\nstages:\n  s:\n    apply_chat_template:\n      dataset: d\n      chat_template: \"{text}\"\n"
        )
    };
    refused(&recipe(&long, &uses), &[], "MiB of text");
    let map = format!(
        "{{ {} }}",
        (0..5000)
            .map(|n| format!("k{n}: 1"))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let mut lists = "version: 1\nvars:\n".to_owned();
    let _ = write!(
        lists,
        "  a: {map}\nstages:\n  s:\n    import_dataset:\n      path: ["
    );
    lists += &vec!["\"${a}\""; 1000].join(", ");
    lists += "]\n";
    refused(&lists, &[], "more than 200000 values");
    let aliases = format!(
        "version: 1\nvars:\n  a: &a {long}\n  b: [{}]\n",
        vec!["*a"; 5000].join(", ")
    );
    refused(&aliases, &[], "the limit is 16 MiB of text");
    let keys = format!(
        "version: 1\nvars:\n  a: &a\n    ? {long}\n    : 1\n  b: [{}]\n",
        vec!["*a"; 5000].join(", ")
    );
    refused(&keys, &[], "the limit is 16 MiB of text");
    let laughs = (1..9).fold(
        "version: 1\nvars:\n  a0: &a0 [x, x]\n".to_owned(),
        |text, n| {
            let before = vec![format!("*a{}", n - 1); 9].join(", ");
            format!("{text}  a{n}: &a{n} [{before}]\n")
        },
    );
    refused(&laughs, &[], "expand to too much");
}

#[test]
fn set_has_the_same_budget() {
    let recipe = "version: 1\nvars: { a: 1 }\nstages: {}\n";
    let value = format!(
        "vars.a=[&a {}, {}]",
        "x".repeat(50_000),
        vec!["*a"; 300].join(", ")
    );
    let set = ["--set", value.as_str()];
    refused(recipe, &[set, set, set].concat(), "insert more than");
}

#[test]
fn other_files_of_a_project_have_bounds_too() {
    for (name, words) in [
        ("pipeline.config.yaml", "brackets"),
        ("recipe.yaml.lock", "brackets"),
    ] {
        let project = Project::empty();
        project.write(
            "recipe.yaml",
            "version: 1\nstages: { s: { import_dataset: { path: rows.jsonl } } }\n",
        );
        project.write("rows.jsonl", "");
        project.write(name, &"[".repeat(1 << 20));
        let ended = project.run(&["plan", "recipe.yaml"]);
        assert_eq!(ended.code, Some(2), "{name}: {:.2000}", ended.stderr);
        assert!(ended.stderr.contains(words), "{:.2000}", ended.stderr);
    }
}

#[test]
fn nesting_and_many_mistakes_are_told_shortly() {
    for (open, close) in [("[", "]"), ("{a: ", "}")] {
        let recipe = format!(
            "version: 1\nvars:\n  a: {}x{}\n",
            open.repeat(20_000),
            close.repeat(20_000)
        );
        refused(&recipe, &[], "nested too deeply");
    }
    // Each mistake names what there is, and there is much.
    let mut many = "version: 1\nvars:\n".to_owned();
    for n in 0..8000 {
        let _ = writeln!(many, "  variable{n}: 1");
    }
    many += "stages:\n";
    for n in 0..8000 {
        let _ = writeln!(
            many,
            "  s{n}: {{ import_dataset: {{ path: \"${{zzzzzzzzzzzz{n}}}\" }} }}"
        );
    }
    refused(&many, &[], "there is no var");
}
