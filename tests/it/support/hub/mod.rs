//! A hub on this machine: it answers as the real one does, or as badly as a test wants, and refuses what the real one refuses.
//!
//! The real one is known from `huggingface_hub`'s source and from answers in public bug reports; `tests/python/check_hub.py`
//! drives this one with `huggingface_hub`. Where the two leave a choice, this one is the stricter: a listing has no sizes
//! unless they are asked for, an unknown query is refused, a revision must be escaped, small files are behind a redirect on
//! the hub, large ones behind a signed address on another host that refuses a token and `HEAD`.

pub(crate) mod alone;
mod api;
mod files;
mod wire;
mod write;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use sha1::Digest as _;

/// The token that opens gated repositories here.
pub(crate) const TOKEN: &str = "hf_opens_everything";
/// A token that may only read.
pub(crate) const READER: &str = "hf_only_reads_things";

/// How a repository greets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Anybody may read.
    Open,
    /// Readable with [`TOKEN`]; the description is public, as on the real hub.
    Gated,
    /// The account has not accepted the licence.
    Refused,
    /// Hidden from everybody but [`TOKEN`].
    Private,
    /// Taken down by the hub.
    Disabled,
}

/// What goes wrong with an answer. The ones that concern a body wait for an answer that brings a file.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Another status and a page of text.
    Page(u16, String),
    /// A status with headers, as in "too many requests, come back in a second".
    Busy(u16, Vec<(&'static str, String)>),
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// The first byte of the body is another.
    WrongBytes,
    /// The body and its announced length are longer by so many bytes.
    Longer(usize),
    /// The body is longer, and no length is announced.
    LongerUnannounced(usize),
    /// The announced length is right, the whole body comes whatever range was asked for.
    IgnoreRange,
    /// A range that was not asked for.
    WrongRange,
    /// Nothing more comes after so many bytes, but the connection stays open.
    Silence(usize),
    /// A redirect without a target.
    RedirectNowhere,
    /// A redirect to itself.
    RedirectForever,
    /// Another value of a header.
    Header(&'static str, String),
}

impl Fault {
    fn is_of_a_body(&self) -> bool {
        !matches!(
            self,
            Self::Page(..)
                | Self::Busy(..)
                | Self::RedirectNowhere
                | Self::RedirectForever
                | Self::Header(..)
        )
    }
}

/// What a mirror leaves out of what the hub answers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mirror {
    /// There is no address for trees.
    pub no_tree: bool,
    /// Descriptions have no sizes and hashes, asked or not.
    pub no_sizes: bool,
    /// `HEAD` is refused.
    pub no_head: bool,
    /// Files have no etag that is a hash.
    pub no_hashes: bool,
    /// Files come from the mirror itself, without redirects.
    pub no_redirects: bool,
    /// Neither a length nor a range is told.
    pub no_lengths: bool,
}

/// One request as it came in.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The first byte asked for.
    pub range: Option<u64>,
    /// The `Authorization`.
    pub authorization: Option<String>,
    /// Whether it came to the other port, where large files are.
    pub cdn: bool,
    /// The address on the hub of the file whose body this answers with.
    pub file: Option<String>,
}

#[derive(Clone)]
struct Stored {
    bytes: Arc<Vec<u8>>,
    large: bool,
}

impl Stored {
    /// The hash that the hub names the file by.
    fn etag(&self) -> String {
        if self.large {
            sha256(&self.bytes)
        } else {
            git_sha1(&self.bytes)
        }
    }
}

struct Repository {
    branches: BTreeMap<String, String>,
    commits: BTreeMap<String, BTreeMap<String, Stored>>,
    gate: Gate,
}

#[derive(Default)]
struct State {
    /// By `models/owner/name` or `datasets/owner/name`.
    repositories: BTreeMap<String, Repository>,
    /// Old names to new ones.
    renamed: BTreeMap<String, String>,
    /// For paths that contain the text: the fault and how many times it still happens.
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<Asked>,
    mirror: Mirror,
    /// The entries of a page of a tree.
    page: usize,
    endpoint: String,
    cdn: String,
    /// A name and a password that a proxy before the hub asks for.
    login: Option<String>,
    /// Large files that were sent, by their hash.
    store: BTreeMap<String, Arc<Vec<u8>>>,
    /// Parts of those on their way.
    parts: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    /// From which size on a large file is sent in parts, and the size of those.
    multipart: (u64, u64),
    /// Whether it makes an open repository where a private one is asked for.
    ignores_private: bool,
}

/// The hub. It lives until the test process ends.
pub(crate) struct HubServer {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// An empty hub on a free port, and one for its large files.
    pub(crate) fn start() -> Self {
        Self::listen(None, "127.0.0.1")
    }

    /// The same by https, under a name of the certificate.
    pub(crate) fn start_tls(config: ServerConfig, host: &str) -> Self {
        Self::listen(Some(&Arc::new(config)), host)
    }

    fn listen(tls: Option<&Arc<ServerConfig>>, host: &str) -> Self {
        let state = Arc::new(Mutex::new(State {
            page: 1000,
            multipart: (5 << 30, 5 << 30),
            ..State::default()
        }));
        let endpoint = listen(&state, false, tls, host);
        let cdn = listen(&state, true, tls, host);
        let mut held = state.lock().unwrap();
        held.endpoint.clone_from(&endpoint);
        held.cdn = cdn;
        drop(held);
        Self { endpoint, state }
    }

    /// Puts a new commit on `main` of a model; gives the commit.
    pub(crate) fn model(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        self.commit(&format!("models/{repo}"), "main", files)
    }

    /// Puts a new commit on `main` of a dataset; gives the commit.
    pub(crate) fn dataset(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        self.commit(&format!("datasets/{repo}"), "main", files)
    }

    /// Puts a new commit on a branch of `models/owner/name` or `datasets/owner/name`; gives the commit.
    pub(crate) fn commit(&self, repo: &str, branch: &str, files: &[(&str, &[u8])]) -> String {
        let stored: BTreeMap<_, _> = files
            .iter()
            .map(|(path, bytes)| {
                let large = [".safetensors", ".parquet", ".bin"]
                    .iter()
                    .any(|end| path.ends_with(end));
                let bytes = Arc::new(bytes.to_vec());
                ((*path).to_owned(), Stored { bytes, large })
            })
            .collect();
        let mut name = format!("{repo} {branch}");
        for (path, file) in &stored {
            let _ = write!(name, " {path} {}", sha256(&file.bytes));
        }
        let commit = hex(&sha1::Sha1::digest(name));
        let mut state = self.state.lock().unwrap();
        let repository = state
            .repositories
            .entry(repo.to_owned())
            .or_insert(Repository {
                branches: BTreeMap::new(),
                commits: BTreeMap::new(),
                gate: Gate::Open,
            });
        repository
            .branches
            .insert(branch.to_owned(), commit.clone());
        repository.commits.insert(commit.clone(), stored);
        commit
    }

    /// Closes a repository (`models/owner/name`).
    pub(crate) fn gate(&self, repo: &str, gate: Gate) {
        let mut state = self.state.lock().unwrap();
        state.repositories.get_mut(repo).unwrap().gate = gate;
    }

    /// Gives a repository another name; the old one is redirected.
    pub(crate) fn rename(&self, old: &str, new: &str) {
        let mut state = self.state.lock().unwrap();
        let repository = state.repositories.remove(old).unwrap();
        state.repositories.insert(new.to_owned(), repository);
        state.renamed.insert(old.to_owned(), new.to_owned());
    }

    /// Answers as a mirror that leaves things out.
    pub(crate) fn mirror(&self, mirror: Mirror) {
        self.state.lock().unwrap().mirror = mirror;
    }

    /// Lists so many entries of a tree at a time.
    pub(crate) fn page(&self, entries: usize) {
        self.state.lock().unwrap().page = entries;
    }

    /// Sends large files above `threshold` bytes in parts of `chunk` bytes.
    pub(crate) fn multipart(&self, threshold: u64, chunk: u64) {
        self.state.lock().unwrap().multipart = (threshold, chunk);
    }

    /// Makes an open repository where a private one is asked for, as a hub that does not know the setting.
    pub(crate) fn ignore_private(&self) {
        self.state.lock().unwrap().ignores_private = true;
    }

    /// The files of a branch of `models/owner/name` or `datasets/owner/name`, if there is one.
    pub(crate) fn files(&self, repo: &str, branch: &str) -> Option<BTreeMap<String, Vec<u8>>> {
        let state = self.state.lock().unwrap();
        let repository = state.repositories.get(repo)?;
        let files = &repository.commits[repository.branches.get(branch)?];
        let plain = files.iter();
        Some(
            plain
                .map(|(path, file)| (path.clone(), file.bytes.to_vec()))
                .collect(),
        )
    }

    /// How many commits a repository has.
    pub(crate) fn commits(&self, repo: &str) -> usize {
        self.state.lock().unwrap().repositories[repo].commits.len()
    }

    /// Whether a repository is private.
    pub(crate) fn is_private(&self, repo: &str) -> bool {
        self.state.lock().unwrap().repositories[repo].gate == Gate::Private
    }

    /// Asks everybody for a name and a password (`name:password`), as a proxy before a hub does.
    pub(crate) fn login(&self, login: &str) {
        self.state.lock().unwrap().login = Some(login.to_owned());
    }

    /// Lets the next `times` answers for paths that contain `path` go wrong.
    pub(crate) fn fault(&self, path: &str, fault: Fault, times: usize) {
        let mut state = self.state.lock().unwrap();
        state.faults.push((path.to_owned(), fault, times));
    }

    /// No more faults.
    pub(crate) fn forgive(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// Everything that was asked for so far.
    pub(crate) fn requests(&self) -> Vec<Asked> {
        self.state.lock().unwrap().requests.clone()
    }
}

fn listen(
    state: &Arc<Mutex<State>>,
    cdn: bool,
    tls: Option<&Arc<ServerConfig>>,
    host: &str,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let scheme = if tls.is_some() { "https" } else { "http" };
    let address = format!(
        "{scheme}://{host}:{}",
        listener.local_addr().unwrap().port()
    );
    let (state, tls) = (Arc::clone(state), tls.cloned());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (state, tls) = (Arc::clone(&state), tls.clone());
            std::thread::spawn(move || serve(stream, tls, &state, cdn));
        }
    });
    address
}

/// Serves one connection. A client that goes away is none of our business.
fn serve(stream: TcpStream, tls: Option<Arc<ServerConfig>>, state: &Mutex<State>, cdn: bool) {
    match tls {
        None => {
            if let Ok(twin) = stream.try_clone() {
                let _ = wire::converse(stream, state, cdn);
                let _ = twin.shutdown(Shutdown::Both);
            }
        }
        Some(config) => {
            if let Ok(connection) = ServerConnection::new(config) {
                let _ = wire::converse(StreamOwned::new(connection, stream), state, cdn);
            }
        }
    }
}

/// The hash of a large file.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Sha256::digest(bytes))
}

/// The hash of a small file.
pub(crate) fn git_sha1(bytes: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
