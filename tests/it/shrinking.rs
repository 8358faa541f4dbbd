//! Files that are cut while the program reads them, and sizes that no machine has: an error, and never the end of the process.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use serde_json::Value;

use crate::support::program::Project;

const ROW: &str =
    "{\"prompt\": \"some words\", \"chosen\": \"more of them\", \"rejected\": \"none\"}\n";

/// Cuts a file, whatever its mode.
fn cut(path: &std::path::Path, length: u64) {
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(path, mode).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

/// As the hub's shared cache or a placed output may have another name for a file of the store, whose owner cuts it.
#[test]
fn weights_that_are_cut_under_a_stage_fail_it() {
    let project = Project::empty();
    project.write(
        "recipe.yaml",
        "version: 1
stages:
  rows: { import_dataset: { path: rows.jsonl } }
  base: { create_model: { dataset: rows, vocab_size: 300, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 2, \
         num_attention_heads: 8 } }
  base4: { quantize: { model: base } }
",
    );
    project.write("rows.jsonl", &ROW.repeat(50));
    project.succeeds(&["run", "recipe.yaml", "base"]);
    let records = project.records();
    let made = |record: &&Value| record["stage"] == "base";
    let record = records.iter().find(made).unwrap();
    let artifact = record["artifact"].as_str().unwrap();
    let artifacts = project.path(".pipeline/v1/artifacts");
    let weights = artifacts.join(artifact).join("model.safetensors");
    let size = weights.metadata().unwrap().len();
    assert!(size > 100_000_000);
    // Early, while the stage reads, and behind its last byte but one.
    for left in [5000, size / 3, size - 1] {
        let mut child = project
            .command(&["run", "--json", "recipe.yaml", "base4"])
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("stage_started") {
            line.clear();
            assert!(out.read_line(&mut line).unwrap() > 0, "it has not started");
        }
        let whole = std::fs::read(&weights).unwrap();
        cut(&weights, left);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let mut told = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut told)
            .unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(1), "{status:?} {told} {rest}");
        let known = [
            "became shorter",
            "changed while it was read",
            "speaks of",
            "a header",
        ];
        assert!(known.iter().any(|known| rest.contains(known)), "{rest}");
        assert!(!rest.contains("stage_done"), "{rest}");
        // For the next one, as it was.
        std::fs::write(&weights, whole).unwrap();
    }
}

#[test]
fn a_source_that_is_cut_while_it_is_digested_ends_no_process() {
    let project = Project::empty();
    project.write(
        "recipe.yaml",
        "version: 1\nstages:\n  rows: { import_dataset: { path: rows.jsonl } }\n",
    );
    let path = project.path("rows.jsonl");
    for wait in [1, 3, 6, 10, 15, 20] {
        project.write("rows.jsonl", &ROW.repeat(1 << 21));
        let mut child = project.command(&["plan", "recipe.yaml"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        cut(&path, 100);
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), None, "{status:?}");
    }
}

/// Where the system gives no thread, which is what a stack of 128 TiB amounts to.
#[test]
fn without_threads_there_is_a_sentence() {
    let mut project = Project::empty();
    project.write(
        "recipe.yaml",
        "version: 1\nstages:\n  rows: { import_dataset: { path: rows.jsonl } }\n",
    );
    project.write("rows.jsonl", &ROW.repeat(1 << 17));
    project.variable("RUST_MIN_STACK", &(1u64 << 47).to_string());
    for arguments in [["plan", "recipe.yaml"], ["run", "recipe.yaml"]] {
        let ended = project.run(&arguments);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        let told = ended.stdout + &ended.stderr;
        assert!(matches!(ended.code, Some(0 | 1)), "{:?} {told}", ended.code);
        assert!(told.contains("temporarily unavailable"), "{told}");
    }
}

#[test]
fn a_configuration_of_absurd_sizes_is_refused() {
    let project = Project::empty();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model");
    std::fs::create_dir(project.path("model")).unwrap();
    for name in [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(golden.join(name), project.path("model").join(name)).unwrap();
    }
    project.write(
        "recipe.yaml",
        "version: 1
stages:
  base: { import_model: { path: model } }
  base4: { quantize: { model: base } }
",
    );
    let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
    for (key, value) in [
        ("num_hidden_layers", 4_000_000_000u64),
        ("num_hidden_layers", 16_000),
        ("vocab_size", 1 << 62),
        ("hidden_size", 4_000_000_000),
        ("head_dim", 1 << 31),
    ] {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config[key] = value.into();
        project.write("model/config.json", &config.to_string());
        let ended = project.run(&["run", "recipe.yaml"]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let text = ended.stdout + &ended.stderr;
        assert!(
            text.contains(key) || text.contains("model.layers.3."),
            "{text}"
        );
        assert!(!text.contains("panicked"), "{text}");
    }
    project.write(
        "create.yaml",
        "version: 1
stages:
  rows: { import_dataset: { path: rows.jsonl } }
  base: { create_model: { dataset: rows, vocab_size: 300, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4000000000, \
         num_attention_heads: 4611686018427387904 } }
",
    );
    project.write("rows.jsonl", ROW);
    let ended = project.run(&["validate", "create.yaml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    for (name, largest) in [
        ("num_hidden_layers", "16384"),
        ("num_attention_heads", "65536"),
    ] {
        assert!(ended.stderr.contains(name), "{}", ended.stderr);
        assert!(ended.stderr.contains(largest), "{}", ended.stderr);
    }
}
