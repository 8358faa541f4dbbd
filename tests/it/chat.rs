//! `chat` and `generate` by the real program: with stages of a recipe and with folders, at a pipe.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::program::{Project, copy, repository};
use crate::support::terminal::AtTerminal;

/// A recipe of a few steps on the golden model.
const RECIPE: &str = r"
version: 1
stages:
  pairs: { import_dataset: { path: rows.jsonl } }
  base: { import_model: { path: model } }
  chats: { apply_chat_template: { dataset: pairs, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 192 } }
  base4: { quantize: { model: base } }
  start: { import_adapter: { path: adapter } }
  tuned: { train_orpo: { model: base, adapter: start, dataset: tokens, max_steps: 2, learning_rate: 1.0e-2, seed: 1 } }
  tuned4: { train_orpo: { model: base4, adapter: start, dataset: tokens, max_steps: 1, seed: 1 } }
  scores: { evaluate: { model: base, adapter: tuned, dataset: tokens, split: train, num_answers: 1 } }
  merged: { merge: { model: base, adapter: tuned } }
";

fn project() -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden");
    copy(&golden.join("model"), &project.path("model"));
    copy(&golden.join("adapter_final"), &project.path("adapter"));
    let rows = std::fs::read_to_string(golden.join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(4).collect();
    project.write("rows.jsonl", &(rows.join("\n") + "\n"));
    project.write("recipe.yaml", RECIPE);
    project
}

fn golden() -> Vec<Value> {
    let text = std::fs::read_to_string(repository().join("tests/golden/sampling/answers.json"));
    serde_json::from_str(&text.unwrap()).unwrap()
}

fn json_lines(rows: impl Iterator<Item = Value>) -> String {
    let lines: Vec<String> = rows.map(|row| row.to_string()).collect();
    lines.join("\n") + "\n"
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

const SHORT: [&str; 2] = ["--max-new-tokens", "24"];

#[test]
fn a_file_of_prompts_is_answered_as_by_transformers() {
    let project = project();
    let rows = golden();
    let prompts = rows
        .iter()
        .map(|row| json!({ "messages": row["messages"] }));
    let prompts = json_lines(prompts);
    project.write("prompts.jsonl", &prompts);
    let folders = [
        "generate",
        "adapter",
        "--base",
        "model",
        "--prompts",
        "prompts.jsonl",
        "--batch-size",
        "2",
    ];
    let arguments = [&folders[..], &SHORT].concat();
    let answers = lines(&project.succeeds(&arguments));
    for (row, answer) in rows.iter().zip(&answers) {
        let golden = &row["tuned 1.0"];
        assert_eq!(answer["text"], golden["text"]);
        assert_eq!(answer["finish_reason"], "length");
        assert_eq!(answer["prompt_tokens"], row["prompt_tokens"]);
        assert_eq!(answer["completion_tokens"], 24);
        assert_eq!(answer["prompt"], row["messages"]);
        assert!(answer["tokens_per_second"].as_f64().unwrap() > 0.);
    }
    assert_eq!(answers.len(), rows.len());

    let compared = lines(
        &project.succeeds(
            &[
                &arguments[..],
                &["--compare", "--repetition-penalty", "1.3"],
            ]
            .concat(),
        ),
    );
    for (row, answer) in rows.iter().zip(&compared) {
        assert_eq!(answer["base"]["text"], row["base 1.3"]["text"]);
        assert_eq!(answer["tuned"]["text"], row["tuned 1.3"]["text"]);
        assert_eq!(answer.get("text"), None);
    }

    // Texts, from standard input, into a file; drawn answers come again with their seed.
    let drawn = [
        "generate",
        "model",
        "--prompts",
        "-",
        "--temperature",
        "0.9",
        "--seed",
        "5",
        "-o",
        "out.jsonl",
    ];
    let drawn = [&drawn[..], &SHORT].concat();
    let ended = project.with_input(&drawn, "Why is the sky blue?\n\nName a bird.\n");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let first = project.read("out.jsonl");
    assert_eq!(lines(&first)[1]["prompt"], "Name a bird.");
    project.with_input(&drawn, "Why is the sky blue?\nName a bird.\n");
    let texts = |text: &str| {
        lines(text)
            .iter()
            .map(|line| line["text"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(texts(&project.read("out.jsonl")), texts(&first));
}

#[test]
fn a_text_is_gone_on_with_and_ends_where_it_should() {
    let project = project();
    let raw = [
        "generate",
        "model",
        "--raw",
        "--prompt",
        "Once upon a time",
        "--max-new-tokens",
        "8",
    ];
    let answer = &lines(&project.succeeds(&raw))[0];
    let text = answer["text"].as_str().unwrap();
    assert_eq!(answer["completion_tokens"], 8);
    let stop: String = text.chars().skip(2).take(2).collect();
    let cut = &lines(&project.succeeds(&[&raw[..], &["--stop", &stop]].concat()))[0];
    assert_eq!(cut["finish_reason"], "stop");
    assert_eq!(cut["text"], text[..text.find(&stop).unwrap()]);
}

#[test]
fn a_conversation_goes_through_a_pipe() {
    let project = project();
    let rows = golden();
    let said = rows[0]["messages"][0]["content"].as_str().unwrap();
    let chat = [&["chat", "model"][..], &SHORT].concat();
    let ended = project.with_input(&chat, &format!("{said}\n"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let expected = rows[0]["base 1.0"]["text"].as_str().unwrap();
    assert_eq!(ended.stdout.trim_end(), harmless(expected).trim_end());

    // What was said before counts, until it is forgotten; the conversation is kept as rows of a dataset.
    let talk = "Name a bird.\nAnd a fish?\n/save talk.jsonl\n/reset\nName a bird.\n/save talk.jsonl\n/quit\nnever\n";
    let ended = project.with_input(&[&chat[..], &["--system", "Be brief."]].concat(), talk);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let saved = lines(&project.read("talk.jsonl"));
    let messages = |row: &Value| row["messages"].as_array().unwrap().clone();
    assert_eq!(
        (messages(&saved[0]).len(), messages(&saved[1]).len()),
        (5, 3)
    );
    assert_eq!(messages(&saved[0])[2], messages(&saved[1])[2]);
    assert_eq!(
        messages(&saved[0])[0],
        json!({ "role": "system", "content": "Be brief." })
    );
    project.write(
        "again.yaml",
        "version: 1\nstages:\n  talk: { import_dataset: { path: talk.jsonl } }\n",
    );
    project.succeeds(&["run", "again.yaml"]);

    let both = project.with_input(
        &[
            "chat",
            "adapter",
            "--base",
            "model",
            "--compare",
            "--max-new-tokens",
            "3",
        ],
        "Hi\n",
    );
    let (base, tuned) = (both.stdout.find("base: "), both.stdout.find("tuned: "));
    assert!(base.is_some() && base < tuned, "{}", both.stdout);
    let drawn = project.with_input(
        &[&chat[..], &["--max-new-tokens", "3"]].concat(),
        "/set temperature warm\n",
    );
    assert_eq!(
        drawn.code,
        Some(2),
        "twice the same option: {}",
        drawn.stderr
    );
}

/// The text as the program prints it.
fn harmless(text: &str) -> String {
    pipeline::report::harmless(text).into_owned()
}

#[test]
fn any_stage_that_leads_to_a_model_answers() {
    let project = project();
    let early = project.run(&["chat", "recipe.yaml"]);
    assert_eq!(early.code, Some(1));
    assert!(
        early.stderr.contains("pipeline run recipe.yaml"),
        "{}",
        early.stderr
    );
    project.succeeds(&["run", "recipe.yaml"]);
    let ask = |stage: &str, more: &[&str]| {
        let arguments = [
            "generate",
            "recipe.yaml",
            stage,
            "--prompt",
            "Name a bird.",
            "--max-new-tokens",
            "6",
        ];
        lines(&project.succeeds(&[&arguments[..], more].concat())).remove(0)
    };
    let tuned = ask("tuned", &["--compare"]);
    let base = ask("base", &[]);
    assert_eq!(tuned["base"]["text"], base["text"]);
    assert_ne!(tuned["tuned"]["text"], base["text"]);
    // An evaluation leads to what it scored, and a merged model knows what it was made of.
    assert_eq!(ask("scores", &[])["text"], tuned["tuned"]["text"]);
    let merged = ask("merged", &["--compare"]);
    assert_eq!(merged["base"]["text"], base["text"]);
    // An adapter from elsewhere belongs to the model that the recipe uses it with.
    ask("start", &[]);
    // In 4 bits.
    let four_bit = ask("tuned4", &["--compare"]);
    assert_eq!(four_bit["base"]["text"], ask("base4", &[])["text"]);
    // Without a stage it is the last one with a result.
    let last = lines(&project.succeeds(&[
        "generate",
        "recipe.yaml",
        "--prompt",
        "Name a bird.",
        "--max-new-tokens",
        "6",
    ]));
    assert_eq!(last[0]["text"], merged["tuned"]["text"]);
    // `evaluate` answers in the same way.
    let record = project
        .records()
        .into_iter()
        .find(|record| record["stage"] == "scores")
        .unwrap();
    let answers = project.read(&format!(
        ".pipeline/v1/artifacts/{}/answers.jsonl",
        record["artifact"].as_str().unwrap()
    ));
    let scored = &lines(&answers)[0];
    let raw = [
        "generate",
        "recipe.yaml",
        "tuned",
        "--template",
        "plain.jinja",
        "--max-new-tokens",
        "64",
        "--prompt",
    ];
    project.write("plain.jinja", "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<|eot_id|>{% endif %}{% endfor %}");
    let asked =
        lines(&project.succeeds(&[&raw[..], &[scored["prompt"].as_str().unwrap()]].concat()));
    assert_eq!(asked[0]["text"], scored["adapter"]);

    // A result that is stale is told.
    let stale = project.run(&[
        "generate",
        "recipe.yaml",
        "tuned",
        "--set",
        "stages.tuned.train_orpo.beta=0.5",
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
    ]);
    assert!(
        stale.code == Some(0) && stale.stderr.contains("stale"),
        "{stale:?}"
    );
}

#[test]
fn what_can_not_answer_says_why() {
    let project = project();
    project.refuses(&["chat", "recipe.yaml", "tokens"], "choose one of");
    project.refuses(&["chat", "recipe.yaml", "tune"], "did you mean `tuned`");
    project.refuses(&["chat", "nowhere"], "`nowhere` is no recipe and no folder");
    project.refuses(&["chat", "home"], "neither a model");
    project.refuses(&["chat", "adapter"], "--base DIR");
    project.refuses(&["chat", "model", "stage"], "is a folder");
    project.refuses(&["generate", "model"], "there is no prompt");
    project.refuses(
        &["generate", "model", "--prompt", "x", "--top-p", "3"],
        "`top_p` is 3",
    );
    project.refuses(
        &["generate", "model", "--prompt", "x", "--temperature", "-1"],
        "`temperature` is -1",
    );
    project.refuses(
        &[
            "generate", "model", "--prompt", "x", "--greedy", "--top-p", "0.3",
        ],
        "--greedy",
    );
    project.refuses(
        &["generate", "model", "--prompt", "x", "--compare"],
        "--base DIR",
    );
    project.refuses(
        &["generate", "model", "--prompts", "none.jsonl"],
        "none.jsonl",
    );
    project.write("bad.jsonl", "{\"prompt\": \"x\"}\n{\"text\": \"y\"}\n");
    project.refuses(
        &["generate", "model", "--prompts", "bad.jsonl"],
        "line 2 of `bad.jsonl`",
    );
    project.refuses(
        &[
            "generate",
            "model",
            "--prompt",
            "x",
            "--template",
            "none.jinja",
        ],
        "none.jinja",
    );
    project.write("loud.jinja", "{{ raise_exception('only in French') }}");
    project.refuses(
        &[
            "generate",
            "model",
            "--prompt",
            "x",
            "--template",
            "loud.jinja",
        ],
        "only in French",
    );
    // A model that never learnt to talk.
    std::fs::remove_file(project.path("model/chat_template.jinja")).unwrap();
    let config = project.read("model/tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    project.write("model/tokenizer_config.json", &config.to_string());
    project.refuses(&["chat", "model"], "no chat template");
    project.refuses(&["generate", "model", "--prompt", "x"], "--raw");
    project.write("model/model.safetensors", "junk");
    project.refuses(&["chat", "model"], "model.safetensors");
}

#[test]
fn rows_of_one_answer_are_scored_and_answered() {
    let project = project();
    let rows = [
        json!({ "prompt": "What is 2 + 2?", "response": "4." }),
        json!({ "prompt": "Name a bird.", "response": "A robin." }),
    ];
    let rows = json_lines(rows.into_iter());
    project.write("sft.jsonl", &rows.replace("response", "completion"));
    project.write(
        "sft.yaml",
        "version: 1
stages:
  rows: { import_dataset: { path: sft.jsonl } }
  base: { import_model: { path: model } }
  chats: { apply_chat_template: { dataset: rows, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 192 } }
  start: { import_adapter: { path: adapter } }
  scores: { evaluate: { model: base, adapter: start, dataset: tokens, split: train, num_answers: 2, max_new_tokens: 5 } }
",
    );
    let ended = project.run(&["run", "sft.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("perplexity"), "{}", ended.stderr);
    let record = project
        .records()
        .into_iter()
        .find(|record| record["stage"] == "scores")
        .unwrap();
    let folder = format!(
        ".pipeline/v1/artifacts/{}",
        record["artifact"].as_str().unwrap()
    );
    let scores: Value =
        serde_json::from_str(&project.read(&format!("{folder}/scores.json"))).unwrap();
    for part in ["base", "adapter"] {
        let (loss, perplexity) = (&scores[part]["loss"], &scores[part]["perplexity"]);
        assert!((loss.as_f64().unwrap().exp() / perplexity.as_f64().unwrap() - 1.).abs() < 1e-9);
        assert!(scores[part].get("rewards/accuracies").is_none());
    }
    let answers = lines(&project.read(&format!("{folder}/answers.jsonl")));
    assert_eq!(answers.len(), 2);
    assert!(answers[0].get("rejected").is_none() && answers[0]["adapter"].is_string());
    let shown = project.succeeds(&["show", "sft.yaml", "scores"]);
    assert!(shown.contains("perplexity"), "{shown}");

    let dpo = project.run(&[
        "run",
        "sft.yaml",
        "--set",
        "stages.scores.evaluate.loss=dpo",
    ]);
    assert!(
        dpo.code == Some(1) && dpo.stderr.contains("no rejected answers"),
        "{}",
        dpo.stderr
    );
}

#[test]
fn at_a_terminal_ctrl_c_ends_an_answer_and_then_the_conversation() {
    let project = project();
    // An answer that does not end by itself meanwhile: there is room, and no token ends it.
    for file in ["model/config.json", "model/generation_config.json"] {
        let mut config: Value = serde_json::from_str(&project.read(file)).unwrap();
        config["eos_token_id"] = json!([]);
        if file == "model/config.json" {
            config["max_position_embeddings"] = 131_072.into();
        }
        project.write(file, &config.to_string());
    }
    let chat = ["chat", "model", "--max-new-tokens", "100000"];
    let mut terminal = AtTerminal::start(&project, &chat);
    let interrupted = |terminal: &mut AtTerminal| {
        terminal.wait_for(">>> ");
        terminal.say("Name a bird.\r");
        // The line, and then the answer's first tokens.
        terminal.wait_for("\n");
        std::thread::sleep(Duration::from_millis(500));
        terminal.interrupt();
        terminal.wait_for(", interrupted");
    };
    interrupted(&mut terminal);
    terminal.wait_for(">>> ");
    terminal.say("/set max_new_tokens 3\r");
    terminal.wait_for("max_new_tokens 3");
    terminal.wait_for(">>> ");
    terminal.say("/nonsense\r");
    terminal.wait_for("there is no command `/nonsense`");
    terminal.wait_for(">>> ");
    terminal.say("\"\"\"two\r");
    terminal.wait_for("... ");
    terminal.say("lines\"\"\"\r");
    terminal.wait_for("3 tokens, ");
    terminal.wait_for(">>> ");
    // The line editor takes it as a key; the first one is a warning.
    terminal.say("\u{3}");
    terminal.wait_for("Ctrl-C again");
    terminal.wait_for(">>> ");
    terminal.say("\u{3}");
    assert_eq!(terminal.ended(), Some(0));

    // A signal does not come from the keyboard there, and leaves at once.
    let mut terminal = AtTerminal::start(&project, &chat);
    interrupted(&mut terminal);
    terminal.wait_for(">>> ");
    terminal.interrupt();
    assert_eq!(terminal.ended(), Some(130));
}

#[test]
fn two_answers_stand_side_by_side() {
    let project = project();
    let chat = [
        "chat",
        "adapter",
        "--base",
        "model",
        "--compare",
        "--max-new-tokens",
        "5",
    ];
    let mut terminal = AtTerminal::start(&project, &chat);
    terminal.wait_for(">>> ");
    terminal.say("Name a bird.\r");
    let heading = terminal.wait_for("tuned  ");
    assert!(heading.contains("base  "), "{heading:?}");
    terminal.wait_for("5 tokens, ");
    terminal.wait_for(" │ 5 tokens, ");
    terminal.wait_for(">>> ");
    // Ctrl-D.
    terminal.say("\u{4}");
    assert_eq!(terminal.ended(), Some(0));
}
