//! Evaluations of all kinds on a model that learnt a little, and gates: what `require` fails, and what it never computes again.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::program::{Project, events, stages};

const RECIPE: &str = "recipes/scores.yaml";
/// What is evaluated beside the quickstart's own scores.
const MORE: &str = r#"
  questions:
    import_dataset:
      path: data/questions.jsonl
      columns: { question: ask, answer: right }
  choices:
    evaluate_choices:
      adapter: tuned
      dataset: questions
      split: train
      doc_to_text: "Q: {{question}}\nA:"
  shown:
    evaluate_choices:
      model: base
      dataset: questions
      num_fewshot: 2
      fewshot_delimiter: "\n"
  answers:
    evaluate_answers:
      adapter: tuned
      dataset: tokens
      num_answers: 6
      max_new_tokens: 8
      do_sample: true
      regex_pattern: "[a-z]+"
  beside:
    evaluate:
      model: base
      baseline: blank
      dataset: tokens
      num_answers: 1
      max_new_tokens: 4
  texts:
    import_dataset:
      path: data/texts.jsonl
      split: test
  plain:
    apply_chat_template:
      dataset: texts
      tokenizer: blank
      template: templates/llama3.jinja
  text_tokens:
    tokenize:
      dataset: plain
      tokenizer: blank
  texts_read:
    evaluate:
      adapter: tuned
      dataset: text_tokens

outputs:"#;

/// A reward model with a tokenizer and a chat template of its own, and what it scores.
const REWARDS: &str = r#"
  other:
    create_model:
      dataset: split
      vocab_size: 500
      hidden_size: 64
      intermediate_size: 128
      num_hidden_layers: 2
      num_attention_heads: 4
      num_key_value_heads: 2
      max_position_embeddings: 256
  scoring:
    add_score_head: { model: other }
  reward_lora:
    attach_lora: { model: scoring, r: 4, target_modules: all-linear }
  reward_chats:
    apply_chat_template: { dataset: split, template: chatml, tokenizer: other }
  reward_tokens:
    tokenize: { dataset: reward_chats, trainer: reward, max_length: 256 }
  reward:
    train_reward: { adapter: reward_lora, dataset: reward_tokens, learning_rate: 1.0e-2, max_steps: 3 }
  reward_scores:
    evaluate:
      adapter: reward
      dataset: reward_tokens
      require: { accuracy: ">= 0", difference/margin: "> -1e9" }
  answers:
    evaluate_answers:
      adapter: tuned
      dataset: tokens
      num_answers: 6
      max_new_tokens: 8
      reward_adapter: reward
      require: { reward: "> -1e9" }
  elsewhere:
    import_dataset: { path: data/myths.jsonl, split: test }
  labelled:
    tokenize: { dataset: chats, trainer: kto, max_length: 128 }
  labelled_scores:
    evaluate:
      adapter: tuned
      dataset: labelled
      loss: kto
      undesirable_weight: 1.5
      per_device_eval_batch_size: 4
      num_answers: 0
  simpo_scores:
    evaluate:
      adapter: tuned
      dataset: tokens
      loss: simpo
      cpo_alpha: 0
      beta: 2.0
      simpo_gamma: 1.0
      num_answers: 0

outputs:"#;

/// A project in which everything ran once.
fn evaluated() -> Project {
    project_with(MORE)
}

fn project_with(more: &str) -> Project {
    let project = Project::with_recipes();
    let quickstart = project.read("recipes/quickstart.yaml");
    let (stages, outputs) = quickstart.split_once("\noutputs:").unwrap();
    let stages = stages
        .replace("      num_train_epochs: 8\n", "      max_steps: 3\n")
        .replace("    train_orpo:\n", "    train_orpo:\n      max_steps: 3\n")
        .replace("      max_new_tokens: 40\n", "      num_answers: 0\n");
    project.write(RECIPE, &format!("{stages}{more}{outputs}"));
    let questions: Vec<String> = (0..9)
        .map(|row| {
            let right = ["0", "\"B\"", "\"green tea\""][row % 3];
            format!(
                r#"{{"ask": "What is drunk at {row}?", "choices": ["water", "milk", "green tea"], "right": {right}, "id": {row}}}"#
            )
        })
        .collect();
    project.write("recipes/data/questions.jsonl", &questions.join("\n"));
    let texts: Vec<String> = (0..5)
        .map(|row| format!(r#"{{"text": "The kettle boils {row} times a day."}}"#))
        .collect();
    project.write("recipes/data/texts.jsonl", &texts.join("\n"));
    project.succeeds(&["run", RECIPE]);
    project
}

/// The record of a stage's result, its scores and the lines of its answers.
fn result(project: &Project, stage: &str, more: &[&str]) -> (Value, Value, Vec<Value>) {
    let shown = project.succeeds(&[&["show", RECIPE, stage], more].concat());
    let folder = shown
        .lines()
        .find_map(|line| line.strip_prefix("artifact"))
        .unwrap();
    let folder = Path::new(folder.trim());
    let content = folder.file_name().unwrap().to_str().unwrap();
    let mut records = project.records().into_iter();
    let record = records.find(|record| record["artifact"] == content);
    let read = |name: &str| fs::read_to_string(folder.join(name));
    let scores = serde_json::from_str(&read("scores.json").unwrap()).unwrap();
    let answers = read("answers.jsonl").unwrap_or_default();
    let answers = answers
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (record.unwrap(), scores, answers.collect())
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-9, "{a} {b}");
}

#[test]
fn each_kind_of_evaluation_compares_two_models_on_the_same_rows() {
    let project = evaluated();

    // Choices: the shares follow from the log-likelihoods that stand beside them.
    let (record, scores, answers) = result(&project, "choices", &[]);
    assert_eq!((scores["rows"].as_u64(), answers.len()), (Some(9), 9));
    for side in ["base", "adapter"] {
        let (mut acc, mut acc_norm) = (0., 0.);
        for (row, line) in answers.iter().enumerate() {
            let expected = ["water", "milk", "green tea"][row % 3];
            assert_eq!(line["chosen"], expected);
            assert_eq!(
                line["prompt"],
                format!("Q: What is drunk at {row}?\nA:").as_str()
            );
            let sums = line["log_likelihoods"][side].as_array().unwrap();
            let best = |lengths: [f64; 3]| {
                let values = sums.iter().zip(lengths).map(|(sum, n)| number(sum) / n);
                let values: Vec<f64> = values.collect();
                (0..3)
                    .max_by(|&a, &b| values[a].total_cmp(&values[b]))
                    .unwrap()
            };
            let taken = best([1.; 3]);
            assert_eq!(line[side], ["water", "milk", "green tea"][taken]);
            acc += f64::from(u8::from(taken == row % 3));
            acc_norm += f64::from(u8::from(best([5., 4., 9.]) == row % 3));
        }
        near(number(&scores[side]["acc"]), acc / 9.);
        near(number(&scores[side]["acc_norm"]), acc_norm / 9.);
    }
    let change = number(&scores["adapter"]["acc"]) - number(&scores["base"]["acc"]);
    near(number(&scores["difference"]["acc"]), change);
    let intervals = &record["notes"]["intervals"];
    let [low, high] = [0, 1].map(|end| number(&intervals["difference"]["acc"][end]));
    assert!(low <= change && change <= high, "{intervals}");
    let p = number(&intervals["p_values"]["acc"]);
    assert!((0. ..=1.).contains(&p), "{p}");

    // Examples before a question are the first others.
    let (_, _, answers) = result(&project, "shown", &[]);
    let text = |row: usize| format!("Question: What is drunk at {row}?\nAnswer:");
    let right = |row: usize| ["water", "milk", "green tea"][row % 3];
    for (row, others) in [(0, [1, 2]), (1, [0, 2]), (8, [0, 1])] {
        let examples = others.map(|other| format!("{} {}\n", text(other), right(other)));
        let expected = format!("{}{}", examples.concat(), text(row));
        assert_eq!(answers[row]["prompt"], expected.as_str());
    }

    // Answers: what is found in them decides.
    let (_, scores, answers) = result(&project, "answers", &[]);
    assert_eq!(answers.len(), 6);
    let answers_of_seed = answers.clone();
    let word = |text: &Value| {
        let text = text.as_str().unwrap();
        let start = text.find(|letter: char| letter.is_ascii_lowercase())?;
        let rest = &text[start..];
        let end = rest.find(|letter: char| !letter.is_ascii_lowercase());
        Some(rest[..end.unwrap_or(rest.len())].to_owned())
    };
    let right = |line: &&Value| word(&line["adapter"]) == word(&line["chosen"]);
    let share = answers.iter().filter(right).count() as f64 / 6.;
    near(number(&scores["adapter"]["regex_match"]), share);
    assert!(number(&scores["base"]["answer_tokens"]) <= 8.);

    // Two models, and texts without prompts.
    let (_, scores, answers) = result(&project, "beside", &[]);
    assert!(scores.get("adapter").is_none());
    let perplexity = |part: &str| number(&scores[part]["perplexity"]);
    assert!(perplexity("model") < perplexity("base"), "{scores}");
    assert!(answers[0]["model"].is_string());
    let shown = project.succeeds(&["show", RECIPE, "beside"]);
    for words in ["baseline", "95 % intervals", "p\n"] {
        assert!(shown.contains(words), "{shown}");
    }
    let (_, scores, answers) = result(&project, "texts_read", &[]);
    assert_eq!((scores["rows"].as_u64(), answers.len()), (Some(5), 0));
    let loss = number(&scores["base"]["loss"]);
    assert!((number(&scores["base"]["perplexity"]) - loss.exp()).abs() < 1e-6 * loss.exp());

    let table = project.succeeds(&["runs", RECIPE, "--json"]);
    let runs: Value = serde_json::from_str(&table).unwrap();
    assert!(
        runs[0]["metrics"]["choices.acc_norm"].is_number(),
        "{table}"
    );
    assert!(runs[0]["metrics"]["beside.perplexity"].is_number());
    project.succeeds(&["report", RECIPE, "-o", "report.html"]);
    let page = project.read("report.html");
    assert!(page.contains("acc_norm") && page.contains("The baseline"));

    // Draws depend on the seed and on the row alone, not on how many are made at a time.
    let before = project.artifacts(&[RECIPE]);
    let alone = [
        "--set",
        "stages.answers.evaluate_answers.per_device_eval_batch_size=1",
    ];
    assert_eq!(project.ran(&[&[RECIPE][..], &alone].concat()), [""; 0]);
    let forced = [RECIPE, "answers", "--force", "answers"];
    assert_eq!(project.ran(&[&forced[..], &alone].concat()), ["answers"]);
    assert_eq!(project.artifacts(&[RECIPE]), before);
    let other = ["--set", "stages.answers.evaluate_answers.seed=7"];
    assert_eq!(
        project.ran(&[&[RECIPE, "answers"][..], &other].concat()),
        ["answers"]
    );
    let (_, _, others) = result(&project, "answers", &other);
    assert_ne!(others, answers_of_seed);
}

#[test]
fn a_reward_model_scores_pairs_and_answers_by_its_own_template() {
    let project = project_with(REWARDS);

    // Pairs: the base's head is as it was drawn, that with the adapter has learnt a little.
    let (record, scores, answers) = result(&project, "reward_scores", &[]);
    assert!(answers.is_empty());
    let names = [
        "accuracy",
        "loss",
        "margin",
        "max_reward",
        "mean_reward",
        "min_reward",
    ];
    for side in ["base", "adapter", "difference"] {
        let own: Vec<&String> = scores[side].as_object().unwrap().keys().collect();
        assert_eq!(own, names, "{side}");
    }
    assert!(number(&scores["adapter"]["loss"]) < number(&scores["base"]["loss"]));
    let intervals = &record["notes"]["intervals"];
    for name in ["accuracy", "loss", "margin", "mean_reward"] {
        let value = number(&scores["adapter"][name]);
        let [low, high] = [0, 1].map(|end| number(&intervals["adapter"][name][end]));
        assert!(low <= value && value <= high, "{name}: {intervals}");
        assert!(intervals["p_values"][name].is_number(), "{name}");
    }
    assert!(intervals["adapter"].get("max_reward").is_none());

    // Answers: the mean of what each got.
    let (record, scores, answers) = result(&project, "answers", &[]);
    assert_eq!(answers.len(), 6);
    for side in ["base", "adapter"] {
        let rewards = answers
            .iter()
            .map(|line| number(&line["scores"][side]["reward"]));
        let rewards: Vec<f64> = rewards.collect();
        near(
            number(&scores[side]["reward"]),
            rewards.iter().sum::<f64>() / 6.,
        );
        assert!(
            rewards
                .iter()
                .any(|reward| (reward - rewards[0]).abs() > 1e-6)
        );
    }
    assert!(record["notes"]["intervals"]["p_values"]["reward"].is_number());
    // The same answer gets the same, whatever else is scored with it.
    let alone = [
        "--set",
        "stages.answers.evaluate_answers.per_device_eval_batch_size=1",
    ];
    let before = project.artifacts(&[RECIPE]);
    let forced = [RECIPE, "answers", "--force", "answers"];
    assert_eq!(project.ran(&[&forced[..], &alone].concat()), ["answers"]);
    assert_eq!(project.artifacts(&[RECIPE]), before);

    // Labelled answers: KTO's numbers, of which the reference gets none.
    let (_, scores, _) = result(&project, "labelled_scores", &[]);
    near(number(&scores["base"]["rewards/chosen"]), 0.);
    near(number(&scores["base"]["kl"]), 0.);
    near(number(&scores["base"]["loss"]), 0.5 * (1. + 1.5) / 2.);
    // Of preferences the chosen answers come first, so no batch has both.
    let [chosen, rejected, margin] = ["chosen", "rejected", "margins"]
        .map(|name| number(&scores["adapter"][&format!("rewards/{name}")]));
    near(margin, chosen - rejected);
    assert!(margin > 0., "{scores}");
    let (_, scores, _) = result(&project, "simpo_scores", &[]);
    near(number(&scores["adapter"]["nll_loss"]), 0.);
    assert!(number(&scores["adapter"]["loss"]) > 0.);

    // What can't be scored is told before anything is computed, or with the row.
    let told = |set: &str| {
        let ended = project.run(&["run", RECIPE, "answers", "--set", set]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        ended.stderr
    };
    let of_logits = told(
        "stages.answers.evaluate_answers={adapter: tuned, dataset: tokens, reward_model: base}",
    );
    assert!(of_logits.contains("gives logits"), "{of_logits}");
    let others = told(
        "stages.answers.evaluate_answers={adapter: tuned, dataset: tokens, reward_adapter: reward, conversations: elsewhere, num_answers: 9}",
    );
    assert!(
        others.contains("is not among the rows of `conversations`"),
        "{others}"
    );
    let ended = project.run(&[
        "plan",
        RECIPE,
        "--set",
        "stages.reward_scores.evaluate={adapter: reward, dataset: reward_tokens, simpo_gamma: 1}",
    ]);
    assert!(
        ended.stderr.contains("expected only with `loss: simpo`"),
        "{}",
        ended.stderr
    );
}

/// A run that has to fail; the stages that started, and what was told of the failed one.
fn fails(project: &Project, arguments: &[&str]) -> (Vec<String>, String) {
    let ended = project.run(&[&["run", "--json", RECIPE], arguments].concat());
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let events = events(&ended.stdout);
    let failed = stages(&events, "stage_failed");
    assert_eq!(failed.len(), 1, "{failed:?}");
    let error = failed["scores"]["error"].as_str().unwrap().to_owned();
    (
        stages(&events, "stage_started").into_keys().collect(),
        error,
    )
}

#[test]
fn a_gate_fails_a_run_and_computes_nothing_again() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let project = evaluated();
    let require = |what: &str| format!("stages.scores.evaluate.require={what}");
    let strict = require(r#"{"rewards/accuracies": ">= 1.5", "difference/perplexity": "< 1e9"}"#);
    let strict = ["--set", strict.as_str()];

    // The evaluation is there: only the gate is new.
    for _ in 0..2 {
        let (started, error) = fails(&project, &strict);
        assert_eq!(started, [""; 0]);
        assert!(
            error.contains("the scores of 60 rows of the split `test`")
                && error.contains("`rewards/accuracies` is ")
                && error.contains("required is >= 1.5")
                && !error.contains("perplexity"),
            "{error}"
        );
    }
    let plan = project.succeeds(&[&["plan", RECIPE], &strict[..]].concat());
    let line = plan
        .lines()
        .find(|line| line.starts_with("scores"))
        .unwrap();
    assert!(line.contains("fails") && line.contains(">= 1.5"), "{plan}");
    assert!(plan.contains("1 failing"), "{plan}");
    let why = project.succeeds(&[&["why", RECIPE, "scores"], &strict[..]].concat());
    assert!(why.contains("its result is up to date and stays"), "{why}");

    // Easier, nothing runs; and of an evaluation that is made anew the result stays.
    let easy = require(r#"{"rewards/accuracies": ">= 0, <= 1"}"#);
    assert_eq!(project.ran(&[RECIPE, "--set", &easy]), [""; 0]);
    let other = [&strict[..], &["--set", "stages.scores.evaluate.beta=0.3"]].concat();
    assert_eq!(fails(&project, &other).0, ["scores"]);
    assert_eq!(fails(&project, &other).0, [""; 0]);
    let beta = ["--set", "stages.scores.evaluate.beta=0.3"];
    assert_eq!(project.ran(&[&[RECIPE][..], &beta].concat()), [""; 0]);

    // Outputs stay as they were.
    fs::remove_dir_all(project.path("out")).unwrap();
    fails(&project, &strict);
    assert!(!project.path("out").exists());

    // Another machine judges what it gets from the remote, and computes nothing.
    project.succeeds(&["cache", "push", RECIPE, "--remote", &url]);
    let second = Project::empty();
    crate::support::program::copy(&project.path("recipes"), &second.path("recipes"));
    let (started, error) = fails(&second, &[&strict[..], &["--remote", &url]].concat());
    assert_eq!(started, [""; 0]);
    assert!(error.contains("required is >= 1.5"), "{error}");
}

#[test]
fn the_recipe_that_compares_methods_scores_each_on_the_same_rows() {
    let recipe = "recipes/orpo-vs-dpo.yaml";
    let project = Project::with_recipes();
    let trainings = [
        ("base", "train_sft"),
        ("orpo", "train_orpo"),
        ("sft", "train_sft"),
        ("dpo", "train_dpo"),
        ("simpo", "train_cpo"),
    ];
    let mut sets = Vec::new();
    for (stage, kind) in trainings {
        sets.push(format!("stages.{stage}.{kind}.max_steps=3"));
        if stage != "base" {
            sets.push(format!("stages.{stage}_scores.evaluate.num_answers=0"));
        }
    }
    let mut arguments = vec![recipe];
    for set in &sets {
        arguments.extend(["--set", set.as_str()]);
    }
    project.succeeds(&[&["run"][..], &arguments[..]].concat());
    let scores = |name: &str| -> Value {
        let text = project.read(&format!("out/orpo-vs-dpo/{name}/scores.json"));
        serde_json::from_str(&text).unwrap()
    };
    let orpo = scores("orpo");
    assert_eq!(orpo["rows"], 60);
    for name in ["sft", "dpo", "simpo"] {
        let other = scores(name);
        assert_eq!(other["base"], orpo["base"], "{name}");
        assert_ne!(other["adapter"], orpo["adapter"], "{name}");
    }
    let beta = ["--set", "stages.dpo.train_dpo.beta=0.2"];
    assert_eq!(
        project.ran(&[&arguments[..], &beta[..]].concat()),
        ["dpo", "dpo_scores"]
    );
}

#[test]
fn mistakes_in_requirements_are_shown_in_their_places() {
    let project = Project::with_recipes();
    let recipe = project.read("recipes/quickstart.yaml").replace(
        "      max_new_tokens: 40\n",
        "      require:\n        rewards/acuracies: \">= 0.6\"\n        perplexity: about 3\n",
    );
    project.write("recipes/bad.yaml", &recipe);
    let ended = project.run(&["validate", "recipes/bad.yaml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    for told in [
        "there is no score `rewards/acuracies`",
        "rewards/acuracies: \">= 0.6\"",
        "hint: did you mean `rewards/accuracies`?",
        "`about 3` is no comparison",
        "perplexity: about 3",
    ] {
        assert!(ended.stderr.contains(told), "{told}: {}", ended.stderr);
    }
}
