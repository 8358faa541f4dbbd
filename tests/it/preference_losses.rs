//! Trainings by KTO, CPO and weighted DPO and of reward models, from rows to an adapter, driven as a user would.

use serde_json::{Value, json};

use crate::support::program::Project;

/// Questions with two answers each.
fn pairs() -> String {
    let row = |n: usize| {
        json!({
            "prompt": format!("What is {n} and {n}?"),
            "chosen": format!("It is {}, of course.", n + n),
            "rejected": "Leave me alone."
        })
    };
    (1..=12).map(|n| row(n).to_string() + "\n").collect()
}

/// The same answers, one a row, each with a label.
fn labelled() -> String {
    let row = |n: usize| {
        let good = !n.is_multiple_of(3);
        let answer = if good {
            format!("It is {}, of course.", n + n)
        } else {
            "Leave me alone.".to_owned()
        };
        json!({"question": format!("What is {n} and {n}?"), "completion": answer, "good": good})
    };
    (1..=12).map(|n| row(n).to_string() + "\n").collect()
}

/// A recipe that trains an adapter on a tiny model.
fn recipe(import: &str, trainer: &str, training: &str) -> String {
    format!(
        "version: 1
stages:
  rows:
    import_dataset: {{path: rows.jsonl{import}}}
  blank:
    create_model: {{dataset: rows, vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
      num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128}}
  chats:
    apply_chat_template: {{dataset: rows, template: chatml, tokenizer: blank}}
  tokens:
    tokenize: {{dataset: chats, tokenizer: blank{trainer}}}
  lora:
    attach_lora: {{model: blank, r: 4, target_modules: [q_proj, v_proj]}}
  tuned:
    {training}
"
    )
}

const COMMON: &str = "adapter: lora, dataset: tokens, max_steps: 3, per_device_train_batch_size: 4, learning_rate: 0.01";

/// The metrics of each step of the stage `tuned`, which has run.
#[track_caller]
fn steps(project: &Project) -> Vec<Value> {
    let artifact = &project.artifacts(&["recipe.yaml"])["tuned"];
    let text = project.read(&format!(".pipeline/v1/artifacts/{artifact}/metrics.jsonl"));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Runs the recipe, which has to succeed; gives what it told.
#[track_caller]
fn run(project: &Project) -> String {
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout + &ended.stderr
}

fn number(step: &Value, name: &str) -> f64 {
    step[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {step}"))
}

#[test]
fn labelled_rows_and_pairs_train_by_kto() {
    let project = Project::empty();
    project.write("rows.jsonl", &labelled());
    let training = format!("train_kto: {{{COMMON}, beta: 0.2, undesirable_weight: 2.0}}");
    let import = ", format: kto, columns: {prompt: question, label: good}";
    let text = recipe(import, ", trainer: kto", &training);
    project.write("recipe.yaml", &text);
    let told = run(&project);
    assert!(
        told.contains("8 answers are labelled as good, 4 as bad"),
        "{told}"
    );
    let own = steps(&project);
    assert_eq!(own.len(), 3);
    // Before the first step the model is its reference.
    let first = &own[0];
    assert!(
        (number(first, "loss") - 0.5 * (3. + 2.) / 4.).abs() < 1e-6,
        "{first}"
    );
    assert!(number(first, "kl").abs() < 1e-6 && number(first, "rewards/margins").abs() < 1e-6);
    assert!(number(&own[2], "rewards/margins") > 0., "{}", own[2]);

    // Another weight changes the training alone.
    let plan = project.succeeds(&[
        "plan",
        "recipe.yaml",
        "--set",
        "stages.tuned.train_kto.undesirable_weight=1.5",
    ]);
    assert!(
        plan.contains("`undesirable_weight` changed from 2.0 to 1.5"),
        "{}",
        plan
    );
    assert!(plan.contains("5 fresh, 1 to run"), "{}", plan);

    // Pairs become twice as many rows.
    project.write("rows.jsonl", &pairs());
    let training = format!(
        "train_kto: {{{COMMON}, loss_type: apo_zero_unpaired, train_sampling_strategy: random}}"
    );
    project.write("recipe.yaml", &recipe("", ", trainer: kto", &training));
    let told = run(&project);
    assert!(
        told.contains("12 answers are labelled as good, 12 as bad"),
        "{told}"
    );
    assert!(number(&steps(&project)[0], "kl").abs() < 1e-12);
}

/// Answers behind the prompts of other rows are made ready once, however often the training evaluates; and the reference is the model before
/// the first step in each evaluation, also where every weight is trained (TRL's pull requests 6348, 6370, 6434 and 6443).
#[test]
fn a_reference_computed_before_changes_nothing_for_kto() {
    let project = Project::empty();
    project.write("rows.jsonl", &labelled());
    let import = ", format: kto, columns: {prompt: question, label: good}";
    for model in ["adapter: lora", "model: blank"] {
        let train = |every: usize, precomputes: bool| {
            let training = format!(
                "train_kto: {{{model}, dataset: tokens, max_steps: 3, per_device_train_batch_size: 4, learning_rate: 0.01,
      eval_strategy: steps, eval_steps: {every}, eval_split: train, precompute_ref_log_probs: {precomputes}}}"
            );
            let recipe = recipe(import, ", trainer: kto", &training);
            project.write("recipe.yaml", &recipe);
            run(&project);
            steps(&project)
        };
        let (plain, known) = (train(1, false), train(1, true));
        assert_eq!(plain, known, "{model}");
        assert_eq!(known.len(), 6);
        let last = &known[5];
        assert!(number(last, "eval_rewards/margins").abs() > 1e-3, "{last}");
        assert_eq!(train(3, true).last(), Some(last), "{model}");
    }
}

#[test]
fn what_kto_can_not_use_is_told() {
    let project = Project::empty();
    project.write("rows.jsonl", &labelled());
    let import = ", format: kto, columns: {prompt: question, label: good}";
    let one = "train_kto: {adapter: lora, dataset: tokens, per_device_train_batch_size: 1, train_sampling_strategy: random}";
    project.write("recipe.yaml", &recipe(import, ", trainer: kto", one));
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(2));
    for sentence in ["expected more than 1", "expected `sequential`"] {
        assert!(ended.stderr.contains(sentence), "{}", ended.stderr);
    }
    // Tokens that were not made for it, and bad answers elsewhere.
    let training = format!("train_kto: {{{COMMON}}}");
    project.write("recipe.yaml", &recipe(import, "", &training));
    let ended = project.run(&["run", "recipe.yaml"]);
    assert!(
        ended.stderr.contains("its `label` is false"),
        "{}",
        ended.stderr
    );
    project.write("rows.jsonl", &pairs());
    project.write("recipe.yaml", &recipe("", "", &training));
    let ended = project.run(&["run", "recipe.yaml"]);
    assert!(
        ended.stderr.contains("hint: `trainer: kto`"),
        "{}",
        ended.stderr
    );
}

#[test]
fn pairs_train_by_cpo() {
    let project = Project::empty();
    project.write("rows.jsonl", &pairs());
    let training = format!(
        "train_cpo: {{{COMMON}, loss_type: simpo, cpo_alpha: 0, beta: 2.0, simpo_gamma: 1.0}}"
    );
    project.write("recipe.yaml", &recipe("", "", &training));
    run(&project);
    let own = steps(&project);
    assert_eq!(own.len(), 3);
    assert!(number(&own[0], "nll_loss").abs() < 1e-12);
    assert!(number(&own[2], "rewards/margins") > number(&own[0], "rewards/margins"));
    assert!(number(&own[2], "loss") < number(&own[0], "loss"));
}

#[test]
fn pairs_weigh_by_their_probability() {
    let project = Project::empty();
    project.write("rows.jsonl", &pairs());
    let training = format!("train_dpo: {{{COMMON}, use_weighting: true}}");
    project.write("recipe.yaml", &recipe("", ", trainer: dpo", &training));
    run(&project);
    let own = steps(&project);
    // Both answers of a model that knows nothing yet are about as probable as any, so the weight is about 1.
    let relative = number(&own[0], "loss") / std::f64::consts::LN_2;
    assert!((0.5..1.5).contains(&relative), "{relative}");
    let wrong = format!("train_dpo: {{{COMMON}, use_weighting: true, loss_type: aot}}");
    project.write("recipe.yaml", &recipe("", ", trainer: dpo", &wrong));
    let ended = project.run(&["plan", "recipe.yaml"]);
    assert!(
        ended.code == Some(2)
            && ended
                .stderr
                .contains("the loss `aot` is not one of single pairs"),
        "{}",
        ended.stderr
    );
}

/// A recipe that trains a reward model on rows with margins.
fn reward_recipe(training: &str) -> String {
    recipe("", ", trainer: reward", training)
        .replace(
            "attach_lora: {model: blank, ",
            "attach_lora: {model: scoring, ",
        )
        .replace(
            "  lora:",
            "  scoring:
    add_score_head: {model: blank}
  lora:",
        )
}

#[test]
fn pairs_train_a_reward_model() {
    let project = Project::empty();
    let rows: String = pairs()
        .lines()
        .map(|line| line.replace('}', ",\"margin\":0.5}") + "\n")
        .collect();
    project.write("rows.jsonl", &rows);
    let text = reward_recipe(&format!(
        "train_reward: {{{COMMON}, max_steps: 8, center_rewards_coefficient: 0.01}}"
    ))
    .replace(", max_steps: 3", "")
        + "  merged:
    merge: {adapter: tuned}
outputs: {merged: out/reward}
";
    project.write("recipe.yaml", &text);
    run(&project);
    let own = steps(&project);
    assert_eq!(own.len(), 8);
    // The margin makes the loss of a model without a preference larger than ln 2.
    assert!(number(&own[0], "loss") > 0.8, "{}", own[0]);
    assert!(number(&own[7], "loss") < number(&own[0], "loss"));
    assert!(number(&own[7], "accuracy") > 0.9 && number(&own[7], "margin") > 0.);
    assert!(number(&own[7], "min_reward") < number(&own[7], "max_reward"));
    let artifact = &project.artifacts(&["recipe.yaml"])["tuned"];
    let folder = format!(".pipeline/v1/artifacts/{artifact}");
    let settings: Value =
        serde_json::from_str(&project.read(&format!("{folder}/adapter_config.json"))).unwrap();
    assert_eq!(settings["task_type"], "SEQ_CLS");
    assert_eq!(settings["modules_to_save"], json!(["score"]));
    let config: Value = serde_json::from_str(&project.read("out/reward/config.json")).unwrap();
    assert_eq!(
        config["architectures"],
        json!(["LlamaForSequenceClassification"])
    );
    assert_eq!(config["id2label"], json!({"0": "LABEL_0"}));

    // The merged model is one of its own, which is trained on whole.
    let more = "version: 1
stages:
  rows:
    import_dataset: {path: rows.jsonl}
  reward:
    import_model: {path: out/reward}
  chats:
    apply_chat_template: {dataset: rows, template: chatml, tokenizer: reward}
  tokens:
    tokenize: {dataset: chats, tokenizer: reward, trainer: reward}
  tuned:
    train_reward: {model: reward, dataset: tokens, max_steps: 1, learning_rate: 0.0001}
";
    project.write("recipe.yaml", more);
    run(&project);
    let first = &steps(&project)[0];
    assert!(number(first, "accuracy") > 0.9, "{first}");
    project.write(
        "prompts.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n",
    );
    let generate = ["generate", "out/reward", "--prompts", "prompts.jsonl"];
    project.refuses(&generate, "the model gives scores and no text");
}

#[test]
fn scores_and_logits_are_not_mixed_up() {
    let project = Project::empty();
    project.write("rows.jsonl", &pairs());
    let training = format!("train_reward: {{{COMMON}}}");
    project.write("recipe.yaml", &recipe("", ", trainer: reward", &training));
    project.refuses(&["run", "recipe.yaml"], "hint: `add_score_head`");
    let text = reward_recipe(&format!("train_dpo: {{{COMMON}}}"));
    project.write("recipe.yaml", &text);
    project.refuses(&["run", "recipe.yaml"], "head gives scores");
}
