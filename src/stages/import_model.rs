//! `import_model`: a model folder from this machine.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::Model;
use super::model_files::{self, Checked, INDEX};
use crate::engine::{Context, Problem, SourcePath, Stage};
use crate::ml::tied;

/// Takes a model from a local Hugging Face folder: configuration, safetensors weights, tokenizer and chat template.
///
/// Everything else in the folder (checkpoints, pickled weights, `.git`) stays behind. The files are copied, so that later
/// edits of the folder can't reach a result.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportModel {
    /// The folder with `config.json`.
    pub path: SourcePath,
}

impl Stage for ImportModel {
    const KIND: &'static str = "import_model";
    const VERSION: u32 = 1;
    type Output = Model;

    fn check(&self) -> Vec<Problem> {
        if self.path.as_written().trim().is_empty() {
            return vec![Problem::new("path", "expected a folder with `config.json`")];
        }
        Vec::new()
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.source(&self.path)?;
        let refused = || {
            format!(
                "the model folder `{}` can't be used",
                self.path.as_written()
            )
        };
        ensure!(
            folder.is_dir(),
            "`{}` is no folder, expected one with `config.json`",
            self.path.as_written()
        );
        let chosen = choose(folder).with_context(refused)?;
        for (done, name) in chosen.iter().enumerate() {
            cx.check_cancelled()?;
            cx.progress(done as u64, Some(chosen.len() as u64), "files");
            cx.copy_in(&folder.join(name), name)?;
        }
        let checked = model_files::check(cx.out()).with_context(refused)?;
        tell(cx, &checked);
        Ok(())
    }
}

/// Notes what a model holds, and warns of what it lacks.
pub(super) fn tell(cx: &Context, checked: &Checked) {
    cx.note("tensors", checked.tensors);
    cx.note("weight_bytes", checked.bytes);
    if let Some(told) = tied::told(cx.out()) {
        cx.warn(told);
    }
    if !checked.tokenizer {
        cx.warn("the model has no `tokenizer.json`: `tokenize` needs another model's");
    }
}

fn choose(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for below in ["", "additional_chat_templates/"] {
        let Ok(entries) = std::fs::read_dir(folder.join(below)) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            // Through links: folders of the hub's cache consist of them.
            if let Ok(name) = entry.file_name().into_string()
                && entry.path().is_file()
            {
                found.push(format!("{below}{name}"));
            }
        }
    }
    found.sort();
    let names: BTreeSet<_> = found.iter().map(String::as_str).collect();
    let weights = model_files::weights(&names, || Ok(std::fs::read(folder.join(INDEX))?))?;
    found.retain(|name| model_files::is_beside(name) || weights.contains(name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn import(source: &Path, folder: &Path) -> anyhow::Result<()> {
        let stage = ImportModel {
            path: SourcePath::new("m"),
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
