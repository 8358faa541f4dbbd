//! `import_model`: a model folder or a GGUF file from this machine.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dtype::Dtype;
use super::files::{self, Checked, INDEX};
use super::gguf;
use crate::engine::{Context, Problem, SourcePath, Stage};
use crate::ml::model::compare::compare;
use crate::ml::model::families::without_effect;
use crate::ml::model::tied;
use crate::stages::artifacts::Model;

/// Takes a model from a local Hugging Face folder (configuration, safetensors weights, tokenizer and chat template), or makes such a
/// folder of a GGUF file.
///
/// Everything else in a folder (checkpoints, pickled weights, `.git`) stays behind. The files are copied, so that later edits of
/// the folder can't reach a result. Weights and `config.json` have to agree: a missing tensor or another shape is an error, and
/// tensors that the model doesn't use are named in a warning.
///
/// The weights of a GGUF file are computed from its blocks, whatever the types of its tensors (`Q4_K`, `Q8_0`, `IQ4_XS`, ..), and
/// configuration, tokenizer, special tokens and chat template come from its metadata. What quantising has taken from the model does
/// not come back.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"path": "models/my-llama"}]))]
pub struct ImportModel {
    /// The folder with `config.json`, or a GGUF file.
    #[schemars(extend("examples" = ["models/my-llama", "models/my-llama.Q4_K_M.gguf"]))]
    pub path: SourcePath,
    /// The type in which the weights of a GGUF file are stored. By default it is that of the file's matrices, if they are floats, and
    /// `bfloat16` if they are quantised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::stages) dtype: Option<Dtype>,
}

impl Stage for ImportModel {
    const KIND: &'static str = "import_model";
    const VERSION: u32 = 1;
    type Output = Model;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        if self.path.as_written().trim().is_empty() {
            return vec![Problem::new(
                "path",
                "expected a folder with `config.json`, or a GGUF file",
            )];
        }
        Vec::new()
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.source(&self.path)?;
        let written = self.path.as_written();
        if gguf::is_gguf(written) && folder.is_file() {
            let refused = || format!("the GGUF file `{written}` can't be used");
            gguf::import_file(cx, folder, self.dtype).with_context(refused)?;
            let checked = files::check(cx.out()).with_context(refused)?;
            return tell(cx, &checked).with_context(refused);
        }
        let refused = || format!("the model folder `{written}` can't be used");
        ensure!(
            folder.is_dir(),
            "`{written}` is no folder, expected one with `config.json`, or a file that ends in `.gguf`",
        );
        ensure!(
            self.dtype.is_none(),
            "`dtype` is for GGUF files, and `{written}` is a folder, whose weights are taken as they are; hint: leave `dtype` out",
        );
        let chosen = choose_files(folder).with_context(refused)?;
        for (done, name) in chosen.iter().enumerate() {
            cx.check_cancelled()?;
            cx.progress(done as u64, Some(chosen.len() as u64), "files");
            cx.copy_in(&folder.join(name), name)?;
        }
        let checked = files::check(cx.out()).with_context(refused)?;
        tell(cx, &checked).with_context(refused)
    }
}

/// The largest number of unused tensors that a warning names.
const NAMED: usize = 8;

/// Compares the weights with the configuration, notes what the model contains, and warns of missing and unused tensors.
pub(in crate::stages) fn tell(cx: &Context, checked: &Checked) -> anyhow::Result<()> {
    cx.note("tensors", checked.tensors);
    cx.note("weight_bytes", checked.bytes);
    let (config, weights) = tied::open(cx.out())?;
    let unused = compare(&config, &weights)?;
    if !unused.is_empty() {
        cx.note("unused_tensors", unused.len());
        let named: Vec<_> = unused
            .iter()
            .take(NAMED)
            .map(|name| format!("`{name}`"))
            .collect();
        let more = match unused.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        cx.warn(format!(
            "tensors that the model described by `config.json` doesn't have are not used, as in transformers: {}{more}",
            named.join(", ")
        ));
    }
    let (family, keys) = without_effect(cx.out())?;
    for key in keys {
        cx.warn(format!(
            "`{key}` in `config.json` has no effect: the model type `{family}` doesn't know it, here as in transformers"
        ));
    }
    if let Some(conflict) = tied::conflict(cx.out(), &config)? {
        cx.warn(conflict);
    }
    if !checked.tokenizer {
        cx.warn("the model has no `tokenizer.json`: `tokenize` needs another model's");
    }
    Ok(())
}

fn choose_files(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for below in ["", "additional_chat_templates/"] {
        let Ok(entries) = std::fs::read_dir(folder.join(below)) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            // Links are followed, since folders of the hub's cache consist of them. Hidden files don't belong to the contents.
            if let Ok(name) = entry.file_name().into_string()
                && !name.starts_with('.')
                && entry.path().is_file()
            {
                found.push(format!("{below}{name}"));
            }
        }
    }
    found.sort();
    let names: BTreeSet<_> = found.iter().map(String::as_str).collect();
    let weights = files::weights(&names, || Ok(std::fs::read(folder.join(INDEX))?))?;
    found.retain(|name| files::is_beside(name) || weights.contains(name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Level;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn import(source: &Path, folder: &Path) -> anyhow::Result<()> {
        let stage = ImportModel {
            path: SourcePath::new("m"),
            dtype: None,
        };
        stage.run(&Context::for_test(folder, &[], &[("m", source)]))
    }

    #[test]
    fn a_model_comes_in_without_odd_files() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::create_dir_all(source.join("checkpoint-5")).unwrap();
        std::fs::create_dir_all(source.join(".git")).unwrap();
        for entry in std::fs::read_dir(GOLDEN).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
        }
        for odd in [
            "pytorch_model.bin",
            "README.md",
            "checkpoint-5/model.safetensors",
            ".git/HEAD",
        ] {
            std::fs::write(source.join(odd), "odd").unwrap();
        }
        import(&source, folder.path()).unwrap();
        let out = folder.path().join("out");
        let mut names: Vec<_> = std::fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names, expected);
        for name in expected {
            let same =
                std::fs::read(out.join(name)).unwrap() == std::fs::read(source.join(name)).unwrap();
            assert!(same, "{name}");
        }
    }

    #[test]
    fn weights_and_configuration_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::create_dir_all(&source).unwrap();
        for entry in std::fs::read_dir(GOLDEN).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), source.join(entry.file_name())).unwrap();
        }
        let config = std::fs::read_to_string(source.join("config.json")).unwrap();
        let out = |changes: &[(&str, &str)]| {
            let mut text = config.clone();
            for (from, to) in changes {
                assert!(text.contains(from));
                text = text.replace(from, to);
            }
            std::fs::write(source.join("config.json"), text).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let cx = Context::for_test(folder.path(), &[], &[("m", &source)]);
            let stage = ImportModel {
                path: SourcePath::new("m"),
                dtype: None,
            };
            let ran = stage.run(&cx).map_err(|error| format!("{error:#}"));
            ran.map(|()| {
                (
                    cx.messages(Level::Warning),
                    cx.notes.lock().unwrap().clone(),
                )
            })
        };
        let (warnings, notes) = out(&[]).unwrap();
        assert_eq!(
            (warnings.len(), notes.contains_key("unused_tensors")),
            (0, false)
        );
        // Fewer layers than the file has: transformers reports the rest as unexpected.
        let (warnings, notes) =
            out(&[("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2")]).unwrap();
        assert_eq!(notes["unused_tensors"], 9);
        assert_eq!(warnings.len(), 1);
        assert!(
            warnings[0].contains("`model.layers.2.input_layernorm.weight`")
                && warnings[0].ends_with("and 1 more"),
            "{warnings:?}"
        );
        let (warnings, _) =
            out(&[("\"use_cache\"", "\"sliding_window\": 64, \"use_cache\"")]).unwrap();
        assert!(
            warnings.len() == 1 && warnings[0].contains("`sliding_window`"),
            "{warnings:?}"
        );
        for (from, to, expected) in [
            (
                "\"num_hidden_layers\": 3",
                "\"num_hidden_layers\": 16000",
                "model.layers.3.",
            ),
            (
                "\"intermediate_size\": 192",
                "\"intermediate_size\": 128",
                "expected [128, 64]",
            ),
            (
                "\"attention_bias\": false",
                "\"attention_bias\": true",
                "q_proj.bias",
            ),
            ("\"model_type\": \"llama\",", "", "`model_type` is missing"),
        ] {
            let error = out(&[(from, to)]).unwrap_err();
            assert!(
                error.contains("`m` can't be used") && error.contains(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn no_model_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", import(folder.path(), folder.path()).unwrap_err());
        assert!(error.contains("no weights"), "{error}");
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let error = import(&file, folder.path()).unwrap_err().to_string();
        assert!(error.contains("no folder"), "{error}");
    }
}
