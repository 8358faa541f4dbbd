//! [`Hub`]: what it needs, what a revision means, and how long one waits for it. Lists of files are in `listing`, downloads in
//! `download`, sentences in `explain`.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, CacheRepo, Repo};
use serde::Deserialize;
use ureq::http::Uri;

use super::endpoint::Endpoint;
use super::http::{Http, wait};
use super::http_error::HttpError;
use super::names::{check_repo, check_revision, escape_revision, is_commit};
use super::{HubSettings, RepoKind, Snapshot};

/// Tries of a request whose failure may pass.
const TRIES: u32 = 5;
/// The longest wait that a server may ask for: the hub's own count starts anew every five minutes.
const LONGEST_WAIT: Duration = Duration::from_mins(15);
/// A wait from here on is told.
const WORTH_TELLING: Duration = Duration::from_secs(2);
/// The longest description of a repository that is read, over all its pages.
pub(super) const MAX_DESCRIPTION: u64 = 256 << 20;

/// Who waits for the hub.
pub trait Watch {
    /// Called at least ten times a second during waits; an error ends them.
    fn tick(&self) -> anyhow::Result<()>;
    /// Tells something the user should know; it may come several times.
    fn tell(&self, text: &str);
}

/// Waits for ever and tells nobody.
impl Watch for () {
    fn tick(&self) -> anyhow::Result<()> {
        Ok(())
    }

    fn tell(&self, _: &str) {}
}

/// The hub.
pub struct Hub<'a> {
    pub(super) settings: HubSettings,
    pub(super) endpoint: Endpoint,
    pub(super) http: Http,
    pub(super) watch: &'a dyn Watch,
    cache: Cache,
}

impl<'a> Hub<'a> {
    /// Prepares for asking; nothing is sent yet.
    pub fn new(mut settings: HubSettings, watch: &'a dyn Watch) -> anyhow::Result<Self> {
        settings.cache = std::path::absolute(&settings.cache)
            .with_context(|| format!("`{}` is no place for a cache", settings.cache.display()))?;
        if let Some(token) = &settings.token {
            ensure!(
                token.bytes().all(|byte| byte.is_ascii_graphic()),
                "the hub's token holds characters that no token has; set `HF_TOKEN` anew, or the token file"
            );
        }
        let endpoint = Endpoint::parse(settings.written_endpoint())?;
        let cache = Cache::new(settings.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(endpoint.address.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_user_agent("pipeline", env!("CARGO_PKG_VERSION"))
            .build()
            .context("could not set up the hub's client")?;
        // Of hf-hub's requests only the headers are taken: who asks, and the token.
        let request = api.model("none".into()).info_request();
        let headers = request.headers_ref().cloned();
        let headers = headers.context("could not set up the hub's client")?;
        let http = Http::new(&settings, &endpoint, headers)?;
        let hub = Self {
            settings,
            endpoint,
            http,
            watch,
            cache,
        };
        hub.warn_of_open_doors();
        Ok(hub)
    }

    /// A secret on a line that everybody on the way can read.
    fn warn_of_open_doors(&self) {
        let address = &self.endpoint.address;
        if self.settings.offline {
            return;
        }
        if self.endpoint.login.is_some() && self.settings.token.is_some() {
            self.watch.tell(
                "`HF_ENDPOINT` holds a name and a password, which are sent instead of the hub's token: a request has room for one",
            );
        }
        let origin = &self.endpoint.origin;
        if self.http.has_token() && origin.scheme == "http" && !origin.is_loopback() {
            let (secret, instead) = if self.endpoint.login.is_some() {
                ("the password of `HF_ENDPOINT`", "take it out")
            } else {
                (
                    "your token for the hub",
                    "keep it back with `HF_HUB_DISABLE_IMPLICIT_TOKEN=1`",
                )
            };
            self.watch.tell(&format!(
                "{secret} goes to {address} without encryption, for everybody on the way to read; use an `https` address, or \
                 {instead}"
            ));
        }
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
        let described = self.describe(kind, repo, revision, "")?;
        if let Some(id) = &described.id
            && !id.eq_ignore_ascii_case(repo)
            && check_repo(id).is_ok()
        {
            self.watch.tell(&format!(
                "the {noun} `{repo}` is called `{id}` now; write that name, since the old one may be given to somebody else"
            ));
        }
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

    /// The folder in the cache with the files of a revision, as far as they are there. Nothing is fetched.
    ///
    /// # Errors
    /// It is not known what the revision means, or nothing of it is there.
    pub fn cached(&self, kind: RepoKind, repo: &str, revision: &str) -> anyhow::Result<PathBuf> {
        let snapshot = Snapshot {
            kind,
            repo: repo.to_owned(),
            commit: self.resolve(kind, repo, revision)?,
        };
        let folder = self.place(&snapshot).pointer_path(&snapshot.commit);
        ensure!(
            folder.is_dir(),
            "the {} `{repo}` is not in the cache `{}`",
            kind.noun(),
            self.settings.cache.display()
        );
        Ok(folder)
    }

    /// The place of a snapshot in the cache.
    pub(super) fn place(&self, snapshot: &Snapshot) -> CacheRepo {
        self.cache.repo(Repo::with_revision(
            snapshot.repo.clone(),
            snapshot.kind.repo_type(),
            snapshot.commit.clone(),
        ))
    }

    /// The folder of a repository in the cache.
    pub(super) fn folder(&self, kind: RepoKind, repo: &str) -> PathBuf {
        let repo = Repo::new(repo.to_owned(), kind.repo_type());
        self.settings.cache.join(repo.folder_name())
    }

    fn ref_path(&self, kind: RepoKind, repo: &str, revision: &str) -> PathBuf {
        self.folder(kind, repo).join("refs").join(revision)
    }

    pub(super) fn listing_path(&self, snapshot: &Snapshot) -> PathBuf {
        let folder = self.folder(snapshot.kind, &snapshot.repo);
        folder
            .join(".listings")
            .join(format!("{}.json", snapshot.commit))
    }

    /// The address of `what` (`revision` or `tree`) of a repository in the hub's API.
    pub(super) fn api(
        &self,
        kind: RepoKind,
        repo: &str,
        what: &str,
        revision: &str,
        query: &str,
    ) -> anyhow::Result<Uri> {
        let address = format!(
            "{}/api/{}/{repo}/{what}/{}{query}",
            self.endpoint.address,
            kind.plural(),
            escape_revision(revision)
        );
        address
            .parse()
            .with_context(|| format!("`{address}` is no address"))
    }

    /// A repository as the hub describes it; with `?blobs=true` its files have sizes and hashes.
    pub(super) fn describe(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        query: &str,
    ) -> anyhow::Result<Description> {
        let uri = self.api(kind, repo, "revision", revision, query)?;
        let described = self.persist(|| self.http.read(&uri, &mut MAX_DESCRIPTION.clone()))?;
        described
            .map(|(description, _)| description)
            .map_err(|failure| self.explain(kind, repo, revision, None, &failure))
    }

    /// Asks again while that may help. The outer error is the watch's.
    pub(super) fn persist<T>(
        &self,
        mut ask: impl FnMut() -> Result<T, HttpError>,
    ) -> anyhow::Result<Result<T, HttpError>> {
        let mut tried = 0;
        loop {
            self.watch.tick()?;
            let failure = match ask() {
                Ok(answer) => return Ok(Ok(answer)),
                Err(failure) => failure,
            };
            tried += 1;
            let Some(pause) = self.pause(tried, &failure) else {
                return Ok(Err(failure));
            };
            wait(pause, &mut || self.watch.tick())?;
        }
    }

    /// How long to wait before the next try after `tried` of them; `None` when there is no use.
    pub(super) fn pause(&self, tried: u32, failure: &HttpError) -> Option<Duration> {
        if !failure.is_transient() || tried >= TRIES {
            return None;
        }
        let own = self.settings.retry_wait * (1 << (tried - 1));
        let (status, told) = match failure {
            HttpError::Status {
                status,
                wait: Some(told),
                ..
            } if !told.is_zero() => (status, *told),
            _ => {
                if tried == 1 {
                    // The tries take some time, in which nothing else happens.
                    self.watch.tell(&format!(
                        "{} does not answer as it should ({}); trying up to {} more times",
                        self.endpoint.address,
                        failure.reason(),
                        TRIES - 1
                    ));
                }
                return Some(own);
            }
        };
        if told > LONGEST_WAIT {
            return None;
        }
        if told >= WORTH_TELLING {
            self.watch.tell(&format!(
                "{} asks to wait {} seconds ({status}); waiting",
                self.endpoint.address,
                told.as_secs()
            ));
        }
        // Its seconds are rounded.
        Some(told + self.settings.retry_wait)
    }
}

impl fmt::Debug for Hub<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hub").field(&self.settings).finish()
    }
}

/// A repository as the hub describes it.
#[derive(Deserialize)]
pub(super) struct Description {
    /// Its name, which may be another than was asked for.
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    pub(super) sha: String,
    #[serde(default)]
    pub(super) siblings: Vec<Sibling>,
    pub(super) private: Option<bool>,
    /// The head of its card.
    #[serde(rename = "cardData")]
    pub(super) card: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
pub(super) struct Sibling {
    pub(super) rfilename: String,
    pub(super) size: Option<u64>,
    #[serde(rename = "blobId")]
    pub(super) blob_id: Option<String>,
    pub(super) lfs: Option<Lfs>,
}

#[derive(Deserialize)]
pub(super) struct Lfs {
    pub(super) size: Option<u64>,
    pub(super) sha256: Option<String>,
}

/// Writes a small file so that nobody ever sees half of it.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
