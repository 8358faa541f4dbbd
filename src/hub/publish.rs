//! Putting files into a repository: the hub's commit API as `huggingface_hub` 2.4 uses it (`_commit_api.py`, `lfs.py`).
//!
//! The hub says of each file whether it goes into the commit itself or into the store of large files (git LFS). What is in the repository or
//! in that store already is not sent again, so an upload that broke off goes on where it stopped, file by file. The token goes to the hub
//! alone, never to the store's signed addresses, and never over plain http to another machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::Uri;

use super::digest::{Hasher, feed};
use super::http_error::HttpError;
use super::names::{check_file, check_repo, check_revision, escape, escape_revision, is_commit};
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
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Action,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Map<String, Value>,
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
        let mut hasher = Hasher::of(&like, size);
        let mut source = self.contents.part(0, u64::MAX)?;
        let read = feed(&mut source, &mut hasher, &mut || hub.watch.tick())?;
        ensure!(read == size, "`{}` changed while it was read", self.path);
        tell(&self.path, 0, size);
        Ok(hasher.finish())
    }
}

impl Hub<'_> {
    /// The licence that a model's card names, by the hub's own word for it; `None` where it names none or can't be asked for.
    pub fn license(&self, kind: RepoKind, repo: &str, revision: &str) -> Option<String> {
        if self.settings.offline {
            return None;
        }
        let card = self.describe(kind, repo, revision, "").ok()?.card?;
        let license = card.get("license")?.as_str()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._+".contains(c);
        (license.len() < 64 && license.chars().all(plain)).then(|| license.to_owned())
    }

    /// A file of a repository as it is now; `None` where there is none, or no such repository or revision.
    ///
    /// # Errors
    /// A hub that can't be asked.
    pub fn read_file(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        path: &str,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        check_repo(repo)?;
        check_revision(revision)?;
        let address = format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint.address,
            kind.page(repo),
            escape_revision(revision),
            escape(path)
        );
        let uri: Uri = address.parse()?;
        match self.persist(|| self.http.get(&uri, 0))? {
            Ok(mut reply) => {
                let body = reply.response.body_mut().with_config().limit(LONGEST_CARD);
                Ok(Some(body.read_to_vec()?))
            }
            Err(HttpError::Status { status: 404, .. }) => Ok(None),
            Err(HttpError::Status { status: 401, .. }) if self.http.has_token() => Ok(None),
            Err(failure) => Err(self.explain(kind, repo, revision, Some(path), &failure)),
        }
    }

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
        self.check_doors()?;
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

    /// Whether something may be sent at all.
    fn check_doors(&self) -> anyhow::Result<()> {
        let endpoint = &self.endpoint;
        ensure!(
            !self.settings.offline,
            "publishing needs the network, which `--offline` or `HF_HUB_OFFLINE` forbids"
        );
        ensure!(
            endpoint.origin.scheme == "https" || endpoint.origin.is_loopback(),
            "`HF_ENDPOINT` is {}, and nothing is published without encryption: your token would be everybody's; use an `https` address",
            endpoint.address
        );
        ensure!(
            self.http.has_token(),
            "publishing needs a token that may write: {}",
            if self.settings.token_withheld {
                "unset `HF_HUB_DISABLE_IMPLICIT_TOKEN`, which keeps yours back"
            } else {
                "set `HF_TOKEN`, or log in with `hf auth login`"
            }
        );
        Ok(())
    }

    fn ask<T: serde::de::DeserializeOwned>(
        &self,
        address: &str,
        body: &Value,
    ) -> anyhow::Result<Result<T, HttpError>> {
        let uri: Uri = address
            .parse()
            .with_context(|| format!("`{address}` is no address"))?;
        let body = serde_json::to_vec(body)?;
        self.persist(|| self.http.post(&uri, "application/json", &body))
    }

    fn make_repository(&self, kind: RepoKind, repo: &str, private: bool) -> anyhow::Result<()> {
        let noun = kind.noun();
        let (owner, name) = repo.split_once('/').context("there is no owner")?;
        let address = format!("{}/api/repos/create", self.endpoint.address);
        let mut wanted = json!({ "name": name, "organization": owner, "type": noun });
        if private {
            wanted["visibility"] = "private".into();
        }
        let made = self.ask::<Value>(&address, &wanted)?;
        match &made {
            Ok(_) | Err(HttpError::Status { status: 409, .. }) => {}
            // It may be there all the same, for a token that may write but not make repositories.
            Err(HttpError::Status {
                status: 401..=403, ..
            }) => {
                let there = self.persist(|| {
                    let uri = self.api(kind, repo, "revision", MAIN, "");
                    let uri = uri.map_err(|error| HttpError::Malformed(format!("{error:#}")))?;
                    self.http
                        .read::<Value>(&uri, &mut super::client::MAX_DESCRIPTION.clone())
                })?;
                if there.is_err()
                    && let Err(failure) = &made
                {
                    return Err(self.explain_write(kind, repo, "making it", failure));
                }
            }
            Err(failure) => return Err(self.explain_write(kind, repo, "making it", failure)),
        }
        if private {
            // Nothing is sent before that is sure.
            let described = self.describe(kind, repo, MAIN, "")?;
            ensure!(
                described.private == Some(true),
                "the {noun} `{repo}` is open to everybody, and `private` is wanted; make it private in its settings at {}/{}/settings, \
                 or publish under another name",
                self.endpoint.address,
                kind.page(repo)
            );
        }
        Ok(())
    }

    fn make_branch(&self, kind: RepoKind, repo: &str, branch: &str) -> anyhow::Result<()> {
        let address = format!(
            "{}/api/{}/{repo}/branch/{}",
            self.endpoint.address,
            kind.plural(),
            escape_revision(branch)
        );
        match self.ask::<Value>(&address, &json!({}))? {
            Ok(_) | Err(HttpError::Status { status: 409, .. }) => Ok(()),
            // Whether it is there is seen when files are announced.
            Err(HttpError::Status { status: 403, .. }) => Ok(()),
            Err(failure) => {
                let doing = format!("making the branch `{branch}`");
                Err(self.explain_write(kind, repo, &doing, &failure))
            }
        }
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
        let card = publication
            .files
            .iter()
            .find(|file| file.path == "README.md");
        if let Some(card) = card {
            self.check_card(kind, card)?;
        }
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

    /// Lets the hub look at the head of a card, before anything is sent.
    fn check_card(&self, kind: RepoKind, card: &NewFile) -> anyhow::Result<()> {
        #[derive(Deserialize)]
        struct Found {
            #[serde(default)]
            errors: Vec<Mistake>,
        }
        #[derive(Deserialize)]
        struct Mistake {
            message: String,
        }
        let mut bytes = Vec::new();
        card.contents
            .part(0, LONGEST_CARD)?
            .read_to_end(&mut bytes)?;
        let content = String::from_utf8(bytes).context("`README.md` is not UTF-8")?;
        let address = format!("{}/api/validate-yaml", self.endpoint.address);
        let asked = json!({ "repoType": kind.noun(), "content": content });
        // Mirrors don't have it, and the commit is looked at anyway.
        let found = self
            .ask::<Found>(&address, &asked)?
            .map(|found| found.errors);
        let mistakes: Vec<String> = found
            .unwrap_or_default()
            .iter()
            .map(|mistake| self.http.quotable(&mistake.message))
            .collect();
        ensure!(
            mistakes.is_empty(),
            "the hub refuses the head of the card `README.md`: {}",
            mistakes.join("; ")
        );
        Ok(())
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

    /// Sends what the store of large files does not have; returns how many bytes.
    fn send_large(
        &self,
        publication: &Publication,
        branch: &str,
        sending: &[Sending<'_>],
        tell: Progress<'_>,
    ) -> anyhow::Result<u64> {
        let Publication { kind, repo, .. } = publication;
        let address = format!(
            "{}/{}.git/info/lfs/objects/batch",
            self.endpoint.address,
            kind.page(repo)
        );
        let large: Vec<&Sending<'_>> = sending.iter().filter(|sending| sending.large).collect();
        let mut sent = 0;
        for large in large.chunks(AT_ONCE) {
            let objects = large
                .iter()
                .map(|sending| (sending.hash.as_str(), *sending))
                .collect::<BTreeMap<_, _>>();
            let wanted: Vec<Value> = objects
                .iter()
                .map(|(oid, sending)| json!({ "oid": oid, "size": sending.size }))
                .collect();
            let mut asked = json!({
                "operation": "upload", "transfers": ["basic", "multipart"], "objects": wanted, "hash_algo": "sha256",
            });
            // Who may only propose need not be allowed to write to the branch.
            if !publication.create_pr {
                asked["ref"] = json!({ "name": branch });
            }
            let uri: Uri = address.parse()?;
            let body = serde_json::to_vec(&asked)?;
            let batch: Batch = self
                .persist(|| self.http.post(&uri, "application/vnd.git-lfs+json", &body))?
                .map_err(|failure| {
                    self.explain_write(*kind, repo, "announcing large files", &failure)
                })?;
            for object in batch.objects {
                let sending = objects.get(object.oid.as_str()).with_context(|| {
                    format!(
                        "{} answers for a file that nobody asked about",
                        self.endpoint.address
                    )
                })?;
                let path = &sending.file.path;
                if let Some(error) = object.error {
                    bail!(
                        "{} refuses `{path}`: \"{}\"",
                        self.endpoint.address,
                        self.http.quotable(&error.message)
                    );
                }
                let Some(actions) = object.actions else {
                    continue;
                };
                self.send_one(sending, &actions, tell)
                    .map_err(|failure| match failure {
                        Failed::Hub(failure) => {
                            self.explain_write(*kind, repo, &format!("sending `{path}`"), &failure)
                        }
                        Failed::Here(error) => error.context(format!("could not send `{path}`")),
                    })?;
                sent += sending.size;
            }
        }
        Ok(sent)
    }

    fn send_one(
        &self,
        sending: &Sending<'_>,
        actions: &Actions,
        tell: Progress<'_>,
    ) -> Result<(), Failed> {
        let Action { href, header } = &actions.upload;
        let uri = |address: &str| -> Result<Uri, Failed> {
            let uri = address.parse();
            uri.map_err(|_| HttpError::Malformed("it names an address that is none".into()).into())
        };
        let mut put = |address: &Uri, start: u64, size: u64| -> Result<Option<String>, Failed> {
            let sent = self.persist(|| {
                let source = sending.file.contents.part(start, size);
                let source = source.map_err(|error| {
                    HttpError::Malformed(format!("the file can't be read: {error}"))
                })?;
                let mut watched = Watched {
                    source,
                    tick: &mut |read: u64| {
                        tell(&sending.file.path, start + read, sending.size);
                        self.watch.tick()
                    },
                    read: 0,
                };
                self.http.put(address, &mut watched, size)
            });
            sent.map_err(Failed::Here)?.map_err(Failed::Hub)
        };
        match header.get("chunk_size") {
            None => _ = put(&uri(href)?, 0, sending.size)?,
            Some(size) => {
                let size = size.as_u64().or_else(|| size.as_str()?.parse().ok());
                let size = size.filter(|size| *size > 0);
                let size = size.ok_or_else(|| {
                    HttpError::Malformed("it names no size of the parts of a file".into())
                })?;
                let mut parts: Vec<(u64, &str)> = header
                    .iter()
                    .filter_map(|(name, address)| Some((name.parse().ok()?, address.as_str()?)))
                    .collect();
                parts.sort_unstable();
                if parts.len() as u64 != sending.size.div_ceil(size) {
                    return Err(HttpError::Malformed(
                        "it names addresses for other parts than the file has".into(),
                    )
                    .into());
                }
                let mut etags = Vec::with_capacity(parts.len());
                for (number, (_, address)) in (0..).zip(&parts) {
                    let start = number * size;
                    let etag = put(&uri(address)?, start, size.min(sending.size - start))?;
                    let etag = etag.ok_or_else(|| {
                        HttpError::Malformed("it does not say what a part became".into())
                    })?;
                    etags.push(json!({ "partNumber": number + 1, "etag": etag }));
                }
                let body = json!({ "oid": sending.hash, "parts": etags });
                let body = serde_json::to_vec(&body).map_err(|error| Failed::Here(error.into()))?;
                let whole = uri(href)?;
                // Its address is signed, as those of the parts.
                let done = self.persist(|| self.http.post_signed(&whole, &body));
                done.map_err(Failed::Here)?.map_err(Failed::Hub)?;
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({ "oid": sending.hash, "size": sending.size });
            let body = serde_json::to_vec(&body).map_err(|error| Failed::Here(error.into()))?;
            let address = uri(&verify.href)?;
            let done = self.persist(|| self.http.post_any(&address, "application/json", &body));
            done.map_err(Failed::Here)?.map_err(Failed::Hub)?;
        }
        Ok(())
    }

    /// The sentence for something that a hub did not let us do.
    fn explain_write(
        &self,
        kind: RepoKind,
        repo: &str,
        doing: &str,
        failure: &HttpError,
    ) -> anyhow::Error {
        let endpoint = &self.endpoint.address;
        let what = format!(
            "the {} `{repo}` at {endpoint} could not be published ({doing})",
            kind.noun()
        );
        let says = |says: &Option<String>| {
            let says = says.as_deref().map(|says| self.http.quotable(says));
            says.map_or_else(String::new, |says| format!(": \"{says}\""))
        };
        match failure {
            HttpError::Status {
                status: 401,
                says: said,
                ..
            } => anyhow!(
                "{what}: the token is wrong or has expired, or may not see it (401){}; set `HF_TOKEN` anew or log in with `hf auth login`",
                says(said)
            ),
            HttpError::Status {
                status: 403,
                says: said,
                ..
            } => anyhow!(
                "{what}: the token may not write there (403){}; use one with write access, of an account that belongs to `{}`",
                says(said),
                repo.split('/').next().unwrap_or_default()
            ),
            HttpError::Status {
                status: 404,
                code,
                says: said,
                ..
            } if code.as_deref() == Some("RevisionNotFound") => {
                anyhow!("{what}: it has no such branch (404){}", says(said))
            }
            HttpError::Status { status: 404, .. } => {
                anyhow!("{what}: there is no such repository that this token may see (404)")
            }
            HttpError::Status {
                status: 413,
                says: said,
                ..
            } => {
                anyhow!("{what}: it is too much (413){}", says(said))
            }
            HttpError::Status {
                status, says: said, ..
            } => {
                anyhow!("{what}: it answers with status {status}{}", says(said))
            }
            HttpError::Connection(reason) => {
                anyhow!("{what}: {reason}; what was sent stays there, and the same command goes on")
            }
            HttpError::Certificate(reason) => anyhow!("{what}: {reason}"),
            HttpError::Malformed(reason) => anyhow!("{what}: {reason}"),
        }
    }
}

/// Why a file was not sent.
enum Failed {
    Hub(HttpError),
    /// The watch ended it, or the like.
    Here(anyhow::Error),
}

impl From<HttpError> for Failed {
    fn from(failure: HttpError) -> Self {
        Self::Hub(failure)
    }
}

/// A reader that tells how far it is, and ends when it is told to.
struct Watched<'r> {
    source: Box<dyn Read + 'r>,
    tick: &'r mut dyn FnMut(u64) -> anyhow::Result<()>,
    read: u64,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        (self.tick)(self.read).map_err(std::io::Error::other)?;
        let read = self.source.read(buffer)?;
        self.read += read as u64;
        Ok(read)
    }
}
