//! What `show` prints of an artifact.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::data;
use crate::engine::{Bytes, View, canonical_json};
use crate::ml::gguf;
use crate::ml::io::folder::METRICS;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::{Arch, QkNorm};
use crate::ml::model::create::parameters;
use crate::ml::model::tensors::projection_name;
use crate::ml::train::Log;

fn line(text: impl Into<String>) -> View {
    View::Line(text.into())
}

/// Tables: their splits, columns and first rows.
pub(super) fn splits(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
    let mut views = Vec::new();
    for split in data::summary(folder)?.splits {
        views.push(line(""));
        views.push(line(format!("{}: {} rows", split.name, split.rows)));
        for (name, kind) in &split.columns {
            views.push(line(format!("  {name}: {kind}")));
        }
        for row in data::head(folder, &split.name, rows)? {
            views.push(line(row.to_string()));
        }
    }
    Ok(views)
}

/// Files: their names and sizes, ten for each row that is asked for.
pub(super) fn files(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
    let most = rows.saturating_mul(10);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let found = entry.metadata()?;
        let size = if found.is_dir() {
            "folder".to_owned()
        } else {
            Bytes(found.len()).to_string()
        };
        names.push(vec![format!("  {name}"), size]);
    }
    names.sort();
    let more = names.len().saturating_sub(most);
    names.truncate(most);
    if more > 0 {
        names.push(vec![format!("  and {more} more"), String::new()]);
    }
    Ok(vec![line(""), View::Table(names)])
}

/// A model: its sizes and weights, and how it was trained.
pub(super) fn model(folder: &Path) -> anyhow::Result<Vec<View>> {
    let config = Arch::read(folder)?;
    let weights = Weights::open(folder)?;
    let sizes = [
        ("family", config.family.to_owned()),
        ("layers", config.num_hidden_layers().to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("intermediate_size", config.intermediate_size.to_string()),
        (
            "heads",
            format!(
                "{} queries, {} keys and values, {} wide",
                config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
        ),
        ("attention", attention(&config)),
        ("vocab_size", config.vocab_size.to_string()),
        ("parameters", parameters(&config).to_string()),
        (
            "dtype",
            config
                .dtype
                .map_or_else(|| "not said".to_owned(), |dtype| dtype.as_str().to_owned()),
        ),
        (
            "quantization",
            config
                .quantization
                .as_ref()
                .map_or("none", |quantization| {
                    if quantization.double_quant {
                        "nf4, double quant"
                    } else {
                        "nf4"
                    }
                })
                .to_owned(),
        ),
        (
            "weights",
            format!(
                "{} in {} files, {} tensors",
                Bytes(weights.bytes()),
                weights.files().len(),
                weights.names().len()
            ),
        ),
    ];
    let sizes = sizes.map(|(name, value)| vec![format!("  {name}"), value]);
    let mut views = vec![line(""), line("model"), View::Table(sizes.to_vec())];
    views.extend(metrics(folder)?);
    Ok(views)
}

/// An adapter: its settings, and how it was trained.
pub(super) fn adapter(folder: &Path) -> anyhow::Result<Vec<View>> {
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json"))?)?;
    let names = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "bias",
        "target_modules",
    ];
    let settings = names.map(|name| {
        let value = config.get(name).map(canonical_json).unwrap_or_default();
        vec![format!("  {name}"), value]
    });
    let mut views = vec![line(""), line("adapter"), View::Table(settings.to_vec())];
    views.extend(metrics(folder)?);
    Ok(views)
}

/// A GGUF file: what it says of itself, and the types of its tensors.
pub(super) fn gguf(folder: &Path) -> anyhow::Result<Vec<View>> {
    let mut views = Vec::new();
    let mut names: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    names.sort_by_key(fs::DirEntry::file_name);
    for entry in names {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.ends_with(".gguf") {
            continue;
        }
        let file = gguf::read::File::open(&entry.path())?;
        let mut rows = Vec::new();
        for (key, value) in file.metadata() {
            let text = match value {
                gguf::Value::String(text) if text.chars().count() <= 80 && !text.contains('\n') => {
                    text.clone()
                }
                gguf::Value::String(text) => format!("{} characters", text.chars().count()),
                gguf::Value::Array(values) => format!("{} values", values.len()),
                gguf::Value::Bool(value) => value.to_string(),
                number => number.number().map_or_else(String::new, |n| n.to_string()),
            };
            rows.push(vec![format!("  {key}"), text]);
        }
        let mut kinds: BTreeMap<_, usize> = BTreeMap::new();
        for tensor in file.tensors().values() {
            *kinds.entry(tensor.kind).or_default() += 1;
        }
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        rows.push(vec!["  tensors".to_owned(), kinds.join(", ")]);
        views.extend([line(""), line(name), View::Table(rows)]);
    }
    Ok(views)
}

/// An evaluation: its numbers and some answers.
pub(super) fn scores(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
    let scores: Value = serde_json::from_slice(&fs::read(folder.join("scores.json"))?)?;
    let of = |part: &str, name: &str| {
        scores
            .get(part)
            .and_then(|part| part.get(name))
            .and_then(Value::as_f64)
    };
    let number = |value: Option<f64>| value.map(|value| format!("{value:.4}")).unwrap_or_default();
    let names = scores
        .get("base")
        .and_then(Value::as_object)
        .map(|base| base.keys().cloned().collect::<Vec<_>>());
    let has = |part: &str| scores.get(part).is_some_and(Value::is_object);
    let (compared, titles) = if has("model") {
        ("model", ["", "baseline", "model", "difference"])
    } else {
        ("adapter", ["", "base", "with adapter", "difference"])
    };
    let mut lines = vec![titles.map(str::to_owned).to_vec()];
    for name in names.unwrap_or_default() {
        let parts = ["base", compared, "difference"].map(|part| number(of(part, &name)));
        lines.push(std::iter::once(name).chain(parts).collect());
    }
    let mut views = vec![line(""), View::Table(lines)];
    let answers = fs::read_to_string(folder.join("answers.jsonl")).unwrap_or_default();
    for answer in answers.lines().take(rows) {
        let answer: Value = serde_json::from_str(answer)?;
        views.push(line(""));
        for name in ["prompt", "chosen", "rejected", "base", "adapter", "model"] {
            if let Some(value) = answer.get(name).and_then(Value::as_str) {
                let value = value.trim().replace('\n', "\n           ");
                views.push(line(format!("{name:>9}: {value}")));
            }
        }
    }
    Ok(views)
}

/// The curves of a training.
fn metrics(folder: &Path) -> anyhow::Result<Vec<View>> {
    let path = folder.join(METRICS);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path)?;
    let logs: Vec<Log> = text.lines().filter_map(Log::parse).collect();
    let mut curves: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for log in &logs {
        for (name, value) in &log.values {
            curves.entry(name.clone()).or_default().push(*value);
        }
    }
    let steps = logs.last().map_or(0, |log| log.step);
    Ok(vec![
        line(""),
        line(format!("metrics of {steps} steps")),
        View::Curves(curves.into_iter().collect()),
    ])
}

/// What a model's attention has beside heads, in words.
fn attention(arch: &Arch) -> String {
    let windows: Vec<_> = arch
        .layers
        .iter()
        .filter_map(|layer| layer.window)
        .collect();
    let layers = arch.num_hidden_layers();
    let mut words = match windows[..] {
        [] => vec!["causal".to_owned()],
        [window, ..] => vec![format!(
            "windows of {window} keys in {} of {layers} layers",
            windows.len()
        )],
    };
    if arch.qk_norm != QkNorm::None {
        words.push("norms of queries and keys".to_owned());
    }
    let unrotated = arch.layers.iter().filter(|layer| layer.rope.is_none());
    let unrotated = unrotated.count();
    if unrotated > 0 {
        words.push(format!(
            "no rotary embedding in {unrotated} of {layers} layers"
        ));
    }
    if arch.rotary_dim != arch.head_dim {
        let (part, whole) = (arch.rotary_dim, arch.head_dim);
        words.push(format!("{part} of {whole} features of a head rotated"));
    }
    if let Some(cap) = arch.score_softcap {
        words.push(format!("scores capped at {cap}"));
    }
    if !arch.biases.is_empty() {
        let names: Vec<_> = arch.biases.iter().copied().map(projection_name).collect();
        words.push(format!("biases of {}", names.join(", ")));
    }
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::testing::golden;

    #[test]
    fn a_model_s_family_and_attention_are_told() {
        for (name, expected) in [
            ("model", "causal"),
            ("families/qwen2", "causal; biases of q_proj, k_proj, v_proj"),
            ("families/qwen3", "causal; norms of queries and keys"),
            ("families/mistral", "windows of 16 keys in 2 of 2 layers"),
            (
                "families/smollm3",
                "windows of 20 keys in 1 of 2 layers; no rotary embedding in 1 of 2 layers",
            ),
            (
                "families/gemma2",
                "windows of 16 keys in 1 of 2 layers; scores capped at 3",
            ),
            (
                "families/phi3",
                "causal; 24 of 32 features of a head rotated",
            ),
        ] {
            let arch = Arch::read(&golden::folder(name)).unwrap();
            assert_eq!(attention(&arch), expected, "{name}");
        }
    }
}
