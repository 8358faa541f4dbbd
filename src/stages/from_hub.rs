//! Code shared by the stages that download: the hub client of a run, the pinned commit, and downloads with progress.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::engine::{Context, Problem, RunEnv, Stat};
use crate::hub::{Hub, HubSettings, Listing, RemoteFile, RepoKind, Snapshot, Watch};

/// The name of the external fact that pins a revision.
const COMMIT: &str = "commit";

pub(super) fn main_revision() -> String {
    "main".into()
}

/// The hub client for the settings of the run.
fn hub<'a>(env: &RunEnv, watch: &'a dyn Watch) -> anyhow::Result<Hub<'a>> {
    let variable = |name: &str| env.variable(name).map(str::to_owned);
    let mut settings = HubSettings::from_variables(&variable, env.home.as_deref())?;
    settings.offline |= env.offline;
    Hub::new(settings, watch)
}

/// A plan waits for the hub, and so does a run before its stages start.
impl Watch for RunEnv {
    fn tick(&self) -> anyhow::Result<()> {
        self.check_cancelled()
    }

    fn tell(&self, text: &str) {
        self.warn(text);
    }
}

/// A stage waits for the hub. Warnings that were given when it was planned are not repeated.
impl Watch for Context {
    fn tick(&self) -> anyhow::Result<()> {
        self.check_cancelled()
    }

    fn tell(&self, text: &str) {
        if self.env().is_first_warning(text) {
            self.warn(text);
        }
    }
}

/// The commit that `revision` refers to now.
pub(super) fn pin(
    env: &RunEnv,
    kind: RepoKind,
    repo: &str,
    revision: &str,
) -> anyhow::Result<BTreeMap<String, String>> {
    let commit = hub(env, env)?.resolve(kind, repo, revision)?;
    Ok([(COMMIT.to_owned(), commit)].into())
}

/// Rules that both stages share.
pub(super) fn check(repo: &str, revision: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    if repo.trim().is_empty() {
        problems.push(
            Problem::new(
                "repo",
                "expected a repository of the hub, such as `owner/name`",
            )
            .hint("for local files there are `import_dataset` and `import_model`"),
        );
    }
    if revision.trim().is_empty() {
        problems.push(Problem::new(
            "revision",
            "expected a branch, a tag or a commit",
        ));
    }
    problems
}

/// One repository at the pinned commit.
pub(super) struct Source<'a> {
    cx: &'a Context,
    hub: Hub<'a>,
    snapshot: Snapshot,
    /// Its files.
    pub(super) listing: Listing,
    /// The fetched files with their stats after they were verified.
    fetched: Vec<(PathBuf, Stat)>,
    done: u64,
    total: u64,
}

impl<'a> Source<'a> {
    pub(super) fn open(
        cx: &'a Context,
        kind: RepoKind,
        repo: &str,
        revision: &str,
    ) -> anyhow::Result<Self> {
        let hub = hub(cx.env(), cx)?;
        let snapshot = Snapshot {
            kind,
            repo: repo.to_owned(),
            commit: cx.external_fact(COMMIT)?.to_owned(),
        };
        let listing = hub.list(&snapshot)?;
        if let Err(error) = hub.remember(&snapshot, revision) {
            cx.warn(format!(
                "{error:#}; later runs with `--offline` need a full commit"
            ));
        }
        if !listing.complete {
            cx.warn(format!(
                "offline: of `{repo}` only what another program left in the cache is known, {} files",
                listing.files.len()
            ));
        }
        cx.note(COMMIT, &snapshot.commit);
        Ok(Self {
            cx,
            hub,
            snapshot,
            listing,
            fetched: Vec::new(),
            done: 0,
            total: 0,
        })
    }

    /// Announces how many bytes will be fetched in all, and tells what can't be verified. Sizes and hashes that the list of files
    /// leaves out are asked for.
    pub(super) fn expect(&mut self, files: &mut [RemoteFile]) -> anyhow::Result<()> {
        let repo = &self.snapshot.repo;
        let unsized_ = files.iter().filter(|file| file.size.is_none()).count();
        if unsized_ > 0 {
            self.cx.warn(format!(
                "the hub lists {unsized_} of {} files of `{repo}` without their sizes; each of them is asked for by itself",
                files.len()
            ));
        }
        for file in files.iter_mut() {
            self.cx.check_cancelled()?;
            *file = self.hub.measure(&self.snapshot, file)?;
        }
        let bare: Vec<&str> = files
            .iter()
            .filter(|file| !file.has_hash())
            .map(|file| file.path.as_str())
            .collect();
        if let Some(first) = bare.first() {
            self.cx.warn(format!(
                "the hub tells no hash of {} of {} files of `{repo}` (such as `{first}`); their sizes are checked, their contents \
                 can't be",
                bare.len(),
                files.len()
            ));
        }
        let mut sizes = files.iter().filter_map(|file| file.size);
        self.total = sizes.try_fold(0_u64, u64::checked_add).with_context(|| {
            format!("the hub lists sizes of the files of `{repo}` that no disk holds")
        })?;
        self.cx.note("bytes", self.total);
        Ok(())
    }

    pub(super) fn file(&self, path: &str) -> Option<RemoteFile> {
        self.listing
            .files
            .iter()
            .find(|file| file.path == path)
            .cloned()
    }

    /// The file in the cache, verified.
    pub(super) fn fetch(&mut self, file: &RemoteFile) -> anyhow::Result<PathBuf> {
        let (cx, before) = (self.cx, self.done);
        let total = (self.total > 0).then_some(self.total);
        let mut reported: Option<Instant> = None;
        let path = self.hub.fetch(&self.snapshot, file, &mut |bytes| {
            cx.check_cancelled()?;
            if reported.is_none_or(|reported| reported.elapsed() > Duration::from_millis(100)) {
                reported = Some(Instant::now());
                cx.progress(before + bytes, total, "bytes");
            }
            Ok(())
        })?;
        if total.is_some() {
            self.done += file.size.unwrap_or_default();
        }
        cx.progress(self.done, total, "bytes");
        self.fetched.push((path.clone(), stat(&path)?));
        Ok(path)
    }

    /// Fetches files into the stage's output, each under its path inside `folder` of the repository.
    pub(super) fn fetch_to_output(
        &mut self,
        folder: &str,
        mut files: Vec<RemoteFile>,
    ) -> anyhow::Result<()> {
        self.expect(&mut files)?;
        for file in &files {
            self.cx.check_cancelled()?;
            let path = self.fetch(file)?;
            let name = file.path.strip_prefix(folder).unwrap_or(&file.path);
            place(&path, &self.cx.out().join(name))?;
        }
        Ok(())
    }

    /// Fails if a file of the cache changed after it was verified, since other programs may write there.
    pub(super) fn unchanged(&self) -> anyhow::Result<()> {
        for (path, before) in &self.fetched {
            let now = stat(path)?;
            // Linking a file changes its ctime, so that is not compared.
            ensure!(
                (now.size, now.modified, now.inode) == (before.size, before.modified, before.inode),
                "`{}` changed while it was read; run again, and it is fetched anew where it is not what the hub has",
                path.display()
            );
        }
        Ok(())
    }
}

fn stat(path: &Path) -> anyhow::Result<Stat> {
    let found = std::fs::metadata(path);
    let found = found.with_context(|| format!("could not read `{}`", path.display()))?;
    Ok(Stat::from_metadata(&found))
}

/// Files up to this size are copied: that costs nothing, and leaves the cache's file alone.
const SMALL: u64 = 1 << 20;

/// Puts a file of the cache into an artifact. A large one is not copied, where the file system can share its blocks or else link
/// it: then it is another program's file as well, whose mode stays theirs, and which is noticed when they change it.
pub(super) fn place(source: &Path, target: &Path) -> anyhow::Result<()> {
    let real = source
        .canonicalize()
        .with_context(|| format!("could not read `{}`", source.display()))?;
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let small = std::fs::metadata(&real).is_ok_and(|found| found.len() <= SMALL);
    if !small
        && (reflink_copy::reflink(&real, target).is_ok()
            || std::fs::hard_link(&real, target).is_ok())
    {
        return Ok(());
    }
    copy(&real, target)
}

/// Copies a file; on file systems with shared extents that costs no space.
pub(super) fn copy(source: &Path, target: &Path) -> anyhow::Result<()> {
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::copy(source, target)
        .map(|_| ())
        .with_context(|| format!("could not copy `{}`", source.display()))
}
