//! GGUF files: `import_model` and `download_model` make model folders of them, with which everything else works.
//! `tests/golden/gguf` is made by `tests/python/generate_gguf.py`.

use std::fs;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::support::hub::HubServer;
use crate::support::program::{Project, repository};

fn project() -> Project {
    let project = Project::empty();
    let golden = repository().join("tests/golden/gguf/llama.gguf");
    fs::copy(golden, project.path("tiny.gguf")).unwrap();
    project
}

const RECIPE: &str = r"
version: 1
stages:
  base: { import_model: { path: tiny.gguf } }
  rows: { import_dataset: { path: rows.jsonl } }
  chats: { apply_chat_template: { dataset: rows, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 256 } }
  adapter: { attach_lora: { model: base, r: 2, target_modules: [q_proj, v_proj] } }
  tuned: { train_sft: { model: base, adapter: adapter, dataset: tokens, max_steps: 2, per_device_train_batch_size: 1 } }
  merged: { merge: { model: base, adapter: tuned } }
outputs:
  base: out/base
  merged: out/merged
";

#[test]
fn a_gguf_file_is_a_model_to_train() {
    let project = project();
    project.write("recipe.yaml", RECIPE);
    let row = r#"{"messages": [{"role": "user", "content": "Where is the cat?"}, {"role": "assistant", "content": "On the mat."}]}"#;
    project.write("rows.jsonl", &format!("{row}\n{row}\n"));
    // Before anything is made, its tokenizer is known.
    let ended = project.run(&["preview", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stdout.contains("<|im_start|>"), "{}", ended.stdout);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        assert!(project.path("out/base").join(name).is_file(), "{name}");
        assert!(project.path("out/merged").join(name).is_file(), "{name}");
    }
    let config: Value = serde_json::from_str(&project.read("out/base/config.json")).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert_eq!(config["tie_word_embeddings"], true);

    // Ids are llama.cpp's.
    let tokenizer = Tokenizer::from_file(project.path("out/base/tokenizer.json")).unwrap();
    let cases = fs::read_to_string(repository().join("tests/golden/gguf/llama.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    assert!(cases.len() > 3);
    for case in cases {
        let ids = tokenizer
            .encode(case["text"].as_str().unwrap(), true)
            .unwrap();
        assert_eq!(serde_json::json!(ids.get_ids()), case["ids"], "{case}");
    }

    // Nothing runs again.
    let again = project.run(&["run", "recipe.yaml", "--json"]);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert!(!again.stdout.contains("stage_started"), "{}", again.stdout);
}

#[test]
fn dtype_is_for_gguf_files() {
    let project = project();
    project.write(
        "recipe.yaml",
        "version: 1\nstages:\n  base: { import_model: { path: tiny.gguf, dtype: f32 } }\noutputs:\n  base: out\n",
    );
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(project.read("out/config.json").contains("float32"));
    project.write(
        "folder.yaml",
        "version: 1\nstages:\n  base: { import_model: { path: out, dtype: f32 } }\n",
    );
    let ended = project.run(&["run", "folder.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("`dtype` is for GGUF files"),
        "{}",
        ended.stderr
    );
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    let project = project();
    let whole = fs::read(project.path("tiny.gguf")).unwrap();
    fs::write(project.path("short.gguf"), &whole[..20_000]).unwrap();
    let mut big = whole.clone();
    big[4..8].copy_from_slice(&3u32.to_be_bytes());
    fs::write(project.path("big.gguf"), &big).unwrap();
    fs::create_dir(project.path("folder")).unwrap();
    fs::write(
        project.path("folder/config.json"),
        r#"{"model_type": "llama"}"#,
    )
    .unwrap();
    fs::write(project.path("folder/model.gguf"), &whole).unwrap();
    for (path, whys) in [
        (
            "short.gguf",
            [
                "was it cut off?",
                "the GGUF file `short.gguf` can't be used",
            ],
        ),
        ("big.gguf", ["big-endian", "gguf-convert-endian"]),
        ("folder", ["`model.gguf`", "add it to the `path`"]),
    ] {
        let recipe =
            format!("version: 1\nstages:\n  base: {{ import_model: {{ path: {path} }} }}\n");
        project.write("recipe.yaml", &recipe);
        let ended = project.run(&["run", "recipe.yaml"]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let said = ended
            .stderr
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        for why in whys {
            assert!(said.contains(why), "{why}: {said}");
        }
    }
}

#[test]
fn a_repository_of_gguf_files_is_a_model_by_one_of_them() {
    let server = HubServer::start();
    let mut project = project();
    let bytes = fs::read(project.path("tiny.gguf")).unwrap();
    server.model(
        "some/tiny-GGUF",
        &[("tiny.Q8_0.gguf", &bytes), ("README.md", b"tiny")],
    );
    project.variable("HF_ENDPOINT", &server.endpoint);
    let recipe = |more: &str| {
        format!(
            "version: 1\nstages:\n  base: {{ download_model: {{ repo: some/tiny-GGUF{more} }} }}\noutputs:\n  base: out\n"
        )
    };
    project.write(
        "recipe.yaml",
        &recipe(", file: tiny.Q8_0.gguf, dtype: float16"),
    );
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}{}", ended.stdout, ended.stderr);
    assert!(project.read("out/config.json").contains("float16"));
    assert!(project.path("out/tokenizer.json").is_file());
    for (more, why) in [
        (", file: other.gguf", "it has `tiny.Q8_0.gguf`"),
        (", file: README.md", "expected the name of a GGUF file"),
        (", dtype: float16", "there is no `file`"),
        (
            ", file: tiny.Q8_0.gguf, allow_patterns: ['*']",
            "the one file that is taken",
        ),
        ("", "as `file` of `download_model`"),
    ] {
        project.write("wrong.yaml", &recipe(more));
        let ended = project.run(&["run", "wrong.yaml"]);
        assert_ne!(ended.code, Some(0), "{more}");
        let said = ended
            .stderr
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        assert!(said.contains(why), "{why}: {said}");
    }
}
