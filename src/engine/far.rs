//! A task for a node that shares no folder with the runner: what it reads goes to the remote, and it names that by its contents.
//!
//! Only the remote lies between the two, and what a scheduler carries by itself: a script, which says which task it is and what digest
//! it has, and the environment, which has the secrets. `far_work` is the other end.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::digest::digest_file;
use super::glob::Pattern;
use super::manifest::{Entry, Manifest};
use super::part::Part;
use super::remote::Shared;
use super::sources::files_at;
use super::stat::Stat;
use super::store::Store;
use super::task::Task;

/// A task without paths of the machine that made it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FarTask {
    /// All contents that it reads, which are in the remote.
    pub(super) reads: BTreeSet<Digest>,
    /// The task; it has no folders yet.
    pub(super) task: Task,
    /// The contents of inputs by stage.
    pub(super) inputs: BTreeMap<String, Digest>,
    /// Local files and folders by the path as it was written.
    pub(super) sources: BTreeMap<String, FarSource>,
    /// The contents of what shards made, if it joins these.
    pub(super) shards: Vec<Digest>,
    /// The name of its scratch folder, if what a stopped attempt leaves there is of use to the next one.
    pub(super) scratch: Option<String>,
}

/// A local file, folder or pattern of files.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FarSource {
    pub(super) content: Digest,
    /// Its path below the contents.
    pub(super) path: String,
    /// The files that can be started as programs.
    pub(super) programs: Vec<String>,
}

impl FarTask {
    /// Sends what a task reads to the remote, as far as it lacks it.
    pub(super) fn send(
        task: &Task,
        store: &Store,
        shared: &Shared,
        cancel: &AtomicBool,
    ) -> anyhow::Result<Self> {
        let sending = Sending {
            store,
            shared,
            cancel,
        };
        let (mut inputs, mut sources, mut shards) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for (stage, folder) in &task.inputs {
            let content = sending.folder(Path::new(folder));
            let content =
                content.with_context(|| format!("the result of `{stage}` could not be sent"))?;
            inputs.insert(stage.clone(), content);
        }
        let known = task.known.iter();
        let known: BTreeMap<&Path, &Entry> = known
            .map(|(path, entry)| (Path::new(path), entry))
            .collect();
        for (written, path) in &task.sources {
            let source = sending.source(Path::new(path), &known);
            let source = source.with_context(|| format!("`{written}` could not be sent"))?;
            sources.insert(written.clone(), source);
        }
        let mut part = task.part.clone();
        if let Part::Joined(folders) = &mut part {
            for folder in std::mem::take(folders) {
                shards.push(sending.folder(Path::new(&folder))?);
            }
        }
        let scratch = Path::new(&task.scratch).file_name();
        let scratch = scratch.filter(|_| !matches!(part, Part::Shard(_)));
        let of_sources = sources.values().map(|source| &source.content);
        Ok(Self {
            reads: inputs
                .values()
                .chain(of_sources)
                .chain(&shards)
                .cloned()
                .collect(),
            task: Task {
                part,
                inputs: BTreeMap::new(),
                sources: BTreeMap::new(),
                out: OsString::new(),
                scratch: OsString::new(),
                continuations: None,
                known: Vec::new(),
                seen: Vec::new(),
                ..task.clone()
            },
            inputs,
            sources,
            shards,
            scratch: scratch.map(|name| name.to_string_lossy().into_owned()),
        })
    }
}

/// What is sent, and where to.
struct Sending<'a> {
    store: &'a Store,
    shared: &'a Shared,
    cancel: &'a AtomicBool,
}

impl Sending<'_> {
    /// Sends a folder, which may be an artifact of the store.
    fn folder(&self, folder: &Path) -> anyhow::Result<Digest> {
        let is_artifact = folder.parent() == Some(&self.store.folder("artifacts"));
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let manifest = match self.store.manifest(&name).filter(|_| is_artifact) {
            Some(manifest) => manifest,
            None => Manifest::read(folder)?,
        };
        self.shared.send_folder(folder, &manifest, self.cancel)
    }

    /// Sends the files at a path of a recipe.
    fn source(&self, path: &Path, known: &BTreeMap<&Path, &Entry>) -> anyhow::Result<FarSource> {
        let pattern = Pattern::parse(path);
        let (folder, below, prefix) = if let Some(pattern) = &pattern {
            let below = pattern.below(Path::new(""));
            (pattern.folder().to_owned(), below, PathBuf::new())
        } else {
            let Some(name) = path.file_name() else {
                bail!("`{}` has no name of its own", path.display());
            };
            let folder = path.parent().unwrap_or(path).to_owned();
            (folder, PathBuf::from(name), PathBuf::from(name))
        };
        let mut manifest = Manifest::default();
        let mut programs = Vec::new();
        for (name, path) in files_at(path)? {
            let name = if name.is_empty() {
                prefix.clone()
            } else {
                prefix.join(name)
            };
            let name = in_unicode(&name)?;
            let found = fs::metadata(&path)
                .with_context(|| format!("could not read `{}`", path.display()))?;
            let stat = Stat::from_metadata(&found);
            let blake3 = match known.get(path.as_path()).filter(|known| known.stat == stat) {
                Some(known) => known.blake3.clone(),
                None => digest_file(&path)?,
            };
            if found.permissions().mode() & 0o111 != 0 {
                programs.push(name.clone());
            }
            manifest.files.insert(name, Entry { blake3, stat });
        }
        Ok(FarSource {
            content: self.shared.send_folder(&folder, &manifest, self.cancel)?,
            path: in_unicode(&below)?,
            programs,
        })
    }
}

fn in_unicode(path: &Path) -> anyhow::Result<String> {
    let name = path.to_str().map(str::to_owned);
    name.with_context(|| format!("`{}` has a name that is not Unicode", path.display()))
}
