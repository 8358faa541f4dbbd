//! `import_dataset`: rows from local files.

mod find;
mod paths;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::row_format::RowFormats;
use crate::data::Encoding;
use crate::data::import::{
    CANONICAL, Format, ImportOptions, ImportReport, Mix, StoppingStrategy, import_files, mix_rows,
};
use crate::engine::{Context, Problem, Stage};
use crate::stages::artifacts::Dataset;
use find::{FindOptions, Found, find};
use paths::Paths;

/// Imports rows from local files: Parquet, Arrow, JSONL, JSON, CSV or TSV, compressed (`.gz`, `.zst`, `.xz`, `.bz2`) or not.
///
/// `path` is a file; a pattern of files (`data/*.jsonl`, `**`); a folder with one file for each split (`train.jsonl`, `test.jsonl`;
/// `train-00000-of-00002.parquet` is a part of `train`), or with what `datasets` saved (`save_to_disk`); or a list of those.
/// `datasets` takes several datasets instead, one behind the other or interleaved.
///
/// A row has `prompt`, `chosen` and, for preferences, `rejected`, each of them text or a list of messages, and perhaps a `system`
/// text; or it has `messages`; or it has another of the forms that are in use (docs/data.md). Other columns are carried along.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"path": "data/pairs.jsonl"}]))]
pub struct ImportDataset {
    /// A file, a folder, a pattern of files, or a list of them. The contents of all files that fit count, not their paths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["data/pairs.jsonl", ["data/a.jsonl", "data/b.parquet"]]))]
    path: Option<Paths>,
    /// Several datasets in place of `path`. Without weights they follow each other; with weights each row is drawn from one of
    /// them, as by `datasets.interleave_datasets`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [[{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]]))]
    datasets: Vec<Part>,
    /// When interleaved datasets end. Where there are no weights, it takes a row from each in turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stopping_strategy: Option<StoppingStrategy>,
    /// The seed by which it is drawn which dataset each row comes from; 42 if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    /// The split that a single file becomes. The files of a folder name their splits themselves.
    #[serde(default = "train")]
    split: String,
    /// The configuration to read, where the README of a folder declares several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Which column of the files is which of ours; columns that have our names need no mention. In place of a column's name there
    /// may be a path into one (`answers[0].text`) or a text made of several (`"${instruction}\n\n${input}"`, with minijinja's
    /// expressions).
    #[serde(default)]
    #[schemars(extend("examples" = [{"prompt": "question", "chosen": "good", "rejected": "bad"}]))]
    columns: BTreeMap<String, String>,
    /// The most rows to take of each split. Nothing behind them is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [1000]))]
    max_rows: Option<usize>,
    /// The format of the files, where their extension doesn't tell; the form of the rows, where their columns don't; or a list of
    /// both.
    #[serde(default, skip_serializing_if = "RowFormats::is_empty")]
    #[schemars(extend("examples" = ["sharegpt", ["csv", "alpaca"]]))]
    format: RowFormats,
    /// The number of rows that can't be used and may be left out; they are named. One more is an error.
    #[serde(default)]
    skip_invalid_rows: u64,
    /// The character between the values of a line of CSV, where it is neither a comma nor, in TSV, a tab.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [";"]))]
    delimiter: Option<String>,
    /// The encoding of files that are not UTF-8, by the web's names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["windows-1252", "utf-16"]))]
    encoding: Option<String>,
}

/// One of several datasets. What it doesn't say the stage says for all.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Part {
    /// The files of this dataset, given as for the stage's `path`.
    path: Paths,
    /// How often a row is drawn from it, compared with the weights of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    weight: Option<f64>,
    /// The configuration to read, where the README of a folder declares several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Its columns, in place of the stage's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<BTreeMap<String, String>>,
    /// The most of its rows to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    max_rows: Option<usize>,
    /// The format of its files, and the form of its rows.
    #[serde(default, skip_serializing_if = "RowFormats::is_empty")]
    format: RowFormats,
    /// The character between the values of its lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delimiter: Option<String>,
    /// The encoding of its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encoding: Option<String>,
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
        let mut problems = self.check_paths();
        let top = ReadOptions {
            at: String::new(),
            columns: Some(&self.columns),
            format: &self.format,
            delimiter: self.delimiter.as_deref(),
            encoding: self.encoding.as_deref(),
        };
        top.check(&mut problems);
        for (number, part) in self.datasets.iter().enumerate() {
            let options = ReadOptions {
                at: format!("datasets[{number}]."),
                columns: part.columns.as_ref(),
                format: &part.format,
                delimiter: part.delimiter.as_deref(),
                encoding: part.encoding.as_deref(),
            };
            options.check(&mut problems);
        }
        if !is_split(&self.split) {
            problems.push(Problem::new(
                "split",
                "expected a name of at most 200 letters, digits, `_`, `-` and `.`",
            ));
        }
        problems
    }

    fn on_first_rows(&self, rows: usize) -> Option<Self> {
        let most = |given: Option<usize>| Some(given.map_or(rows, |given| given.min(rows)));
        let mut first = self.clone();
        first.max_rows = most(self.max_rows);
        for part in &mut first.datasets {
            part.max_rows = most(part.max_rows);
        }
        Some(first)
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let mut counts = BTreeMap::new();
        let mut skipped = 0;
        if let Some(path) = &self.path {
            let (found, options) = self.found(cx, path, None)?;
            let mut before = 0;
            for (split, files) in &found.splits {
                let destination = cx.out().join(format!("{split}.parquet"));
                let report = read(cx, files, &options, &destination, &mut before)?;
                tell(cx, &format!("`{split}`"), &report);
                skipped += report.rows_skipped;
                counts.insert(split.clone(), report.rows);
            }
        } else {
            let mut parts = Vec::with_capacity(self.datasets.len());
            for part in &self.datasets {
                parts.push((part, self.found(cx, &part.path, Some(part))?));
            }
            let splits = parts.iter().flat_map(|(_, (found, _))| found.splits.keys());
            let splits: BTreeSet<String> = splits.cloned().collect();
            for split in splits {
                let rows = self.several(cx, &split, &parts, &mut skipped)?;
                counts.insert(split, rows);
            }
        }
        let rows: usize = counts.values().sum();
        ensure!(rows > 0, "{} holds no rows", self.written());
        cx.note("rows", counts);
        if skipped > 0 {
            cx.note("rows_skipped", skipped);
        }
        Ok(())
    }
}

/// Files with these extensions are packed; to see a row of them is not cheap.
const PACKED: [&str; 4] = ["gz", "zst", "xz", "bz2"];
/// The largest file that is looked at before its stage runs, in bytes, where all of it has to be read to see a row.
const LARGEST_TO_PEEK: u64 = 16 << 20;

impl ImportDataset {
    /// Our columns of the first row, and the file as it was written, where that is cheap to see: one file of a local `path`. `files` says
    /// where files are by the path as it was written. Nothing where the row can't be read; its stage tells why.
    pub(in crate::stages) fn columns_of_first_row(
        &self,
        files: &BTreeMap<String, PathBuf>,
    ) -> Option<(String, Vec<String>)> {
        let [path] = &self.path.as_ref()?.0[..] else {
            return None;
        };
        let written = path.as_written();
        let file = files.get(written)?;
        let about = std::fs::metadata(file).ok()?;
        let format = self.format.file().or(Format::of_file(file))?;
        let small = about.len() <= LARGEST_TO_PEEK;
        let is_cheap = match format {
            Format::Parquet | Format::Jsonl | Format::Csv | Format::Tsv => true,
            Format::Json => small,
            Format::Arrow => false,
        };
        let packed = |extension: &OsStr| PACKED.iter().any(|packed| extension == *packed);
        if !about.is_file() || !is_cheap || file.extension().is_some_and(packed) {
            return None;
        }
        let options = ImportOptions {
            columns: self.columns.clone(),
            max_rows: Some(1),
            format: self.format.file(),
            form: self.format.form(),
            delimiter: self
                .delimiter
                .as_deref()
                .map(delimiter_of)
                .transpose()
                .ok()?,
            encoding: self
                .encoding
                .as_deref()
                .map(Encoding::named)
                .transpose()
                .ok()?,
            ..ImportOptions::default()
        };
        let folder = tempfile::tempdir().ok()?;
        let destination = folder.path().join("first.parquet");
        let report = import_files(
            std::slice::from_ref(file),
            &options,
            &destination,
            &mut |_| Ok(()),
        );
        Some((written.to_owned(), report.ok()?.columns))
    }

    fn check_paths(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        match (&self.path, self.datasets.is_empty()) {
            (None, true) => problems.push(
                Problem::new("path", "expected the file to import")
                    .hint("as in `path: pairs.jsonl`; `datasets` takes several with weights"),
            ),
            (Some(_), false) => problems.push(
                Problem::new("datasets", "`path` is given, too")
                    .hint("make it one of `datasets`, as in `datasets: [{path: a.jsonl}, ..]`"),
            ),
            _ => {}
        }
        let paths = self.path.iter().map(|paths| ("path".to_owned(), paths));
        let parts = self.datasets.iter().enumerate();
        let parts = parts.map(|(number, part)| (format!("datasets[{number}].path"), &part.path));
        for (parameter, paths) in paths.chain(parts) {
            if paths.0.is_empty() {
                problems.push(Problem::new(&parameter, "expected at least one path"));
            }
            for (number, path) in paths.0.iter().enumerate() {
                if paths.0[..number].contains(path) {
                    problems.push(
                        Problem::new(
                            format!("{parameter}[{number}]"),
                            format!("`{}` is named twice", path.as_written()),
                        )
                        .hint("its rows would be there twice; interleave by weights to read a dataset more often"),
                    );
                }
            }
        }
        let weighed = self
            .datasets
            .iter()
            .filter(|part| part.weight.is_some())
            .count();
        for (number, part) in self.datasets.iter().enumerate() {
            let parameter = format!("datasets[{number}].weight");
            if part.weight.is_none() && weighed > 0 {
                let problem = Problem::new(parameter, "the other datasets have weights");
                problems.push(problem.hint("give every dataset a weight, or none of them"));
            }
        }
        let is_drawn = weighed > 0;
        if self.seed.is_some() && !is_drawn {
            problems.push(
                Problem::new("seed", "nothing is drawn by it")
                    .hint("it decides between `datasets` that have weights"),
            );
        }
        if self.stopping_strategy.is_some() && self.datasets.len() < 2 {
            problems.push(
                Problem::new("stopping_strategy", "there is nothing to interleave")
                    .hint("it is for two or more `datasets`"),
            );
        }
        problems
    }

    /// The files of a dataset, and how they are read.
    fn found(
        &self,
        cx: &Context,
        paths: &Paths,
        part: Option<&Part>,
    ) -> Result<(Found, ImportOptions)> {
        let format = part.and_then(|part| part.format.file());
        let format = format.or(self.format.file());
        let form = part.and_then(|part| part.format.form());
        let name = part.and_then(|part| part.name.as_deref());
        let options = FindOptions {
            split: &self.split,
            name: name.or(self.name.as_deref()),
            format,
        };
        let found = find(cx, paths, &options)?;
        for message in &found.messages {
            cx.info(message.clone());
        }
        let delimiter = part.and_then(|part| part.delimiter.as_deref());
        let delimiter = delimiter.or(self.delimiter.as_deref());
        let encoding = part.and_then(|part| part.encoding.as_deref());
        let encoding = encoding.or(self.encoding.as_deref());
        let columns = part.and_then(|part| part.columns.as_ref());
        let rows = [part.and_then(|part| part.max_rows), self.max_rows];
        let options = ImportOptions {
            columns: columns.unwrap_or(&self.columns).clone(),
            max_rows: rows.into_iter().flatten().min(),
            format,
            form: form.or(self.format.form()),
            skip_invalid_rows: self.skip_invalid_rows,
            delimiter: delimiter
                .map(|text| delimiter_of(text).map_err(anyhow::Error::msg))
                .transpose()?,
            encoding: encoding
                .map(|name| Encoding::named(name).map_err(anyhow::Error::msg))
                .transpose()?,
            names: found.names.clone(),
        };
        Ok((found, options))
    }

    /// Makes one split of those datasets that have it.
    fn several(
        &self,
        cx: &Context,
        split: &str,
        parts: &[(&Part, (Found, ImportOptions))],
        skipped: &mut u64,
    ) -> Result<usize> {
        let parts: Vec<_> = parts
            .iter()
            .filter_map(|(part, (found, options))| Some((*part, found.splits.get(split)?, options)))
            .collect();
        let destination = cx.out().join(format!("{split}.parquet"));
        let mut read_rows = 0;
        if let [(_, files, options)] = parts.as_slice() {
            let report = read(cx, files, options, &destination, &mut read_rows)?;
            tell(cx, &format!("`{split}`"), &report);
            *skipped += report.rows_skipped;
            return Ok(report.rows);
        }
        // Each is read by itself first, for it may have columns and a form of its own.
        let scratch = cx.scratch()?;
        let (mut lengths, mut files) = (Vec::new(), Vec::new());
        let mut names = BTreeMap::new();
        for (number, (part, of_part, options)) in parts.iter().enumerate() {
            let file = scratch.join(format!("{split}-{number}.parquet"));
            let report = read(cx, of_part, options, &file, &mut read_rows)?;
            tell(
                cx,
                &format!("`{split}` of {}", written(&part.path)),
                &report,
            );
            *skipped += report.rows_skipped;
            lengths.push(report.rows);
            names.insert(file.clone(), written(&part.path));
            files.push(file);
        }
        let weights: Option<Vec<f64>> = parts.iter().map(|(part, ..)| part.weight).collect();
        let mixed = weights.is_some() || self.stopping_strategy.is_some();
        let joined = if mixed {
            scratch.join(format!("{split}.parquet"))
        } else {
            destination.clone()
        };
        let options = ImportOptions {
            max_rows: self.max_rows.filter(|_| !mixed),
            format: Some(Format::Parquet),
            names,
            ..ImportOptions::default()
        };
        let rows = read(cx, &files, &options, &joined, &mut 0)?.rows;
        if !mixed {
            let counts: Vec<_> = lengths.iter().map(usize::to_string).collect();
            cx.info(format!(
                "`{split}`: {} rows, one dataset behind the other",
                counts.join(" + ")
            ));
            return Ok(rows);
        }
        let mix = Mix {
            probabilities: weights.map(|weights| {
                let sum: f64 = weights.iter().sum();
                weights.iter().map(|weight| weight / sum).collect()
            }),
            seed: self.seed.unwrap_or(42),
            stopping_strategy: self
                .stopping_strategy
                .unwrap_or(StoppingStrategy::FirstExhausted),
        };
        let most = self.max_rows.unwrap_or(usize::MAX);
        let rows = mix_rows(&joined, &lengths, &mix, most, &destination, &mut |rows| {
            cx.progress(rows, None, "rows");
            cx.check_cancelled()
        })
        .with_context(|| format!("the datasets can't be interleaved for the split `{split}`"))?;
        let all: usize = lengths.iter().sum();
        cx.info(format!(
            "`{split}`: {rows} rows interleaved from {} datasets that have {all}",
            lengths.len()
        ));
        Ok(rows)
    }

    /// What is read, as the recipe has it.
    fn written(&self) -> String {
        let paths = self
            .path
            .iter()
            .chain(self.datasets.iter().map(|part| &part.path));
        paths.map(written).collect::<Vec<_>>().join(", ")
    }
}

/// Reads files as one split. `before` counts the rows of all splits.
fn read(
    cx: &Context,
    files: &[PathBuf],
    options: &ImportOptions,
    destination: &Path,
    before: &mut u64,
) -> Result<ImportReport> {
    let report = import_files(files, options, destination, &mut |rows| {
        cx.progress(*before + rows, None, "rows");
        cx.check_cancelled()
    })?;
    *before += report.rows as u64;
    Ok(report)
}

/// Says how rows were read, and which were left out. `of` names them in front of each sentence.
pub(in crate::stages) fn tell(cx: &Context, of: &str, report: &ImportReport) {
    for message in &report.messages {
        cx.info(format!("{of}: {message}"));
    }
    if report.rows_skipped > 0 {
        cx.warn(format!(
            "{of}: {} rows can't be used and were left out:\n  {}",
            report.rows_skipped,
            report.skipped.join("\n  ")
        ));
    }
}

fn written(paths: &Paths) -> String {
    let names = paths
        .0
        .iter()
        .map(|path| format!("`{}`", path.as_written()));
    names.collect::<Vec<_>>().join(", ")
}

/// What the recipe says of how files are read, in one place of it.
struct ReadOptions<'a> {
    at: String,
    columns: Option<&'a BTreeMap<String, String>>,
    format: &'a RowFormats,
    delimiter: Option<&'a str>,
    encoding: Option<&'a str>,
}

impl ReadOptions<'_> {
    fn check(&self, problems: &mut Vec<Problem>) {
        let at = &self.at;
        let columns = self.columns.into_iter().flat_map(BTreeMap::keys);
        for ours in columns.filter(|ours| !CANONICAL.contains(&ours.as_str())) {
            let problem = Problem::new(
                format!("{at}columns.{ours}"),
                format!("`{ours}` is no column of ours"),
            );
            problems.push(problem.hint(format!(
                "ours are {}; write `ours: theirs`",
                CANONICAL.join(", ")
            )));
        }
        self.format.check(at, problems);
        if let Some(Err(why)) = self.delimiter.map(delimiter_of) {
            let problem = Problem::new(format!("{at}delimiter"), why);
            problems.push(problem.hint(r#"as in `delimiter: ";"` or `delimiter: "\t"`"#));
        }
        if self.delimiter.is_some()
            && let Some(format) = self.format.file()
            && !matches!(format, Format::Csv | Format::Tsv)
        {
            problems.push(Problem::new(
                format!("{at}delimiter"),
                format!("files of the format `{}` have none", format.name()),
            ));
        }
        if let Some(Err(why)) = self.encoding.map(Encoding::named) {
            let problem = Problem::new(format!("{at}encoding"), why);
            problems.push(problem.hint(
                "expected the web's name of an encoding, as `utf-16`, `windows-1252`, `latin-1`, `shift_jis`, `gb18030` or `koi8-r`",
            ));
        }
    }
}

/// The one character between the values of a line. A tab may be written as in Python.
fn delimiter_of(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        [b'"' | b'\n' | b'\r' | 0] => Err("this character can't stand between values".to_owned()),
        [one] => Ok(*one),
        b"\\t" => Ok(b'\t'),
        _ => Err("expected one character of ASCII".to_owned()),
    }
}

/// The longest name of a split.
const LONGEST_SPLIT: usize = 200;

/// Whether `name` can be a file's name everywhere.
pub(in crate::stages) fn is_split(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    // With an extension behind it, it has to be a file's name.
    (1..=LONGEST_SPLIT).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

#[cfg(test)]
mod tests;
