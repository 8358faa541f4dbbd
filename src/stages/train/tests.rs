//! Tests of `training`.

use std::fs;
use std::path::Path;

use candle_core::Device;

use super::fixture::Fixture;
use crate::data::table::Writer;
use crate::data::tokens::{Columns, TokenRow, batch, schema};
use crate::engine::{AnyStage, Context, Control, Event, Stage};
use crate::ml::adapter::Adapter;
use crate::ml::testing::golden;
use crate::stages::scores::evaluate::Evaluate;
use crate::stages::train::train_orpo::TrainOrpo;
use crate::stages::train::train_sft::TrainSft;

/// The golden rows as an artifact with `train` (24 rows) and `test` (5 rows).
pub(in crate::stages) fn write_tokens(folder: &Path) {
    let rows: Vec<TokenRow> = golden::rows("trl-1.16")
        .into_iter()
        .map(|row| TokenRow {
            prompt_ids: row.prompt,
            chosen_ids: row.chosen,
            rejected_ids: row.rejected,
            rejected_prompt_ids: row.rejected_prompt,
            ..TokenRow::default()
        })
        .collect();
    write_splits(folder, &rows);
}

/// Rows as an artifact: all of them as `train`, the first five as `test`.
pub(super) fn write_splits(folder: &Path, rows: &[TokenRow]) {
    for (name, rows) in [("train", rows), ("test", &rows[..5])] {
        let mut writer = Writer::create(folder, name, schema(Columns::Preferences)).unwrap();
        writer
            .write(&batch(rows, Columns::Preferences).unwrap())
            .unwrap();
        writer.finish().unwrap();
    }
}

fn fixture() -> Fixture {
    Fixture::new(write_tokens)
}

/// The context of a stage with the golden model and, unless another is given, the golden adapter before its training.
fn context(fixture: &Fixture, name: &str, adapter: Option<&Path>) -> Context {
    let (model, initial) = (golden::folder("model"), golden::folder("adapter_init"));
    let adapter = adapter.unwrap_or(&initial);
    fixture.context(name, &[("model", model.as_path()), ("adapter", adapter)])
}

const RUN_A: &str = "{model: model, adapter: adapter, dataset: tokens, beta: 0.1, num_train_epochs: 2,
    per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 2.0e-3, lr_scheduler_type: cosine,
    warmup_steps: 2, weight_decay: 0.01, seed: 3407, train_sampling_strategy: sequential}";

#[test]
fn the_stage_makes_the_adapter_of_trl() {
    let fixture = fixture();
    let cx = context(&fixture, "tuned", None);
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
    let mut again = context(&fixture, "again", None);
    again.control.cancel();
    let error = Stage::run(&stage, &again).unwrap_err();
    assert_eq!(error.to_string(), "interrupted");
    again.control = Control::default();
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
    let fixture = fixture();
    let cx = context(&fixture, "model", None);
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
        let mut cx = context(&fixture, name, None);
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
    let fixture = fixture();
    let final_adapter = golden::folder("adapter_final");
    let cx = context(&fixture, "scores", Some(&final_adapter));
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
        let problems = crate::engine::check(&stage);
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
        ["beta", "learning_rate", "max_steps", "fp16", "eval_steps"]
    );

    // A row that was tokenized for another model.
    let fixture = fixture();
    let tokens = fixture.path().join("tokens");
    let row = TokenRow {
        prompt_ids: vec![1],
        chosen_ids: vec![70_000],
        ..TokenRow::default()
    };
    let mut writer = Writer::create(&tokens, "odd", schema(Columns::Answers)).unwrap();
    writer
        .write(&batch(&[row], Columns::Answers).unwrap())
        .unwrap();
    writer.finish().unwrap();
    let text = format!("{start}, train_split: odd}}").replace("a,", "model,");
    let text = text.replace("b,", "adapter,").replace("c,", "tokens,");
    let stage: TrainOrpo = serde_yaml::from_str(&text).unwrap();
    let error = Stage::run(&stage, &context(&fixture, "odd", None)).unwrap_err();
    assert!(error.to_string().contains("token id 70000"), "{error:#}");
}

/// What a training told when it began, and the notes on it.
fn beginning(cx: &Context) -> (String, serde_json::Value) {
    let told = cx.events.last();
    let mut texts = told.iter().filter_map(|event| match event {
        Event::Message { text, .. } => Some(text.clone()),
        _ => None,
    });
    // The first is what the training will take.
    let text = texts.nth(1);
    let notes = cx.notes.lock().unwrap();
    let note = |name: &str| notes.get(name).cloned().unwrap_or_default();
    let note = match note("continued_after_step") {
        serde_json::Value::Null => note("not_continued"),
        step => step,
    };
    (text.unwrap(), note)
}

/// Trains twice with different lengths, the second with what the first left, and once more alone. The second's beginning;
/// whatever that is, it makes the bytes of the third.
fn lengthened(short: &str, long: &str, damage: &dyn Fn(&Path)) -> (String, serde_json::Value) {
    let fixture = fixture();
    let run = |name: &str, length: &str, before: Option<&Context>| {
        let mut cx = context(&fixture, name, None);
        cx.continuations = before.map(|before| before.scratch().unwrap().to_path_buf());
        let yaml = format!(
            "{{model: model, adapter: adapter, dataset: tokens, learning_rate: 2.0e-3, seed: 5,
              disable_dropout: false, {length}}}"
        );
        let stage: TrainOrpo = serde_yaml::from_str(&yaml).unwrap();
        assert_eq!(Stage::check(&stage), []);
        Stage::run(&stage, &cx).unwrap();
        cx
    };
    let first = run("first", short, None);
    damage(&first.continuation().unwrap());
    let second = run("second", long, Some(&first));
    let alone = run("alone", long, None);
    let names = fs::read_dir(alone.out())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let names: Vec<_> = names.collect();
    assert_eq!(names.len(), 4);
    for name in names {
        let read = |cx: &Context| fs::read(cx.out().join(&name)).unwrap();
        assert!(read(&second) == read(&alone), "{}", name.display());
    }
    beginning(&second)
}

#[test]
fn more_epochs_start_where_fewer_ended_if_that_is_the_same() {
    // The evaluation at the very end of the shorter one is none of the longer one's, unless it is due anyway.
    for (more, short, long, steps) in [
        (
            "lr_scheduler_type: constant, optim: adamw_8bit, eval_strategy: steps, eval_steps: 2,
             per_device_train_batch_size: 2",
            "max_steps: 3",
            "max_steps: 5",
            3,
        ),
        (
            "lr_scheduler_type: constant_with_warmup, warmup_steps: 2, eval_strategy: epoch, early_stopping_patience: 9,
             per_device_train_batch_size: 3",
            "num_train_epochs: 0.25",
            "num_train_epochs: 0.4",
            2,
        ),
        (
            "lr_scheduler_type: inverse_sqrt, warmup_steps: 4, optim: sgd, eval_strategy: epoch,
             per_device_train_batch_size: 12",
            "num_train_epochs: 1",
            "max_steps: 3",
            2,
        ),
    ] {
        let with = |length: &str| format!("{more}, {length}");
        let (text, note) = lengthened(&with(short), &with(long), &|_| ());
        assert!(
            text.contains(&format!("goes on after step {steps} of")),
            "{text}"
        );
        assert!(text.contains("an earlier training ended"), "{text}");
        assert_eq!(note, steps);
    }
}

#[test]
fn more_epochs_start_at_the_beginning_if_anything_would_differ() {
    let best = "lr_scheduler_type: constant, eval_strategy: epoch, load_best_model_at_end: true";
    let impatient = "lr_scheduler_type: constant, eval_strategy: steps, eval_steps: 1, early_stopping_patience: 1,
                     greater_is_better: true";
    let share = "lr_scheduler_type: constant_with_warmup, warmup_ratio: 0.5";
    let by_schedule = "its learning rate depends on the number of all steps";
    for (more, short, long, why) in [
        ("lr_scheduler_type: cosine", 2, 3, by_schedule),
        ("lr_scheduler_type: linear", 2, 3, by_schedule),
        (share, 3, 5, by_schedule),
        (best, 2, 3, "its weights are those of its best step"),
        (
            "lr_scheduler_type: constant",
            3,
            2,
            "it did not have fewer steps",
        ),
        (impatient, 4, 5, "it was stopped early"),
    ] {
        let with =
            |steps: u64| format!("{more}, per_device_train_batch_size: 2, max_steps: {steps}");
        let (text, note) = lengthened(&with(short), &with(long), &|_| ());
        let done = if more == impatient { 2 } else { short };
        let start = format!(
            "starts at the beginning, {long} steps to go; the earlier training of {done} steps"
        );
        assert!(text.contains(&start) && text.contains(why), "{text}");
        assert!(note.as_str().unwrap().starts_with(why), "{note}");
    }
}

#[test]
fn what_says_how_far_a_training_goes_are_parameters() {
    let text = "{model: a, dataset: b}";
    let (orpo, sft): (TrainOrpo, TrainSft) = (
        serde_yaml::from_str(text).unwrap(),
        serde_yaml::from_str(text).unwrap(),
    );
    for stage in [&orpo as &dyn AnyStage, &sft] {
        let params = stage.params().unwrap();
        assert_eq!(stage.length_parameters().len(), 2);
        assert!(
            stage
                .length_parameters()
                .iter()
                .all(|name| params.get(name).is_some())
        );
    }
}

#[test]
fn a_damaged_end_is_not_started_from() {
    let change = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let constant = |steps: u64| {
        format!("lr_scheduler_type: constant, per_device_train_batch_size: 2, max_steps: {steps}")
    };
    let with = |damage: &dyn Fn(&Path)| lengthened(&constant(3), &constant(4), damage).0;
    for name in ["state.safetensors", "state.json"] {
        let text = with(&|end| change(&end.join("step-00000003").join(name)));
        assert!(
            text.contains("its state could not be read (damaged)"),
            "{text}"
        );
    }
    let text = with(&|end| change(&end.join("end.json")));
    assert_eq!(text, "starts at the beginning, 4 steps to go");
}

#[test]
fn the_trainer_s_state_is_that_of_transformers() {
    let fixture = fixture();
    let cx = context(&fixture, "tuned", None);
    let text = RUN_A.replace('}', ", eval_strategy: epoch, early_stopping_patience: 5}");
    let stage: TrainOrpo = serde_yaml::from_str(&text).unwrap();
    Stage::run(&stage, &cx).unwrap();
    let read = |path: &Path| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let state = read(&cx.out().join("trainer_state.json"));
    // Its keys but `save_steps`, which is none of the result, and `total_flos`, an estimate.
    let keys: Vec<&str> = state
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "best_global_step",
            "best_metric",
            "best_model_checkpoint",
            "epoch",
            "eval_steps",
            "global_step",
            "is_hyper_param_search",
            "is_local_process_zero",
            "is_world_process_zero",
            "log_history",
            "logging_steps",
            "max_steps",
            "num_input_tokens_seen",
            "num_train_epochs",
            "stateful_callbacks",
            "train_batch_size",
            "trial_name",
            "trial_params"
        ]
    );
    for (name, value) in [
        ("global_step", 12),
        ("max_steps", 12),
        ("num_train_epochs", 2),
        ("train_batch_size", 2),
    ] {
        assert_eq!(state[name], value, "{name}");
    }
    assert_eq!(state["epoch"], 2.);
    assert_eq!(state["best_global_step"], 12);
    // The lines of the reference, with the same names in each, and an evaluation after each epoch.
    let golden = read(&golden::folder("runs/a_f32.json"));
    let theirs = golden["log_history"].as_array().unwrap();
    let ours = state["log_history"].as_array().unwrap();
    let evaluated = |log: &&serde_json::Value| log.get("eval_loss").is_some();
    let steps: Vec<_> = ours
        .iter()
        .filter(evaluated)
        .map(|log| log["step"].clone())
        .collect();
    assert_eq!(steps, [6, 12]);
    let names = |log: &serde_json::Value| -> Vec<String> {
        let mut names: Vec<String> = log.as_object().unwrap().keys().cloned().collect();
        names.sort_unstable();
        names
    };
    let ours = ours.iter().filter(|log| log.get("loss").is_some());
    let theirs = theirs.iter().filter(|log| log.get("loss").is_some());
    let both: Vec<_> = ours.zip(theirs).collect();
    assert_eq!(both.len(), 12);
    for (ours, theirs) in both {
        assert_eq!(names(ours), names(theirs));
        assert_eq!(
            (&ours["step"], &ours["epoch"]),
            (&theirs["step"], &theirs["epoch"])
        );
    }
}
