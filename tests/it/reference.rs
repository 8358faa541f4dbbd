//! The reference as a stage: computed once for every training that compares with it.

use serde_json::{Value, json};

use crate::support::program::{Project, events, stages};

const RECIPE: &str = "recipes/sweep.yaml";
const BETAS: [&str; 5] = ["0.02", "0.05", "0.1", "0.2", "0.5"];

/// The recipe `dpo.yaml`, whose training is there once for each beta, short of its last stages.
fn sweep() -> Project {
    let project = Project::with_recipes();
    let recipe = project.read("recipes/dpo.yaml");
    let (head, rest) = recipe.split_once("  tuned:\n").unwrap();
    let (training, _) = rest.split_once("  scores:\n").unwrap();
    let trainings = BETAS.iter().enumerate();
    let trainings = trainings.map(|(number, beta)| {
        let training =
            training.replace("train_dpo:\n", &format!("train_dpo:\n      beta: {beta}\n"));
        format!("  tuned{number}:\n{training}")
    });
    project.write(RECIPE, &(head.to_owned() + &trainings.collect::<String>()));
    project
}

const SHORT: [&str; 4] = [
    "--set",
    "stages.base.train_sft.max_steps=2",
    "--set",
    "stages.reference.score_reference.per_device_eval_batch_size=4",
];

/// What `plan` says of each stage, by kind.
fn planned(project: &Project, more: &[&str]) -> Vec<(String, String)> {
    let plan = project.succeeds(&[&["plan", RECIPE, "--json"], &SHORT[..], more].concat());
    let plan: Vec<Value> = serde_json::from_str(&plan).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let stages = plan.iter();
    stages
        .map(|stage| (text(&stage["kind"]), text(&stage["plan"]["state"])))
        .collect()
}

#[test]
fn a_search_for_beta_computes_the_reference_once() {
    let project = sweep();
    let count = |planned: &[(String, String)], kind: &str, state: &str| {
        let matching = planned.iter().filter(|(of, is)| of == kind && is == state);
        matching.count()
    };
    let before = planned(&project, &[]);
    let kinds = |kind: &str| before.iter().filter(|(of, _)| of == kind).count();
    assert_eq!(
        (kinds("score_reference"), kinds("train_dpo")),
        (1, 5),
        "{before:?}"
    );
    assert_eq!(count(&before, "score_reference", "fresh"), 0);

    let steps: Vec<String> = (0..BETAS.len())
        .map(|number| format!("stages.tuned{number}.train_dpo.max_steps=2"))
        .collect();
    let mut more: Vec<&str> = Vec::new();
    for steps in &steps {
        more.extend(["--set", steps]);
    }
    let run = [&["run", RECIPE, "--json"], &SHORT[..], &more].concat();
    let events = events(&project.succeeds(&run));
    let done = stages(&events, "stage_done");
    let tuned =
        (0..BETAS.len()).map(|number| done[&format!("tuned{number}")]["artifact"].to_string());
    let distinct: std::collections::BTreeSet<String> = tuned.collect();
    assert_eq!(distinct.len(), 5, "each beta makes another adapter");
    let told = events.iter().filter_map(|event| event["text"].as_str());
    let told = told.filter(|text| text.contains("its log-probabilities come with the dataset"));
    assert_eq!(told.count(), 5);

    // Another beta, and another loss: nothing but the trainings themselves.
    more.extend([
        "--set",
        "stages.tuned1.train_dpo.beta=0.07",
        "--set",
        "stages.tuned2.train_dpo.loss_type=ipo",
    ]);
    let after = planned(&project, &more);
    assert_eq!(count(&after, "score_reference", "fresh"), 1, "{after:?}");
    assert_eq!(count(&after, "train_dpo", "fresh"), 3);
    let stale = after.iter().filter(|(_, state)| state != "fresh").count();
    assert_eq!(stale, 2, "{after:?}");

    // Another model as the reference: each training refuses it.
    let other = ["--set", "stages.reference.score_reference.model=base"];
    let refused = [&["run", RECIPE, "tuned0"], &SHORT[..], &more, &other].concat();
    project.refuses(&refused, "were computed by another model");

    // A look at the rows needs no reference.
    let shown = project.succeeds(&["show", RECIPE, "reference"]);
    assert!(shown.contains("ref_chosen_logps"), "{shown}");
}

#[test]
fn rows_are_looked_at_before_the_reference_is_computed() {
    let project = sweep();
    let preview = project.succeeds(&["preview", RECIPE, "reference", "--rows", "2"]);
    let tokens = project.succeeds(&["preview", RECIPE, "tokens", "--rows", "2"]);
    assert_eq!(preview, tokens);
    let shown = project.succeeds(&["preview", RECIPE]);
    assert!(shown.contains("tokens"), "{shown}");
}

/// The same bytes with the reference in each step and with its columns: DPO, KTO with the answers of other rows, and KTO without.
#[test]
fn columns_change_nothing_but_the_time() {
    let project = Project::empty();
    let row = |n: usize| {
        json!({
            "prompt": format!("What is {n} and {n}?"),
            "chosen": format!("It is {}, of course.", n + n),
            "rejected": "Leave me alone, I am tired of your questions."
        })
    };
    let rows: String = (1..=12).map(|n| row(n).to_string() + "\n").collect();
    project.write("rows.jsonl", &rows);
    let common = "adapter: lora, max_steps: 5, per_device_train_batch_size: 4, learning_rate: 0.01, eval_strategy: steps, eval_steps: 2, \
                  eval_split: train";
    let trainings = [
        ("dpo", "dpo", "train_dpo", ""),
        ("kto", "kto", "train_kto", ""),
        ("apo", "kto", "train_kto", "loss_type: apo_zero_unpaired, "),
    ];
    let mut stages = Vec::new();
    for trainer in ["dpo", "kto"] {
        stages.push(format!(
            "  {trainer}:
    tokenize: {{dataset: chats, tokenizer: blank, max_length: 60, trainer: {trainer}}}
  {trainer}_scored:
    score_reference: {{model: blank, dataset: {trainer}, per_device_eval_batch_size: 3}}
"
        ));
    }
    for (name, trainer, kind, more) in trainings {
        for (suffix, scored) in [("", ""), ("_scored", "_scored")] {
            stages.push(format!(
                "  by_{name}{suffix}:
    {kind}: {{{more}dataset: {trainer}{scored}, {common}}}
"
            ));
        }
    }
    let stages = stages.concat();
    let recipe = format!(
        "version: 1
stages:
  rows:
    import_dataset: {{path: rows.jsonl}}
  blank:
    create_model: {{dataset: rows, vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
      num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128}}
  chats:
    apply_chat_template: {{dataset: rows, template: chatml, tokenizer: blank}}
  lora:
    attach_lora: {{model: blank, r: 4, target_modules: [q_proj, v_proj]}}
{stages}"
    );
    project.write("recipe.yaml", &recipe);
    project.succeeds(&["run", "recipe.yaml"]);
    let artifacts = project.artifacts(&["recipe.yaml"]);
    for (name, ..) in trainings {
        let [plain, scored] =
            ["", "_scored"].map(|suffix| &artifacts[&format!("by_{name}{suffix}")]);
        assert_eq!(plain, scored, "{name}");
    }
    assert_ne!(artifacts["by_kto"], artifacts["by_apo"]);
}
