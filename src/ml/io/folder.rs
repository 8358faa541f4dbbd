//! The files beside the weights of a model folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

/// The model's configuration.
pub const CONFIG: &str = "config.json";
/// The metrics that a training leaves beside its weights. They describe that training only, so they are not copied to other models.
pub const METRICS: &str = "metrics.jsonl";
/// The metrics in the form of transformers.
pub const TRAINER_STATE: &str = "trainer_state.json";

/// Copies the other files of the model folder `source` to `out` unchanged: tokenizer, chat template, generation config. Weights of any
/// kind and their indexes are left out, and so are the files named in `skip`.
///
/// # Errors
/// A file can't be read or written.
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
                // Additional chat templates are one folder deeper (`additional_chat_templates/`).
                fs::create_dir(&to)?;
                carry(&from, &to, skip)
            } else if skip.contains(&text.as_ref())
                || [METRICS, TRAINER_STATE].contains(&text.as_ref())
                || is_weights(&text)
            {
                Ok(())
            } else {
                // Reading and writing gives the copy permissions of its own.
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

/// Serialises a JSON value as transformers and PEFT do: indented by two spaces, with keys sorted.
pub fn sorted_json(value: &Value) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(&sorted(value))?;
    text.push('\n');
    Ok(text)
}

/// The value with the keys of its objects sorted, at every depth.
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

/// Reads `config.json` of a model folder, unchanged.
///
/// # Errors
/// The file can't be read, or is not a JSON object.
pub fn config(folder: &Path) -> anyhow::Result<Map<String, Value>> {
    let path = folder.join(CONFIG);
    let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
    read().with_context(|| format!("could not read `{}`", path.display()))
}

/// Writes `config.json` to a model folder.
pub fn write_config(folder: &Path, config: Map<String, Value>) -> anyhow::Result<()> {
    let path = folder.join(CONFIG);
    fs::write(&path, sorted_json(&Value::Object(config))?)
        .with_context(|| format!("could not write `{}`", path.display()))
}
