//! What trainings are estimated to take, beside what they take; and the watchdog that looks on.

use std::process::Stdio;

use serde_json::Value;

use crate::support::program::{Project, events};

/// A model that is large enough for its parts to count beside the process itself, and rows that it learns.
fn recipe(train: &str) -> String {
    format!(
        "version: 1
stages:
  pairs: {{ import_dataset: {{ path: recipes/data/pairs.jsonl, max_rows: 64 }} }}
  base:
    create_model: {{ dataset: pairs, vocab_size: 2048, hidden_size: 256, intermediate_size: 704, num_hidden_layers: 6,
                    num_attention_heads: 4, num_key_value_heads: 2 }}
  chats: {{ apply_chat_template: {{ dataset: pairs, tokenizer: base }} }}
  tokens: {{ tokenize: {{ dataset: chats, tokenizer: base, max_length: 256 }} }}
  lora: {{ attach_lora: {{ model: base, r: 16, lora_alpha: 16, target_modules: all-linear }} }}
  tuned: {{ {train}, resources: {{ cpus: 2 }} }}
"
    )
}

fn notes(project: &Project) -> Value {
    let records = project.records();
    let record = records
        .into_iter()
        .find(|record| record["stage"] == "tuned");
    record.unwrap()["notes"].clone()
}

#[test]
#[cfg(target_os = "linux")]
fn memory_is_estimated_within_a_tenth_of_what_is_measured() {
    for train in [
        "train_orpo: { model: base, adapter: lora, dataset: tokens, max_steps: 2, per_device_train_batch_size: 16, \
         gradient_checkpointing: false }",
        "train_sft: { model: base, dataset: tokens, max_steps: 2, per_device_train_batch_size: 4 }",
    ] {
        let project = Project::with_recipes();
        project.write("recipe.yaml", &recipe(train));
        let wide = ["--set", "stages.base.create_model.intermediate_size=2048"];
        project.succeeds(&[&["run", "recipe.yaml"], &wide[..]].concat());
        let notes = notes(&project);
        let estimate = notes["estimate"]["peak_memory"].as_f64().unwrap();
        let measured = notes["peak_memory"].as_f64().unwrap();
        let ratio = estimate / measured;
        assert!((0.9..1.1).contains(&ratio), "{ratio}: {notes:#}");
        assert_eq!(notes["estimate"]["counts"]["steps"], 2);
        assert_eq!(notes["estimate"]["counts"]["tokens"], notes["tokens"]);
        assert_eq!(
            notes["estimate"]["counts"]["trained_parameters"],
            notes["trained_parameters"]
        );
        // The command tells the same, and what was measured.
        let text = project.succeeds(&[&["estimate", "recipe.yaml"], &wide[..]].concat());
        for expected in [
            "memory at most",
            "weights",
            "optimiser",
            "measured in the last run",
        ] {
            assert!(text.contains(expected), "{text}");
        }
    }
}

#[test]
fn before_its_inputs_are_there_a_training_is_not_estimated() {
    let project = Project::with_recipes();
    let train = "train_sft: { model: base, dataset: tokens, max_steps: 2 }";
    project.write("recipe.yaml", &recipe(train));
    let text = project.succeeds(&["estimate", "recipe.yaml"]);
    assert!(
        text.contains("`pipeline run recipe.yaml tokens base`"),
        "{text}"
    );
    let json: Value =
        serde_json::from_str(&project.succeeds(&["estimate", "recipe.yaml", "--json"])).unwrap();
    assert_eq!(json["not_estimated"][0]["stage"], "tuned");
}

#[test]
#[cfg(target_os = "linux")]
fn what_can_not_fit_is_refused_with_advice() {
    let project = Project::with_recipes();
    let train = "train_sft: { model: base, dataset: tokens, max_steps: 2, per_device_train_batch_size: 64, \
                 gradient_checkpointing: false }";
    project.write("recipe.yaml", &recipe(train));
    let wide = ["--set", "stages.base.create_model.intermediate_size=4096"];
    project.succeeds(&[&["run", "recipe.yaml", "base", "tokens"], &wide[..]].concat());
    // A process may have half a gigabyte: more than it begins with, and less than the training takes.
    let arguments = [&["run", "recipe.yaml", "tuned"], &wide[..]].concat();
    let program = project.command(&arguments);
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "ulimit -d 500000; exec \"$0\" \"$@\""])
        .arg(program.get_program())
        .args(arguments)
        .current_dir(program.get_current_dir().unwrap())
        .env_clear()
        .envs(
            program
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stdin(Stdio::null());
    let ended = limited.output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("of memory, and there are 512 MB")
            && stderr.contains("`gradient_checkpointing: true`"),
        "{stderr}"
    );
}

#[test]
fn a_training_that_falls_apart_is_told_and_may_be_stopped() {
    let project = Project::with_recipes();
    let train = |more: &str| {
        recipe(&format!(
            "train_sft: {{ model: base, adapter: lora, dataset: tokens, learning_rate: 1.0e+6, max_steps: 40, \
             per_device_train_batch_size: 2, lr_scheduler_type: constant{more} }}"
        ))
    };
    let limit = ", loss_watchdog_threshold: 3, loss_watchdog_patience: 2";
    project.write("recipe.yaml", &train(limit));
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .contains("the loss has been above `loss_watchdog_threshold` (3) for 2 steps in a row"),
        "{}",
        ended.stderr
    );
    // Without the limit it goes on from the checkpoint of the stop, and says what is wrong.
    project.write("recipe.yaml", &train(""));
    let events = events(&project.succeeds(&["run", "--json", "recipe.yaml"]));
    let texts: Vec<&str> = events
        .iter()
        .filter_map(|event| event["text"].as_str())
        .collect();
    assert!(
        texts
            .iter()
            .any(|text| text.starts_with("goes on after step")),
        "{texts:?}"
    );
    let alarms = notes(&project)["alarms"].clone();
    let alarms = alarms.as_array().unwrap();
    assert!(
        alarms.iter().any(|alarm| alarm
            .as_str()
            .unwrap()
            .contains("`learning_rate` (now 1e6)")),
        "{alarms:?}"
    );
}
