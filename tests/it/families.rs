//! Families of models by the real program: made, quantised, trained, scored, merged and asked.

use std::fs;

use serde_json::Value;

use crate::support::program::{Project, copy, repository};

/// A recipe that makes a model of a family and uses it in every way.
fn recipe(family: &str, more: &str) -> String {
    format!(
        r"
version: 1
stages:
  pairs: {{ import_dataset: {{ path: rows.jsonl }} }}
  llama: {{ import_model: {{ path: model }} }}
  base: {{ create_model: {{ tokenizer: llama, family: {family}, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4,
    num_attention_heads: 4, initializer_range: 0.1, {more} }} }}
  base4: {{ quantize: {{ model: base }} }}
  chats: {{ apply_chat_template: {{ dataset: pairs, tokenizer: base }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: base, max_length: 192 }} }}
  start: {{ attach_lora: {{ model: base, r: 4 }} }}
  all: {{ attach_lora: {{ model: base4, r: 2, target_modules: all-linear, modules_to_save: [model.norm] }} }}
  tuned: {{ train_orpo: {{ model: base, adapter: start, dataset: tokens, max_steps: 2, learning_rate: 1.0e-2 }} }}
  tuned4: {{ train_orpo: {{ model: base4, adapter: all, dataset: tokens, max_steps: 1 }} }}
  scores: {{ evaluate: {{ model: base, adapter: tuned, dataset: tokens, split: train, num_answers: 1 }} }}
  merged: {{ merge: {{ model: base, adapter: tuned }} }}
  whole: {{ train_sft: {{ model: merged, dataset: tokens, max_steps: 1, packing: true }} }}
outputs: {{ base: out/base, tuned: out/tuned, tuned4: out/tuned4, merged: out/merged, whole: out/whole }}
"
    )
}

fn project(family: &str, more: &str) -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden");
    copy(&golden.join("model"), &project.path("model"));
    let rows = fs::read_to_string(golden.join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(4).collect();
    project.write("rows.jsonl", &(rows.join("\n") + "\n"));
    project.write("recipe.yaml", &recipe(family, more));
    project
}

/// What a model answers, greedily.
fn answer(project: &Project, model: &[&str]) -> Value {
    let prompt = ["--prompt", "Name a bird.", "--max-new-tokens", "12"];
    let text = project.succeeds(&[&["generate"], model, &prompt].concat());
    let row: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    row["text"].clone()
}

fn goes_all_the_way(family: &str, more: &str, targets: &[&str]) {
    let project = project(family, more);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(
        ended.code,
        Some(0),
        "{family}: {}{}",
        ended.stdout,
        ended.stderr
    );
    for name in ["base", "merged", "whole"] {
        let config = project.read(&format!("out/{name}/config.json"));
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["model_type"], family);
    }
    let config = project.read("out/tuned/adapter_config.json");
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(targets));
    // The merged model says what the adapter says beside its base.
    let beside = answer(&project, &["out/tuned", "--base", "out/base"]);
    assert_eq!(answer(&project, &["out/merged"]), beside, "{family}");
    let shown = project.succeeds(&["show", "recipe.yaml", "base"]);
    assert!(shown.contains(family), "{shown}");
}

#[test]
fn gemma_3_goes_all_the_way() {
    let more =
        "head_dim: 32, num_key_value_heads: 1, sliding_window: 16, tie_word_embeddings: true";
    goes_all_the_way("gemma3_text", more, &["q_proj", "v_proj"]);
}

#[test]
fn gemma_2_goes_all_the_way() {
    let more = "sliding_window: 16, tie_word_embeddings: true";
    goes_all_the_way("gemma2", more, &["q_proj", "v_proj"]);
}

#[test]
fn phi_3_goes_all_the_way() {
    goes_all_the_way("phi3", "num_key_value_heads: 2", &["qkv_proj"]);
}

#[test]
fn olmo_3_goes_all_the_way() {
    goes_all_the_way("olmo3", "sliding_window: 16", &["q_proj", "v_proj"]);
}

#[test]
fn smollm_3_and_granite_go_all_the_way() {
    goes_all_the_way("smollm3", "num_key_value_heads: 2", &["q_proj", "v_proj"]);
    goes_all_the_way("granite", "num_key_value_heads: 2", &["q_proj", "v_proj"]);
}
