//! Putting files into a repository: the hub's commit API as `huggingface_hub` 2.4 uses it (`_commit_api.py`, `lfs.py`).
//!
//! The hub says of each file whether it goes into the commit itself or into the store of large files (git LFS). What is in the repository or
//! in that store already is not sent again, so an upload that broke off goes on where it stopped, file by file. The token goes to the hub
//! alone, never to the store's signed addresses, and never over plain http to another machine.

mod large;
mod repository;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::Uri;

use super::digest::{Hasher, feed};
use super::http_error::HttpError;
use super::names::{check_file, check_repo, check_revision, escape_revision, is_commit};
use super::{Hub, RemoteFile, RepoKind, Snapshot};

/// Files whose way is asked for at once, and that are announced to the store at once.
const AT_ONCE: usize = 256;
/// The bytes of a file that the hub looks at to tell text from other data.
const SAMPLE: usize = 512;
/// The longest file that is read whole; the hub sends larger ones to the store.
const LONGEST_REGULAR: u64 = 32 << 20;
/// How often a commit is tried anew after somebody else's.
const COMMITS: usize = 3;
/// The longest card that is looked at.
const LONGEST_CARD: u64 = 8 << 20;
const MAIN: &str = "main";

/// A file to be put into a repository.
#[derive(Debug, Clone)]
pub struct NewFile {
    /// Its path in the repository.
    pub path: String,
    /// What it holds.
    pub contents: Contents,
}

/// Where bytes come from.
#[derive(Debug, Clone)]
pub enum Contents {
    /// A file on this machine.
    File(PathBuf),
    /// These.
    Bytes(Vec<u8>),
}

/// What is to be put where.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Model or dataset.
    pub kind: RepoKind,
    /// `owner/name`; it is made if it isn't there.
    pub repo: String,
    /// The branch; it is made if it isn't there.
    pub branch: Option<String>,
    /// Whether only its owner may see it. An existing one is not changed, and refused if it is open though it should be private.
    pub private: bool,
    /// Proposes the change instead of making it.
    pub create_pr: bool,
    /// The commit's first line.
    pub message: String,
    /// The files.
    pub files: Vec<NewFile>,
    /// Patterns of files in the root that go if they are not among `files`: the name's beginning and end. Weights of an earlier upload would
    /// otherwise be mixed with these.
    pub replaces: Vec<(&'static str, &'static str)>,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The commit; that of before, where nothing was to be changed.
    pub commit: String,
    /// Where people see it.
    pub url: String,
    /// The proposal's address.
    pub pull_request: Option<String>,
    /// Paths that were added or changed.
    pub changed: Vec<String>,
    /// Paths that were removed.
    pub removed: Vec<String>,
    /// Paths that were there with the same contents.
    pub unchanged: Vec<String>,
    /// Bytes that were sent to the store of large files.
    pub sent: u64,
}

/// What is told while files are read and sent: of which file, how many bytes of how many.
pub type Progress<'p> = &'p mut dyn FnMut(&str, u64, u64);

#[derive(Deserialize)]
struct Preupload {
    files: Vec<Way>,
}

#[derive(Deserialize)]
struct Way {
    path: String,
    #[serde(rename = "uploadMode")]
    mode: String,
    #[serde(rename = "shouldIgnore", default)]
    ignored: bool,
    /// The hash of what is there under this path.
    oid: Option<String>,
}

#[derive(Deserialize)]
struct Committed {
    #[serde(rename = "commitOid")]
    oid: String,
    #[serde(rename = "commitUrl")]
    url: String,
    #[serde(rename = "pullRequestUrl")]
    pull_request: Option<String>,
}

/// A file with what the hub wants of it.
struct Sending<'f> {
    file: &'f NewFile,
    size: u64,
    large: bool,
    hash: String,
}

impl Contents {
    fn size(&self) -> anyhow::Result<u64> {
        Ok(match self {
            Self::File(path) => std::fs::metadata(path)?.len(),
            Self::Bytes(bytes) => bytes.len() as u64,
        })
    }

    /// A reader of `size` bytes from `start` on.
    fn part(&self, start: u64, size: u64) -> std::io::Result<Box<dyn Read + '_>> {
        match self {
            Self::File(path) => {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(start))?;
                Ok(Box::new(file.take(size)))
            }
            Self::Bytes(bytes) => {
                let rest = bytes.get(start as usize..).unwrap_or_default();
                Ok(Box::new(rest.take(size)))
            }
        }
    }
}

impl NewFile {
    fn sample(&self) -> anyhow::Result<Vec<u8>> {
        let mut sample = Vec::new();
        self.contents
            .part(0, SAMPLE as u64)?
            .read_to_end(&mut sample)?;
        Ok(sample)
    }

    /// The hash that the hub knows its contents by.
    fn hash(
        &self,
        size: u64,
        large: bool,
        hub: &Hub<'_>,
        tell: Progress<'_>,
    ) -> anyhow::Result<String> {
        let some = Some(String::new());
        let (sha256, git_sha1) = if large { (some, None) } else { (None, some) };
        let like = RemoteFile {
            path: self.path.clone(),
            size: Some(size),
            sha256,
            git_sha1,
        };
        let mut hasher = Hasher::for_file(&like, size);
        let mut source = self.contents.part(0, u64::MAX)?;
        let read = feed(&mut source, &mut hasher, &mut || hub.watch.tick())?;
        ensure!(read == size, "`{}` changed while it was read", self.path);
        tell(&self.path, 0, size);
        Ok(hasher.finish())
    }
}

impl Hub<'_> {
    /// Puts files into a repository in one commit. `tell` hears how far it is.
    ///
    /// # Errors
    /// A sentence of what can't be done and what helps.
    pub fn publish(&self, publication: &Publication, tell: Progress<'_>) -> anyhow::Result<Pushed> {
        let Publication { kind, repo, .. } = publication;
        check_repo(repo)?;
        ensure!(
            repo.contains('/'),
            "`{repo}` has no owner: expected `owner/name`, where the owner is your name on the hub or an organisation's"
        );
        let branch = publication.branch.as_deref().unwrap_or(MAIN);
        check_revision(branch)?;
        ensure!(
            !is_commit(branch),
            "`{branch}` is a commit, expected a branch"
        );
        for file in &publication.files {
            check_file(&file.path)?;
        }
        self.check_may_publish()?;
        let mut files = publication.files.iter();
        if let Some(card) = files.find(|file| file.path == "README.md") {
            self.check_card(*kind, card)?;
        }
        self.make_repository(*kind, repo, publication.private)?;
        if branch != MAIN {
            self.make_branch(*kind, repo, branch)?;
        }
        // Others may commit at the same time.
        for _ in 1..COMMITS {
            if let Some(pushed) = self.try_publish(publication, branch, tell)? {
                return Ok(pushed);
            }
        }
        self.try_publish(publication, branch, tell)?
            .with_context(|| {
                format!(
                    "others keep changing the {} `{repo}`; try again later",
                    kind.noun()
                )
            })
    }

    /// One commit; `None` when somebody else's came before it.
    fn try_publish(
        &self,
        publication: &Publication,
        branch: &str,
        tell: Progress<'_>,
    ) -> anyhow::Result<Option<Pushed>> {
        let Publication { kind, repo, .. } = publication;
        let (kind, noun) = (*kind, kind.noun());
        let parent = self.resolve(kind, repo, branch)?;
        let api = |what: &str| {
            let pr = if publication.create_pr {
                "?create_pr=1"
            } else {
                ""
            };
            format!(
                "{}/api/{}/{repo}/{what}/{}{pr}",
                self.endpoint.address,
                kind.plural(),
                escape_revision(branch)
            )
        };
        let (mut sending, mut unchanged) = (Vec::new(), Vec::new());
        for files in publication.files.chunks(AT_ONCE) {
            self.announce(
                publication,
                &api("preupload"),
                files,
                &mut sending,
                &mut unchanged,
                tell,
            )?;
        }
        let removed = self.outdated(publication, &parent)?;
        if sending.is_empty() && removed.is_empty() {
            return Ok(Some(Pushed {
                url: format!("{}/{}", self.endpoint.address, kind.page(repo)),
                commit: parent,
                pull_request: None,
                changed: Vec::new(),
                removed,
                unchanged,
                sent: 0,
            }));
        }
        let sent = self.send_large(publication, branch, &sending, tell)?;
        let mut lines = Vec::new();
        let mut line = |value: Value| -> anyhow::Result<()> {
            serde_json::to_writer(&mut lines, &value)?;
            lines.push(b'\n');
            Ok(())
        };
        line(json!({ "key": "header", "value": {
            "summary": publication.message, "description": "", "parentCommit": parent,
        } }))?;
        for Sending {
            file,
            size,
            large,
            hash,
        } in &sending
        {
            line(if *large {
                json!({ "key": "lfsFile", "value": { "path": file.path, "algo": "sha256", "oid": hash, "size": size } })
            } else {
                let mut bytes = Vec::new();
                file.contents.part(0, u64::MAX)?.read_to_end(&mut bytes)?;
                json!({ "key": "file", "value": {
                    "path": file.path, "encoding": "base64", "content": STANDARD.encode(bytes),
                } })
            })?;
        }
        for path in &removed {
            line(json!({ "key": "deletedFile", "value": { "path": path } }))?;
        }
        let uri: Uri = api("commit").parse()?;
        let commit: Committed = match self.commit(&uri, &lines, publication.create_pr)? {
            Ok(commit) => commit,
            Err(HttpError::Status { status: 412, .. }) => return Ok(None),
            Err(failure) => return Err(self.explain_write(kind, repo, "committing", &failure)),
        };
        ensure!(
            is_commit(&commit.oid),
            "{} names no commit of the {noun} `{repo}`, but {:?}",
            self.endpoint.address,
            commit.oid
        );
        Ok(Some(Pushed {
            commit: commit.oid,
            url: commit.url,
            pull_request: commit.pull_request.filter(|_| publication.create_pr),
            changed: sending
                .iter()
                .map(|sending| sending.file.path.clone())
                .collect(),
            removed,
            unchanged,
            sent,
        }))
    }

    /// Sends a commit. After a connection that broke nobody knows whether it arrived. Sent again it is refused (412) if it did, since its
    /// parent is not the last commit any more; a proposal would be made twice.
    fn commit(
        &self,
        uri: &Uri,
        lines: &[u8],
        create_pr: bool,
    ) -> anyhow::Result<Result<Committed, HttpError>> {
        let send = || self.http.post(uri, "application/x-ndjson", lines);
        if create_pr {
            self.watch.tick()?;
            return Ok(send());
        }
        self.persist(send)
    }

    /// Asks which way files go, and leaves out those that are there.
    fn announce<'f>(
        &self,
        publication: &Publication,
        address: &str,
        files: &'f [NewFile],
        sending: &mut Vec<Sending<'f>>,
        unchanged: &mut Vec<String>,
        tell: Progress<'_>,
    ) -> anyhow::Result<()> {
        let Publication { kind, repo, .. } = publication;
        let mut asked = Vec::with_capacity(files.len());
        for file in files {
            let read = || -> anyhow::Result<Value> {
                Ok(json!({
                    "path": file.path,
                    "sample": STANDARD.encode(file.sample()?),
                    "size": file.contents.size()?,
                }))
            };
            asked.push(read().with_context(|| format!("could not read `{}`", file.path))?);
        }
        let ways: Preupload = self
            .ask(address, &json!({ "files": asked }))?
            .map_err(|failure| self.explain_write(*kind, repo, "announcing files", &failure))?;
        let ways: BTreeMap<&str, &Way> = ways
            .files
            .iter()
            .map(|way| (way.path.as_str(), way))
            .collect();
        for file in files {
            let way = ways.get(file.path.as_str()).with_context(|| {
                format!(
                    "{} does not say how to send `{}`",
                    self.endpoint.address, file.path
                )
            })?;
            ensure!(
                !way.ignored,
                "the repository's `.gitignore` leaves out `{}`, which the {} can't do without",
                file.path,
                kind.noun()
            );
            let size = file.contents.size()?;
            let large = match way.mode.as_str() {
                // The store takes no empty files.
                "lfs" => size > 0,
                "regular" => false,
                other => bail!(
                    "{} asks for {other:?}, which is no way to send a file",
                    self.endpoint.address
                ),
            };
            ensure!(
                large || size <= LONGEST_REGULAR,
                "{} wants `{}` of {size} bytes within the commit, which is too long for one",
                self.endpoint.address,
                file.path
            );
            let hash = file
                .hash(size, large, self, tell)
                .with_context(|| format!("could not read `{}`", file.path))?;
            if way.oid.as_ref() == Some(&hash) {
                unchanged.push(file.path.clone());
            } else {
                sending.push(Sending {
                    file,
                    size,
                    large,
                    hash,
                });
            }
        }
        Ok(())
    }

    /// Files of an earlier upload that would be mixed with these.
    fn outdated(&self, publication: &Publication, parent: &str) -> anyhow::Result<Vec<String>> {
        if publication.replaces.is_empty() {
            return Ok(Vec::new());
        }
        let snapshot = Snapshot {
            kind: publication.kind,
            repo: publication.repo.clone(),
            commit: parent.to_owned(),
        };
        let listing = self.list(&snapshot)?;
        let there = listing.files.iter().map(|file| file.path.as_str());
        let old = there.filter(|path| {
            let replaced = publication.replaces.iter().any(|(start, end)| {
                path.starts_with(start) && path.ends_with(end) && !path.contains('/')
            });
            replaced && publication.files.iter().all(|file| file.path != *path)
        });
        Ok(old.map(str::to_owned).collect())
    }
}
