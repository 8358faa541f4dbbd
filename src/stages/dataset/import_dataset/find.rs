//! Finds the data files for the paths of a recipe: files, folders, patterns, and datasets saved by `save_to_disk`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::is_split;
use super::paths::Paths;
use crate::data::import::Format;
use crate::engine::glob::Pattern;
use crate::engine::{Context, files_at};
use crate::stages::dataset::files::{format_of, is_description};
use crate::stages::dataset::folders::all_splits;

/// The file in which `datasets` describes a dataset that it saved, and that of several splits.
const STATE: &str = "state.json";
const SPLITS: &str = "dataset_dict.json";
/// The largest of them.
const LONGEST: u64 = 16 << 20;

/// The recipe's other settings for finding files.
pub(crate) struct FindOptions<'a> {
    /// The split of files whose names don't identify one.
    pub(crate) split: &'a str,
    pub(crate) name: Option<&'a str>,
    pub(crate) format: Option<Format>,
}

/// The data files that were found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// The files of each split, in order.
    pub(crate) splits: BTreeMap<String, Vec<PathBuf>>,
    /// The names of the files in messages.
    pub(crate) names: BTreeMap<PathBuf, String>,
    /// Messages about which files are used and which are not, where the recipe does not make that clear.
    pub(crate) messages: Vec<String>,
}

/// Finds the data files.
pub(crate) fn find(cx: &Context, paths: &Paths, options: &FindOptions<'_>) -> Result<Found> {
    let mut found = Found::default();
    for path in &paths.0 {
        let written = path.as_written();
        let place = cx.source(path)?;
        if let Some(pattern) = Pattern::parse(place) {
            matching(&mut found, place, written, options.split)?;
            ensure!(
                !found.splits.is_empty(),
                "no data file fits `{written}`; hint: files are looked for below `{}`",
                pattern.folder().display()
            );
        } else if place.is_dir() {
            folder(&mut found, place, written, options)
                .with_context(|| format!("the folder `{written}` can't be imported"))?;
        } else {
            found.add(options.split, place, written)?;
        }
    }
    if paths.0.len() > 1 || found.names.len() > 1 {
        for (split, files) in &found.splits {
            let names = files.iter().filter_map(|file| found.names.get(file));
            let names: Vec<&String> = names.collect();
            found
                .messages
                .insert(0, format!("`{split}` is read from {}", some(&names)));
        }
    }
    Ok(found)
}

impl Found {
    fn add(&mut self, split: &str, path: &Path, name: &str) -> Result<()> {
        ensure!(
            is_split(split),
            "`{name}` can't be a split called `{split}`; hint: the name of a split has at most 200 letters, digits, `_`, `-` and `.`"
        );
        if let Some(before) = self.names.insert(path.to_owned(), name.to_owned()) {
            bail!("`{name}` would be read twice, as `{before}`, too; hint: name it once by `path`");
        }
        let files = self.splits.entry(split.to_owned()).or_default();
        files.push(path.to_owned());
        Ok(())
    }
}

/// Adds the files that fit a pattern.
fn matching(found: &mut Found, place: &Path, written: &str, split: &str) -> Result<()> {
    let folder = written_folder(written);
    let mut first: Option<String> = None;
    let mut plain = BTreeMap::new();
    for (name, path) in files_at(place)? {
        let shown = shown(&folder.join(&name));
        if is_description(&name) {
            found
                .messages
                .push(format!("`{shown}` describes data, and is left aside"));
            continue;
        }
        if let Some(first) = &first
            && format_of(first) != format_of(&name)
        {
            bail!(
                "`{written}` fits files of several formats, `{first}` and `{name}`; hint: write it so that it fits those of one"
            );
        }
        if let Some(twin) = plain.insert(unpacked(&name).to_owned(), name.clone()) {
            bail!(
                "`{written}` fits `{twin}` and `{name}`, which are the same file packed and unpacked by their names; hint: write it so \
                 that it fits one of them"
            );
        }
        first.get_or_insert(name);
        found.add(split, &path, &shown)?;
    }
    Ok(())
}

/// Adds the files of a folder.
fn folder(found: &mut Found, place: &Path, written: &str, options: &FindOptions<'_>) -> Result<()> {
    let shown_name = |name: &str| shown(&Path::new(written).join(name));
    if place.join(SPLITS).is_file() {
        let saved: SavedSplits = read(&place.join(SPLITS), SPLITS)?;
        for split in saved.splits {
            ensure!(is_split(&split), "`{SPLITS}` names a split {split:?}");
            for name in saved_files(&place.join(&split))
                .with_context(|| format!("its split `{split}` is not whole"))?
            {
                let name = format!("{split}/{name}");
                found.add(&split, &place.join(&name), &shown_name(&name))?;
            }
        }
        return Ok(());
    }
    if place.join(STATE).is_file() {
        for name in saved_files(place)? {
            found.add(options.split, &place.join(&name), &shown_name(&name))?;
        }
        return Ok(());
    }
    let names: Vec<String> = files_at(place)?.into_iter().map(|(name, _)| name).collect();
    let readme = match names.iter().find(|name| *name == "README.md") {
        Some(name) => {
            let text = std::fs::read(place.join(name)).context("could not read its README.md")?;
            Some(String::from_utf8_lossy(&text).into_owned())
        }
        None => None,
    };
    let splits = all_splits(&names, readme.as_deref(), options.name, options.format)?;
    for (split, files) in splits.files {
        for name in files {
            found.add(&split, &place.join(&name), &shown_name(&name))?;
        }
    }
    for (name, why) in splits.aside {
        found
            .messages
            .push(format!("`{}` is left aside: {why}", shown_name(&name)));
    }
    Ok(())
}

#[derive(Deserialize)]
struct SavedSplits {
    splits: Vec<String>,
}

#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "_data_files")]
    files: Vec<SavedFile>,
    /// Old versions keep the order of rows in files of their own.
    #[serde(rename = "_indices_data_files", default)]
    indices: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct SavedFile {
    filename: String,
}

/// The files of a dataset that `save_to_disk` wrote.
fn saved_files(folder: &Path) -> Result<Vec<String>> {
    let saved: Saved = read(&folder.join(STATE), STATE)?;
    let is_reordered = saved.indices.is_some_and(|indices| match indices {
        serde_json::Value::Array(files) => !files.is_empty(),
        other => !other.is_null(),
    });
    ensure!(
        !is_reordered,
        "its rows stand in an order of their own, which is not read; hint: save it anew with a newer version of `datasets`"
    );
    let mut seen = BTreeSet::new();
    for file in &saved.files {
        let name = &file.filename;
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        ensure!(
            plain,
            "`{STATE}` names a file {name:?}, which is not in the folder"
        );
        ensure!(seen.insert(name), "`{STATE}` names the file `{name}` twice");
        ensure!(
            folder.join(name).is_file(),
            "the file `{name}` is missing, which `{STATE}` names"
        );
    }
    ensure!(!saved.files.is_empty(), "`{STATE}` names no file");
    Ok(saved.files.into_iter().map(|file| file.filename).collect())
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path, name: &str) -> Result<T> {
    let found = std::fs::metadata(path).with_context(|| format!("could not read `{name}`"))?;
    ensure!(
        found.len() <= LONGEST,
        "`{name}` is larger than {} MiB",
        LONGEST >> 20
    );
    let text = std::fs::read(path).with_context(|| format!("could not read `{name}`"))?;
    serde_json::from_slice(&text)
        .ok()
        .with_context(|| format!("`{name}` is not as `datasets` writes it"))
}

/// A file's name without the extension of a packed file.
fn unpacked(name: &str) -> &str {
    let packed = name.rsplit_once('.');
    let packed = packed.filter(|(_, extension)| matches!(*extension, "gz" | "zst" | "xz" | "bz2"));
    packed.map_or(name, |(plain, _)| plain)
}

/// The folder before the first part of a path that is a pattern.
fn written_folder(written: &str) -> PathBuf {
    let parts = Path::new(written).iter();
    let plain = parts.take_while(|part| !part.to_string_lossy().contains(['*', '?', '[']));
    plain.collect()
}

/// A path for messages.
fn shown(path: &Path) -> String {
    let path = path.strip_prefix(".").unwrap_or(path);
    if path.as_os_str().is_empty() {
        ".".to_owned()
    } else {
        path.display().to_string()
    }
}

/// The first few of many names.
fn some(names: &[&String]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(4)
        .map(|name| format!("`{name}`"))
        .collect();
    match names.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
