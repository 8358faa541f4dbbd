//! `download_dataset`: one split of a dataset from the hub, pinned to a commit and verified.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{Wanted, choose_files};
use super::import_dataset::tell;
use super::row_format::RowFormats;
use crate::data::import::{CANONICAL, ImportOptions, import_files};
use crate::engine::{Context, Problem, RunEnv, Stage};
use crate::hub::{RemoteFile, RepoKind};
use crate::stages::artifacts::Dataset;
use crate::stages::from_hub::{Source, check, main_revision, pin};

/// Downloads one split of a dataset from the Hugging Face hub.
///
/// The data files (Parquet, Arrow, JSONL, JSON, CSV or TSV, packed or not) are found as `datasets` finds them: what the header of the repository's
/// README declares, else the names (`data/train-00000-of-00001.parquet`, `test.jsonl`), else all files are `train`. The
/// result has one split, `train`. The revision is resolved to a commit, and a moved branch makes the stage run again.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DownloadDataset {
    /// The repository, `owner/name`.
    pub repo: String,
    /// A branch, a tag or a commit.
    #[serde(default = "main_revision")]
    pub revision: String,
    /// The split to take, as it is called there.
    #[serde(default = "train")]
    pub split: String,
    /// The configuration, where the repository has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The data files to take, as paths or patterns, instead of those of `split`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<String>>,
    /// Which column of the files is which of ours, as in `{prompt: question, chosen: good, rejected: bad}`. Columns that are
    /// called as ours are need no mention. In place of a column's name there may be a way into one (`answers[0].text`) or a text made of
    /// several (`"${instruction}\n\n${input}"`, with minijinja's expressions).
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
    /// The form of the rows, when their columns don't tell.
    #[serde(default, skip_serializing_if = "RowFormats::is_empty")]
    pub format: RowFormats,
    /// Leave out up to so many rows that can't be used, and name them. Without it the first one is an error.
    #[serde(default)]
    pub skip_invalid_rows: u64,
    /// Take only so many rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<usize>,
}

fn train() -> String {
    "train".into()
}

impl Stage for DownloadDataset {
    const KIND: &'static str = "download_dataset";
    const VERSION: u32 = 2;
    const HAS_EXTERNAL_FACTS: bool = true;
    type Output = Dataset;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = check(&self.repo, &self.revision);
        for ours in self
            .columns
            .keys()
            .filter(|ours| !CANONICAL.contains(&ours.as_str()))
        {
            problems.push(
                Problem::new(
                    format!("columns.{ours}"),
                    format!("`{ours}` is no column of ours"),
                )
                .hint(format!(
                    "ours are {}; write `ours: theirs`",
                    CANONICAL.join(", ")
                )),
            );
        }
        if self.max_rows == Some(0) {
            problems.push(Problem::new("max_rows", "expected a number above 0"));
        }
        self.format.check("", &mut problems);
        if self.files.as_ref().is_some_and(Vec::is_empty) {
            problems.push(Problem::new(
                "files",
                "expected at least one path or pattern",
            ));
        }
        if self.split.trim().is_empty() {
            problems.push(Problem::new(
                "split",
                "expected the name of a split, such as `train`",
            ));
        }
        problems
    }

    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        pin(env, RepoKind::Dataset, &self.repo, &self.revision)
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let mut source = Source::open(cx, RepoKind::Dataset, &self.repo, &self.revision)?;
        let refused = || format!("the dataset `{}` can't be used", self.repo);
        let mut files = self.choose_files(&mut source).with_context(refused)?;
        source.expect(&mut files)?;
        let mut paths = Vec::with_capacity(files.len());
        for file in &files {
            cx.check_cancelled()?;
            paths.push(source.fetch(file)?);
        }
        let names = files.iter().zip(&paths);
        let names = names
            .map(|(file, path)| (path.clone(), format!("{}/{}", self.repo, file.path)))
            .collect();
        let options = ImportOptions {
            columns: self.columns.clone(),
            max_rows: self.max_rows,
            format: self.format.file(),
            form: self.format.form(),
            skip_invalid_rows: self.skip_invalid_rows,
            names,
            ..ImportOptions::default()
        };
        let destination = cx.out().join("train.parquet");
        let report = import_files(&paths, &options, &destination, &mut |rows| {
            cx.progress(rows, None, "rows");
            cx.check_cancelled()
        })
        .with_context(refused)?;
        source.unchanged()?;
        tell(cx, "`train`", &report);
        ensure!(report.rows > 0, "the dataset `{}` holds no rows", self.repo);
        cx.note(
            "files",
            files.iter().map(|file| &file.path).collect::<Vec<_>>(),
        );
        cx.note("rows", report.rows);
        Ok(())
    }
}

impl DownloadDataset {
    fn choose_files(&self, source: &mut Source<'_>) -> anyhow::Result<Vec<RemoteFile>> {
        let paths: Vec<_> = source
            .listing
            .files
            .iter()
            .map(|file| file.path.clone())
            .collect();
        let readme = match source.file("README.md") {
            Some(readme) if self.files.is_none() => {
                let path = source.fetch(&readme)?;
                let text = std::fs::read(&path)
                    .with_context(|| format!("could not read `{}`", path.display()))?;
                Some(String::from_utf8_lossy(&text).into_owned())
            }
            _ => None,
        };
        let wanted = Wanted {
            split: &self.split,
            name: self.name.as_deref(),
            files: self.files.as_deref(),
        };
        let chosen = choose_files(&paths, readme.as_deref(), &wanted)?;
        let files = source.listing.files.iter();
        Ok(files
            .filter(|file| chosen.contains(&file.path))
            .cloned()
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::data;
    use crate::stages::test_hub::HubServer;

    const ROWS: &[u8] = br#"{"question":"a","chosen":"b","rejected":"c"}
{"question":"d","chosen":"e","rejected":"f"}
"#;

    fn run(stage: &str, server: &HubServer, folder: &Path) -> anyhow::Result<()> {
        let stage: DownloadDataset = serde_yaml::from_str(stage).unwrap();
        assert!(stage.check().is_empty());
        let mut env = RunEnv {
            home: Some(folder.to_path_buf()),
            ..RunEnv::default()
        };
        env.variables
            .insert("HF_ENDPOINT".into(), server.endpoint.clone());
        let mut cx = Context::for_test(folder, &[], &[]);
        cx.external_facts = stage.external_facts(&env)?;
        cx.env = Arc::new(env);
        stage.run(&cx)
    }

    fn rows(folder: &Path) -> Vec<(String, usize)> {
        let out = folder.join("out");
        let names = data::splits(&out).unwrap().into_keys();
        names
            .map(|name| {
                let rows = data::Split::open(&out, &name).unwrap().rows();
                (name, rows)
            })
            .collect()
    }

    #[test]
    fn a_split_arrives_as_our_columns() {
        let server = HubServer::start();
        let test = b"{\"question\":\"x\",\"chosen\":\"y\",\"rejected\":\"z\"}\n";
        server.dataset(
            "some/pairs",
            &[
                ("train.jsonl", ROWS),
                ("test.jsonl", test),
                ("README.md", b"# Pairs\n"),
            ],
        );
        for (split, expected) in [("train", 2), ("test", 1)] {
            let folder = tempfile::tempdir().unwrap();
            let stage =
                format!("{{ repo: some/pairs, split: {split}, columns: {{ prompt: question }} }}");
            run(&stage, &server, folder.path()).unwrap();
            assert_eq!(rows(folder.path()), [("train".to_owned(), expected)]);
        }
        let folder = tempfile::tempdir().unwrap();
        let stage = "{ repo: some/pairs, columns: { prompt: question }, max_rows: 1 }";
        run(stage, &server, folder.path()).unwrap();
        assert_eq!(rows(folder.path()), [("train".to_owned(), 1)]);
    }

    #[test]
    fn the_readme_and_explicit_files_choose() {
        let server = HubServer::start();
        let readme = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: odd/*.jsonl\n---\n";
        server.dataset(
            "some/pairs",
            &[
                ("odd/1.jsonl", ROWS),
                ("odd/2.jsonl", ROWS),
                ("README.md", readme),
                ("x.jsonl", ROWS),
            ],
        );
        for (more, expected) in [("", 4), (", files: [x.jsonl]", 2)] {
            let folder = tempfile::tempdir().unwrap();
            let stage = format!("{{ repo: some/pairs, columns: {{ prompt: question }}{more} }}");
            run(&stage, &server, folder.path()).unwrap();
            assert_eq!(rows(folder.path()), [("train".to_owned(), expected)]);
        }
    }

    #[test]
    fn a_dataset_without_the_split_is_explained() {
        let server = HubServer::start();
        server.dataset("some/pairs", &[("train.jsonl", ROWS)]);
        let folder = tempfile::tempdir().unwrap();
        let error = run("{ repo: some/pairs, split: dev }", &server, folder.path()).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("`some/pairs`") && error.contains("there are `train`"),
            "{error}"
        );
    }
}
