//! Tests that a reference which is computed before the first step goes right where it went wrong in TRL. The numbers are those of TRL's pull
//! requests; 6403 (several processes) has its test in `ml::train::tests::together`.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::dpo_tests::write_tokens;
use super::fixture::Fixture;
use super::reference_tests::write_added;
use super::train_dpo::TrainDpo;
use crate::engine::Stage;
use crate::ml::testing::golden;

/// Trains for four steps; the result's files by their names.
fn train(fixture: &Fixture, name: &str, parameters: &str) -> BTreeMap<String, Vec<u8>> {
    let folders =
        ["model", "adapter_init", "adapter_final"].map(|name| (name, golden::folder(name)));
    let inputs = folders
        .each_ref()
        .map(|(name, folder)| (*name, folder.as_path()));
    let cx = fixture.context(name, &inputs);
    let text = format!(
        "{{model: model, dataset: tokens, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 2.0e-3,
        max_steps: 4, eval_strategy: steps, {parameters}}}"
    );
    let stage: TrainDpo = serde_yaml::from_str(&text).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &cx).unwrap();
    let files = fs::read_dir(cx.out()).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    });
    files.collect()
}

/// What the last evaluation of a training told.
fn last_evaluation(files: &BTreeMap<String, Vec<u8>>) -> Value {
    let lines = std::str::from_utf8(&files["metrics.jsonl"])
        .unwrap()
        .lines();
    let steps = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut evaluations = steps.filter(|step| step.get("eval_loss").is_some());
    evaluations.next_back().unwrap()
}

/// 6348: the log-probabilities were looked for in a file that nobody had written. 6443: where every weight is trained, an evaluation after
/// the first step took the model as it was by then for its own reference.
#[test]
fn a_precomputed_reference_is_the_model_before_the_first_step_in_every_evaluation() {
    let fixture = Fixture::new(write_tokens);
    for (name, reference) in [
        ("adapter", "adapter: adapter_init, ref_model: model"),
        ("initial", "adapter: adapter_init"),
        ("other", "adapter: adapter_init, ref_adapter: adapter_final"),
        ("full", "ref_model: model"),
        ("full-initial", "loss_type: [ipo, sft]"),
    ] {
        let run = |name: &str, precomputes: bool| {
            let more =
                format!("eval_steps: 1, precompute_ref_log_probs: {precomputes}, {reference}");
            train(&fixture, name, &more)
        };
        let plain = run(&format!("{name}-plain"), false);
        let known = run(&format!("{name}-known"), true);
        assert!(plain.keys().eq(known.keys()), "{name}: {:?}", known.keys());
        for file in [
            "adapter_model.safetensors",
            "model.safetensors",
            "metrics.jsonl",
        ] {
            assert!(plain.get(file) == known.get(file), "{name}: {file}");
        }
        assert!(known == run(&format!("{name}-again"), true), "{name}");
        let last = last_evaluation(&known);
        assert!(
            last["eval_rewards/margins"].as_f64().unwrap().abs() > 1e-3,
            "{name}: {last}"
        );
    }
}

/// 6370: each evaluation of several computed the reference again, and gave the rows a second pair of columns. 6434: it made the rows ready
/// again that were ready, which cut them twice.
#[test]
fn many_evaluations_tell_what_one_tells() {
    let fixture = Fixture::new(write_added);
    for precomputes in [false, true] {
        let run = |every: usize| {
            let name = format!("every-{every}-{precomputes}");
            let more = format!(
                "eval_steps: {every}, precompute_ref_log_probs: {precomputes}, adapter: adapter_init, ref_model: model"
            );
            train(&fixture, &name, &more)
        };
        let (one, many) = (run(4), run(1));
        assert_eq!(last_evaluation(&one), last_evaluation(&many));
        let weights = "adapter_model.safetensors";
        assert!(one[weights] == many[weights]);
    }
}
