//! The bytes that stages make, by kind and VERSION. Other bytes under the same VERSION would let stale results pass for fresh.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::program::{Project, repository, update_wanted};

/// Trainings are left out: their last bits depend on the processor.
const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: recipes/data/pairs.jsonl, max_rows: 60 } }
  split: { split_dataset: { dataset: pairs, test_size: 0.2 } }
  base:
    create_model: { dataset: split, vocab_size: 400, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
                    num_attention_heads: 4, num_key_value_heads: 2, max_shard_size: 100KB }
  copy: { import_model: { path: out/base } }
  chats: { apply_chat_template: { dataset: split, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 48, max_prompt_length: 24 } }
  base4: { quantize: { model: base } }
  adapter: { attach_lora: { model: base4, r: 4 } }
  merged: { merge: { model: base, adapter: adapter } }
  gguf: { export_gguf: { model: merged, name: small } }
";

/// What puts the model where the recipe reads it; a recipe doesn't read its own outputs.
const COPY: &str = "  copy: { import_model: { path: out/base } }\n";
const OUTPUTS: &str = "outputs: { base: out/base }\n";

#[test]
fn other_bytes_need_another_version() {
    let project = Project::with_recipes();
    project.write("base.yaml", &(RECIPE.replace(COPY, "") + OUTPUTS));
    project.succeeds(&["run", "base.yaml", "base"]);
    project.write("r.yaml", RECIPE);
    project.succeeds(&["run", "r.yaml"]);
    let made: BTreeMap<String, Value> = project
        .records()
        .iter()
        .map(|record| {
            let pin = serde_json::json!({
                "version": record["fingerprint"]["version"],
                "artifact": record["artifact"],
            });
            (
                record["fingerprint"]["kind"].as_str().unwrap().to_owned(),
                pin,
            )
        })
        .collect();
    let path = repository().join("tests/it/pins.json");
    if update_wanted() {
        std::fs::write(&path, serde_json::to_string_pretty(&made).unwrap() + "\n").unwrap();
    }
    let pinned: BTreeMap<String, Value> =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (kind, made) in &made {
        let pinned = pinned.get(kind).unwrap_or(&Value::Null);
        if pinned["version"] == made["version"] {
            assert_eq!(
                pinned["artifact"], made["artifact"],
                "`{kind}` makes other bytes than before: raise its VERSION in its file under src/stages, then \
                 UPDATE_GENERATED=1 cargo test pins"
            );
        }
        assert_eq!(
            pinned, made,
            "the pin of `{kind}` is old: UPDATE_GENERATED=1 cargo test pins"
        );
    }
    assert_eq!(made.len(), pinned.len());
}
