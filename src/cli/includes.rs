//! Finds the recipes that a recipe includes or extends: beside it, in a git repository, or on the hub.
//!
//! A local one has to lie in the project, like everything that a recipe reads. What comes from elsewhere is named by a commit, which the
//! lock file pins, and may read files of its own repository only.

mod cache;
mod git;
mod source;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::folders::normal;
use crate::engine::{PinChange, RunEnv};
use crate::hub::{Hub, HubSettings, Snapshot};
use crate::recipe::{Includes, RecipeFile};
use git::Repository;
use source::Source;

/// The largest recipe, in bytes.
const LONGEST: u64 = 1 << 20;
/// The most files beside a recipe of the hub that are fetched with it, and the most bytes of them.
const MOST_BESIDE: usize = 1000;
const MOST_BYTES_BESIDE: u64 = 64 << 20;

/// What the lock file knows of an included recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IncludePin {
    /// The commit of a branch or a tag, for what comes from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) commit: Option<String>,
    /// The digest of the recipe's text.
    pub(super) digest: String,
}

/// The pins of included recipes by how they are named, local ones by the path from the recipe.
pub(super) type IncludePins = BTreeMap<String, IncludePin>;

/// Finds recipes for one that somebody runs.
pub(super) struct Finder<'a> {
    /// The recipe's folder.
    folder: &'a Path,
    /// What local recipes may lie in, and a sentence on it.
    allowed: Vec<PathBuf>,
    advice: String,
    env: &'a RunEnv,
    /// What is pinned; commits in it are taken, whatever branches mean now.
    pins: IncludePins,
    found: RefCell<IncludePins>,
}

type Refusal = (String, String);

impl<'a> Finder<'a> {
    /// A finder for the recipe in `folder`. Local recipes may lie in the folders `allowed`.
    pub(super) fn new(
        folder: &'a Path,
        allowed: &[PathBuf],
        advice: String,
        env: &'a RunEnv,
        pins: IncludePins,
    ) -> Self {
        let real = allowed.iter().filter_map(|path| path.canonicalize().ok());
        Self {
            folder,
            allowed: real.collect(),
            advice,
            env,
            pins,
            found: RefCell::default(),
        }
    }

    /// What was found, to be pinned.
    pub(super) fn found(self) -> IncludePins {
        self.found.into_inner()
    }

    fn allows(&self, path: &Path) -> bool {
        let real = path.canonicalize();
        real.is_ok_and(|real| self.allowed.iter().any(|folder| real.starts_with(folder)))
    }

    fn local(&self, path: &Path, written: &str) -> Result<RecipeFile, Refusal> {
        let refuse = |message: String| Err((message, self.advice.clone()));
        if !path.exists() {
            let message = format!("there is no recipe `{written}`");
            let hint = "a path starts at the folder of the recipe that names it";
            return Err((message, hint.to_owned()));
        }
        if !self.allows(path) {
            return refuse(format!("the recipe `{written}` leaves the project"));
        }
        let text = text(path, written)?;
        let shown = self.shown(path);
        self.pin(shown.display().to_string(), None, &text);
        Ok(RecipeFile {
            path: path.to_owned(),
            shown: seen_from_here(path),
            text: text.into(),
            fetched: None,
        })
    }

    /// A path as the recipe's folder sees it, by which it is pinned.
    fn shown(&self, path: &Path) -> PathBuf {
        let below = path.strip_prefix(self.folder);
        below.map_or_else(|_| path.to_owned(), Path::to_owned)
    }

    fn pin(&self, name: String, commit: Option<String>, text: &str) {
        let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
        let pin = IncludePin { commit, digest };
        self.found.borrow_mut().insert(name, pin);
    }

    /// The commit that is pinned for a source.
    fn pinned(&self, source: &str) -> Option<&str> {
        self.pins.get(source)?.commit.as_deref()
    }

    fn git_recipe(&self, source: &Source, written: &str) -> anyhow::Result<RecipeFile> {
        let Source::Git {
            url,
            revision,
            path,
        } = source
        else {
            anyhow::bail!("`{written}` is no git repository");
        };
        let repository = Repository::new(url, self.env.offline)?;
        let commit = match self.pinned(written) {
            Some(commit) => commit.to_owned(),
            None => repository.commit(revision.as_deref())?,
        };
        let folder = repository.checkout(&commit, &|| self.env.check_cancelled())?;
        self.fetched(folder.join(path), folder, (written, path), commit)
    }

    fn hub_recipe(&self, source: &Source, written: &str) -> anyhow::Result<RecipeFile> {
        let Source::Hub {
            kind,
            repo,
            revision,
            path,
        } = source
        else {
            anyhow::bail!("`{written}` is no repository of the hub");
        };
        let variable = |name: &str| self.env.variable(name).map(str::to_owned);
        let mut settings = HubSettings::from_variables(&variable, self.env.home.as_deref())?;
        settings.offline |= self.env.offline;
        let hub = Hub::new(settings, self.env)?;
        let commit = match self.pinned(written) {
            Some(commit) => commit.to_owned(),
            None => hub.resolve(*kind, repo, revision)?,
        };
        let snapshot = Snapshot {
            kind: *kind,
            repo: repo.clone(),
            commit: commit.clone(),
        };
        let listing = hub.list(&snapshot)?;
        // It spares a question when there is no network.
        let _ = hub.remember(&snapshot, revision);
        let own = listing.files.iter().find(|file| file.path == *path);
        let own = own.with_context(|| format!("`{repo}` has no file `{path}` at {commit}"))?;
        let mut progress = |_| self.env.check_cancelled();
        let place = hub.fetch(&snapshot, own, &mut progress)?;
        // Files beside it may be read by its stages.
        let beside = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let files = listing.files.iter().filter(|file| {
            let below = file.path.strip_prefix(beside);
            file.path != *path
                && below.is_some_and(|rest| beside.is_empty() || rest.starts_with('/'))
        });
        let mut left = MOST_BYTES_BESIDE;
        for file in files.take(MOST_BESIDE) {
            let size = file.size.unwrap_or(u64::MAX);
            if let Some(rest) = left.checked_sub(size) {
                left = rest;
                hub.fetch(&snapshot, file, &mut progress)?;
            }
        }
        // Files of the hub's cache are links to its blobs, which lie beside its snapshots.
        let depth = path.split('/').count();
        let folder = place.ancestors().nth(depth + 2).map(Path::to_owned);
        let folder = folder.context("the hub's cache has another layout")?;
        self.fetched(place, folder, (written, path), commit)
    }

    /// A recipe that was fetched: the file, and the folder that it may read.
    fn fetched(
        &self,
        file: PathBuf,
        folder: PathBuf,
        (written, path): (&str, &str),
        commit: String,
    ) -> anyhow::Result<RecipeFile> {
        let real = file.canonicalize();
        let inside = folder.canonicalize();
        let inside = inside.with_context(|| format!("`{}` is gone", folder.display()))?;
        anyhow::ensure!(
            real.is_ok_and(|real| real.starts_with(&inside)),
            "there is no recipe `{path}` in it at {commit}"
        );
        let text = text(&file, written).map_err(|(message, _)| anyhow::anyhow!(message))?;
        let named = written.split('#').next().unwrap_or(written);
        let short: String = commit.chars().take(10).collect();
        self.pin(written.to_owned(), Some(commit), &text);
        Ok(RecipeFile {
            path: file,
            shown: PathBuf::from(format!("{named} {short}: {path}")),
            text: text.into(),
            fetched: Some(folder),
        })
    }
}

impl Includes for Finder<'_> {
    fn find(&self, written: &str, from: &RecipeFile) -> Result<RecipeFile, Refusal> {
        let source = Source::parse(written)?;
        let far = |found: anyhow::Result<RecipeFile>| {
            found.map_err(|error| {
                let message = format!("the recipe `{written}` could not be had: {error:#}");
                let hint = if self.env.offline {
                    "`--offline` takes what was fetched before; run once with a network"
                } else {
                    "`pipeline lock` pins what it means now, which is then taken from the cache"
                };
                (message, hint.to_owned())
            })
        };
        match (&source, &from.fetched) {
            (Source::Local(_), Some(folder)) => beside(from, folder, written),
            (Source::Local(path), None) => {
                let here = std::env::current_dir().unwrap_or_default();
                let of = normal(&here.join(&from.path));
                let start = of.parent().unwrap_or(&here);
                self.local(&normal(&start.join(path)), written)
            }
            (Source::Git { url, .. }, fetched) => {
                if let Some(path) = url.strip_prefix("file://") {
                    // Another repository of this machine is a local file.
                    // One that is gone may be in the cache.
                    let mut there = Path::new(path).ancestors();
                    let there = there.find(|folder| folder.exists());
                    if fetched.is_some() || !there.is_some_and(|there| self.allows(there)) {
                        let message = format!("the repository `{url}` leaves the project");
                        return Err((message, self.advice.clone()));
                    }
                }
                far(self.git_recipe(&source, written))
            }
            (Source::Hub { .. }, _) => far(self.hub_recipe(&source, written)),
        }
    }
}

/// A path for messages: from the current folder, where it lies in it.
fn seen_from_here(path: &Path) -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let below = path.strip_prefix(here);
    below.map_or_else(|_| path.to_owned(), Path::to_owned)
}

/// A recipe in the same repository as the one that names it.
fn beside(from: &RecipeFile, folder: &Path, written: &str) -> Result<RecipeFile, Refusal> {
    let start = from.path.parent().unwrap_or(folder);
    let path = normal(&start.join(written));
    let real = path.canonicalize();
    let inside = folder.canonicalize();
    let is_inside = real.ok().zip(inside.ok());
    if !path.starts_with(folder)
        || !is_inside.is_some_and(|(real, inside)| real.starts_with(inside))
    {
        let message = format!(
            "there is no recipe `{written}` beside `{}`",
            from.shown.display()
        );
        let hint = "what comes from elsewhere names recipes of its own repository, and others by their addresses";
        return Err((message, hint.to_owned()));
    }
    let text = text(&path, written)?;
    let named = from.shown.display().to_string();
    let named = named
        .rsplit_once(": ")
        .map_or(named.as_str(), |(named, _)| named);
    Ok(RecipeFile {
        shown: PathBuf::from(format!("{named}: {written}")),
        path,
        text: text.into(),
        fetched: Some(folder.to_owned()),
    })
}

/// The text of a recipe.
fn text(path: &Path, written: &str) -> Result<String, Refusal> {
    let read = || -> std::io::Result<String> {
        let found = std::fs::metadata(path)?;
        if !found.is_file() {
            return Err(std::io::Error::other("it is not a file"));
        }
        if found.len() > LONGEST {
            return Err(std::io::Error::other("it has more than 1 MiB"));
        }
        std::fs::read_to_string(path)
    };
    let text = read().map_err(|error| {
        let message = format!("could not read the recipe `{written}`: {error}");
        (message, "give the path of a recipe, a YAML file".to_owned())
    })?;
    Ok(text
        .strip_prefix('\u{feff}')
        .map_or(text.clone(), str::to_owned))
}

/// What was found that is not as it is pinned, or not pinned at all.
pub(super) fn changes(pins: &IncludePins, found: &IncludePins) -> Vec<PinChange> {
    let mut changes = Vec::new();
    for (name, now) in found {
        let pin = pins.get(name);
        let mut tell = |what: &str, old: Option<String>, new: Option<String>| {
            if old != new {
                changes.push(PinChange {
                    stage: name.clone(),
                    what: what.to_owned(),
                    old,
                    new,
                });
            }
        };
        let commit = pin.and_then(|pin| pin.commit.clone());
        tell("commit", commit, now.commit.clone());
        let digest = pin.map(|pin| pin.digest.clone());
        tell("recipe", digest, Some(now.digest.clone()));
    }
    changes
}
