//! `download_adapter`: a LoRA adapter from the hub, pinned to a commit and verified.

use std::collections::BTreeMap;

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adapter_files;
use super::artifacts::Adapter;
use super::from_hub::{Source, check, main_revision, pin, place};
use crate::engine::{Context, Problem, Stage, World};
use crate::hub::RepoKind;

/// Downloads a LoRA adapter from the Hugging Face hub: to go on training it, to score it, or to merge it.
///
/// The revision is resolved to a commit, and a moved branch makes the stage run again. Settings that would change the adapter's
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
    const MOVES: bool = true;
    type Output = Adapter;

    fn check(&self) -> Vec<Problem> {
        check(&self.repo, &self.revision)
    }

    fn outside(&self, world: &World) -> anyhow::Result<BTreeMap<String, String>> {
        pin(world, RepoKind::Model, &self.repo, &self.revision)
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
        let chosen = adapter_files::choose(&names).with_context(refused)?;
        let files = chosen.map(|name| (name, source.file(&format!("{folder}{name}"))));
        let announced: Vec<_> = files.iter().filter_map(|(_, file)| file.as_ref()).collect();
        source.expect(&announced);
        for (name, file) in &files {
            cx.check_cancelled()?;
            let file = file.as_ref().with_context(|| format!("`{name}` is gone"))?;
            let path = source.fetch(file)?;
            place(&path, &cx.out().join(name))?;
        }
        adapter_files::check(cx).with_context(refused)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::super::test_hub::{HubServer, TOKEN};
    use super::*;
    use crate::ml::adapter::{CONFIG, FILE};
    use crate::ml::golden;

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
        ];
        let files: Vec<_> = files
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_slice()))
            .collect();
        let commit = server.model("some/adapter", &files);
        let home = tempfile::tempdir().unwrap();
        let mut world = World {
            home: Some(home.path().to_path_buf()),
            ..World::default()
        };
        for (name, value) in [
            ("HF_ENDPOINT", server.endpoint.as_str()),
            ("HF_TOKEN", TOKEN),
        ] {
            world.environment.insert(name.into(), value.into());
        }
        let run = |yaml: &str| -> anyhow::Result<Vec<String>> {
            let folder = tempfile::tempdir().unwrap();
            let stage: DownloadAdapter = serde_yaml::from_str(yaml).unwrap();
            assert_eq!(stage.check(), []);
            let mut cx = Context::for_test(folder.path(), &[], &[]);
            cx.outside = stage.outside(&world)?;
            assert_eq!(cx.outside["commit"], commit);
            cx.world = Arc::new(world.clone());
            stage.run(&cx)?;
            assert!(fs::read(cx.out().join(FILE)).unwrap() == weights);
            assert!(fs::read(cx.out().join(CONFIG)).unwrap() == config);
            adapter_files::names_in(cx.out())
        };
        let second = "{ repo: some/adapter, subfolder: second/ }";
        assert_eq!(run(second).unwrap(), [CONFIG, FILE]);
        let error = format!("{:#}", run("{ repo: some/adapter }").unwrap_err());
        assert!(error.contains("`adapter_config.json`"), "{error}");
    }
}
