//! Chat templates by the real program: built-in ones by name, and all turns of the assistant learnt (`assistant_only_loss`).

use std::fs;

use serde_json::{Value, json};

use crate::support::program::{Project, copy, repository};

fn project(recipe: &str, rows: &[Value]) -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden");
    copy(&golden.join("model"), &project.path("model"));
    copy(&golden.join("adapter_init"), &project.path("adapter"));
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    project.write("rows.jsonl", &(lines.join("\n") + "\n"));
    project.write("recipe.yaml", recipe);
    project
}

fn recipe(chats: &str) -> String {
    format!(
        "\
version: 1
stages:
  rows: {{ import_dataset: {{ path: rows.jsonl }} }}
  base: {{ import_model: {{ path: model }} }}
  chats: {{ apply_chat_template: {{ dataset: rows, tokenizer: base, {chats} }} }}
  tokens: {{ tokenize: {{ dataset: chats, max_length: 256 }} }}
  start: {{ import_adapter: {{ path: adapter }} }}
  tuned:
    train_sft:
      {{ model: base, adapter: start, dataset: tokens, learning_rate: 2.0e-3, warmup_steps: 2, lr_scheduler_type: cosine,
        weight_decay: 0.01, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, num_train_epochs: 1, seed: 3407,
        train_sampling_strategy: sequential }}
outputs: {{ chats: out/chats, tuned: out/tuned }}
"
    )
}

fn golden() -> Value {
    let path = repository().join("tests/golden/sft/assistant.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn turns(messages: &[(&str, &str)]) -> Value {
    let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = messages.iter().map(message).collect();
    json!({ "messages": messages })
}

/// What the program tells when it refuses the recipe, with line breaks as spaces.
fn refusal(project: &Project, command: &str) -> String {
    let ended = project.run(&[command, "recipe.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let words: Vec<&str> = ended.stderr.split_whitespace().collect();
    words.join(" ")
}

/// From conversations to a training: the losses are those of `SFTTrainer` with `assistant_only_loss`, with tags and without.
#[test]
fn every_turn_of_the_assistant_is_learnt_as_by_trl() {
    let golden = golden();
    let rows = golden["rows"].as_array().unwrap();
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| json!({ "messages": row["messages"] }))
        .collect();
    for template in ["template: llama3", "template: tagged.jinja"] {
        let project = project(
            &recipe(&format!("{template}, assistant_only_loss: true")),
            &rows,
        );
        let tagged = repository().join("tests/golden/templates/llama3_generation.jinja");
        fs::copy(tagged, project.path("tagged.jinja")).unwrap();
        project.succeeds(&["run", "recipe.yaml"]);
        let metrics = project.read("out/tuned/metrics.jsonl");
        let losses: Vec<f64> = metrics
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter_map(|step| step["loss"].as_f64())
            .collect();
        let theirs = golden["log_history"].as_array().unwrap();
        assert_eq!(losses.len(), theirs.len(), "{metrics}");
        for (loss, theirs) in losses.iter().zip(theirs) {
            let theirs = theirs["loss"].as_f64().unwrap();
            assert!(
                (loss - theirs).abs() < 2e-5,
                "{template}: {loss}, TRL: {theirs}"
            );
        }
    }
}

#[test]
fn a_built_in_template_goes_with_the_chats() {
    let rows = [turns(&[("user", "a"), ("assistant", "b")])];
    let project = project(&recipe("template: chatml"), &rows);
    project.succeeds(&["run", "recipe.yaml", "chats"]);
    let template = project.read("out/chats/chat_template.jinja");
    assert!(template.contains("<|im_start|>"), "{template}");
    assert!(!template.contains("{#"), "comments stay behind: {template}");
}

#[test]
fn rows_in_which_the_assistant_says_nothing_are_refused_or_dropped() {
    let rows = [
        turns(&[("user", "a"), ("assistant", "b")]),
        turns(&[("user", "c"), ("assistant", "silence")]),
        turns(&[("user", "c"), ("assistant", "d"), ("user", "e")]),
    ];
    // What stands in its tags is nothing for one of the answers.
    let quiet = "{% for m in messages %}{% if m.role == 'assistant' and m.content != 'silence' %}{% generation %}{{ m.content }}\n\
                 {% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}";
    let settings = "template: quiet.jinja, assistant_only_loss: true";
    let strict = project(&recipe(settings), &rows);
    strict.write("quiet.jinja", quiet);
    let told = refusal(&strict, "run");
    assert!(told.contains("row 2 of the split `train`"), "{told}");
    assert!(told.contains("rows_without_answer: drop"), "{told}");

    let lenient = recipe(&format!("{settings}, rows_without_answer: drop"));
    let lenient = project(&lenient, &rows);
    lenient.write("quiet.jinja", quiet);
    let ended = lenient.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("1 of 3 rows were left out"),
        "{}",
        ended.stderr
    );
}

#[test]
fn turns_that_a_template_changes_are_refused_with_the_reason() {
    let rows = [turns(&[
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ])];
    let project = project(
        &recipe("template: last.jinja, assistant_only_loss: true"),
        &rows,
    );
    project.write(
        "last.jinja",
        "{% for m in messages %}{{ m.role }}: {{ '(last) ' if loop.last }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    );
    let told = refusal(&project, "run");
    assert!(told.contains("row 1 of the split `train`"), "{told}");
    assert!(
        told.contains("message 2") && told.contains("{% generation %}"),
        "{told}"
    );
}

#[test]
fn rules_between_the_settings_are_told_before_anything_runs() {
    let rows = [turns(&[("user", "a"), ("assistant", "b")])];
    let project = project(
        &recipe("template: chatml, rows_without_answer: drop"),
        &rows,
    );
    let ended = project.run(&["plan", "recipe.yaml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let told = ended.stderr;
    assert!(told.contains("assistant_only_loss: true"), "{told}");
}
