//! Finds the files of all splits in a local folder by the rules of [`super::files`].

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};

use super::files::{
    all_shards, by_names, by_patterns, configs, declared, format_of, inside, is_description,
    one_format, pick, shard, some,
};
use crate::data::import::{Format, split_of_file};

/// Names of splits whose parts may be numbered.
const SPLITS: [&str; 7] = ["train", "validation", "valid", "val", "dev", "test", "eval"];

/// The splits of a folder.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::stages) struct Splits {
    /// The files of each split, in order.
    pub(in crate::stages) files: BTreeMap<String, Vec<String>>,
    /// Data files that are not used, and why.
    pub(in crate::stages) aside: Vec<(String, String)>,
}

/// All splits of a folder with these files. Files in the folder itself are splits by their names; where there are none, what the folders
/// below it are called counts as it does for [`choose_files`]. `format` leaves others aside, and takes files of any name.
pub(in crate::stages) fn all_splits(
    paths: &[String],
    readme: Option<&str>,
    name: Option<&str>,
    format: Option<Format>,
) -> anyhow::Result<Splits> {
    let of_format = |path: &&str| match (format, format_of(path)) {
        (None, found) => found.is_some(),
        (Some(wanted), Some(found)) => wanted == found,
        (Some(_), None) => !is_about(path),
    };
    let hidden = |path: &&str| {
        let mut parts = path.split('/');
        parts.any(|part| part.starts_with('.') || part.starts_with("__"))
    };
    let data: Vec<&str> = paths
        .iter()
        .map(String::as_str)
        .filter(|path| !hidden(path) && !is_description(path) && of_format(path))
        .collect();
    ensure!(
        !data.is_empty(),
        "it has no data file that can be read, expected {}; it has {}",
        format.map_or_else(
            || "Parquet, Arrow, JSONL, JSON, CSV or TSV".to_owned(),
            |format| format!("files of the format {}", format.name())
        ),
        some(paths)
    );
    let configs = readme.map(configs).transpose()?.unwrap_or_default();
    let mut below = data.clone();
    if configs.is_empty() {
        if let Some(name) = name.filter(|name| *name != "default") {
            below = inside(&data, name);
            ensure!(
                !below.is_empty(),
                "it has no configuration `{name}`: neither its README nor a folder is called so"
            );
        }
    } else {
        let config = pick(&configs, name)?;
        if let Some(files) = &config.data_files {
            let declared = declared(files).with_context(|| {
                format!(
                    "its README describes the configuration `{}` oddly",
                    config.name
                )
            })?;
            let mut splits = Splits::default();
            for (split, patterns) in declared {
                splits.files.insert(split, by_patterns(&data, &patterns)?);
            }
            return splits.checked(&data, "its README doesn't name it");
        }
        if let Some(folder) = &config.data_dir {
            below = inside(&data, folder);
        }
    }
    let here = below.iter().filter(|path| !path.contains('/'));
    let named: Vec<&str> = here.copied().collect();
    let mut splits = Splits::default();
    for format in Format::ALL.map(Some).into_iter().chain([None]) {
        let same = |path: &&&str| format_of(path) == format;
        let found = if named.is_empty() {
            by_names(&below.iter().filter(same).copied().collect::<Vec<_>>())
        } else {
            by_stems(named.iter().filter(same))?
        };
        for (split, files) in found {
            if let Some(taken) = splits.files.get(&split).and_then(|files| files.first()) {
                let why = format!("the split `{split}` is read from `{taken}`");
                splits
                    .aside
                    .extend(files.into_iter().map(|file| (file, why.clone())));
            } else {
                splits.files.insert(split, files);
            }
        }
    }
    splits.checked(&data, "files right in the folder are its splits")
}

impl Splits {
    /// With the data files that were not taken for another reason, and all parts there.
    fn checked(mut self, data: &[&str], why: &str) -> anyhow::Result<Self> {
        for files in self.files.values() {
            one_format(files)?;
            all_shards(files)?;
        }
        for path in data {
            let taken = self.files.values().flatten().any(|file| file == path);
            let reported = self.aside.iter().any(|(file, _)| file == path);
            if !taken && !reported {
                self.aside.push(((*path).to_owned(), why.to_owned()));
            }
        }
        Ok(self)
    }
}

/// Whether a file without a format is one that stands beside data: a text about it, or a program.
fn is_about(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_lowercase();
    let stem = name.split('.').next().unwrap_or_default();
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    name.starts_with('_')
        || matches!(
            stem,
            "readme" | "license" | "licence" | "changelog" | "notice"
        )
        || matches!(
            extension,
            Some("md" | "py" | "yaml" | "yml" | "lock" | "sha256" | "crc" | "ipynb")
        )
}

/// The split and the number of a part without a count, `train-3` or `test_10`. Other names may end with a number of their own.
fn numbered(stem: &str) -> Option<(&str, u64)> {
    let name = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = stem.strip_prefix(name)?.parse().ok()?;
    let split = name.strip_suffix(['-', '_', '.'])?;
    SPLITS.contains(&split).then_some((split, number))
}

/// Splits by what files are called: `holdout.jsonl` is `holdout`, and `train-00000-of-00002.parquet` a part of `train`.
fn by_stems<'a>(
    paths: impl Iterator<Item = &'a &'a str>,
) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in paths {
        let stem = split_of_file(Path::new(path));
        let split = numbered(&stem).map_or(stem.as_str(), |(split, _)| split);
        let files = splits.entry(split.to_owned()).or_default();
        files.push((*path).to_owned());
    }
    for (split, files) in &mut splits {
        let number =
            |path: &String| numbered(&split_of_file(Path::new(path))).map(|(_, number)| number);
        files.sort_by_key(|path| (number(path), path.clone()));
        let part = |path: &String| {
            shard(path.rsplit('/').next().unwrap_or(path)).is_some() || number(path).is_some()
        };
        if let [first, second, ..] = files.as_slice()
            && !files.iter().all(part)
        {
            bail!(
                "`{first}` and `{second}` are both the split `{split}`; hint: remove one, or name the files by `path`, as in \
                 `path: [{first}]`"
            );
        }
    }
    Ok(splits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splits(paths: &[&str]) -> Result<Vec<(String, Vec<String>)>, String> {
        let splits = folder(paths, None, None)?;
        Ok(splits.files.into_iter().collect())
    }

    fn folder(
        paths: &[&str],
        readme: Option<&str>,
        format: Option<Format>,
    ) -> Result<Splits, String> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        all_splits(&paths, readme, None, format).map_err(|error| format!("{error:#}"))
    }

    fn named(splits: &[(&str, &[&str])]) -> Vec<(String, Vec<String>)> {
        let owned = |files: &[&str]| files.iter().map(|file| (*file).to_owned()).collect();
        let splits = splits.iter();
        splits
            .map(|(split, files)| ((*split).to_owned(), owned(files)))
            .collect()
    }

    #[test]
    fn files_in_the_folder_are_splits_by_their_names() {
        let paths = [
            "train.jsonl",
            "holdout.jsonl.gz",
            "test.csv",
            "README.md",
            "dataset_info.json",
            ".hidden.csv",
            "old/train.jsonl",
        ];
        let found = folder(&paths, None, None).unwrap();
        let expected = named(&[
            ("holdout", &["holdout.jsonl.gz"]),
            ("test", &["test.csv"]),
            ("train", &["train.jsonl"]),
        ]);
        assert_eq!(found.files.into_iter().collect::<Vec<_>>(), expected);
        let aside: Vec<_> = found.aside.iter().map(|(file, _)| file.as_str()).collect();
        assert_eq!(aside, ["old/train.jsonl"]);
        let shards = [
            "train-00001-of-00002.parquet",
            "train-00000-of-00002.parquet",
        ];
        let expected = named(&[("train", &[shards[1], shards[0]])]);
        assert_eq!(splits(&shards).unwrap(), expected);
    }

    #[test]
    fn parts_may_be_numbered_without_a_count() {
        let paths = ["train-10.csv", "train-2.csv", "fold-1.csv", "fold-2.csv"];
        let expected = named(&[
            ("fold-1", &["fold-1.csv"]),
            ("fold-2", &["fold-2.csv"]),
            ("train", &["train-2.csv", "train-10.csv"]),
        ]);
        assert_eq!(splits(&paths).unwrap(), expected);
    }

    #[test]
    fn a_split_is_read_from_one_format() {
        let found = folder(&["train.csv", "train.jsonl", "test.csv"], None, None).unwrap();
        let expected = named(&[("test", &["test.csv"]), ("train", &["train.jsonl"])]);
        assert_eq!(found.files.into_iter().collect::<Vec<_>>(), expected);
        let why = "the split `train` is read from `train.jsonl`";
        assert_eq!(found.aside, [("train.csv".to_owned(), why.to_owned())]);
        let error = splits(&["train.jsonl", "train.jsonl.gz"]).unwrap_err();
        assert!(error.contains("both the split `train`"), "{error}");
    }

    #[test]
    fn folders_below_count_where_there_are_no_files() {
        let paths = [
            "data/train-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        let expected = named(&[("test", &[paths[1]]), ("train", &[paths[0]])]);
        assert_eq!(splits(&paths).unwrap(), expected);
        let paths = ["train/a.csv", "train/b.csv", "validation/a.csv"];
        let expected = named(&[("train", &paths[..2]), ("validation", &paths[2..])]);
        assert_eq!(splits(&paths).unwrap(), expected);
    }

    #[test]
    fn a_missing_part_is_told() {
        let error = splits(&["train-00000-of-00002.parquet"]).unwrap_err();
        assert!(error.contains("the part 00001 of 00002"), "{error}");
        assert!(splits(&["notes.txt"]).unwrap_err().contains("notes.txt"));
    }

    #[test]
    fn the_readme_s_configuration_decides() {
        let readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl\n---\n";
        let paths = ["a.jsonl", "b.jsonl", "c.jsonl", "README.md"];
        let found = folder(&paths, Some(readme), None).unwrap();
        let expected = named(&[("test", &["b.jsonl"]), ("train", &["a.jsonl"])]);
        assert_eq!(found.files.into_iter().collect::<Vec<_>>(), expected);
        assert_eq!(found.aside.len(), 1);
    }

    #[test]
    fn a_format_takes_files_of_any_name() {
        let paths = ["train.txt", "README.md", "test.csv", "_SUCCESS"];
        let found = folder(&paths, None, Some(Format::Jsonl)).unwrap();
        let expected = named(&[("train", &["train.txt"])]);
        assert_eq!(found.files.into_iter().collect::<Vec<_>>(), expected);
    }
}
