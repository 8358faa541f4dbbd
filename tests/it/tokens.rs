//! New tokens by the real program: `add_tokens`, and trainings of their rows.

use serde_json::{Value, json};

use crate::support::program::{Project, copy, repository};

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: rows.jsonl } }
  base: { import_model: { path: model } }
  wider:
    add_tokens:
      model: base
      tokens: [<tool>, </tool>]
      special_tokens: [<|im_start|>]
      pad_token: <|pad|>
      pad_to_multiple_of: 16
  chats: { apply_chat_template: { dataset: pairs, tokenizer: wider } }
  tokens: { tokenize: { dataset: chats, tokenizer: wider, max_length: 192 } }
  lora:
    attach_lora:
      model: wider
      r: 4
      target_modules: [q_proj]
      trainable_token_indices: { embed_tokens: [<tool>, </tool>], lm_head: [</tool>, 1024] }
  tuned: { train_orpo: { model: wider, adapter: lora, dataset: tokens, max_steps: 2, learning_rate: 1.0e-2, seed: 1 } }
  scores: { evaluate: { model: wider, adapter: tuned, dataset: tokens, split: train, num_answers: 1 } }
  merged: { merge: { model: wider, adapter: tuned } }
  wider4: { quantize: { model: wider } }
  lora4: { attach_lora: { model: wider4, r: 4, target_modules: [q_proj], trainable_token_indices: [<tool>] } }
  tuned4: { train_orpo: { model: wider4, adapter: lora4, dataset: tokens, max_steps: 1, seed: 1 } }
  whole: { attach_lora: { model: wider, r: 4, target_modules: [q_proj], modules_to_save: [embed_tokens, lm_head] } }
  tuned_whole: { train_orpo: { model: wider, adapter: whole, dataset: tokens, max_steps: 1, seed: 1 } }
outputs: { wider: out/wider, tuned: out/tuned, merged: out/merged, tuned4: out/tuned4, tuned_whole: out/whole }
";

fn project() -> Project {
    let project = Project::empty();
    copy(
        &repository().join("tests/golden/model"),
        &project.path("model"),
    );
    let rows = (0..4).map(|n| {
        let row = json!({
            "prompt": format!("Use the <tool> number {n}"),
            "chosen": format!("<tool>{n}</tool>"),
            "rejected": "I can't.",
        });
        row.to_string() + "\n"
    });
    project.write("rows.jsonl", &rows.collect::<String>());
    project.write("recipe.yaml", RECIPE);
    project
}

fn read(project: &Project, name: &str) -> Value {
    serde_json::from_str(&project.read(name)).unwrap()
}

#[test]
fn tokens_are_added_trained_and_merged() {
    let project = project();
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    // `lora4` names no rows of the head, which is its own.
    assert_eq!(
        ended.stderr.matches("trains both rows of a token").count(),
        1
    );

    let config = read(&project, "out/wider/config.json");
    assert_eq!(
        (&config["vocab_size"], &config["pad_token_id"]),
        (&json!(1040), &json!(1026))
    );
    let generation = read(&project, "out/wider/generation_config.json");
    assert_eq!(generation["pad_token_id"], 1026);
    assert_eq!(generation["eos_token_id"], 1019);
    let settings = read(&project, "out/wider/tokenizer_config.json");
    assert_eq!(settings["pad_token"], "<|pad|>");
    assert_eq!(
        settings["additional_special_tokens"],
        json!(["<|im_start|>"])
    );
    let tokenizer = read(&project, "out/wider/tokenizer.json");
    let added = tokenizer["added_tokens"].as_array().unwrap();
    for (text, id, special) in [
        ("<tool>", 1024, false),
        ("</tool>", 1025, false),
        ("<|pad|>", 1026, true),
        ("<|im_start|>", 1027, true),
    ] {
        let token = added.iter().find(|token| token["content"] == text).unwrap();
        assert_eq!(
            (&token["id"], &token["special"]),
            (&json!(id), &json!(special))
        );
    }
    let records = project.records();
    let record = records
        .iter()
        .find(|record| record["stage"] == "wider")
        .unwrap();
    assert_eq!(record["notes"]["new_tokens"], 4);
    assert_eq!(record["notes"]["rows"], 1040);
    assert_eq!(record["notes"]["ids"]["</tool>"], 1025);

    let adapter = read(&project, "out/tuned/adapter_config.json");
    let indices = json!({ "embed_tokens": [1024, 1025], "lm_head": [1025, 1024] });
    assert_eq!(adapter["trainable_token_indices"], indices);
    let adapter = read(&project, "out/tuned4/adapter_config.json");
    assert_eq!(adapter["trainable_token_indices"], json!([1024]));

    // The adapter beside its base and the merged model say the same, and what is merged lasts.
    let ask = [
        "--prompt",
        "Use the <tool> number 1",
        "--max-new-tokens",
        "12",
    ];
    let answer = |folder: &[&str]| {
        let told = project.succeeds(&[&["generate"], folder, &ask].concat());
        serde_json::from_str::<Value>(&told).unwrap()["text"].clone()
    };
    let beside = answer(&["out/tuned", "--base", "out/wider"]);
    assert_eq!(beside, answer(&["out/merged"]));
    assert_eq!(beside, answer(&["recipe.yaml", "merged"]));
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&["recipe.yaml"]), nothing);
}

#[test]
fn mistakes_with_tokens_are_told() {
    let project = project();
    let set = |value: &str| format!("stages.wider.add_tokens.{value}");
    for (value, expected) in [
        ("tokens=[<a>,<a>]", "`<a>` stands there twice"),
        ("special_tokens=['']", "expected texts that are not empty"),
        ("special_tokens=[<tool>]", "`<tool>` is among `tokens`, too"),
        ("pad_to_multiple_of=0", "expected a number from 1"),
    ] {
        let ended = project.run(&["validate", "recipe.yaml", "--set", &set(value)]);
        assert_eq!(ended.code, Some(2), "{value}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{value}: {}", ended.stderr);
    }
    project.write("none.yaml", "version: 1\nstages:\n  base: { import_model: { path: model } }\n  wider: { add_tokens: { model: base } }\n");
    project.refuses(&["validate", "none.yaml"], "expected tokens to add");
    let trained = |value: &str| format!("stages.lora.attach_lora.trainable_token_indices={value}");
    for (value, expected) in [
        ("[<tool>,<tool>]", "`<tool>` stands there twice"),
        ("{q_proj: [1]}", "`q_proj` has no rows of tokens"),
        ("[]", "expected at least one token"),
        ("[-1]", "trainable_token_indices"),
    ] {
        let ended = project.run(&["validate", "recipe.yaml", "--set", &trained(value)]);
        assert_eq!(ended.code, Some(2), "{value}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{value}: {}", ended.stderr);
    }
    for (value, expected) in [
        (
            "[<nowhere>]",
            "`<nowhere>`, which is no token of the model\n           hint: `add_tokens`",
        ),
        (
            "[5000]",
            "has the token 5000, but the model's vocabulary has 1040",
        ),
    ] {
        let ended = project.run(&["run", "recipe.yaml", "lora", "--set", &trained(value)]);
        assert_eq!(ended.code, Some(1), "{value}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{value}: {}", ended.stderr);
    }
    // An adapter whose tokens its base does not have.
    project.succeeds(&[
        "run",
        "recipe.yaml",
        "lora",
        "--set",
        "outputs.lora=out/lora",
    ]);
    project.refuses(
        &["generate", "out/lora", "--base", "model", "--prompt", "x"],
        "a row for the token 1025, but the model's vocabulary has 1024",
    );
}
