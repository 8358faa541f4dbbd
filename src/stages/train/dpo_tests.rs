//! Tests of `train_dpo`, and of `evaluate` on what it made.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::fixture::Fixture;
use super::tests::write_splits;
use super::train_cpo::TrainCpo;
use super::train_dpo::TrainDpo;
use super::train_kto::TrainKto;
use crate::data::tokens::TokenRow;
use crate::engine::{Context, Control, Level, Stage};
use crate::ml::adapter::Adapter;
use crate::ml::testing::golden;
use crate::stages::scores::evaluate::Evaluate;

/// The rows of the golden runs as an artifact with `train` (24 rows) and `test` (5 rows).
pub(super) fn write_tokens(folder: &Path) {
    let text = fs::read_to_string(golden::folder("dpo/ids.json")).unwrap();
    let cases: Value = serde_json::from_str(&text).unwrap();
    let ids = |row: &Value, name: &str| serde_json::from_value(row[name].clone()).unwrap();
    let rows = cases[0]["rows"].as_array().unwrap().iter();
    let rows: Vec<TokenRow> = rows
        .map(|row| TokenRow {
            prompt_ids: ids(row, "prompt"),
            chosen_ids: ids(row, "chosen"),
            rejected_ids: Some(ids(row, "rejected")),
            ..TokenRow::default()
        })
        .collect();
    write_splits(folder, &rows);
}

fn context(fixture: &Fixture, name: &str, adapter: &Path) -> Context {
    let (model, other) = (golden::folder("model"), golden::folder("adapter_final"));
    let inputs = [
        ("model", model.as_path()),
        ("adapter", adapter),
        ("other", other.as_path()),
    ];
    fixture.context(name, &inputs)
}

/// Runs a training and returns its context and the metrics of its steps.
fn train(fixture: &Fixture, name: &str, adapter: &Path, parameters: &str) -> (Context, Vec<Value>) {
    let cx = context(fixture, name, adapter);
    let stage: TrainDpo = serde_yaml::from_str(parameters).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &cx).unwrap();
    let metrics = fs::read_to_string(cx.out().join("metrics.jsonl")).unwrap();
    let lines = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (cx, lines.collect())
}

const START: &str = "model: model, dataset: tokens, per_device_train_batch_size: 2, gradient_accumulation_steps: 2,
    learning_rate: 2.0e-3, lr_scheduler_type: cosine, warmup_steps: 2, weight_decay: 0.01, seed: 3407,
    train_sampling_strategy: sequential";

fn loss(step: &Value) -> f64 {
    step["loss"].as_f64().unwrap()
}

#[test]
fn the_stage_makes_the_adapter_of_trl() {
    let fixture = Fixture::new(write_tokens);
    let init = golden::folder("adapter_init");
    let text = format!(
        "{{{START}, adapter: adapter, ref_model: model, num_train_epochs: 2, save_steps: 4}}"
    );
    let (cx, steps) = train(&fixture, "tuned", &init, &text);
    assert!(cx.messages(Level::Info)[1].contains("without the adapter"));
    let theirs = golden::tensors("dpo/adapter_final.safetensors");
    let ours = Adapter::load(cx.out()).unwrap();
    assert_eq!(2 * ours.tensors.len(), theirs.len());
    for (path, pair) in &ours.tensors {
        for (part, tensor) in [("A", &pair.a), ("B", &pair.b)] {
            let name = format!("base_model.model.{path}.lora_{part}.weight");
            assert!(golden::far(tensor, &theirs[&name]) < 2e-4, "{name}");
        }
    }
    assert_eq!(steps.len(), 12);
    assert_eq!(steps[11]["num_tokens"], 7572);

    // Interrupted at once and taken up again: the same bytes.
    let stage: TrainDpo = serde_yaml::from_str(&text).unwrap();
    let mut again = context(&fixture, "again", &init);
    again.control.cancel();
    assert_eq!(
        Stage::run(&stage, &again).unwrap_err().to_string(),
        "interrupted"
    );
    again.control = Control::default();
    Stage::run(&stage, &again).unwrap();
    for name in [
        "adapter_model.safetensors",
        "metrics.jsonl",
        "trainer_state.json",
    ] {
        let read = |cx: &Context| fs::read(cx.out().join(name)).unwrap();
        assert!(read(&cx) == read(&again), "{name}");
    }

    // Scored against the base: what the adapter has learnt to prefer.
    let scores = context(&fixture, "scores", cx.out());
    let text = "{model: model, adapter: adapter, dataset: tokens, loss: dpo, num_answers: 0}";
    let stage: Evaluate = serde_yaml::from_str(text).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &scores).unwrap();
    let text = fs::read_to_string(scores.out().join("scores.json")).unwrap();
    let scores: Value = serde_json::from_str(&text).unwrap();
    let number = |part: &str, name: &str| scores[part][name].as_f64().unwrap();
    assert!((number("base", "loss") - std::f64::consts::LN_2).abs() < 1e-12);
    assert!(number("base", "rewards/margins").abs() < 1e-12);
    // TRL's evaluation after the training, with other means: over batches.
    assert!((number("adapter", "rewards/accuracies") - 1.).abs() < 1e-12);
    assert!((number("adapter", "loss") - 0.238_495_752).abs() < 1e-4);
    assert!(number("adapter", "entropy") > 6. && number("adapter", "perplexity") > 1.);
}

#[test]
fn the_reference_is_the_model_before_the_first_step_or_a_named_one() {
    let fixture = Fixture::new(write_tokens);
    let init = golden::folder("adapter_init");
    let one = format!("{START}, max_steps: 1");
    // Behind what the training will take.
    let reference_message = |cx: &Context| cx.messages(Level::Info)[1].clone();

    // An adapter that was trained before.
    let text = format!("{{{one}, adapter: adapter}}");
    let (cx, steps) = train(&fixture, "initial", &init, &text);
    assert!(reference_message(&cx).contains("with the adapter before the first step"));
    assert!((loss(&steps[0]) - std::f64::consts::LN_2).abs() < 1e-7);
    assert_eq!(steps[0]["rewards/accuracies"], 0);

    // A new one: its base is the same model.
    let new = fixture.path().join("new");
    fs::create_dir(&new).unwrap();
    fs::copy(
        init.join("adapter_config.json"),
        new.join("adapter_config.json"),
    )
    .unwrap();
    let mut tensors = golden::tensors("adapter_init/adapter_model.safetensors");
    for (name, tensor) in &mut tensors {
        if name.contains("lora_B") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    let file = new.join("adapter_model.safetensors");
    crate::ml::io::weights::save(&file, &tensors, &[]).unwrap();
    let (cx, steps) = train(&fixture, "new-adapter", &new, &text);
    assert!(reference_message(&cx).contains("which changes nothing"));
    assert!((loss(&steps[0]) - std::f64::consts::LN_2).abs() < 1e-7);

    // Every weight.
    let (cx, steps) = train(&fixture, "full", &init, &format!("{{{one}}}"));
    assert!(reference_message(&cx).contains("the model before the first step"));
    assert!((loss(&steps[0]) - std::f64::consts::LN_2).abs() < 1e-7);
    assert!(cx.out().join("model.safetensors").is_file());

    // Another adapter: TRL's loss of the first step, with the reference computed before or in each step.
    for precompute in [false, true] {
        let text = format!(
            "{{{one}, adapter: adapter, ref_adapter: other, precompute_ref_log_probs: {precompute}}}"
        );
        let (_, steps) = train(&fixture, &format!("second-{precompute}"), &init, &text);
        assert!(
            (loss(&steps[0]) - 0.830_464_005).abs() < 2e-5,
            "{}",
            loss(&steps[0])
        );
    }
}

/// They are in fingerprints as they were when each of the two had its own.
#[test]
fn dpo_and_kto_name_the_reference_by_the_same_parameters() {
    fn named<S: Stage + serde::de::DeserializeOwned>(more: &str) -> Value {
        let text = format!("{{model: a, adapter: b, dataset: c{more}}}");
        let stage: S = serde_yaml::from_str(&text).unwrap();
        let Value::Object(mut all) = serde_json::to_value(&stage).unwrap() else {
            panic!("not a map")
        };
        all.retain(|name, _| name.contains("ref"));
        Value::Object(all)
    }
    let given = ", ref_model: d, ref_adapter: e, precompute_ref_log_probs: true";
    for (more, expected) in [
        ("", json!({"precompute_ref_log_probs": false})),
        (
            given,
            json!({
                "ref_model": {"$stage": "d", "$artifact": "model"},
                "ref_adapter": {"$stage": "e", "$artifact": "adapter"},
                "precompute_ref_log_probs": true
            }),
        ),
    ] {
        assert_eq!(named::<TrainDpo>(more), expected);
        assert_eq!(named::<TrainKto>(more), expected);
    }
    // Methods without a reference refuse them.
    let text = format!("{{model: a, adapter: b, dataset: c{given}}}");
    let error = serde_yaml::from_str::<TrainCpo>(&text).unwrap_err();
    assert!(error.to_string().contains("ref_"), "{error}");
}

#[test]
fn mistakes_are_told() {
    let problems = |text: &str| -> Vec<String> {
        let stage: TrainDpo = serde_yaml::from_str(text).unwrap();
        let problems = crate::engine::check(&stage).into_iter();
        problems.map(|problem| problem.parameter).collect()
    };
    let start = "model: a, adapter: b, dataset: c";
    assert_eq!(
        problems(&format!("{{{start}, label_smoothing: 0.1}}")),
        [""; 0]
    );
    let wrong =
        format!("{{{start}, beta: 0, label_smoothing: 0.5, learning_rate: -1, max_steps: 0}}");
    assert_eq!(
        problems(&wrong),
        ["beta", "label_smoothing", "learning_rate", "max_steps"]
    );
    let alone: Evaluate = serde_yaml::from_str("{model: a, dataset: c, loss: dpo}").unwrap();
    assert_eq!(Stage::check(&alone)[0].parameter, "loss");
    let orpo: Evaluate = serde_yaml::from_str("{model: a, dataset: c, ref_model: b}").unwrap();
    assert_eq!(Stage::check(&orpo)[0].parameter, "ref_model");
}
