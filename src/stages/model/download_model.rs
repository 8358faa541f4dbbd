//! `download_model`: a model folder from the hub, pinned to a commit and verified.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dtype::Dtype;
use super::files::{self, INDEX};
use super::gguf;
use crate::engine::glob::{Star, matches};
use crate::engine::{Context, Problem, RunEnv, Stage};
use crate::hub::{RemoteFile, RepoKind};
use crate::stages::artifacts::Model;
use crate::stages::from_hub::{Source, check, main_revision, pin};

/// Downloads a model from the Hugging Face hub: configuration, safetensors weights, tokenizer and chat template.
///
/// With `file`, a GGUF file of the repository becomes such a folder, as with `import_model`.
///
/// Weights and `config.json` have to agree, as for `import_model`. The revision is resolved to a commit, and the stage runs again
/// when a branch has moved. Every file is verified by its size and hash, and shared with other programs through the hub's cache.
/// Gated models need `HF_TOKEN` or a login.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"repo": "HuggingFaceTB/SmolLM2-135M-Instruct"}]))]
pub struct DownloadModel {
    /// The repository of the model, `owner/name`.
    #[schemars(extend("examples" = ["HuggingFaceTB/SmolLM2-135M-Instruct"]))]
    pub repo: String,
    /// A branch, a tag or a commit.
    #[serde(default = "main_revision")]
    #[schemars(extend("examples" = ["main"]))]
    pub revision: String,
    /// A GGUF file of the repository to take, instead of configuration and safetensors weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["SmolLM2-135M-Instruct.Q8_0.gguf"]))]
    pub file: Option<String>,
    /// The type in which the weights of a GGUF file are stored. By default it is that of the file's matrices, if they are floats, and
    /// `bfloat16` if they are quantised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::stages) dtype: Option<Dtype>,
    /// Patterns of the files to take, instead of the usual ones (`*` also matches `/`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [["*.safetensors", "*.json"]]))]
    pub allow_patterns: Option<Vec<String>>,
    /// Patterns of files to leave behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [["original/*"]]))]
    pub ignore_patterns: Option<Vec<String>>,
}

impl Stage for DownloadModel {
    const KIND: &'static str = "download_model";
    const VERSION: u32 = 1;
    const HAS_EXTERNAL_FACTS: bool = true;
    type Output = Model;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = check(&self.repo, &self.revision);
        if let Some(file) = &self.file {
            if !gguf::is_gguf(file) {
                problems.push(
                    Problem::new("file", "expected the name of a GGUF file").hint(
                        "without `file`, the stage takes configuration and safetensors weights",
                    ),
                );
            }
            if self.allow_patterns.is_some() || self.ignore_patterns.is_some() {
                let patterns = if self.allow_patterns.is_some() {
                    "allow_patterns"
                } else {
                    "ignore_patterns"
                };
                problems.push(Problem::new(
                    patterns,
                    "`file` names the one file that is taken",
                ));
            }
        } else if self.dtype.is_some() {
            problems.push(
                Problem::new("dtype", "it is for GGUF files, and there is no `file`")
                    .hint("safetensors weights are taken as they are"),
            );
        }
        problems
    }

    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        pin(env, RepoKind::Model, &self.repo, &self.revision)
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let mut source = Source::open(cx, RepoKind::Model, &self.repo, &self.revision)?;
        let refused = || format!("the model `{}` can't be used", self.repo);
        if let Some(name) = &self.file {
            let file = source.file(name).with_context(|| {
                let known = source.listing.files.iter().map(|file| file.path.as_str());
                let known: Vec<_> = known.filter(|path| gguf::is_gguf(path)).take(20).collect();
                let found = if known.is_empty() {
                    "it has no GGUF file".to_owned()
                } else {
                    format!("it has `{}`", known.join("`, `"))
                };
                format!("`{}` has no file `{name}`; {found}", self.repo)
            })?;
            let mut files = [file];
            source.expect(&mut files)?;
            let [file] = &files;
            let path = source.fetch(file)?;
            let refused = || format!("the GGUF file `{name}` of `{}` can't be used", self.repo);
            gguf::import_file(cx, &path, self.dtype).with_context(refused)?;
            source.unchanged()?;
            let checked = files::check(cx.out()).with_context(refused)?;
            return super::import_model::tell(cx, &checked).with_context(refused);
        }
        let files = self.choose_files(&mut source).with_context(refused)?;
        source.fetch_to_output("", files)?;
        source.unchanged()?;
        let checked = files::check(cx.out()).with_context(refused)?;
        super::import_model::tell(cx, &checked).with_context(refused)
    }
}

impl DownloadModel {
    fn choose_files(&self, source: &mut Source<'_>) -> anyhow::Result<Vec<RemoteFile>> {
        let fits = |patterns: &[String], path: &str| {
            patterns.iter().any(|pattern| {
                // As in `snapshot_download`, a folder means all in it.
                let all = if pattern.ends_with('/') { "*" } else { "" };
                matches(&format!("{pattern}{all}"), path, Star::CrossesFolders)
            })
        };
        let mut files = source.listing.files.clone();
        if let Some(ignore) = &self.ignore_patterns {
            files.retain(|file| !fits(ignore, &file.path));
        }
        if let Some(allow) = &self.allow_patterns {
            files.retain(|file| fits(allow, &file.path));
            return Ok(files);
        }
        let names: BTreeSet<_> = files.iter().map(|file| file.path.as_str()).collect();
        let index = source.file(INDEX);
        let weights = files::weights(&names, || {
            let index = index.with_context(|| format!("it has no `{INDEX}`"))?;
            let path = source.fetch(&index)?;
            std::fs::read(&path).with_context(|| format!("could not read `{}`", path.display()))
        })?;
        files.retain(|file| files::is_beside(&file.path) || weights.contains(&file.path));
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::stages::from_hub::place;
    use crate::stages::test_hub::{Gate, HubServer, TOKEN};

    const REPO: &str = "some/model";
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn golden() -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(GOLDEN).unwrap().map(Result::unwrap);
        entries
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, std::fs::read(entry.path()).unwrap())
            })
            .collect()
    }

    fn serve(server: &HubServer, files: &[(String, Vec<u8>)]) -> String {
        let files: Vec<_> = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect();
        server.model(REPO, &files)
    }

    fn stage(yaml: &str) -> DownloadModel {
        serde_yaml::from_str(yaml).unwrap()
    }

    fn env(server: &HubServer, home: &Path) -> RunEnv {
        let mut env = RunEnv {
            home: Some(home.to_path_buf()),
            ..RunEnv::default()
        };
        for (name, value) in [
            ("HF_ENDPOINT", server.endpoint.as_str()),
            ("HF_TOKEN", TOKEN),
        ] {
            env.variables.insert(name.into(), value.into());
        }
        env
    }

    /// What the engine does with a stage: the facts from outside, then the run.
    fn run(stage: &DownloadModel, env: &RunEnv, folder: &Path) -> anyhow::Result<Vec<String>> {
        let mut cx = Context::for_test(folder, &[], &[]);
        cx.external_facts = stage.external_facts(env)?;
        cx.env = Arc::new(env.clone());
        stage.run(&cx)?;
        let entries = std::fs::read_dir(cx.out()).unwrap().map(Result::unwrap);
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        Ok(names)
    }

    #[test]
    fn a_gated_model_arrives_without_duplicates_of_its_weights() {
        let server = HubServer::start();
        let mut files = golden();
        for odd in [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/params.json",
            "README.md",
        ] {
            files.push((odd.into(), b"odd".to_vec()));
        }
        let commit = serve(&server, &files);
        server.gate("models/some/model", Gate::Gated);
        let folder = tempfile::tempdir().unwrap();
        let env = env(&server, folder.path());
        let stage = stage("repo: some/model");
        assert_eq!(
            stage.external_facts(&env).unwrap(),
            [("commit".into(), commit)].into()
        );
        let names = run(&stage, &env, folder.path()).unwrap();
        let expected = [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names, expected);

        // Offline, the same again, from the cache alone.
        let before = server.requests().len();
        let offline = RunEnv {
            offline: true,
            ..env
        };
        let again = tempfile::tempdir().unwrap();
        assert_eq!(run(&stage, &offline, again.path()).unwrap(), expected);
        assert_eq!(server.requests().len(), before);
    }

    #[test]
    fn a_file_of_the_cache_that_changes_while_it_is_read_is_no_result() {
        let server = HubServer::start();
        serve(&server, &golden());
        let folder = tempfile::tempdir().unwrap();
        let env = env(&server, folder.path());
        let mut cx = Context::for_test(folder.path(), &[], &[]);
        cx.external_facts = stage("repo: some/model").external_facts(&env).unwrap();
        cx.env = Arc::new(env);
        let mut source = Source::open(&cx, RepoKind::Model, REPO, "main").unwrap();
        let file = source.file("config.json").unwrap();
        let path = source.fetch(&file).unwrap();
        source.unchanged().unwrap();
        place(&path, &cx.out().join("config.json")).unwrap();
        source.unchanged().unwrap();
        std::fs::write(&path, "{}").unwrap();
        let error = source.unchanged().unwrap_err().to_string();
        assert!(error.contains("changed while it was read"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn weights_enter_by_link_not_by_copy() {
        use std::os::unix::fs::MetadataExt as _;
        let server = HubServer::start();
        serve(&server, &golden());
        let folder = tempfile::tempdir().unwrap();
        run(
            &stage("repo: some/model"),
            &env(&server, folder.path()),
            folder.path(),
        )
        .unwrap();
        let out = folder.path().join("out/model.safetensors");
        assert!(!out.is_symlink());
        assert_eq!(std::fs::metadata(out).unwrap().nlink(), 2);
    }

    #[test]
    fn patterns_choose_files() {
        let server = HubServer::start();
        serve(&server, &golden());
        let folder = tempfile::tempdir().unwrap();
        let env = env(&server, folder.path());
        let stage = stage(
            "{ repo: some/model, allow_patterns: ['*.json', '*.safetensors'], ignore_patterns: [generation*] }",
        );
        let names = run(&stage, &env, folder.path()).unwrap();
        let expected = [
            "config.json",
            "config.v4style.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn unusable_models_are_explained() {
        let server = HubServer::start();
        let mut files = golden();
        files.retain(|(name, _)| name != "model.safetensors");
        files.push(("pytorch_model.bin".into(), b"pickle".to_vec()));
        serve(&server, &files);
        let folder = tempfile::tempdir().unwrap();
        let env = env(&server, folder.path());
        let stage = stage("repo: some/model");
        let error = format!("{:#}", run(&stage, &env, folder.path()).unwrap_err());
        assert!(
            error.contains("`some/model` can't be used") && error.contains("pytorch_model.bin"),
            "{error}"
        );

        let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
        files.push((INDEX.into(), index.to_vec()));
        serve(&server, &files);
        let error = format!("{:#}", run(&stage, &env, folder.path()).unwrap_err());
        assert!(
            error.contains("model-00001-of-00002.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn shards_come_by_the_index() {
        let server = HubServer::start();
        let mut files = golden();
        let single = files
            .iter()
            .position(|(name, _)| name == "model.safetensors")
            .unwrap();
        let (_, whole) = files.remove(single);
        let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let mut names = tensors.names();
        names.sort_unstable();
        let mut map = BTreeMap::new();
        for (number, part) in names.chunks(names.len().div_ceil(2)).enumerate() {
            let shard = format!("model-0000{}-of-00002.safetensors", number + 1);
            let views = part
                .iter()
                .map(|name| (*name, tensors.tensor(name).unwrap()));
            files.push((shard.clone(), safetensors::serialize(views, None).unwrap()));
            map.extend(part.iter().map(|name| ((*name).to_owned(), shard.clone())));
        }
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        files.push((INDEX.into(), index.to_string().into_bytes()));
        files.push(("consolidated.00.safetensors".into(), b"odd".to_vec()));
        serve(&server, &files);
        let folder = tempfile::tempdir().unwrap();
        let env = env(&server, folder.path());
        let names = run(&stage("repo: some/model"), &env, folder.path()).unwrap();
        let expected = [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            INDEX,
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn an_interrupted_stage_ends() {
        let server = HubServer::start();
        let commit = serve(&server, &golden());
        let folder = tempfile::tempdir().unwrap();
        let mut cx = Context::for_test(folder.path(), &[], &[]);
        cx.external_facts = [("commit".to_owned(), commit)].into();
        cx.env = Arc::new(env(&server, folder.path()));
        cx.control.cancel();
        let error = stage("repo: some/model").run(&cx).unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
    }
}
