//! `export_gguf`: from a training to a file for llama.cpp.

use std::fs;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: recipes/data/pairs.jsonl, max_rows: 24 } }
  base:
    create_model: { dataset: pairs, vocab_size: 400, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2,
                    num_attention_heads: 4, num_key_value_heads: 2 }
  chats: { apply_chat_template: { dataset: pairs, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 48, max_prompt_length: 24 } }
  lora: { attach_lora: { model: base, r: 4 } }
  tuned: { train_orpo: { model: base, adapter: lora, dataset: tokens, max_steps: 2, per_device_train_batch_size: 2 } }
  merged: { merge: { model: base, adapter: tuned } }
  gguf: { export_gguf: { model: merged, name: tuned } }
outputs: { gguf: out/gguf }
";

#[test]
fn a_trained_model_becomes_a_file_once() {
    let project = Project::with_recipes();
    project.write("r.yaml", RECIPE);
    project.succeeds(&["run", "r.yaml"]);
    let head = fs::read(project.path("out/gguf/tuned-Q4_K_M.gguf")).unwrap();
    assert_eq!(head[..8], *b"GGUF\x03\0\0\0");
    let modelfile = project.read("out/gguf/Modelfile");
    for line in [
        "FROM ./tuned-Q4_K_M.gguf",
        "{{ .Content }}<|eot_id|>",
        "PARAMETER stop \"<|eot_id|>\"",
    ] {
        assert!(modelfile.contains(line), "{modelfile}");
    }
    // The second time nothing runs; with another type the export alone does.
    let again = project.run(&["run", "r.yaml"]);
    assert!(
        again.code == Some(0) && again.stderr.contains("8 fresh, 0 ran"),
        "{}",
        again.stderr
    );
    let plan = project.succeeds(&[
        "plan",
        "r.yaml",
        "--set",
        "stages.gguf.export_gguf.outtype=q8_0",
    ]);
    assert!(plan.contains("7 fresh, 1 to run"), "{plan}");
    let shown = project.succeeds(&["show", "r.yaml", "gguf"]);
    for text in ["general.architecture", "llama", "Q4_K", "kl_divergence"] {
        assert!(shown.contains(text), "{text}: {shown}");
    }
    let published = project.run(&[
        "publish",
        "r.yaml",
        "gguf",
        "--repo",
        "me/tuned",
        "--license",
        "mit",
        "--dry-run",
        "--offline",
    ]);
    assert!(
        published.stdout.contains("tuned-Q4_K_M.gguf")
            || published.stderr.contains("tuned-Q4_K_M.gguf"),
        "{}{}",
        published.stdout,
        published.stderr
    );
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let project = Project::with_recipes();
    let refused = |from: &str, to: &str| {
        project.write("r.yaml", &RECIPE.replace(from, to));
        let ended = project.run(&["run", "r.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        ended.stderr
    };
    let error = refused("name: tuned }", "outtype: q3_k_s }");
    assert!(
        error.contains("q3_k_s") && error.contains("q4_k_m"),
        "{error}"
    );
    let error = refused("{ model: merged, name: tuned }", "{ model: tuned }");
    assert!(
        error.contains("takes a stage that makes `model`")
            && error.contains("the stages `base` and `merged` make `model`"),
        "{error}"
    );
    let error = refused("name: tuned }", "name: a/b }");
    assert!(error.contains("name"), "{error}");
}
