//! Tests of `score_reference`, and of trainings on what it made.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dpo_tests::write_tokens;
use super::fixture::Fixture;
use super::tests::write_splits;
use super::train_dpo::TrainDpo;
use crate::data::reference_logps;
use crate::data::table::Split;
use crate::data::tokens::TokenRow;
use crate::engine::{Context, Level, Stage};
use crate::ml::testing::{counting, golden};
use crate::stages::text::added::Added;
use crate::stages::text::score_reference::ScoreReference;

const NAMES: [&str; 4] = ["model", "model_nf4", "adapter_init", "adapter_final"];

/// The context of a stage with the golden models and adapters, and `scored` among its inputs.
fn context(fixture: &Fixture, name: &str, scored: &Path) -> Context {
    let folders = NAMES.map(golden::folder);
    let inputs = NAMES.into_iter().zip(folders.iter().map(PathBuf::as_path));
    let inputs: Vec<(&str, &Path)> = inputs.chain([("scored", scored)]).collect();
    fixture.context(name, &inputs)
}

/// Scores tokens; the result is a folder `name`.
fn try_to_score(
    fixture: &Fixture,
    name: &str,
    scored: &Path,
    parameters: &str,
) -> anyhow::Result<PathBuf> {
    let cx = context(fixture, name, scored);
    let stage: ScoreReference = serde_yaml::from_str(&format!("{{{parameters}}}")).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &cx)?;
    Ok(cx.out().to_owned())
}

fn score(fixture: &Fixture, name: &str, parameters: &str) -> PathBuf {
    try_to_score(fixture, name, Path::new("/nowhere"), parameters).unwrap()
}

/// Trains on `dataset`, `tokens` or `scored`; gives what is told of the reference, and the bytes of weights and metrics.
fn try_to_train(
    fixture: &Fixture,
    (name, dataset, scored): (&str, &str, &Path),
    parameters: &str,
) -> anyhow::Result<(String, Vec<Vec<u8>>)> {
    let cx = context(fixture, name, scored);
    let text = format!(
        "{{dataset: {dataset}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 2.0e-3, num_train_epochs: 2,
        max_steps: 8, eval_strategy: steps, eval_steps: 3, seed: 3407, {parameters}}}"
    );
    let stage: TrainDpo = serde_yaml::from_str(&text).unwrap();
    assert_eq!(Stage::check(&stage), []);
    Stage::run(&stage, &cx)?;
    let told = cx.messages(Level::Info).into_iter();
    let told = told.filter(|text| text.starts_with("the reference is"));
    let names = [
        "adapter_model.safetensors",
        "model.safetensors",
        "metrics.jsonl",
    ];
    let files = names
        .iter()
        .filter_map(|name| fs::read(cx.out().join(name)).ok());
    Ok((told.collect(), files.collect()))
}

/// Trains once with a reference model in memory and once with columns: the same bytes.
fn both_ways(fixture: &Fixture, name: &str, scored: &Path, parameters: &str) {
    let of_model = (format!("{name}-model"), format!("{name}-columns"));
    let plain = try_to_train(
        fixture,
        (&of_model.0, "tokens", Path::new("/nowhere")),
        parameters,
    );
    let columns = try_to_train(fixture, (&of_model.1, "scored", scored), parameters);
    let (plain, columns) = (plain.unwrap(), columns.unwrap());
    assert!(plain.1 == columns.1, "{name}");
    assert_eq!(plain.1.len(), 2);
    let known = "; its log-probabilities come with the dataset";
    assert_eq!(columns.0, plain.0 + known);
}

#[test]
fn columns_have_the_bits_of_a_reference_in_memory() {
    let fixture = Fixture::new(write_tokens);
    let base = score(&fixture, "base", "model: model, dataset: tokens");
    let adapted = score(
        &fixture,
        "adapted",
        "model: model, adapter: adapter_final, dataset: tokens, per_device_eval_batch_size: 3",
    );
    let initial = score(
        &fixture,
        "initial",
        "model: model, adapter: adapter_init, dataset: tokens",
    );
    let nf4 = score(
        &fixture,
        "nf4",
        "model: model_nf4, dataset: tokens, bf16: true",
    );
    // The base, whatever the loss.
    let start = "model: model, adapter: adapter_init, ref_model: model";
    both_ways(&fixture, "sigmoid", &base, start);
    for (name, more) in [
        ("shallow", "beta: 0.01"),
        ("ipo", "loss_type: ipo, beta: 0.4"),
        ("mixture", "loss_type: [sigmoid_norm, sft], ld_alpha: 0.3"),
        (
            "dropping",
            "disable_dropout: false, precompute_ref_log_probs: true",
        ),
        ("checkpointing", "gradient_checkpointing: true"),
    ] {
        both_ways(&fixture, name, &base, &format!("{start}, {more}"));
    }
    // Every weight: after three steps the model is no longer the reference, which evaluations compare with as before.
    both_ways(&fixture, "full", &base, "model: model");
    let start = "model: model, adapter: adapter_init";
    both_ways(&fixture, "initial", &initial, start);
    both_ways(
        &fixture,
        "other",
        &adapted,
        &format!("{start}, ref_adapter: adapter_final"),
    );
    let start = "model: model_nf4, adapter: adapter_init, ref_model: model_nf4, bf16: true";
    both_ways(&fixture, "nf4", &nf4, start);
}

#[test]
fn columns_of_another_reference_or_of_other_rows_are_refused() {
    let fixture = Fixture::new(write_tokens);
    let base = score(&fixture, "base", "model: model, dataset: tokens");
    let start = "model: model, adapter: adapter_init";
    let refuses = |name: &str, scored: &Path, parameters: &str, why: &str| {
        let error = try_to_train(&fixture, (name, "scored", scored), parameters);
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains(why) && error.contains("hint: "), "{error}");
    };
    for (name, parameters, why) in [
        (
            "an-adapter",
            start.to_owned(),
            "computed by the model without an adapter, but the reference of this training is the model with the adapter before the first step",
        ),
        (
            "another-model",
            format!("{start}, ref_model: model_nf4"),
            "computed by another model, but the reference of this training is a model of its own",
        ),
        (
            "another-type",
            format!("{start}, ref_model: model, bf16: true"),
            "computed by the same model in f32, not in bf16",
        ),
    ] {
        refuses(name, &base, &parameters, why);
    }
    let adapted = score(
        &fixture,
        "adapted",
        "model: model, adapter: adapter_final, dataset: tokens",
    );
    let known = format!("{start}, ref_model: model");
    refuses(
        "no-adapter",
        &adapted,
        &known,
        "computed by the model with an adapter",
    );
    refuses(
        "another-adapter",
        &adapted,
        start,
        "computed by the model with another adapter",
    );

    // Rows that were cut otherwise, or stand in another order, under the columns of these.
    let altered = |name: &str, change: fn(&mut Vec<arrow_array::RecordBatch>)| -> PathBuf {
        let folder = fixture.path().join(name);
        fs::create_dir(&folder).unwrap();
        for file in ["reference.json", "test.parquet"] {
            fs::copy(base.join(file), folder.join(file)).unwrap();
        }
        let split = Split::open(&base, "train").unwrap();
        let mut rows: Vec<_> = split.batches(1).collect::<anyhow::Result<_>>().unwrap();
        change(&mut rows);
        let schema = rows[0].schema();
        let mut writer = crate::data::Writer::create(&folder, "train", schema).unwrap();
        for row in &rows {
            writer.write(row).unwrap();
        }
        writer.finish().unwrap();
        folder
    };
    let swapped = altered("swapped", |rows| rows.swap(3, 4));
    let fewer = altered("fewer", |rows| rows.truncate(20));
    let without = altered("without", |rows| {
        for row in rows {
            *row = row.project(&[0, 1, 2, 3]).unwrap();
        }
    });
    for (name, folder) in [
        ("of-swapped", swapped),
        ("of-fewer", fewer),
        ("of-none", without),
    ] {
        refuses(
            name,
            &folder,
            &known,
            "of the split `train` belong to other rows",
        );
    }
}

#[test]
fn scored_tokens_are_scored_anew_without_a_second_pair_of_columns() {
    let fixture = Fixture::new(write_tokens);
    let first = score(&fixture, "first", "model: model, dataset: tokens");
    let parameters = "model: model, adapter: adapter_final, dataset: scored";
    let second = try_to_score(&fixture, "second", &first, parameters).unwrap();
    let back = "model: model, dataset: scored, per_device_eval_batch_size: 1";
    let third = try_to_score(&fixture, "third", &second, back).unwrap();
    for file in ["train.parquet", "test.parquet", "reference.json"] {
        let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
        assert!(read(&first) == read(&third), "{file}");
        assert!(read(&first) != read(&second), "{file}");
    }
    // As far as a program that knows TRL's sums needs them.
    let [plain, tuned] = [&first, &second].map(|folder| {
        let rows = reference_logps::read(folder, "test").unwrap().unwrap();
        assert_eq!(rows.len(), 5);
        rows[0].chosen.iter().sum::<f32>()
    });
    assert!(
        plain < -1. && (plain - tuned).abs() > 1e-2,
        "{plain} {tuned}"
    );
}

/// The rows of the golden runs with a BOS and an EOS that `tokenize` added for `ORPOTrainer`.
pub(super) fn write_added(folder: &Path) {
    let plain = folder.join("plain");
    fs::create_dir(&plain).unwrap();
    write_tokens(&plain);
    let mut rows = crate::data::tokens::read(&plain, "train").unwrap();
    fs::remove_dir_all(&plain).unwrap();
    for row in &mut rows {
        row.prompt_ids.insert(0, 1021);
        row.chosen_ids.push(1022);
        row.rejected_ids.as_mut().unwrap().push(1022);
    }
    write_splits(folder, &rows);
    let added = Added {
        bos: Some(1021),
        eos: Some(1022),
        mixed: false,
    };
    added.write(folder).unwrap();
}

/// What was added is taken off once, by the stage and by the training alike.
#[test]
fn added_tokens_are_neither_scored_nor_lost() {
    let (fixture, plain) = (Fixture::new(write_added), Fixture::new(write_tokens));
    let scored = score(&fixture, "scored", "model: model, dataset: tokens");
    let expected = score(&plain, "scored", "model: model, dataset: tokens");
    for split in ["train", "test"] {
        let logps = |folder: &Path| reference_logps::read(folder, split).unwrap();
        assert_eq!(logps(&scored), logps(&expected));
    }
    let start = "model: model, adapter: adapter_init, ref_model: model";
    both_ways(&fixture, "added", &scored, start);
}

#[test]
fn rows_that_cant_be_scored_are_named() {
    fn write(folder: &Path) {
        let plain = folder.join("plain");
        fs::create_dir(&plain).unwrap();
        write_tokens(&plain);
        let mut rows = crate::data::tokens::read(&plain, "train").unwrap();
        fs::remove_dir_all(&plain).unwrap();
        rows[17].rejected_ids = None;
        write_splits(folder, &rows);
    }
    let fixture = Fixture::new(write);
    let parameters = "model: model, dataset: tokens";
    let error = try_to_score(&fixture, "scored", Path::new("/nowhere"), parameters);
    let error = format!("{:#}", error.unwrap_err());
    assert!(
        error.contains("row 18 of the split `train` lacks"),
        "{error}"
    );
    let both: Result<ScoreReference, _> =
        serde_yaml::from_str("{model: a, dataset: b, bf16: true, fp16: true}");
    assert_eq!(Stage::check(&both.unwrap())[0].parameter, "fp16");
}

/// TRL's run, with the reference before it.
#[test]
fn a_training_on_columns_makes_the_adapter_of_trl() {
    let fixture = Fixture::new(write_tokens);
    let scored = score(&fixture, "scored", "model: model, dataset: tokens");
    let cx = context(&fixture, "tuned", &scored);
    let text = "{model: model, adapter: adapter_init, ref_model: model, dataset: scored, per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2, learning_rate: 2.0e-3, lr_scheduler_type: cosine, warmup_steps: 2, weight_decay: 0.01, seed: 3407,
        train_sampling_strategy: sequential, num_train_epochs: 2}";
    let stage: TrainDpo = serde_yaml::from_str(text).unwrap();
    Stage::run(&stage, &cx).unwrap();
    let theirs = golden::tensors("dpo/adapter_final.safetensors");
    let ours = crate::ml::adapter::Adapter::load(cx.out()).unwrap();
    assert_eq!(2 * ours.tensors.len(), theirs.len());
    for (path, pair) in &ours.tensors {
        for (part, tensor) in [("A", &pair.a), ("B", &pair.b)] {
            let name = format!("base_model.model.{path}.lora_{part}.weight");
            assert!(golden::far(tensor, &theirs[&name]) < 2e-4, "{name}");
        }
    }
    let metrics = fs::read_to_string(cx.out().join("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(last["num_tokens"], 7572);
}

/// Four times the rows take hardly more memory: they are read, scored and written some at a time.
#[test]
fn memory_does_not_grow_with_the_rows() {
    fn write(folder: &Path, count: u32) {
        let row = |number: u32| TokenRow {
            prompt_ids: vec![1, number % 900],
            chosen_ids: vec![2, 3],
            rejected_ids: Some(vec![4, number / 900, 5]),
            ..TokenRow::default()
        };
        write_splits(folder, &(0..count).map(row).collect::<Vec<_>>());
    }
    let peak = |write: fn(&Path)| {
        let fixture = Fixture::new(write);
        let parameters = "model: model, dataset: tokens, per_device_eval_batch_size: 64";
        counting::peak(|| score(&fixture, "scored", parameters)).1
    };
    let few = peak(|folder| write(folder, 2048));
    let many = peak(|folder| write(folder, 8192));
    assert!(many < few + few / 4, "{few} {many}");
}
