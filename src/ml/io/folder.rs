//! What lies beside the weights of a model folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

/// The model's configuration.
pub const CONFIG: &str = "config.json";
/// What a training leaves beside its weights; it tells of that training only.
pub const METRICS: &str = "metrics.jsonl";
/// The same in transformers' form.
pub const TRAINER_STATE: &str = "trainer_state.json";

/// Copies a model folder's other files unchanged: tokenizer, chat template, generation config. Weights of any kind and their
/// indexes stay behind, and so does what `skip` names.
pub fn carry(source: &Path, out: &Path, skip: &[&str]) -> anyhow::Result<()> {
    let entries = fs::read_dir(source).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut entries = entries.with_context(|| format!("could not list `{}`", source.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (from, name) = (entry.path(), entry.file_name());
        let text = name.to_string_lossy();
        let to = out.join(&name);
        let copy = || -> anyhow::Result<()> {
            if from.is_dir() {
                // Named chat templates are one folder deeper (`additional_chat_templates/`).
                fs::create_dir(&to)?;
                carry(&from, &to, skip)
            } else if skip.contains(&text.as_ref())
                || [METRICS, TRAINER_STATE].contains(&text.as_ref())
                || is_weights(&text)
            {
                Ok(())
            } else {
                // Read and written, so that the copy has its own permissions.
                fs::write(&to, fs::read(&from)?)?;
                Ok(())
            }
        };
        copy().with_context(|| format!("could not copy `{}`", from.display()))?;
    }
    Ok(())
}

fn is_weights(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str());
    let weights = [
        "safetensors",
        "bin",
        "pt",
        "pth",
        "gguf",
        "h5",
        "msgpack",
        "onnx",
    ];
    name.ends_with(".index.json") || extension.is_some_and(|extension| weights.contains(&extension))
}

/// A JSON object as transformers and PEFT write it: indented by two, keys sorted, whatever order it came in.
pub fn sorted_json(value: &Value) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(&sorted(value))?;
    text.push('\n');
    Ok(text)
}

/// A value whose objects have their keys sorted, at every depth.
pub fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted_map: BTreeMap<&String, &Value> = map.iter().collect();
            let entries = sorted_map.into_iter();
            Value::Object(
                entries
                    .map(|(key, value)| (key.clone(), sorted(value)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// The configuration of a model folder as it stands.
pub fn config(folder: &Path) -> anyhow::Result<Map<String, Value>> {
    let path = folder.join(CONFIG);
    let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
    read().with_context(|| format!("could not read `{}`", path.display()))
}

/// Writes the configuration of a model folder.
pub fn write_config(folder: &Path, config: Map<String, Value>) -> anyhow::Result<()> {
    let path = folder.join(CONFIG);
    fs::write(&path, sorted_json(&Value::Object(config))?)
        .with_context(|| format!("could not write `{}`", path.display()))
}
