//! Tests of all stages of data and weights together: neither the number of threads nor the short ways change a byte.

use std::fs;
use std::path::{Path, PathBuf};

use super::dataset::import_dataset::ImportDataset;
use super::model::merge::Merge;
use super::model::quantize::Quantize;
use super::text::apply_chat_template::ApplyChatTemplate;
use super::text::tokenize::Tokenize;
use crate::engine::{Context, Stage};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// Runs a stage in `folder/name`; its output.
fn run<S: Stage + serde::de::DeserializeOwned>(
    folder: &Path,
    name: &str,
    yaml: &str,
    inputs: &[(&str, &Path)],
) -> PathBuf {
    let rows = folder.join("rows.jsonl");
    let cx = Context::for_test(&folder.join(name), inputs, &[("rows.jsonl", &rows)]);
    let stage: S = serde_yaml::from_str(yaml).unwrap();
    stage.run(&cx).unwrap();
    cx.out().to_owned()
}

/// More than two batches of rows, all of them different.
fn rows() -> String {
    let golden = include_str!("../../tests/golden/rows.jsonl");
    let lines: Vec<serde_json::Value> = golden
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let rows = (0..2500).map(|number| {
        let mut row = lines[number % lines.len()].clone();
        row["prompt"] = format!("{} ({number}) …", row["prompt"].as_str().unwrap()).into();
        row.to_string() + "\n"
    });
    rows.collect()
}

/// The golden model with a token that no text has, and that only the library's way allows for.
fn model_of_the_long_way(folder: &Path) -> PathBuf {
    let model = folder.join("long");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(Path::new(GOLDEN).join("model")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let path = model.join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut token = json["added_tokens"][0].clone();
    token["id"] = 5000.into();
    token["content"] = "\u{10fffd}".into();
    token["normalized"] = true.into();
    json["added_tokens"].as_array_mut().unwrap().push(token);
    fs::write(&path, json.to_string()).unwrap();
    model
}

/// The bytes that every stage makes.
fn all(threads: usize, long_way: bool) -> Vec<Vec<u8>> {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    fs::write(folder.join("rows.jsonl"), rows()).unwrap();
    let short = Path::new(GOLDEN).join("model");
    let long = model_of_the_long_way(folder);
    let model = if long_way { long } else { short.clone() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(|| {
        let pairs = run::<ImportDataset>(folder, "pairs", "{path: rows.jsonl}", &[]);
        let inputs = [("pairs", pairs.as_path()), ("base", model.as_path())];
        let yaml = "{dataset: pairs, tokenizer: base}";
        let chats = run::<ApplyChatTemplate>(folder, "chats", yaml, &inputs);
        let inputs = [("chats", chats.as_path()), ("base", model.as_path())];
        let yaml = "{dataset: chats, tokenizer: base, max_length: 100, max_prompt_length: 60}";
        let tokens = run::<Tokenize>(folder, "tokens", yaml, &inputs);
        let base4 = run::<Quantize>(folder, "base4", "{model: base}", &[("base", &short)]);
        let adapter = Path::new(GOLDEN).join("adapter_final");
        let merged = |name: &str, base: &Path| {
            let inputs = [("base", base), ("tuned", adapter.as_path())];
            run::<Merge>(folder, name, "{model: base, adapter: tuned}", &inputs)
        };
        let (dense, merged4) = (merged("dense", &short), merged("merged4", &base4));
        let tables = [&pairs, &chats, &tokens].map(|out| out.join("train.parquet"));
        let weights = [&base4, &dense, &merged4].map(|out| out.join("model.safetensors"));
        let files = tables.iter().chain(&weights);
        files.map(|path| fs::read(path).unwrap()).collect()
    })
}

#[test]
fn neither_threads_nor_short_ways_change_a_byte() {
    let one = all(1, false);
    for (threads, long_way) in [(3, false), (2, true)] {
        for (number, (one, other)) in one.iter().zip(all(threads, long_way)).enumerate() {
            assert!(
                *one == other,
                "file {number}, {threads} threads, long way: {long_way}"
            );
        }
    }
}
