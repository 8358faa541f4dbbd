//! `resources: { shards: n }`: stages of data whose rows are made by several tasks have the same bytes, say the same and fail in the same way.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::support::program::{Project, events, stages};

/// A project with rows of two splits and a recipe up to their tokens, in so many shards.
fn project(rows: usize, shards: usize, preferences: bool) -> Project {
    let project = Project::with_recipes();
    let mut lines = String::new();
    for row in 0..rows {
        // Some prompts come twice, some rows have nothing to learn, one is far too long.
        let mut value = json!({
            "prompt": format!("What is {}?", row % (rows * 3 / 4)),
            "chosen": if row % 11 == 5 { String::new() } else { format!("It is {row}. {}", "so ".repeat(row % 70)) },
        });
        if preferences {
            value["rejected"] = format!("No <|eot_id|> {row}").into();
        }
        writeln!(lines, "{value}").unwrap();
    }
    project.write("rows.jsonl", &lines);
    let resources = if shards == 0 {
        String::new()
    } else {
        format!("    resources: {{ shards: {shards}, cpus: 2 }}\n")
    };
    project.write(
        "recipe.yaml",
        &format!(
            "version: 1
stages:
  rows:
    import_dataset: {{ path: rows.jsonl }}
  split:
    split_dataset: {{ dataset: rows, test_size: 0.2 }}
  blank:
    create_model: {{ dataset: split, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2 }}
  chats:
    apply_chat_template: {{ dataset: split, template: recipes/templates/llama3.jinja, tokenizer: blank }}
{resources}  tokens:
    tokenize: {{ dataset: chats, max_length: 64 }}
{resources}"
        ),
    );
    project
}

/// What a run told of the two stages: messages, and the notes of their records.
fn told(project: &Project) -> (Vec<Value>, Vec<Value>) {
    let all = events(&project.succeeds(&["run", "recipe.yaml", "--json"]));
    let of_data = |event: &&Value| {
        event["event"] == "message" && (event["stage"] == "chats" || event["stage"] == "tokens")
    };
    let without_time = |event: &Value| {
        let mut event = event.clone();
        event.as_object_mut().unwrap().remove("time");
        event
    };
    let messages = all.iter().filter(of_data).map(without_time).collect();
    let mut notes = Vec::new();
    for stage in ["chats", "tokens"] {
        let records = project.records();
        let record = records.iter().find(|record| record["stage"] == stage);
        notes.push(record.unwrap()["notes"].clone());
    }
    (messages, notes)
}

#[test]
fn shards_make_the_same_bytes_and_say_the_same() {
    for preferences in [false, true] {
        let plain = project(2500, 0, preferences);
        let expected = told(&plain);
        assert!(!expected.0.is_empty());
        let artifacts = plain.artifacts(&["recipe.yaml"]);
        for shards in [1, 3] {
            let sharded = project(2500, shards, preferences);
            assert_eq!(told(&sharded), expected, "{shards} shards");
            assert_eq!(sharded.artifacts(&["recipe.yaml"]), artifacts);
            // How many there were is no part of what it is.
            sharded.write("recipe.yaml", &plain.read("recipe.yaml"));
            assert_eq!(sharded.ran(&["recipe.yaml"]), Vec::<String>::new());
        }
    }
    // More shards than rows.
    let few = project(4, 0, false);
    few.succeeds(&["run", "recipe.yaml"]);
    let sharded = project(4, 7, false);
    sharded.succeeds(&["run", "recipe.yaml"]);
    assert_eq!(
        sharded.artifacts(&["recipe.yaml"]),
        few.artifacts(&["recipe.yaml"])
    );
}

#[test]
fn the_first_row_that_fails_is_told_whatever_the_shards() {
    let error = |shards: usize| {
        let project = project(1200, shards, true);
        let recipe = project.read("recipe.yaml");
        let refuse = recipe.replace(
            "tokenizer: blank }",
            "tokenizer: blank, special_tokens: refuse }",
        );
        assert_ne!(refuse, recipe);
        project.write("recipe.yaml", &refuse);
        let ended = project.run(&["run", "recipe.yaml", "--json"]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let failed = stages(&events(&ended.stdout), "stage_failed");
        failed["chats"]["error"].as_str().unwrap().to_owned()
    };
    let plain = error(0);
    assert!(plain.contains("row 1 of the split `test`"), "{plain}");
    assert_eq!(error(4), plain);
}

#[test]
fn what_can_not_be_sharded_is_told_with_its_place() {
    let project = project(10, 0, false);
    let recipe = project.read("recipe.yaml");
    let wrong = recipe.replace("  split:\n", "  split:\n    resources: { shards: 2 }\n");
    assert_ne!(wrong, recipe);
    project.write("recipe.yaml", &wrong);
    project.refuses(&["validate", "recipe.yaml"], "`split_dataset` is one task");
}
