//! Adapters by the real program: those that begin with a part of the weights, and several as one.

use std::fs;

use serde_json::Value;

use crate::support::program::{Project, copy, repository};

fn project(stages: &str, outputs: &str) -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden");
    copy(&golden.join("model"), &project.path("model"));
    let rows = fs::read_to_string(golden.join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(4).collect();
    project.write("rows.jsonl", &(rows.join("\n") + "\n"));
    let recipe = format!(
        "
version: 1
stages:
  pairs: {{ import_dataset: {{ path: rows.jsonl }} }}
  base: {{ import_model: {{ path: model }} }}
  chats: {{ apply_chat_template: {{ dataset: pairs }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: base, max_length: 192 }} }}
{stages}
outputs: {{ {outputs} }}
"
    );
    project.write("recipe.yaml", &recipe);
    project
}

/// What a model answers, greedily.
fn answer(project: &Project, model: &[&str]) -> Value {
    let prompt = ["--prompt", "Name a bird.", "--max-new-tokens", "12"];
    let text = project.succeeds(&[&["generate"], model, &prompt].concat());
    let row: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    row["text"].clone()
}

#[test]
fn an_adapter_that_begins_with_the_weights_becomes_one_of_the_whole_model() {
    for init in ["pissa", "olora"] {
        let stages = format!(
            "
  lora: {{ attach_lora: {{ model: base, r: 4, lora_alpha: 8, target_modules: all-linear, init_lora_weights: {init} }} }}
  rest: {{ merge: {{ model: base, adapter: lora, weight: -1 }} }}
  rest4: {{ quantize: {{ model: base, loftq: lora }} }}
  again: {{ merge: {{ model: rest, adapter: lora }} }}
  tuned: {{ train_sft: {{ model: rest, adapter: lora, dataset: tokens, max_steps: 3, learning_rate: 1.0e-2 }} }}
  tuned4: {{ train_sft: {{ model: rest4, adapter: lora, dataset: tokens, max_steps: 1 }} }}
  merged: {{ merge: {{ adapter: tuned }} }}
  difference: {{ combine_adapters: {{ model: base, adapters: [tuned, lora], weights: [1, -1], combination_type: cat }} }}
  same: {{ merge: {{ model: base, adapter: difference }} }}
"
        );
        let outputs =
            "again: out/again, merged: out/merged, same: out/same, difference: out/difference";
        let project = project(&stages, outputs);
        let ended = project.run(&["run", "recipe.yaml"]);
        assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
        // What was taken away and put back gives the model again, and what was learnt is the same beside both.
        let base = answer(&project, &["model"]);
        assert_eq!(answer(&project, &["out/again"]), base, "{init}");
        let learnt = answer(&project, &["out/merged"]);
        assert_ne!(learnt, base, "{init}");
        assert_eq!(answer(&project, &["out/same"]), learnt, "{init}");
        assert_eq!(
            answer(&project, &["out/difference", "--base", "model"]),
            learnt,
            "{init}"
        );
        let config = project.read("out/difference/adapter_config.json");
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(
            (config["r"].clone(), config["lora_alpha"].clone()),
            (8.into(), 8.into())
        );
        assert!(project.path("out/difference/chat_template.jinja").is_file());
    }
}

#[test]
fn a_part_of_the_weights_beside_all_of_them_is_told_before_anything_runs() {
    let stages = "
  lora: { attach_lora: { model: base, init_lora_weights: pissa } }
  tuned: { train_sft: { adapter: lora, dataset: tokens } }
  merged: { merge: { adapter: tuned } }
";
    let project = project(stages, "merged: out/merged");
    let ended = project.run(&["validate", "recipe.yaml"]);
    assert_ne!(ended.code, Some(0));
    let told = ended.stdout + &ended.stderr;
    assert!(told.contains("counts twice"), "{told}");
    assert!(
        told.contains("weight: -1") && told.contains("loftq: lora"),
        "{told}"
    );
}

#[test]
fn adapters_become_one_with_weights() {
    let train = "dataset: tokens, max_steps: 2, learning_rate: 1.0e-2";
    let stages = format!(
        "
  one: {{ attach_lora: {{ model: base, r: 4, seed: 1 }} }}
  two: {{ attach_lora: {{ model: base, r: 4, seed: 2, target_modules: [q_proj, down_proj] }} }}
  first: {{ train_sft: {{ adapter: one, {train} }} }}
  second: {{ train_sft: {{ adapter: two, answers: rejected, {train} }} }}
  sum: {{ combine_adapters: {{ adapters: [first, second], weights: [0.7, 0.3] }} }}
  dare: {{ combine_adapters: {{ adapters: [first, second], weights: [0.7, 0.3], combination_type: dare_ties, density: 0.5 }} }}
  merged: {{ merge: {{ adapter: sum }} }}
"
    );
    let project = project(&stages, "sum: out/sum, dare: out/dare, merged: out/merged");
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    let beside = answer(&project, &["out/sum", "--base", "model"]);
    assert_eq!(answer(&project, &["out/merged"]), beside);
    for name in ["sum", "dare"] {
        let config = project.read(&format!("out/{name}/adapter_config.json"));
        let config: Value = serde_json::from_str(&config).unwrap();
        let names = config["target_modules"].as_array().unwrap();
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(config["r"], 4);
    }
    // The same again is the same.
    let plan = project.succeeds(&["plan", "recipe.yaml"]);
    assert!(!plan.contains(" runs "), "{plan}");
    for (change, told) in [
        (
            "stages.dare.combine_adapters.weights=[1]",
            "a weight for each adapter",
        ),
        (
            "stages.sum.combine_adapters.density=0.5",
            "leaves nothing out",
        ),
        ("stages.merged.merge.weight=0", "other than 0"),
    ] {
        let ended = project.run(&["validate", "recipe.yaml", "--set", change]);
        assert_ne!(ended.code, Some(0), "{change}");
        let all = ended.stdout + &ended.stderr;
        assert!(all.contains(told), "{change}: {all}");
    }
}
