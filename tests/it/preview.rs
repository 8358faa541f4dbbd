//! `preview`, and the lints that it shares with the stages.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use crate::support::program::{Project, events, repository};

const QUICKSTART: &str = "recipes/quickstart.yaml";

/// A recipe over `rows.jsonl` and the golden model, with more parameters of its two stages of text.
fn recipe(chats: &str, tokens: &str) -> String {
    format!(
        "version: 1
stages:
  rows: {{ import_dataset: {{ path: rows.jsonl }} }}
  split: {{ split_dataset: {{ dataset: rows, test_size: 10, shuffle: false, group_by: none }} }}
  base: {{ import_model: {{ path: model }} }}
  chats: {{ apply_chat_template: {{ dataset: split, tokenizer: base{chats} }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: base, max_length: 64{tokens} }} }}
"
    )
}

/// A project with rows of which one has each fault; the others are sound.
fn project() -> Project {
    let project = Project::empty();
    fs::create_dir(project.path("model")).unwrap();
    for entry in fs::read_dir(repository().join("tests/golden/model")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), project.path("model").join(entry.file_name())).unwrap();
    }
    let mut rows = String::new();
    let mut row = |prompt: &str, chosen: &str, rejected: &str| {
        let row = json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected });
        writeln!(rows, "{row}").unwrap();
    };
    for number in 1..=20 {
        let prompt = format!("What is {number}?");
        match number {
            3 => row("What is 2?", "Two, too.", "No idea."),
            5 => row(&prompt, "Five.", "Five."),
            7 => row(&prompt, &"seven ".repeat(100), "7"),
            9 => row("Say <|eot_id|> to me.", "Nine.", "No."),
            // In the last ten rows, which are held out.
            15 => row("What is 1?", "One.", "None."),
            _ => row(&prompt, &format!("It is {number}."), "No."),
        }
    }
    project.write("rows.jsonl", &rows);
    project.write("recipe.yaml", &recipe("", ""));
    project
}

fn preview(project: &Project, more: &[&str]) -> Value {
    let json = project.succeeds(&[&["preview", "recipe.yaml", "--json"], more].concat());
    serde_json::from_str(&json).unwrap()
}

/// What the lints of a stage found: counts by name.
fn lints(preview: &Value, stage: &str) -> Value {
    let stages = preview["stages"].as_array().unwrap();
    let notes = stages.iter().find(|tried| tried["stage"] == stage).unwrap();
    let lints = notes["notes"]["lints"].as_object().cloned();
    let lints = lints.unwrap_or_default().into_iter();
    lints
        .map(|(name, found)| (name, found["rows"].clone()))
        .collect()
}

#[test]
fn a_preview_shows_pieces_and_writes_nothing() {
    let project = Project::with_recipes();
    let text = project.succeeds(&["preview", QUICKSTART, "--rows", "40", "-n", "1"]);
    for expected in [
        "row 1 of test",
        "row 1 of train",
        "  chosen (",
        "  rejected (",
        "    trained | ",
        "    prompt  | <|begin_of_text|>",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(!text.contains('\u{1b}'), "no colours without a terminal");
    let coloured = project.succeeds(&["preview", QUICKSTART, "-n", "1", "--color", "always"]);
    assert!(coloured.contains('\u{1b}'));
    let ids = project.succeeds(&["preview", QUICKSTART, "base", "-n", "1", "--ids"]);
    assert!(ids.contains("  <|begin_of_text|>\n"), "{ids}");
    // `base` learns prompts as well.
    let store = fs::read_dir(project.path(".pipeline")).unwrap().count();
    assert_eq!(store, 0, "nothing was written into the store");
}

#[test]
fn every_fault_of_the_rows_is_found_and_shown() {
    let project = project();
    let found = preview(&project, &["-n", "20"]);
    let expected = json!({ "duplicate_prompts": 1, "leaked_prompts": 1, "special_tokens": 1 });
    assert_eq!(lints(&found, "chats"), expected);
    let expected = json!({ "equal_answers": 1, "cut_answers": 1, "length_bias": 20 });
    assert_eq!(lints(&found, "tokens"), expected);
    let rows = found["targets"][0]["rows"].as_array().unwrap();
    let seventh = rows
        .iter()
        .find(|row| row["split"] == "train" && row["row"] == 7)
        .unwrap();
    let roles: Vec<&str> = seventh["sides"][0]["pieces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|piece| piece["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["prompt", "trained", "cut"]);
    // Fewer rows read, fewer faults found.
    let found = preview(&project, &["--rows", "4"]);
    assert_eq!(lints(&found, "tokens"), json!({}));
    // The model was never imported, and nothing is in the store.
    assert!(!project.path(".pipeline/v1/records").exists());
}

#[test]
fn a_preview_of_chats_and_of_a_dataset_shows_rows() {
    let project = project();
    let found = preview(&project, &["chats", "-n", "1"]);
    let row = &found["targets"][0]["plain_rows"][0];
    assert_eq!(row["split"], "test");
    assert!(
        row["row"]["prompt"]
            .as_str()
            .unwrap()
            .starts_with("<|begin_of_text|>")
    );
    let text = project.succeeds(&["preview", "recipe.yaml", "rows", "-n", "1"]);
    assert!(text.contains("What is 1?"), "{text}");
    let ended = project.run(&["preview", "recipe.yaml", "base"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("reads no rows"), "{}", ended.stderr);
}

#[test]
fn what_is_on_the_hub_is_said_and_not_fetched() {
    let project = project();
    let on_hub = recipe("", "").replace(
        "import_model: { path: model }",
        "download_model: { repo: some/model }",
    );
    project.write("recipe.yaml", &on_hub);
    let ended = project.run(&["preview", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("the tokenizer of `some/model` is not here"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_denied_lint_fails_whatever_ran_before_and_leaves_what_follows_fresh() {
    let project = project();
    let events_of = |arguments: &[&str]| events(&project.succeeds(arguments));
    let first = events_of(&["run", "--json", "recipe.yaml"]);
    let warned = first.iter().filter(|event| event["level"] == "warning");
    let warned: Vec<String> = warned
        .map(|event| event["text"].as_str().unwrap().to_owned())
        .collect();
    assert!(
        warned.iter().any(|text| text
            .starts_with("1 of 20 rows have a prompt that is in another split")
            && text.contains("row 1 of the split `train`, as row 5 of `test`")),
        "{warned:?}"
    );
    let denied = recipe("", ", deny_lints: [empty_answers, equal_answers]");
    project.write("recipe.yaml", &denied);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains(
            "`deny_lints` has `equal_answers`, and 1 of 20 rows have it: row 5 of the split `train`"
        ),
        "{}",
        ended.stderr
    );
    // What is not there is no reason, and the same bytes leave the rest as it was.
    project.write("recipe.yaml", &recipe(", deny_lints: [special_tokens]", ""));
    assert_eq!(project.run(&["run", "recipe.yaml"]).code, Some(1));
    let fewer = project.read("rows.jsonl").replace("<|eot_id|> ", "");
    project.write("rows.jsonl", &fewer);
    assert_eq!(
        project.ran(&["recipe.yaml"]),
        ["chats", "rows", "split", "tokens"]
    );
    project.write(
        "recipe.yaml",
        &recipe(
            ", deny_lints: [special_tokens]",
            ", deny_lints: [double_bos]",
        ),
    );
    assert_eq!(project.ran(&["recipe.yaml"]), ["tokens"]);
}

#[test]
fn a_lint_of_another_stage_is_a_mistake_of_the_recipe() {
    let project = project();
    project.write("recipe.yaml", &recipe(", deny_lints: [cut_answers]", ""));
    let ended = project.run(&["validate", "recipe.yaml"]);
    assert_eq!(ended.code, Some(2));
    assert!(
        ended
            .stderr
            .contains("put it into `deny_lints` of `tokenize`"),
        "{}",
        ended.stderr
    );
}
