//! `import_adapter`: a LoRA adapter from this machine.

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files;
use crate::engine::{Context, Problem, SourcePath, Stage};
use crate::stages::artifacts::Adapter;
use crate::text::tokenizer;

/// Takes a LoRA adapter from a local folder that PEFT saved: to go on training it, to score it, or to merge it.
///
/// The two files of the adapter are copied, and the chat template beside them, if there is one (TRL saves it), so that later edits
/// of the folder can't reach a result. Settings that would change its numbers in a way that this program does not compute are
/// refused.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"path": "adapters/mine"}]))]
pub struct ImportAdapter {
    /// The folder with `adapter_config.json`.
    #[schemars(extend("examples" = ["adapters/mine"]))]
    path: SourcePath,
}

impl Stage for ImportAdapter {
    const KIND: &'static str = "import_adapter";
    const VERSION: u32 = 2;
    type Output = Adapter;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        if self.path.as_written().trim().is_empty() {
            let message = "expected a folder with `adapter_config.json`";
            return vec![Problem::new("path", message)];
        }
        Vec::new()
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.source(&self.path)?;
        let written = self.path.as_written();
        ensure!(
            folder.is_dir(),
            "`{written}` is no folder, expected one with `adapter_config.json`"
        );
        let names = files::names_in(folder)?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let refused = || format!("the adapter folder `{written}` can't be used");
        for name in files::choose_files(&names).with_context(refused)? {
            cx.check_cancelled()?;
            cx.copy_in(&folder.join(name), name)?;
        }
        files::take_template(cx, || tokenizer::chat_template(folder));
        files::check(cx).with_context(refused)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::ml::adapter::{CONFIG, FILE};
    use crate::ml::testing::golden;

    fn import(source: &Path, folder: &Path) -> anyhow::Result<Vec<String>> {
        let stage = ImportAdapter {
            path: SourcePath::new("a"),
        };
        let cx = Context::for_test(folder, &[], &[("a", source)]);
        stage.run(&cx)?;
        assert_eq!(cx.notes.lock().unwrap()["modules"], 21);
        files::names_in(cx.out())
    }

    #[test]
    fn an_adapter_comes_in_without_odd_files() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        fs::create_dir_all(source.join("checkpoint-5")).unwrap();
        for name in [CONFIG, FILE] {
            fs::copy(
                golden::folder("adapter_final").join(name),
                source.join(name),
            )
            .unwrap();
        }
        for odd in ["README.md", "training_args.bin", "tokenizer.json"] {
            fs::write(source.join(odd), "odd").unwrap();
        }
        assert_eq!(import(&source, folder.path()).unwrap(), [CONFIG, FILE]);
        for name in [CONFIG, FILE] {
            let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
            assert!(read(&folder.path().join("out")) == read(&source));
        }
    }

    #[test]
    fn what_is_no_usable_adapter_is_told() {
        let fails = |files: &[(&str, &str)]| {
            let folder = tempfile::tempdir().unwrap();
            let source = folder.path().join("source");
            fs::create_dir_all(&source).unwrap();
            for (name, text) in files {
                fs::write(source.join(name), text).unwrap();
            }
            format!("{:#}", import(&source, folder.path()).unwrap_err())
        };
        assert!(fails(&[]).contains("expected a folder that PEFT saved"));
        assert!(fails(&[("config.json", "{}")]).contains("`import_model`"));
        assert!(fails(&[(CONFIG, "{}"), ("adapter_model.bin", "")]).contains("`save_pretrained`"));
        let loha = fails(&[(CONFIG, r#"{"peft_type": "LOHA"}"#), (FILE, "")]);
        assert!(loha.contains("`LOHA`"), "{loha}");
    }
}
