//! What a command may make: the artifacts, and whether what it made is one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use arrow_schema::DataType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data;
use crate::data::import::{Format, ImportOptions, import_files, split_of_file};
use crate::data::table::{Split, splits};
use crate::engine::{Artifact as _, Context};
use crate::stages::artifacts::{Adapter, Chats, Dataset, Folder, Model, Scores, Tokens};
use crate::stages::{adapter, model};

/// The longest `scores.json`, in bytes.
const LONGEST_SCORES: u64 = 16 << 20;

/// What a command makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Makes {
    /// Rows: one Parquet file or more a split, such as `train.parquet`, with columns as `import_dataset` makes them; or files of JSON
    /// lines, such as `train.jsonl`, which are read as `import_dataset` reads them.
    Dataset,
    /// Rendered texts: Parquet files, or files of JSON lines, with `prompt`, `chosen` and, for preferences, `rejected`.
    Chats,
    /// Token ids: Parquet files with the columns of `tokenize`.
    Tokens,
    /// A Hugging Face model folder with safetensors.
    Model,
    /// A PEFT adapter folder.
    Adapter,
    /// `scores.json`: numbers by name, or `base` with such numbers and perhaps `adapter` and `difference`.
    Scores,
    /// Any files, for other commands and for `outputs`.
    Folder,
}

impl Makes {
    /// The noun of the artifact.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Self::Dataset => Dataset::NAME,
            Self::Chats => Chats::NAME,
            Self::Tokens => Tokens::NAME,
            Self::Model => Model::NAME,
            Self::Adapter => Adapter::NAME,
            Self::Scores => Scores::NAME,
            Self::Folder => Folder::NAME,
        }
    }

    /// Checks what is in the output folder, and notes what it holds.
    ///
    /// # Errors
    /// It is not what it should be; the sentence says in what.
    pub(super) fn check(self, cx: &Context) -> anyhow::Result<()> {
        plain_files(cx.out(), cx.out())?;
        match self {
            Self::Dataset => {
                from_json_lines(cx)?;
                rows(cx, |_, _| Ok(()))
            }
            Self::Chats => {
                from_json_lines(cx)?;
                rows(cx, |split, _| {
                    for column in ["prompt", "chosen"] {
                        let field = split.schema().field_with_name(column);
                        let is_text = field.is_ok_and(|field| {
                            matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8)
                        });
                        ensure!(is_text, "chats need a column `{column}` of texts");
                    }
                    Ok(())
                })
            }
            Self::Tokens => rows(cx, |_, name| {
                for row in data::tokens::rows(cx.out(), name)? {
                    cx.check_cancelled()?;
                    row?;
                }
                Ok(())
            }),
            Self::Model => {
                let checked = model::files::check(cx.out())?;
                model::import_model::tell(cx, &checked)
            }
            Self::Adapter => {
                let names = names(cx.out())?;
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                adapter::files::choose_files(&names)?;
                adapter::files::check(cx)
            }
            Self::Scores => scores(cx),
            Self::Folder => {
                ensure!(!names(cx.out())?.is_empty(), "there is nothing in it");
                Ok(())
            }
        }
    }
}

/// The names in a folder.
fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Refuses what is neither a file nor a folder: a link may lead anywhere.
fn plain_files(root: &Path, folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let path = entry.path();
        if kind.is_dir() {
            plain_files(root, &path)?;
        } else if !kind.is_file() {
            let shown = path.strip_prefix(root).unwrap_or(&path).display();
            bail!("`{shown}` is a link or a special file, expected files and folders");
        }
    }
    Ok(())
}

/// Makes Parquet files of files of JSON lines, if there are no others: `train.jsonl`, or parts such as `train-00000-of-00002.jsonl`.
fn from_json_lines(cx: &Context) -> anyhow::Result<()> {
    let mut written: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for name in names(cx.out())? {
        let path = cx.out().join(&name);
        match path.extension().and_then(OsStr::to_str) {
            Some("parquet") => return Ok(()),
            Some("jsonl") => written.entry(split_of_file(&path)).or_default().push(path),
            _ => {}
        }
    }
    for (split, mut files) in written {
        files.sort_unstable();
        let named = files.iter().filter_map(|path| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some((path.clone(), name))
        });
        let options = ImportOptions {
            format: Some(Format::Jsonl),
            names: named.collect(),
            ..ImportOptions::default()
        };
        let destination = cx.out().join(format!("{split}.parquet"));
        let report = import_files(&files, &options, &destination, &mut |_| {
            cx.check_cancelled()
        })
        .with_context(|| format!("the split `{split}` can't be used"))?;
        for message in report.messages {
            cx.info(format!("`{split}`: {message}"));
        }
        for file in files {
            fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// Opens every split, and looks at its first rows.
fn rows(cx: &Context, check: impl Fn(&Split, &str) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let found = splits(cx.out())?;
    ensure!(
        !found.is_empty(),
        "it has no splits, expected files such as `train.parquet` or `train.jsonl`"
    );
    let mut counts = BTreeMap::new();
    for name in found.keys() {
        let split = Split::open(cx.out(), name)?;
        let wrong = || format!("the split `{name}` can't be used");
        check(&split, name).with_context(wrong)?;
        data::head(cx.out(), name, 1).with_context(wrong)?;
        counts.insert(name.clone(), split.rows());
    }
    cx.note("rows", counts);
    Ok(())
}

/// Checks `scores.json`. Plain numbers by name are those of the model alone.
fn scores(cx: &Context) -> anyhow::Result<()> {
    let path = cx.out().join("scores.json");
    let size = fs::metadata(&path)
        .context("there is no `scores.json`")?
        .len();
    ensure!(
        size <= LONGEST_SCORES,
        "`scores.json` has more than {} MiB",
        LONGEST_SCORES >> 20
    );
    let read: Value = serde_json::from_slice(&fs::read(&path)?)
        .context("`scores.json` is broken, expected JSON")?;
    let Value::Object(mut map) = read else {
        bail!("`scores.json` is no map from names to numbers");
    };
    if !map.contains_key("base") {
        let numbers = std::mem::take(&mut map);
        map.insert("base".to_owned(), Value::Object(numbers));
        fs::write(&path, serde_json::to_vec_pretty(&map)?)?;
    }
    for part in ["base", "adapter", "difference"] {
        let Some(value) = map.get(part) else { continue };
        let numbers = value.as_object().with_context(|| {
            format!("`{part}` in `scores.json` is no map from names to numbers")
        })?;
        ensure!(
            !numbers.is_empty(),
            "`scores.json` has no numbers in `{part}`"
        );
        for (name, number) in numbers {
            ensure!(
                number.is_number(),
                "`{name}` in `scores.json` is no number: {number}"
            );
            if part == "base" {
                cx.note(name, number);
            }
        }
    }
    Ok(())
}
