//! A commit of a git repository as a folder in the cache, by the `git` program.
//!
//! The repository may be anybody's. So git runs no hooks, filters or submodules of it, follows no links, asks nobody anything, and reaches
//! it by the one transport that the address names.

use std::fs;
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::cache::{self, is_commit};
use crate::cli::variable;
use crate::engine::write_atomically;

/// How long git may take for one command.
const LONGEST: Duration = Duration::from_mins(10);
const TICK: Duration = Duration::from_millis(10);
/// The time between two looks at the size of what git writes.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// How much of what git prints is read, in bytes.
const MOST_PRINTED: u64 = 1 << 20;

/// Settings that keep a repository from doing anything here.
const SETTINGS: [(&str, &str); 11] = [
    ("core.hooksPath", "/dev/null"),
    ("core.symlinks", "false"),
    ("core.fsmonitor", "false"),
    ("core.autocrlf", "false"),
    ("fetch.recurseSubmodules", "false"),
    ("submodule.recurse", "false"),
    ("filter.lfs.smudge", ""),
    ("filter.lfs.process", ""),
    ("filter.lfs.required", "false"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
];

/// Variables of a git that runs this program, such as for a hook, which would mean another repository.
const FOREIGN: [&str; 7] = [
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
];

/// A repository, and its place in the cache.
pub(super) struct Repository<'u> {
    url: &'u str,
    folder: PathBuf,
    offline: bool,
}

impl<'u> Repository<'u> {
    /// The repository at an address. Nothing is asked yet.
    pub(super) fn new(url: &'u str, offline: bool) -> anyhow::Result<Self> {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache
            .filter(|folder| folder.is_absolute())
            .or_else(|| Some(std::env::home_dir()?.join(".cache")))
            .context("there is no folder for the cache: HOME is not set")?;
        let digest = blake3::hash(url.as_bytes()).to_hex();
        let folder = cache.join("pipeline").join("recipes").join(&digest[..16]);
        Ok(Self {
            url,
            folder,
            // A repository on this machine needs no network.
            offline: offline && !url.starts_with("file://"),
        })
    }

    /// The commit that a branch or a tag means now; offline, what it meant last.
    pub(super) fn commit(&self, revision: Option<&str>) -> anyhow::Result<String> {
        let revision = revision.unwrap_or("HEAD");
        if is_commit(revision) {
            return Ok(revision.to_owned());
        }
        let digest = blake3::hash(revision.as_bytes()).to_hex();
        let remembered = self.folder.join(format!("{}.commit", &digest[..16]));
        if self.offline {
            let commit = fs::read_to_string(&remembered).unwrap_or_default();
            ensure!(
                is_commit(&commit),
                "what `{revision}` means was never asked, and there is no network"
            );
            return Ok(commit);
        }
        let printed = self.git(
            &[
                "ls-remote",
                "--",
                self.url,
                revision,
                &format!("{revision}^{{}}"),
            ],
            None,
        )?;
        let found: Vec<(&str, &str)> = printed
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .collect();
        // The commit of an annotated tag, a branch, a tag, in this order of what is meant.
        let names = [
            format!("refs/tags/{revision}^{{}}"),
            format!("refs/heads/{revision}"),
            format!("refs/tags/{revision}"),
            revision.to_owned(),
        ];
        let commit = names
            .iter()
            .find_map(|name| found.iter().find(|(_, found)| found == name))
            .map(|(commit, _)| (*commit).to_owned())
            .filter(|commit| is_commit(commit));
        let commit = commit.with_context(|| {
            format!("the repository has no branch or tag `{revision}`; a commit has 40 digits")
        })?;
        fs::create_dir_all(&self.folder)?;
        write_atomically(&remembered, commit.as_bytes())?;
        Ok(commit)
    }

    /// The folder with the files of a commit, fetched where it is not there.
    pub(super) fn checkout(
        &self,
        commit: &str,
        check: &dyn Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        ensure!(is_commit(commit), "`{commit}` is no commit");
        let place = self.folder.join(commit);
        if place.is_dir() {
            cache::note_use(&place);
            return Ok(place);
        }
        check()?;
        ensure!(
            !self.offline,
            "its commit {commit} was never fetched, and there is no network"
        );
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("could not write to `{}`", self.folder.display()))?;
        let making = tempfile::tempdir_in(&self.folder)?;
        let (repository, files) = (making.path().join("git"), making.path().join("files"));
        fs::create_dir(&files)?;
        let shown = repository.to_string_lossy();
        self.git(&["init", "--quiet", "--bare", "--", &shown], None)?;
        self.git(
            &[
                "fetch",
                "--quiet",
                "--depth=1",
                "--no-tags",
                "--",
                self.url,
                commit,
            ],
            Some(&repository),
        )?;
        let tree = files.to_string_lossy();
        self.git(
            &[
                &format!("--work-tree={tree}"),
                "checkout",
                "--quiet",
                "--force",
                commit,
                "--",
                ".",
            ],
            Some(&repository),
        )?;
        match fs::rename(&files, &place) {
            // Another run was faster.
            Err(_) if place.is_dir() => {}
            moved => moved.with_context(|| format!("could not write `{}`", place.display()))?,
        }
        cache::note_use(&place);
        if let Some(all) = self.folder.parent() {
            cache::trim(all);
        }
        Ok(place)
    }

    /// What git prints.
    fn git(&self, arguments: &[&str], repository: Option<&Path>) -> anyhow::Result<String> {
        let mut command = Command::new("git");
        for (name, value) in SETTINGS {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        if let Some(repository) = repository {
            let mut folder = std::ffi::OsString::from("--git-dir=");
            folder.push(repository);
            command.arg(folder);
        }
        command.args(arguments);
        let transport = self.url.split("://").next().unwrap_or_default();
        command
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "")
            .env("SSH_ASKPASS", "")
            .env("SSH_ASKPASS_REQUIRE", "never")
            .env("GIT_ALLOW_PROTOCOL", transport)
            .env("GIT_PROTOCOL_FROM_USER", "0")
            .env("GIT_LFS_SKIP_SMUDGE", "1")
            .env("LC_ALL", "C");
        if variable("GIT_SSH_COMMAND").is_none() {
            command.env("GIT_SSH_COMMAND", "ssh -o BatchMode=yes");
        }
        for name in FOREIGN {
            command.env_remove(name);
        }
        let printed = tempfile::tempfile()?;
        let told = tempfile::tempfile()?;
        command
            .stdin(Stdio::null())
            .stdout(printed.try_clone()?)
            .stderr(told.try_clone()?)
            .process_group(0);
        let mut child = command.spawn().context("could not start `git`")?;
        let since = Instant::now();
        // Its files are beside it.
        let written = repository.and_then(Path::parent);
        let mut looked = since;
        let status = loop {
            let ended = child.try_wait()?;
            let mut bound = None;
            if since.elapsed() > LONGEST {
                bound = Some(format!(
                    "git took more than {} minutes",
                    LONGEST.as_secs() / 60
                ));
            } else if ended.is_some() || looked.elapsed() > BETWEEN_LOOKS {
                looked = Instant::now();
                if written.is_some_and(|folder| cache::size(folder) > cache::MOST_OF_ONE) {
                    let most = crate::engine::Bytes(cache::MOST_OF_ONE);
                    bound = Some(format!("the repository has more than {most}"));
                }
            }
            if let Some(bound) = bound {
                if ended.is_none()
                    && let Ok(pid) = i32::try_from(child.id())
                {
                    // It may have ended by itself.
                    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                }
                let _ = child.wait();
                bail!(bound);
            }
            if let Some(status) = ended {
                break status;
            }
            std::thread::sleep(TICK);
        };
        if status.success() {
            return read(printed);
        }
        let told = read(told)?;
        let last = told
            .lines()
            .rfind(|line| line.starts_with("fatal:") || line.starts_with("error:"));
        let last = last.or(told.lines().last()).unwrap_or("it says nothing");
        bail!("git failed: {last}")
    }
}

/// What was written to a file.
fn read(mut file: fs::File) -> anyhow::Result<String> {
    use std::io::Seek as _;

    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(MOST_PRINTED).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
