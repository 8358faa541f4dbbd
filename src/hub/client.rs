//! [`Hub`]: commits, listings, and the sentences for what goes wrong. Its downloads are in `download`.

use std::collections::BTreeSet;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo};
use serde::{Deserialize, Serialize};
use ureq::http::Uri;

use super::http::{Failure, Http, wait};
use super::names::{check_file, check_repo, check_revision, is_commit, is_hex};
use super::{HubSettings, RemoteFile, RepoKind, Snapshot};

/// Tries of a request whose failure may pass.
pub(super) const TRIES: u32 = 5;
/// The longest description of a repository that is read.
const MAX_DESCRIPTION: u64 = 256 << 20;

/// The hub.
pub struct Hub {
    pub(super) settings: HubSettings,
    pub(super) http: Http,
    api: Api,
    cache: Cache,
}

/// The files of a repository at one commit.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The files, by path.
    pub files: Vec<RemoteFile>,
    /// False when it is only what another program left in the cache, which may be a part.
    pub complete: bool,
}

impl Hub {
    /// Prepares for asking; nothing is sent yet.
    pub fn new(mut settings: HubSettings) -> anyhow::Result<Self> {
        settings.cache = std::path::absolute(&settings.cache)
            .with_context(|| format!("`{}` is no place for a cache", settings.cache.display()))?;
        if let Some(token) = &settings.token {
            ensure!(
                token.bytes().all(|byte| byte.is_ascii_graphic()),
                "the hub's token holds characters that no token has; set `HF_TOKEN` anew, or the token file"
            );
        }
        let cache = Cache::new(settings.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(settings.endpoint().to_owned())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_user_agent("pipeline", env!("CARGO_PKG_VERSION"))
            .build()
            .context("could not set up the hub's client")?;
        let request = api.model("none".into()).info_request();
        let headers = request.headers_ref().cloned().with_context(|| {
            format!(
                "`HF_ENDPOINT` is `{}`, expected an address such as `https://huggingface.co`",
                settings.endpoint()
            )
        })?;
        let http = Http::new(&settings, headers)?;
        Ok(Self {
            settings,
            http,
            api,
            cache,
        })
    }

    /// The commit that `revision` means now. A full commit means itself and needs no network; offline, a branch means what
    /// the cache last saw.
    pub fn resolve(&self, kind: RepoKind, repo: &str, revision: &str) -> anyhow::Result<String> {
        check_repo(repo)?;
        check_revision(revision)?;
        if is_commit(revision) {
            return Ok(revision.to_owned());
        }
        let noun = kind.noun();
        if self.settings.offline {
            let kept = std::fs::read_to_string(self.ref_path(kind, repo, revision));
            let kept = kept.map(|text| text.trim().to_owned()).ok();
            return kept.filter(|commit| is_commit(commit)).with_context(|| {
                format!(
                    "what `{revision}` of the {noun} `{repo}` means is not in the cache `{}`, and `--offline` or `HF_HUB_OFFLINE` \
                     forbids to ask; give a full commit as `revision`, or run once with a network",
                    self.settings.cache.display()
                )
            });
        }
        let described = self.describe(kind, repo, revision, false)?;
        ensure!(
            is_commit(&described.sha),
            "the hub names no commit for `{revision}` of the {noun} `{repo}`, but {:?}",
            described.sha
        );
        Ok(described.sha)
    }

    /// Notes in the cache, as other programs do, that `revision` meant the commit of `snapshot`; used offline.
    pub fn remember(&self, snapshot: &Snapshot, revision: &str) -> anyhow::Result<()> {
        check_repo(&snapshot.repo)?;
        check_revision(revision)?;
        ensure!(
            is_commit(&snapshot.commit),
            "`{}` is no commit",
            snapshot.commit
        );
        if is_commit(revision) || self.settings.offline {
            return Ok(());
        }
        let path = self.ref_path(snapshot.kind, &snapshot.repo, revision);
        write_whole(&path, snapshot.commit.as_bytes())
            .with_context(|| format!("could not write `{}`", path.display()))
    }

    /// The files of `snapshot`. Asked once: the answer is kept in the cache, since a commit never changes.
    pub fn list(&self, snapshot: &Snapshot) -> anyhow::Result<Listing> {
        check_repo(&snapshot.repo)?;
        ensure!(
            is_commit(&snapshot.commit),
            "`{}` is no commit",
            snapshot.commit
        );
        let kept = self.listing_path(snapshot);
        if let Some(files) = read_listing(&kept) {
            return Ok(Listing {
                files,
                complete: true,
            });
        }
        let noun = snapshot.kind.noun();
        let (repo, commit) = (&snapshot.repo, &snapshot.commit);
        if self.settings.offline {
            let files = self.cached_files(snapshot);
            ensure!(
                !files.is_empty(),
                "the {noun} `{repo}` at commit {commit} is not in the cache `{}`, and `--offline` or `HF_HUB_OFFLINE` forbids to \
                 fetch it; run once with a network",
                self.settings.cache.display()
            );
            return Ok(Listing {
                files,
                complete: false,
            });
        }
        let described = self.describe(snapshot.kind, repo, commit, true)?;
        ensure!(
            described.sha == *commit,
            "asked for commit {commit} of the {noun} `{repo}`, the hub answered with {:?}",
            described.sha
        );
        let mut files = Vec::with_capacity(described.siblings.len());
        for sibling in described.siblings {
            files.push(sibling.check().with_context(|| {
                format!("the hub's list of files of the {noun} `{repo}` can't be used")
            })?);
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|a, b| a.path == b.path);
        // A cache that can't be written still serves what is in it.
        if let Ok(text) = serde_json::to_vec(&files) {
            let _ = write_whole(&kept, &text);
        }
        Ok(Listing {
            files,
            complete: true,
        })
    }

    pub(super) fn repo(&self, snapshot: &Snapshot) -> (ApiRepo, CacheRepo) {
        let repo = Repo::with_revision(
            snapshot.repo.clone(),
            snapshot.kind.repo_type(),
            snapshot.commit.clone(),
        );
        (self.api.repo(repo.clone()), self.cache.repo(repo))
    }

    /// The folder of a repository in the cache.
    pub(super) fn folder(&self, kind: RepoKind, repo: &str) -> PathBuf {
        let repo = Repo::new(repo.to_owned(), kind.repo_type());
        self.settings.cache.join(repo.folder_name())
    }

    fn ref_path(&self, kind: RepoKind, repo: &str, revision: &str) -> PathBuf {
        self.folder(kind, repo).join("refs").join(revision)
    }

    fn listing_path(&self, snapshot: &Snapshot) -> PathBuf {
        let folder = self.folder(snapshot.kind, &snapshot.repo);
        folder
            .join(".listings")
            .join(format!("{}.json", snapshot.commit))
    }

    fn describe(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        blobs: bool,
    ) -> anyhow::Result<Description> {
        let asked = Repo::with_revision(repo.to_owned(), kind.repo_type(), revision.to_owned());
        let mut request = self.api.repo(asked).info_request();
        if blobs {
            request = request.query("blobs", "true");
        }
        let uri = request
            .uri_ref()
            .cloned()
            .context("the hub's address is none")?;
        let mut tried = 0;
        loop {
            match self.read_description(&uri) {
                Ok(description) => return Ok(description),
                Err(failure) => {
                    tried += 1;
                    if !failure.may_pass() || tried >= TRIES {
                        return Err(self.explain(kind, repo, revision, None, &failure));
                    }
                }
            }
            wait(
                self.settings.retry_wait * (1 << (tried - 1)),
                &mut || Ok(()),
            )?;
        }
    }

    fn read_description(&self, uri: &Uri) -> Result<Description, Failure> {
        let mut response = self.http.get(uri, 0)?;
        let body = response.body_mut().with_config().limit(MAX_DESCRIPTION);
        let text = body
            .read_to_vec()
            .map_err(|error| Failure::Connection(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|_| {
            Failure::Nonsense(
                "it answers with something that is no description of a repository".into(),
            )
        })
    }

    /// What another program left of this commit in the cache. Its links are named by the hashes.
    fn cached_files(&self, snapshot: &Snapshot) -> Vec<RemoteFile> {
        let root = self.repo(snapshot).1.pointer_path(&snapshot.commit);
        let mut files = Vec::new();
        let mut seen = BTreeSet::new();
        collect(&root, "", &mut seen, &mut files);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files
    }

    /// The sentence for a failed request, with what to do.
    pub(super) fn explain(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        file: Option<&str>,
        failure: &Failure,
    ) -> anyhow::Error {
        let endpoint = self.settings.endpoint();
        let noun = kind.noun();
        let page = format!("{endpoint}/{}", kind.page(repo));
        let what = match file {
            Some(file) => format!("`{file}` of the {noun} `{repo}`"),
            None => format!("the {noun} `{repo}`"),
        };
        let login = "set `HF_TOKEN` or log in with `hf auth login`";
        let (status, code) = match failure {
            Failure::Connection(reason) => {
                return anyhow!(
                    "could not fetch {what} from {endpoint}: {reason}; check the network and `HF_ENDPOINT`, or use `--offline`"
                );
            }
            Failure::Nonsense(reason) => {
                return anyhow!(
                    "could not fetch {what} from {endpoint}: {reason}; is `HF_ENDPOINT` the address of a hub?"
                );
            }
            Failure::Status { status, code } => (*status, code.as_deref().unwrap_or_default()),
        };
        let token = self.http.has_token();
        match (status, code) {
            (401 | 403, "GatedRepo") if !token => anyhow!(
                "{what} is gated ({status}): accept its licence at {page}, then {login} with the same account"
            ),
            (401, _) if !token => anyhow!(
                "{endpoint} shows {what} to nobody without a token ({status}): it is private or gated, or there is no `{repo}`; {login}"
            ),
            (401, "RepoNotFound") => anyhow!(
                "{endpoint} has no {noun} `{repo}` that this token may see ({status}): check its spelling, or use a token of an \
                 account that may read it"
            ),
            (401, "") => anyhow!(
                "{endpoint} refuses the token for {what} ({status}): it is wrong or has expired; {login}"
            ),
            (401 | 403, _) => anyhow!(
                "this account may not read {what} ({status}): accept its licence at {page} with the account that the token belongs \
                 to, and let the token read gated repositories"
            ),
            (404, "RevisionNotFound") => {
                anyhow!("the {noun} `{repo}` at {endpoint} has no revision `{revision}` (404)")
            }
            (404, _) => anyhow!(
                "{endpoint} has no {what} at revision `{revision}` (404): check both names; a private repository answers the same \
                 without a token"
            ),
            (429, _) => anyhow!(
                "{endpoint} lets nobody ask so often (429) for {what}; wait a while, or {login}"
            ),
            _ => anyhow!("{endpoint} failed with status {status} for {what}"),
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hub").field(&self.settings).finish()
    }
}

/// A repository as the hub describes it.
#[derive(Deserialize)]
struct Description {
    #[serde(default)]
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Serialize, Deserialize)]
struct Lfs {
    size: Option<u64>,
    sha256: Option<String>,
}

impl Sibling {
    fn check(self) -> anyhow::Result<RemoteFile> {
        check_file(&self.rfilename)?;
        let (size, sha256, git_sha1) = match self.lfs {
            Some(lfs) => (lfs.size.or(self.size), lfs.sha256, None),
            None => (self.size, None, self.blob_id),
        };
        let sized = sha256.as_deref().is_some_and(|hash| is_hex(hash, 64))
            || git_sha1.as_deref().is_some_and(|hash| is_hex(hash, 40));
        let Some(size) = size.filter(|_| sized) else {
            bail!(
                "`{}` is listed without its size and hash, so it could not be verified",
                self.rfilename
            );
        };
        Ok(RemoteFile {
            path: self.rfilename,
            size,
            sha256,
            git_sha1,
        })
    }
}

fn read_listing(path: &Path) -> Option<Vec<RemoteFile>> {
    let files: Vec<RemoteFile> = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let sound = |file: &RemoteFile| {
        check_file(&file.path).is_ok()
            && file
                .etag()
                .is_some_and(|hash| is_hex(hash, 64) || is_hex(hash, 40))
    };
    files.iter().all(sound).then_some(files)
}

fn collect(folder: &Path, below: &str, seen: &mut BTreeSet<PathBuf>, files: &mut Vec<RemoteFile>) {
    // A link to a parent folder must not send us round and round.
    let Ok(real) = folder.canonicalize() else {
        return;
    };
    if !seen.insert(real) {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{below}{name}");
        let Ok(metadata) = std::fs::metadata(entry.path()) else {
            continue;
        };
        if metadata.is_dir() {
            collect(&entry.path(), &format!("{path}/"), seen, files);
        } else if check_file(&path).is_ok() {
            let target = std::fs::read_link(entry.path()).ok();
            let target = target
                .as_deref()
                .and_then(Path::file_name)
                .and_then(|name| name.to_str());
            let hash = |length| {
                target
                    .filter(|name| is_hex(name, length))
                    .map(str::to_owned)
            };
            files.push(RemoteFile {
                path,
                size: metadata.len(),
                sha256: hash(64),
                git_sha1: hash(40),
            });
        }
    }
}

/// Writes a small file so that nobody ever sees half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
