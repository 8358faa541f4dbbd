//! Tests of `training`.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use candle_core::Device;

use crate::data::table::Writer;
use crate::data::tokens::{TokenRow, batch, schema};
use crate::engine::{AnyStage, Context, Stage};
use crate::ml::adapter::Adapter;
use crate::ml::golden;
use crate::stages::evaluate::Evaluate;
use crate::stages::train_orpo::TrainOrpo;
use crate::stages::train_sft::TrainSft;

/// The golden rows as an artifact with `train` (24 rows) and `test` (5 rows).
pub(in crate::stages) fn write_tokens(folder: &Path) {
    let rows: Vec<TokenRow> = golden::rows("trl-1.16")
        .into_iter()
        .map(|row| TokenRow {
            prompt_ids: row.prompt,
            chosen_ids: row.chosen,
            rejected_ids: row.rejected,
            rejected_prompt_ids: row.rejected_prompt,
        })
        .collect();
    for (name, rows) in [("train", &rows[..]), ("test", &rows[..5])] {
        let mut writer = Writer::create(folder, name, schema(true)).unwrap();
        writer.write(&batch(rows, true).unwrap()).unwrap();
        writer.finish().unwrap();
    }
}

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("tokens")).unwrap();
        write_tokens(&folder.path().join("tokens"));
        Self { folder }
    }

    fn context(&self, name: &str, adapter: Option<&Path>) -> Context {
        let golden = golden::folder("");
        let adapter = adapter.map_or(golden.join("adapter_init"), Path::to_path_buf);
        let folder = self.folder.path();
        Context::for_test(
            &folder.join(name),
            &[
                ("model", &golden.join("model")),
                ("adapter", &adapter),
                ("tokens", &folder.join("tokens")),
            ],
            &[],
        )
    }
}

const RUN_A: &str = "{model: model, adapter: adapter, dataset: tokens, beta: 0.1, num_train_epochs: 2,
    per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 2.0e-3, lr_scheduler_type: cosine,
    warmup_steps: 2, weight_decay: 0.01, seed: 3407, train_sampling_strategy: sequential}";

#[test]
fn the_stage_makes_the_adapter_of_trl() {
    let place = Place::new();
    let cx = place.context("tuned", None);
    let stage: TrainOrpo = serde_yaml::from_str(RUN_A).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &cx).unwrap();

    let ours = Adapter::load(cx.out()).unwrap();
    let theirs = Adapter::load(&golden::folder("adapter_final")).unwrap();
    assert_eq!(ours.tensors.len(), 21);
    for (path, pair) in &ours.tensors {
        assert!(golden::far(&pair.a, &theirs.tensors[path].a) < 2e-4);
        assert!(golden::far(&pair.b, &theirs.tensors[path].b) < 2e-4);
    }
    let metrics = fs::read_to_string(cx.out().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 12);
    let last: serde_json::Value =
        serde_json::from_str(metrics.lines().next_back().unwrap()).unwrap();
    assert_eq!(last["step"], 12);
    assert!((last["loss"].as_f64().unwrap() - 7.015_620_231_628_418).abs() < 2e-4);

    // Interrupted at once and taken up again: the same bytes.
    let again = place.context("again", None);
    again.cancel.store(true, Ordering::Relaxed);
    let error = Stage::run(&stage, &again).unwrap_err();
    assert_eq!(error.to_string(), "interrupted");
    again.cancel.store(false, Ordering::Relaxed);
    Stage::run(&stage, &again).unwrap();
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
    ] {
        let read = |cx: &Context| fs::read(cx.out().join(name)).unwrap();
        assert!(read(&cx) == read(&again), "{name}");
    }
}

#[test]
fn full_fine_tuning_makes_a_model_that_prefers() {
    let place = Place::new();
    let cx = place.context("model", None);
    let text = "{model: model, dataset: tokens, num_train_epochs: 6, per_device_train_batch_size: 4, learning_rate: 5.0e-3}";
    let stage: TrainSft = serde_yaml::from_str(text).unwrap();
    assert_eq!(AnyStage::output(&stage), "model");
    Stage::run(&stage, &cx).unwrap();

    // The same files as before, the tokenizer's too; other weights of the same names and dtypes.
    for name in ["config.json", "tokenizer.json", "generation_config.json"] {
        let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
        assert!(read(cx.out()) == read(&golden::folder("model")), "{name}");
    }
    let before = golden::tensors("model/model.safetensors");
    let after = candle_core::safetensors::load(cx.out().join("model.safetensors"), &Device::Cpu);
    let after = after.unwrap();
    assert_eq!(after.len(), before.len());
    for (name, before) in before {
        assert_eq!(after[&name].dtype(), before.dtype());
        assert!(
            golden::far(&after[&name], &before) > 0.,
            "{name} did not change"
        );
    }

    // What was learnt from the chosen answers is more probable than before.
    let text = "{model: model, dataset: tokens, num_answers: 1, max_new_tokens: 8}";
    let stage: Evaluate = serde_yaml::from_str(text).unwrap();
    let score = |name: &str, model: &Path| -> serde_json::Value {
        let mut cx = place.context(name, None);
        cx.inputs.insert("model".into(), model.to_path_buf());
        Stage::run(&stage, &cx).unwrap();
        let text = fs::read_to_string(cx.out().join("scores.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let (before, after) = (
        score("before", &golden::folder("model")),
        score("after", cx.out()),
    );
    assert_eq!(after["split"], "test");
    let number = |scores: &serde_json::Value, name: &str| scores["base"][name].as_f64().unwrap();
    assert!(number(&after, "perplexity") < 0.5 * number(&before, "perplexity"));
    assert!(number(&after, "rewards/accuracies") >= 0.8);
}

#[test]
fn evaluation_scores_base_and_adapter() {
    let place = Place::new();
    let final_adapter = golden::folder("adapter_final");
    let cx = place.context("scores", Some(&final_adapter));
    let text =
        "{model: model, adapter: adapter, dataset: tokens, num_answers: 2, max_new_tokens: 5}";
    let stage: Evaluate = serde_yaml::from_str(text).unwrap();
    Stage::run(&stage, &cx).unwrap();
    let text = fs::read_to_string(cx.out().join("scores.json")).unwrap();
    let scores: serde_json::Value = serde_json::from_str(&text).unwrap();
    let number = |part: &str, name: &str| scores[part][name].as_f64().unwrap();
    assert_eq!(scores["rows"], 5);
    // TRL's evaluation of the same adapter on the same rows finds every chosen answer preferred.
    assert!((number("adapter", "rewards/accuracies") - 1.).abs() < 1e-12);
    for name in ["loss", "margin", "perplexity"] {
        let difference = number("adapter", name) - number("base", name);
        assert!((number("difference", name) - difference).abs() < 1e-12);
    }
    let answers = fs::read_to_string(cx.out().join("answers.jsonl")).unwrap();
    assert_eq!(answers.lines().count(), 2);
    let answer: serde_json::Value = serde_json::from_str(answers.lines().next().unwrap()).unwrap();
    assert!(
        answer["prompt"]
            .as_str()
            .unwrap()
            .contains("<|start_header_id|>")
    );
    assert_ne!(answer["base"], answer["adapter"]);
}

#[test]
fn mistakes_are_told() {
    let problems = |text: &str| -> Vec<String> {
        let stage: TrainOrpo = serde_yaml::from_str(text).unwrap();
        let problems = Stage::check(&stage);
        problems
            .into_iter()
            .map(|problem| problem.parameter)
            .collect()
    };
    let start = "{model: a, adapter: b, dataset: c";
    assert_eq!(problems(&format!("{start}}}")), [""; 0]);
    assert_eq!(
        problems(&format!(
            "{start}, learning_rate: 0, max_steps: -2, beta: -1, bf16: true, fp16: true, eval_strategy: steps}}"
        )),
        ["learning_rate", "max_steps", "fp16", "eval_steps", "beta"]
    );

    // A row that was tokenized for another model.
    let place = Place::new();
    let tokens = place.folder.path().join("tokens");
    let row = TokenRow {
        prompt_ids: vec![1],
        chosen_ids: vec![70_000],
        ..TokenRow::default()
    };
    let mut writer = Writer::create(&tokens, "odd", schema(false)).unwrap();
    writer.write(&batch(&[row], false).unwrap()).unwrap();
    writer.finish().unwrap();
    let text = format!("{start}, train_split: odd}}").replace("a,", "model,");
    let text = text.replace("b,", "adapter,").replace("c,", "tokens,");
    let stage: TrainOrpo = serde_yaml::from_str(&text).unwrap();
    let error = Stage::run(&stage, &place.context("odd", None)).unwrap_err();
    assert!(error.to_string().contains("token id 70000"), "{error:#}");
}
