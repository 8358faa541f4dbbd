//! Finds the data files of a split in a repository by the rules of `datasets`: from the header of the README, or else from names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use serde_yaml::Value;

use crate::data::import::Format;
use crate::engine::glob::{Star, matches};

/// Files that describe a dataset and never contain its data.
const NOT_DATA: &[&str] = &[
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];
/// The words in names that identify a split.
const WORDS: &[(&str, &[&str])] = &[
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// What the recipe asks for.
pub(in crate::stages) struct Wanted<'a> {
    pub(in crate::stages) split: &'a str,
    pub(in crate::stages) name: Option<&'a str>,
    pub(in crate::stages) files: Option<&'a [String]>,
}

/// The data files among `paths`, in order; `readme` is the text of the repository's `README.md`.
pub(in crate::stages) fn choose_files(
    paths: &[String],
    readme: Option<&str>,
    wanted: &Wanted<'_>,
) -> anyhow::Result<Vec<String>> {
    let data: Vec<&str> = paths
        .iter()
        .map(String::as_str)
        .filter(|path| is_data(path))
        .collect();
    let chosen = if let Some(patterns) = wanted.files {
        by_patterns(&data, patterns)?
    } else {
        ensure!(
            !data.is_empty(),
            "it has no data file that can be read, expected Parquet, Arrow, JSONL, JSON, CSV or TSV; it has {}",
            some(paths)
        );
        by_split(&data, readme, wanted)?
    };
    one_format(&chosen)?;
    if wanted.files.is_none() {
        all_shards(&chosen)?;
    }
    Ok(chosen)
}

pub(in crate::stages) fn format_of(path: &str) -> Option<Format> {
    Format::of_file(Path::new(path))
}

fn is_data(path: &str) -> bool {
    let hidden = path
        .split('/')
        .any(|part| part.starts_with('.') || part.starts_with("__"));
    !hidden && !is_description(path) && format_of(path).is_some()
}

/// Whether a file describes data, and never holds any.
pub(in crate::stages) fn is_description(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    NOT_DATA.contains(&name)
}

pub(in crate::stages) fn by_patterns(
    data: &[&str],
    patterns: &[String],
) -> anyhow::Result<Vec<String>> {
    let mut chosen = BTreeSet::new();
    for pattern in patterns {
        let pattern = pattern.trim_start_matches("./");
        let inside = format!("{}/**", pattern.trim_end_matches('/'));
        let fits = |path: &&&str| {
            matches(pattern, path, Star::StaysInFolder)
                || matches(&inside, path, Star::StaysInFolder)
        };
        let found: Vec<_> = data.iter().filter(fits).collect();
        ensure!(
            !found.is_empty(),
            "no data file fits `{pattern}`; there are {}",
            some(data)
        );
        chosen.extend(found.into_iter().map(|path| (*path).to_owned()));
    }
    Ok(chosen.into_iter().collect())
}

fn by_split(
    data: &[&str],
    readme: Option<&str>,
    wanted: &Wanted<'_>,
) -> anyhow::Result<Vec<String>> {
    let configs = readme.map(configs).transpose()?.unwrap_or_default();
    let mut below = data.to_vec();
    if !configs.is_empty() {
        let config = pick(&configs, wanted.name)?;
        if let Some(files) = &config.data_files {
            let splits = declared(files).with_context(|| {
                format!(
                    "its README describes the configuration `{}` oddly",
                    config.name
                )
            })?;
            let Some(patterns) = splits.get(wanted.split) else {
                bail!("{}", no_split(wanted.split, splits.keys()));
            };
            return by_patterns(data, patterns);
        }
        if let Some(folder) = &config.data_dir {
            below = inside(data, folder);
        }
    } else if let Some(name) = wanted.name.filter(|name| *name != "default") {
        below = inside(data, name);
        ensure!(
            !below.is_empty(),
            "it has no configuration `{name}`: neither its README nor a folder is called so"
        );
    }
    let mut found = BTreeMap::new();
    for format in Format::ALL {
        let same = below.iter().filter(|path| format_of(path) == Some(format));
        let mut splits = by_names(&same.copied().collect::<Vec<_>>());
        if let Some(chosen) = splits.remove(wanted.split) {
            return Ok(chosen);
        }
        found.append(&mut splits);
    }
    bail!("{}", no_split(wanted.split, found.keys()))
}

pub(in crate::stages) fn inside<'a>(data: &[&'a str], folder: &str) -> Vec<&'a str> {
    let folder = format!("{}/", folder.trim_start_matches("./").trim_end_matches('/'));
    let paths = data.iter().copied();
    paths.filter(|path| path.starts_with(&folder)).collect()
}

fn no_split<'a>(split: &str, known: impl Iterator<Item = &'a String>) -> String {
    let known: Vec<_> = known.collect();
    format!("it has no split `{split}`; there are {}", some(&known))
}

/// Splits by names: `train-00000-of-00001`, else words in folders, else words in file names, else all is `train`.
pub(in crate::stages) fn by_names(data: &[&str]) -> BTreeMap<String, Vec<String>> {
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in data {
        if let Some((split, _, _)) = path.strip_prefix("data/").and_then(shard) {
            splits
                .entry(split.to_owned())
                .or_default()
                .push((*path).to_owned());
        }
    }
    let in_folder = |path: &str| {
        path.rsplit_once('/')
            .map_or("", |(folder, _)| folder)
            .to_owned()
    };
    let in_name = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let parts: [&dyn Fn(&str) -> String; 2] = [&in_folder, &in_name];
    for part in parts {
        if !splits.is_empty() {
            break;
        }
        for path in data {
            let text = part(path).to_lowercase();
            let words: Vec<_> = text.split(|c: char| !c.is_alphabetic()).collect();
            for (split, known) in WORDS {
                if words.iter().any(|word| known.contains(word)) {
                    let paths = splits.entry((*split).to_owned()).or_default();
                    paths.push((*path).to_owned());
                }
            }
        }
    }
    if splits.is_empty() && !data.is_empty() {
        let all = data.iter().map(|path| (*path).to_owned()).collect();
        splits.insert("train".into(), all);
    }
    for paths in splits.values_mut() {
        paths.sort();
    }
    splits
}

/// `train`, `0`, `3` of `train-00000-of-00003-0f1e.parquet`.
pub(in crate::stages) fn shard(name: &str) -> Option<(&str, usize, usize)> {
    let (before, after) = name.split_once("-of-")?;
    let (split, number) = before.rsplit_once('-')?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    let five = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    (five(number) && five(&digits) && !split.is_empty() && !split.contains('/')).then_some((
        split,
        number.parse().ok()?,
        digits.parse().ok()?,
    ))
}

/// Fails if a part of a split is missing, since the split would be incomplete.
pub(in crate::stages) fn all_shards(chosen: &[String]) -> anyhow::Result<()> {
    let mut groups: BTreeMap<(String, usize), Vec<usize>> = BTreeMap::new();
    for path in chosen {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        if let Some((split, number, total)) = shard(name) {
            groups
                .entry((format!("{folder}/{split}"), total))
                .or_default()
                .push(number);
        }
    }
    for ((split, total), numbers) in groups {
        if let Some(missing) = (0..total).find(|number| !numbers.contains(number)) {
            let split = split.trim_start_matches('/');
            bail!("of `{split}` the part {missing:05} of {total:05} is missing");
        }
    }
    Ok(())
}

pub(in crate::stages) fn one_format(chosen: &[String]) -> anyhow::Result<()> {
    let first = chosen.first().context("no data file was chosen")?;
    if let Some(other) = chosen
        .iter()
        .find(|path| format_of(path) != format_of(first))
    {
        bail!(
            "`{first}` and `{other}` have different formats; name those of one format by `files`"
        );
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
struct Card {
    #[serde(default)]
    configs: Vec<Config>,
}

#[derive(Debug, Deserialize)]
pub(in crate::stages) struct Config {
    #[serde(rename = "config_name")]
    pub(in crate::stages) name: String,
    #[serde(default)]
    default: bool,
    pub(in crate::stages) data_files: Option<Value>,
    pub(in crate::stages) data_dir: Option<String>,
}

/// The configurations in the YAML header of a README.
pub(in crate::stages) fn configs(readme: &str) -> anyhow::Result<Vec<Config>> {
    let text = readme.trim_start_matches('\u{feff}').replace("\r\n", "\n");
    let Some(rest) = text.strip_prefix("---\n") else {
        return Ok(Vec::new());
    };
    let Some(end) = rest.find("\n---") else {
        return Ok(Vec::new());
    };
    let card: Option<Card> = serde_yaml::from_str(&rest[..end])
        .context("the header of its README is broken; name the data files by `files`")?;
    Ok(card.map(|card| card.configs).unwrap_or_default())
}

pub(in crate::stages) fn pick<'a>(
    configs: &'a [Config],
    name: Option<&str>,
) -> anyhow::Result<&'a Config> {
    let names: Vec<_> = configs.iter().map(|config| &config.name).collect();
    if let Some(name) = name {
        let found = configs.iter().find(|config| config.name == name);
        return found.with_context(|| {
            format!(
                "it has no configuration `{name}`; there are {}",
                some(&names)
            )
        });
    }
    if let [only] = configs {
        return Ok(only);
    }
    configs
        .iter()
        .find(|config| config.default)
        .or_else(|| configs.iter().find(|config| config.name == "default"))
        .with_context(|| {
            format!(
                "it has several configurations: choose one of {} by `name`",
                some(&names)
            )
        })
}

/// The patterns by split of `data_files`: one pattern, a list, or a list of `{split, path}`.
pub(in crate::stages) fn declared(value: &Value) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let items = match value {
        Value::Sequence(items) => items.as_slice(),
        one => std::slice::from_ref(one),
    };
    for item in items {
        let (split, path) = if item.is_string() {
            ("train", item)
        } else {
            let split = item.get("split").and_then(Value::as_str);
            let split = split.context("expected `split` and `path` in `data_files`")?;
            (
                split,
                item.get("path")
                    .context("expected `path` in `data_files`")?,
            )
        };
        let patterns = splits.entry(split.to_owned()).or_default();
        match path {
            Value::String(one) => patterns.push(one.clone()),
            Value::Sequence(several) => {
                for one in several {
                    patterns.push(
                        one.as_str()
                            .context("expected `path` to be text")?
                            .to_owned(),
                    );
                }
            }
            _ => bail!("expected `path` to be text or a list of it"),
        }
    }
    Ok(splits)
}

/// The first few of many names.
pub(in crate::stages) fn some(names: &[impl AsRef<str>]) -> String {
    if names.is_empty() {
        return "none".into();
    }
    let quoted = names
        .iter()
        .take(8)
        .map(|name| format!("`{}`", name.as_ref()));
    let mut text = quoted.collect::<Vec<_>>().join(", ");
    if names.len() > 8 {
        text.push_str(", ...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick_files(
        paths: &[&str],
        readme: Option<&str>,
        split: &str,
        name: Option<&str>,
    ) -> Result<Vec<String>, String> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let wanted = Wanted {
            split,
            name,
            files: None,
        };
        choose_files(&paths, readme, &wanted).map_err(|error| format!("{error:#}"))
    }

    fn by_name(paths: &[&str], split: &str) -> Result<Vec<String>, String> {
        pick_files(paths, None, split, None)
    }

    #[test]
    fn one_file_is_the_training_split() {
        let found = by_name(
            &["README.md", "truthy-dpo.parquet", ".gitattributes"],
            "train",
        );
        assert_eq!(found.unwrap(), ["truthy-dpo.parquet"]);
        let error = by_name(&["truthy-dpo.parquet"], "test").unwrap_err();
        assert!(
            error.contains("no split `test`; there are `train`"),
            "{error}"
        );
    }

    #[test]
    fn shards_are_taken_in_order_and_all() {
        let paths = [
            "data/train-00001-of-00002-ab.parquet",
            "data/train-00000-of-00002-cd.parquet",
            "data/test_prefs-00000-of-00001.parquet",
            "extra.parquet",
        ];
        let found = by_name(&paths, "train").unwrap();
        assert_eq!(found, [paths[1], paths[0]]);
        assert_eq!(by_name(&paths, "test_prefs").unwrap(), [paths[2]]);
        let error = by_name(&paths[..1], "train").unwrap_err();
        assert!(error.contains("00000 of 00002"), "{error}");
    }

    #[test]
    fn words_in_names_tell_splits() {
        let paths = [
            "my_train_set.jsonl",
            "dev.jsonl",
            "retrained.jsonl",
            "eval-1.jsonl",
        ];
        assert_eq!(by_name(&paths, "train").unwrap(), ["my_train_set.jsonl"]);
        assert_eq!(by_name(&paths, "validation").unwrap(), ["dev.jsonl"]);
        assert_eq!(by_name(&paths, "test").unwrap(), ["eval-1.jsonl"]);
        let folders = ["train/a.csv", "train/b.csv", "test/a.csv"];
        assert_eq!(by_name(&folders, "train").unwrap(), &folders[..2]);
    }

    #[test]
    fn parquet_comes_before_the_same_as_text() {
        let paths = [
            "train.csv",
            "train.jsonl",
            "train.parquet",
            "dataset_infos.json",
        ];
        assert_eq!(by_name(&paths, "train").unwrap(), ["train.parquet"]);
        assert_eq!(by_name(&paths[..2], "train").unwrap(), ["train.jsonl"]);
        let error = by_name(&["data.zip", "x.bin"], "train").unwrap_err();
        assert!(error.contains("`data.zip`, `x.bin`"), "{error}");
    }

    #[test]
    fn the_readme_decides() {
        let readme = "---\nlicense: mit\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    \
                      path: main/tr-*\n  - split: test\n    path: [main/te-1.parquet]\n- config_name: other\n  data_files: other/*\n\
                      ---\n# Title\n";
        let paths = [
            "main/tr-1.parquet",
            "main/te-1.parquet",
            "other/x.parquet",
            "train.parquet",
        ];
        let find = |split, name| pick_files(&paths, Some(readme), split, name);
        assert_eq!(find("train", None).unwrap(), ["main/tr-1.parquet"]);
        assert_eq!(find("test", None).unwrap(), ["main/te-1.parquet"]);
        assert_eq!(find("train", Some("other")).unwrap(), ["other/x.parquet"]);
        assert!(find("dev", None).unwrap_err().contains("`test`, `train`"));
        assert!(
            find("train", Some("no"))
                .unwrap_err()
                .contains("`main`, `other`")
        );
        let several = readme.replace("  default: true\n", "");
        let error = pick_files(&paths, Some(&several), "train", None).unwrap_err();
        assert!(
            error.contains("choose one of `main`, `other` by `name`"),
            "{error}"
        );
        let error = pick_files(&paths, Some("---\nconfigs: {\n---\n"), "train", None).unwrap_err();
        assert!(error.contains("README is broken"), "{error}");
    }

    #[test]
    fn files_are_named_by_patterns() {
        let paths: Vec<_> = ["a/1.jsonl", "a/2.jsonl", "b.csv"]
            .map(str::to_owned)
            .into();
        let find = |patterns: &[&str]| {
            let files: Vec<_> = patterns
                .iter()
                .map(|pattern| (*pattern).to_owned())
                .collect();
            let wanted = Wanted {
                split: "train",
                name: None,
                files: Some(&files),
            };
            choose_files(&paths, None, &wanted).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(find(&["a/*.jsonl"]).unwrap(), ["a/1.jsonl", "a/2.jsonl"]);
        assert_eq!(find(&["a"]).unwrap(), ["a/1.jsonl", "a/2.jsonl"]);
        assert!(find(&["c*"]).unwrap_err().contains("`c*`"));
        assert!(find(&["**"]).unwrap_err().contains("different formats"));
    }
}
