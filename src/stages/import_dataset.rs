//! `import_dataset`: rows from local files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::Dataset;
use super::row_format::RowFormats;
use crate::data::import::{
    CANONICAL, Format, ImportOptions, ImportReport, import_files, split_of_file,
};
use crate::engine::{Context, Problem, SourcePath, Stage};

/// Imports rows from a local file (Parquet, JSONL, JSON or CSV), or from a folder with one file for each split
/// (`train.jsonl`, `test.jsonl`; `train-00000-of-00002.parquet` is a part of `train`).
///
/// A row has `prompt`, `chosen` and, for preferences, `rejected`, each of them text or a list of messages, and perhaps a
/// `system` text; or it has `messages`; or another of the forms that data sets have (docs/data.md). Other columns are carried along.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportDataset {
    /// The file, or the folder of files named by split.
    path: SourcePath,
    /// The split that a single file becomes. A folder's files name their splits themselves.
    #[serde(default = "train")]
    split: String,
    /// Which column of the file is which of ours, as in `{prompt: question, chosen: good, rejected: bad}`. Columns that are
    /// called like ours need no mention. In place of a column's name there may be a way into one (`answers[0].text`) or a text made of
    /// several (`"${instruction}\n\n${input}"`, with minijinja's expressions).
    #[serde(default)]
    columns: BTreeMap<String, String>,
    /// Take only so many rows of each split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_rows: Option<usize>,
    /// The files' format, when their extension doesn't tell; the form of the rows, when their columns don't; or a list of both.
    #[serde(default, skip_serializing_if = "RowFormats::is_empty")]
    format: RowFormats,
    /// Leave out up to so many rows that can't be used, and name them. Without it the first one is an error.
    #[serde(default)]
    skip_invalid_rows: u64,
}

fn train() -> String {
    "train".to_owned()
}

impl Stage for ImportDataset {
    const KIND: &'static str = "import_dataset";
    const VERSION: u32 = 2;
    type Output = Dataset;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for ours in self
            .columns
            .keys()
            .filter(|ours| !CANONICAL.contains(&ours.as_str()))
        {
            let problem = Problem::new(
                format!("columns.{ours}"),
                format!("`{ours}` is no column of ours"),
            );
            problems.push(problem.hint(format!(
                "ours are {}; write `ours: theirs`",
                CANONICAL.join(", ")
            )));
        }
        if self.max_rows == Some(0) {
            problems.push(Problem::new("max_rows", "expected a number above 0"));
        }
        self.format.check(&mut problems);
        if !is_split(&self.split) {
            problems.push(Problem::new(
                "split",
                "expected a name of at most 200 letters, digits, `_`, `-` and `.`",
            ));
        }
        problems
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let path = cx.source(&self.path)?;
        let options = ImportOptions {
            columns: self.columns.clone(),
            max_rows: self.max_rows,
            form: self.format.form(),
            skip_invalid_rows: self.skip_invalid_rows,
            format: self
                .format
                .file()
                .or_else(|| Format::of(Path::new(self.path.as_written()))),
        };
        let splits = if path.is_dir() {
            files_by_split(path, self.format.file())?
        } else {
            BTreeMap::from([(self.split.clone(), vec![path.to_owned()])])
        };
        let options = if path.is_dir() {
            ImportOptions {
                format: self.format.file(),
                ..options
            }
        } else {
            options
        };
        let mut before = 0;
        let mut counts = BTreeMap::new();
        for (split, files) in &splits {
            let destination = cx.out().join(format!("{split}.parquet"));
            let report = import_files(files, &options, &destination, &mut |rows| {
                cx.progress(before + rows, None, "rows");
                cx.check_cancelled()
            })?;
            before += report.rows as u64;
            tell(cx, split, &report);
            counts.insert(split, report.rows);
        }
        ensure!(before > 0, "`{}` holds no rows", self.path.as_written());
        cx.note("rows", counts);
        Ok(())
    }
}

/// Says how the rows of a split were read, and which were left out.
pub(super) fn tell(cx: &Context, split: &str, report: &ImportReport) {
    for told in &report.told {
        cx.info(format!("`{split}`: {told}"));
    }
    if !report.skipped.is_empty() {
        let rows = report.rows_skipped;
        cx.warn(format!(
            "`{split}`: {rows} rows can't be used and were left out:\n  {}",
            report.skipped.join("\n  ")
        ));
        cx.note(&format!("rows_skipped_{split}"), rows);
    }
}

/// The longest name of a split.
const LONGEST_SPLIT: usize = 200;

/// Whether `name` can be a file's name everywhere.
pub(super) fn is_split(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    // With an extension behind it, it has to be a file's name.
    (1..=LONGEST_SPLIT).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

fn files_by_split(folder: &Path, format: Option<Format>) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("could not list the folder `{}`", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_file() && !hidden && (format.is_some() || Format::of(&path).is_some()) {
            let split = split_of_file(&path);
            ensure!(is_split(&split), "`{}` can't name a split", path.display());
            splits.entry(split).or_default().push(path);
        }
    }
    ensure!(
        !splits.is_empty(),
        "the folder `{}` holds no file with the extension parquet, jsonl, json or csv",
        folder.display()
    );
    for files in splits.values_mut() {
        files.sort();
    }
    Ok(splits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data;

    fn stage(yaml: &str) -> ImportDataset {
        serde_yaml::from_str(yaml).unwrap()
    }

    fn run(yaml: &str, files: &[(&str, &str)]) -> Result<(tempfile::TempDir, Context)> {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::create_dir(&source).unwrap();
        for (name, text) in files {
            std::fs::write(source.join(name), text).unwrap();
        }
        let stage = stage(yaml);
        let written = stage.path.as_written().to_owned();
        let place = if written == "." {
            source.clone()
        } else {
            source.join(&written)
        };
        let cx = Context::for_test(folder.path(), &[], &[(&written, &place)]);
        stage.run(&cx)?;
        Ok((folder, cx))
    }

    const ROW: &str = r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#;

    #[test]
    fn a_file_becomes_the_split_it_is_called() {
        let (_folder, cx) = run("{path: a.jsonl, split: test}", &[("a.jsonl", ROW)]).unwrap();
        let rows = data::head(cx.out(), "test", 3).unwrap();
        assert_eq!(
            rows,
            [serde_json::from_str::<serde_json::Value>(ROW).unwrap()]
        );
    }

    #[test]
    fn a_folder_has_a_file_for_each_split() {
        let csv = "prompt,chosen\np,c\nq,d\n";
        let files = [
            ("train.jsonl", ROW),
            ("test.csv", csv),
            ("notes.txt", "x"),
            (".hidden.csv", "x"),
        ];
        let (_folder, cx) = run("{path: .}", &files).unwrap();
        let summary = data::summary(cx.out()).unwrap();
        let splits: Vec<_> = summary
            .splits
            .iter()
            .map(|split| (split.name.as_str(), split.rows))
            .collect();
        assert_eq!(splits, [("test", 2), ("train", 1)]);
    }

    #[test]
    fn the_limit_and_the_names_of_columns_count() {
        let text = format!(
            "{}\n{}\n",
            r#"{"q": "p", "chosen": "c"}"#, r#"{"q": "s", "chosen": "d"}"#
        );
        let (_folder, cx) = run(
            "{path: a.txt, format: jsonl, max_rows: 1, columns: {prompt: q}}",
            &[("a.txt", &text)],
        )
        .unwrap();
        let rows = data::head(cx.out(), "train", 3).unwrap();
        assert_eq!(rows, [serde_json::json!({"prompt": "p", "chosen": "c"})]);
    }

    #[test]
    fn mistakes_are_told_before_anything_runs() {
        let problems =
            stage("{path: x.csv, columns: {question: prompt}, max_rows: 0, split: ../x}").check();
        let parameters: Vec<_> = problems
            .iter()
            .map(|problem| problem.parameter.as_str())
            .collect();
        assert_eq!(parameters, ["columns.question", "max_rows", "split"]);
    }

    #[test]
    fn empty_files_and_folders_are_errors() {
        for (yaml, files) in [
            ("{path: a.jsonl}", vec![("a.jsonl", "\n")]),
            ("{path: .}", vec![("x.txt", "")]),
        ] {
            assert!(run(yaml, &files).is_err(), "{yaml}");
        }
    }
}
