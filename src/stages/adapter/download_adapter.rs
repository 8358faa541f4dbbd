//! `download_adapter`: a LoRA adapter from the hub, pinned to a commit and verified.

use std::collections::BTreeMap;

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files;
use crate::engine::{Context, Problem, RunEnv, Stage};
use crate::hub::RepoKind;
use crate::stages::artifacts::Adapter;
use crate::stages::from_hub::{Source, check, main_revision, pin, place};
use crate::stages::text::chat_template;
use crate::text::tokenizer;

/// Downloads a LoRA adapter from the Hugging Face hub: to go on training it, to score it, or to merge it.
///
/// The chat template comes along, if there is one beside it (TRL saves it). The revision is resolved to a commit, and a moved branch makes the stage run again. Settings that would change the adapter's
/// numbers in a way that this program does not compute are refused.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DownloadAdapter {
    /// The repository, `owner/name`.
    repo: String,
    /// A branch, a tag or a commit.
    #[serde(default = "main_revision")]
    revision: String,
    /// The folder in the repository that holds `adapter_config.json`, if it is not the topmost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subfolder: Option<String>,
}

impl Stage for DownloadAdapter {
    const KIND: &'static str = "download_adapter";
    const VERSION: u32 = 2;
    const HAS_EXTERNAL_FACTS: bool = true;
    type Output = Adapter;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        check(&self.repo, &self.revision)
    }

    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        pin(env, RepoKind::Model, &self.repo, &self.revision)
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let mut source = Source::open(cx, RepoKind::Model, &self.repo, &self.revision)?;
        let refused = || format!("the adapter `{}` can't be used", self.repo);
        let folder = match self
            .subfolder
            .as_deref()
            .map(|folder| folder.trim_matches('/'))
        {
            None | Some("") => String::new(),
            Some(folder) => format!("{folder}/"),
        };
        let files = source.listing.files.iter();
        let names: Vec<&str> = files
            .filter_map(|file| file.path.strip_prefix(folder.as_str()))
            .collect();
        let chosen = files::choose_files(&names).with_context(refused)?;
        let files = chosen
            .iter()
            .map(|name| {
                let file = source.file(&format!("{folder}{name}"));
                file.with_context(|| format!("`{name}` is gone"))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        source.fetch_to_output(&folder, files)?;
        // Beside it TRL saves the template: in a file of its own, and in older versions among the tokenizer's settings.
        let template = source.file(&format!("{folder}{}", chat_template::FILE));
        let settings = source.file(&format!("{folder}{}", chat_template::TOKENIZER_CONFIG));
        if let Some(template) = template {
            let path = source.fetch(&template)?;
            place(&path, &cx.out().join(chat_template::FILE))?;
        } else if let Some(settings) = settings {
            let path = source.fetch(&settings)?;
            files::take_template(cx, || tokenizer::template_in(&path));
        }
        source.unchanged()?;
        files::check(cx).with_context(refused)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;
    use crate::ml::adapter::{CONFIG, FILE};
    use crate::ml::testing::golden;
    use crate::stages::test_hub::{HubServer, TOKEN};

    #[test]
    fn an_adapter_comes_from_the_hub_and_its_folder() {
        let server = HubServer::start();
        let read = |name: &str| fs::read(golden::folder("adapter_final").join(name)).unwrap();
        let (config, weights) = (read(CONFIG), read(FILE));
        let at = |folder: &str, name: &str| format!("{folder}{name}");
        let files = [
            (at("", "README.md"), b"odd".to_vec()),
            (at("second/", CONFIG), config.clone()),
            (at("second/", FILE), weights.clone()),
            (at("old/", CONFIG), config.clone()),
            (at("old/", FILE), weights.clone()),
            (
                at("old/", "tokenizer_config.json"),
                br#"{"chat_template": "t"}"#.to_vec(),
            ),
            (at("new/", CONFIG), config.clone()),
            (at("new/", FILE), weights.clone()),
            (at("new/", "chat_template.jinja"), b"t".to_vec()),
        ];
        let files: Vec<_> = files
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_slice()))
            .collect();
        let commit = server.model("some/adapter", &files);
        let home = tempfile::tempdir().unwrap();
        let mut env = RunEnv {
            home: Some(home.path().to_path_buf()),
            ..RunEnv::default()
        };
        for (name, value) in [
            ("HF_ENDPOINT", server.endpoint.as_str()),
            ("HF_TOKEN", TOKEN),
        ] {
            env.variables.insert(name.into(), value.into());
        }
        let run = |yaml: &str| -> anyhow::Result<Vec<String>> {
            let folder = tempfile::tempdir().unwrap();
            let stage: DownloadAdapter = serde_yaml::from_str(yaml).unwrap();
            assert_eq!(stage.check(), []);
            let mut cx = Context::for_test(folder.path(), &[], &[]);
            cx.external_facts = stage.external_facts(&env)?;
            assert_eq!(cx.external_facts["commit"], commit);
            cx.env = Arc::new(env.clone());
            stage.run(&cx)?;
            assert!(fs::read(cx.out().join(FILE)).unwrap() == weights);
            assert!(fs::read(cx.out().join(CONFIG)).unwrap() == config);
            files::names_in(cx.out())
        };
        let second = "{ repo: some/adapter, subfolder: second/ }";
        assert_eq!(run(second).unwrap(), [CONFIG, FILE]);
        // With the template of its training.
        for folder in ["old", "new"] {
            let yaml = format!("{{ repo: some/adapter, subfolder: {folder} }}");
            assert_eq!(run(&yaml).unwrap(), [CONFIG, FILE, chat_template::FILE]);
        }
        let error = format!("{:#}", run("{ repo: some/adapter }").unwrap_err());
        assert!(error.contains("`adapter_config.json`"), "{error}");
    }
}
