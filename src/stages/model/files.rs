//! The files of a model folder, wherever it comes from, and the check that it is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;

use crate::ml::io::weights::Header;

pub(in crate::stages) use crate::ml::io::folder::CONFIG;
pub(in crate::stages) use crate::ml::io::weights::{INDEX, SINGLE};

/// The files beside the weights: configuration, tokenizer, chat template.
const BESIDE: &[&str] = &[
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
/// Named templates beside the default one.
const TEMPLATES: &str = "additional_chat_templates/";
/// The extensions of weights that can't be used, for an error that names them.
const FOREIGN: &[&str] = &["bin", "pth", "pt", "onnx", "h5", "msgpack", "ckpt"];

/// Whether `path` is one of the files beside the weights.
pub(in crate::stages) fn is_beside(path: &str) -> bool {
    let template = path
        .strip_prefix(TEMPLATES)
        .and_then(|name| name.strip_suffix(".jinja"));
    BESIDE.contains(&path) || template.is_some_and(|name| !name.contains('/'))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn parse_index(text: &[u8]) -> anyhow::Result<Index> {
    serde_json::from_slice(text)
        .with_context(|| format!("`{INDEX}` is broken: expected JSON with a `weight_map`"))
}

/// The weights among `names`: one file, or an index and its shards. `read` returns the text of the index.
///
/// As in transformers, `model.safetensors` takes precedence; other layouts of the same weights are left out.
pub(in crate::stages) fn weights(
    names: &BTreeSet<&str>,
    read: impl FnOnce() -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<Vec<String>> {
    if names.contains(SINGLE) {
        return Ok(vec![SINGLE.into()]);
    }
    if names.contains(INDEX) {
        let index = parse_index(&read()?)?;
        let shards: BTreeSet<_> = index.weight_map.into_values().collect();
        ensure!(!shards.is_empty(), "`{INDEX}` names no weights");
        for shard in &shards {
            ensure!(
                names.contains(shard.as_str()) && shard.ends_with(".safetensors"),
                "`{INDEX}` names the shard `{shard}`, which is not there"
            );
        }
        let mut chosen = vec![INDEX.to_owned()];
        chosen.extend(shards);
        return Ok(chosen);
    }
    let with = |extensions: &[&str]| {
        let fits = |name: &&&str| {
            let extension = Path::new(name)
                .extension()
                .and_then(|extension| extension.to_str());
            extension.is_some_and(|extension| extensions.contains(&extension))
        };
        names.iter().find(fits).copied()
    };
    if names.contains("adapter_model.safetensors") {
        bail!(
            "it holds an adapter (`adapter_model.safetensors`), not a model; name its base model instead, and take the adapter by \
             `import_adapter` or `download_adapter`"
        );
    }
    if let Some(odd) = with(&["safetensors"]) {
        bail!("its weights are called `{odd}`, expected `{SINGLE}` or `{INDEX}`");
    }
    if let Some(file) = with(&["gguf"]) {
        bail!(
            "its weights are only there as `{file}`, expected `{SINGLE}` or `{INDEX}`; to take that file, add it to the `path` of \
             `import_model` or give it as `file` of `download_model`"
        );
    }
    if let Some(foreign) = with(FOREIGN) {
        bail!(
            "its weights are only there as `{foreign}`, expected `{SINGLE}` or `{INDEX}`; look for a revision with safetensors \
             (on the hub often `refs/pr/1`), or save it once by transformers' `save_pretrained`"
        );
    }
    bail!("it has no weights, expected `{SINGLE}` or `{INDEX}`")
}

/// The contents of a complete model folder.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::stages) struct Checked {
    pub(in crate::stages) tensors: usize,
    pub(in crate::stages) bytes: u64,
    pub(in crate::stages) tokenizer: bool,
}

/// Checks a model folder: the configuration is JSON, every tensor has its bytes, and the index agrees with its shards.
pub(in crate::stages) fn check(folder: &Path) -> anyhow::Result<Checked> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).with_context(|| format!("could not read `{name}`"))
    };
    ensure!(
        folder.join(CONFIG).is_file(),
        "it has no `{CONFIG}`, expected a Hugging Face model folder"
    );
    let config: serde_json::Value = serde_json::from_slice(&read(CONFIG)?)
        .with_context(|| format!("`{CONFIG}` is broken: expected JSON"))?;
    ensure!(
        config.is_object(),
        "`{CONFIG}` is broken: expected a JSON object"
    );
    if folder.join("tokenizer.json").is_file() {
        serde_json::from_slice::<serde::de::IgnoredAny>(&read("tokenizer.json")?)
            .context("`tokenizer.json` is broken: expected JSON")?;
    }
    let mut checked = Checked {
        tensors: 0,
        bytes: 0,
        tokenizer: folder.join("tokenizer.json").is_file(),
    };
    let mut count = |name: &str| -> anyhow::Result<BTreeSet<String>> {
        let read = || Header::read(&File::open(folder.join(name))?);
        let header = read().with_context(|| format!("`{name}` is broken"))?;
        checked.tensors += header.tensors.len();
        checked.bytes += header.size;
        Ok(header.tensors.into_keys().collect())
    };
    if folder.join(SINGLE).is_file() {
        count(SINGLE)?;
    } else {
        ensure!(
            folder.join(INDEX).is_file(),
            "it has no weights, expected `{SINGLE}` or `{INDEX}`"
        );
        let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (tensor, shard) in parse_index(&read(INDEX)?)?.weight_map {
            shards.entry(shard).or_default().insert(tensor);
        }
        for (shard, wanted) in shards {
            ensure!(
                !shard.contains(['/', '\\']),
                "`{INDEX}` names the shard `{shard}`, expected a file beside it"
            );
            let found = count(&shard)?;
            if let Some(missing) = wanted.difference(&found).next() {
                bail!(
                    "`{INDEX}` says that `{shard}` holds the tensor `{missing}`, but it does not"
                );
            }
        }
    }
    ensure!(checked.tensors > 0, "its weights hold no tensor");
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn names<'a>(names: &[&'a str]) -> BTreeSet<&'a str> {
        names.iter().copied().collect()
    }

    fn none() -> anyhow::Result<Vec<u8>> {
        bail!("not asked")
    }

    #[test]
    fn weights_are_chosen_as_transformers_does() {
        let both = names(&[
            SINGLE,
            INDEX,
            "consolidated.safetensors",
            "pytorch_model.bin",
        ]);
        assert_eq!(weights(&both, none).unwrap(), [SINGLE]);
        let index =
            || Ok(br#"{"weight_map": {"b": "m-2.safetensors", "a": "m-1.safetensors"}}"#.to_vec());
        let sharded = names(&[
            INDEX,
            "m-1.safetensors",
            "m-2.safetensors",
            "consolidated.safetensors",
        ]);
        assert_eq!(
            weights(&sharded, index).unwrap(),
            [INDEX, "m-1.safetensors", "m-2.safetensors"]
        );
        let error = weights(&names(&[INDEX, "m-1.safetensors"]), index)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`m-2.safetensors`, which is not there"),
            "{error}"
        );
    }

    #[test]
    fn other_weights_are_explained() {
        let error = |files: &[&str]| weights(&names(files), none).unwrap_err().to_string();
        assert!(error(&["pytorch_model.bin", CONFIG]).contains("`pytorch_model.bin`"));
        assert!(error(&["adapter_model.safetensors"]).contains("adapter"));
        assert!(error(&["model.fp16.safetensors"]).contains("model.fp16"));
        assert!(error(&[CONFIG]).contains("no weights"));
    }

    #[test]
    fn a_folder_is_checked_to_the_last_byte() {
        let checked = check(Path::new(GOLDEN)).unwrap();
        assert!(checked.tensors > 10 && checked.tokenizer);
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let error = || format!("{:#}", check(folder.path()).unwrap_err());
        assert!(error().contains("no `config.json`"));
        std::fs::write(at(CONFIG), "[]").unwrap();
        assert!(error().contains("JSON object"));
        std::fs::write(at(CONFIG), "{}").unwrap();
        assert!(error().contains("no weights"));
        let whole = std::fs::read(Path::new(GOLDEN).join(SINGLE)).unwrap();
        std::fs::write(at(SINGLE), &whole[..whole.len() - 1]).unwrap();
        assert!(error().contains("cut off"));
        std::fs::write(at(SINGLE), b"version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert!(error().contains("git-lfs"));
        std::fs::write(at(SINGLE), b"12").unwrap();
        assert!(error().contains("shorter"));
        std::fs::remove_file(at(SINGLE)).unwrap();
        std::fs::write(at("part.safetensors"), &whole).unwrap();
        std::fs::write(
            at(INDEX),
            r#"{"weight_map": {"nobody": "part.safetensors"}}"#,
        )
        .unwrap();
        assert!(error().contains("`nobody`"));
        std::fs::write(at(INDEX), r#"{"weight_map": {"x": "gone.safetensors"}}"#).unwrap();
        assert!(error().contains("gone.safetensors"));
    }

    #[test]
    fn files_beside_the_weights() {
        assert!(is_beside("tokenizer.json") && is_beside("additional_chat_templates/tool.jinja"));
        assert!(!is_beside("original/tokenizer.model") && !is_beside("README.md"));
    }
}
