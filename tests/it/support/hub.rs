//! A hub on this machine: it answers like the real one, or as badly as a test wants. Written on plain sockets, since the
//! interesting faults (a cut body, a lying length, silence) are ones that HTTP libraries prevent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha1::Digest as _;

/// The token that opens gated repositories here.
pub(crate) const TOKEN: &str = "hf_opens_everything";

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
}

/// What goes wrong with an answer.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Another status and a page of text.
    Page(u16, String),
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
}

/// One request as it came in.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// The path with its query.
    pub path: String,
    /// The first byte asked for.
    pub range: Option<u64>,
    /// Whether it carried an `Authorization`.
    pub token: bool,
    /// Whether it came to the other port, where large files are.
    pub cdn: bool,
}

#[derive(Clone)]
struct Stored {
    bytes: Arc<Vec<u8>>,
    large: bool,
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
    /// For paths that contain the text: the fault and how many times it still happens.
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<Asked>,
    cdn: Option<String>,
}

/// The hub. It lives until the test process ends.
pub(crate) struct HubServer {
    /// For `HF_ENDPOINT`.
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// An empty hub on a free port.
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let endpoint = listen(&state, false);
        Self { endpoint, state }
    }

    /// Serves large files from another port, to which the hub redirects.
    pub(crate) fn with_cdn(self) -> Self {
        let address = listen(&self.state, true);
        self.state.lock().unwrap().cdn = Some(address);
        self
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

    /// Lets the next `times` answers for paths that contain `path` go wrong.
    pub(crate) fn fault(&self, path: &str, fault: Fault, times: usize) {
        let mut state = self.state.lock().unwrap();
        state.faults.push((path.to_owned(), fault, times));
    }

    /// Everything that was asked for so far.
    pub(crate) fn requests(&self) -> Vec<Asked> {
        self.state.lock().unwrap().requests.clone()
    }
}

fn listen(state: &Arc<Mutex<State>>, cdn: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::clone(state);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                // A client that goes away is none of our business.
                let _ = serve(&stream, &state, cdn);
                let _ = stream.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Arc<Vec<u8>>,
}

impl Answer {
    fn text(status: u16, text: impl Into<String>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Arc::new(text.into().into_bytes()),
        }
    }

    fn error(status: u16, code: &str) -> Self {
        Self::text(status, format!("{{\"error\":\"{code}\"}}")).with("X-Error-Code", code)
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>, cdn: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut words = first.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let (mut range, mut token) = (None, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        match name.to_lowercase().as_str() {
            "range" => {
                let start = value.trim_start_matches("bytes=").split('-').next();
                range = start.and_then(|start| start.parse().ok());
            }
            "authorization" => token = Some(value.trim_start_matches("Bearer ").to_owned()),
            _ => {}
        }
    }
    let (answer, fault) = {
        let mut state = state.lock().unwrap();
        state.requests.push(Asked {
            path: path.clone(),
            range,
            token: token.is_some(),
            cdn,
        });
        let fault = state
            .faults
            .iter_mut()
            .find(|(part, _, left)| path.contains(part.as_str()) && *left > 0)
            .map(|(_, fault, left)| {
                *left -= 1;
                fault.clone()
            });
        let answer = if cdn {
            from_cdn(&state, &path)
        } else {
            answer(&state, &path, token.as_deref())
        };
        (answer, fault)
    };
    send(stream, &method, &path, answer, range, fault.as_ref())
}

fn send(
    mut stream: &TcpStream,
    method: &str,
    path: &str,
    mut answer: Answer,
    range: Option<u64>,
    fault: Option<&Fault>,
) -> std::io::Result<()> {
    match fault {
        Some(Fault::Page(status, text)) => answer = Answer::text(*status, text),
        Some(Fault::RedirectNowhere) => answer = Answer::text(302, ""),
        Some(Fault::RedirectForever) => answer = Answer::text(302, "").with("Location", path),
        _ => {}
    }
    let mut body = answer.body.to_vec();
    if answer.status == 200
        && let Some(start) = range
        && !matches!(fault, Some(Fault::IgnoreRange | Fault::Page(..)))
    {
        let total = body.len();
        let mut start = usize::try_from(start).unwrap();
        if start >= total {
            answer = Answer::text(416, "").with("Content-Range", format!("bytes */{total}"));
            body = Vec::new();
        } else {
            if matches!(fault, Some(Fault::WrongRange)) {
                start = 0;
            }
            body.drain(..start);
            answer.status = 206;
            answer = answer.with(
                "Content-Range",
                format!("bytes {start}-{}/{total}", total - 1),
            );
        }
    }
    let mut announce = true;
    match fault {
        Some(Fault::WrongBytes) if !body.is_empty() => body[0] ^= 1,
        Some(Fault::Longer(more)) => body.resize(body.len() + more, 0),
        Some(Fault::LongerUnannounced(more)) => {
            body.resize(body.len() + more, 0);
            announce = false;
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if announce {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    if method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::CutAfter(bytes)) => stream.write_all(&body[..body.len().min(*bytes)]),
        Some(Fault::Silence(bytes)) => {
            stream.write_all(&body[..body.len().min(*bytes)])?;
            // Until the other side gives up.
            stream.read(&mut [0]).map(|_| ())
        }
        _ => stream.write_all(&body),
    }
}

fn from_cdn(state: &State, path: &str) -> Answer {
    let wanted = path.trim_start_matches("/blob/").split('?').next();
    let stored = state
        .repositories
        .values()
        .flat_map(|repository| repository.commits.values())
        .flat_map(BTreeMap::values)
        .find(|file| Some(sha256(&file.bytes).as_str()) == wanted);
    match stored {
        Some(file) => file_answer(file),
        None => Answer::text(404, "not here"),
    }
}

fn answer(state: &State, path: &str, token: Option<&str>) -> Answer {
    let path = path.trim_start_matches('/');
    let (path, _) = path.split_once('?').unwrap_or((path, ""));
    if let Some(rest) = path.strip_prefix("api/") {
        let Some((repo, revision)) = rest.split_once("/revision/") else {
            return Answer::error(404, "RepoNotFound");
        };
        return describe(state, repo, &revision.replace("%2F", "/"), token);
    }
    let Some((repo, rest)) = path.split_once("/resolve/") else {
        return Answer::text(404, "<html>no such page</html>");
    };
    let repo = if repo.starts_with("datasets/") {
        repo.to_owned()
    } else {
        format!("models/{repo}")
    };
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    let Some(repository) = find(state, &repo, token) else {
        return Answer::error(if token.is_some() { 404 } else { 401 }, "RepoNotFound");
    };
    match (repository.gate, token) {
        (Gate::Gated, Some(TOKEN)) | (Gate::Open | Gate::Private, _) => {}
        (Gate::Refused, Some(TOKEN)) => return Answer::error(403, "GatedRepo"),
        (_, Some(_)) => return Answer::text(401, "Invalid credentials"),
        (_, None) => return Answer::error(401, "GatedRepo"),
    }
    let Some((commit, files)) = at(repository, &revision.replace("%2F", "/")) else {
        return Answer::error(404, "RevisionNotFound");
    };
    let Some(stored) = files.get(&unescape(file)) else {
        return Answer::error(404, "EntryNotFound");
    };
    match &state.cdn {
        Some(cdn) if stored.large => Answer::text(302, "")
            .with(
                "Location",
                format!("{cdn}/blob/{}?signature=secret", sha256(&stored.bytes)),
            )
            .with("X-Repo-Commit", commit)
            .with("X-Linked-Etag", format!("\"{}\"", sha256(&stored.bytes)))
            .with("X-Linked-Size", stored.bytes.len().to_string()),
        _ => file_answer(stored).with("X-Repo-Commit", commit),
    }
}

fn file_answer(file: &Stored) -> Answer {
    let etag = if file.large {
        sha256(&file.bytes)
    } else {
        git_sha1(&file.bytes)
    };
    Answer {
        status: 200,
        headers: vec![
            ("ETag", format!("\"{etag}\"")),
            ("Accept-Ranges", "bytes".into()),
        ],
        body: Arc::clone(&file.bytes),
    }
}

fn find<'a>(state: &'a State, repo: &str, token: Option<&str>) -> Option<&'a Repository> {
    let repository = state.repositories.get(repo)?;
    (repository.gate != Gate::Private || token == Some(TOKEN)).then_some(repository)
}

fn at<'a>(
    repository: &'a Repository,
    revision: &str,
) -> Option<(String, &'a BTreeMap<String, Stored>)> {
    let commit = repository
        .branches
        .get(revision)
        .map_or(revision, String::as_str);
    Some((commit.to_owned(), repository.commits.get(commit)?))
}

fn describe(state: &State, repo: &str, revision: &str, token: Option<&str>) -> Answer {
    let Some(repository) = find(state, repo, token) else {
        return Answer::error(if token.is_some() { 404 } else { 401 }, "RepoNotFound");
    };
    let Some((commit, files)) = at(repository, revision) else {
        return Answer::error(404, "RevisionNotFound");
    };
    let siblings: Vec<_> = files
        .iter()
        .map(|(path, file)| {
            let size = file.bytes.len();
            let mut sibling =
                json!({ "rfilename": path, "size": size, "blobId": git_sha1(&file.bytes) });
            if file.large {
                sibling["lfs"] =
                    json!({ "sha256": sha256(&file.bytes), "size": size, "pointerSize": 134 });
            }
            sibling
        })
        .collect();
    let id = repo.split_once('/').map_or(repo, |(_, id)| id);
    let body = json!({ "id": id, "sha": commit, "private": false, "siblings": siblings });
    Answer::text(200, body.to_string()).with("Content-Type", "application/json")
}

fn unescape(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' && tail.len() >= 2 {
            let digits = std::str::from_utf8(&tail[..2]).unwrap();
            bytes.push(u8::from_str_radix(digits, 16).unwrap());
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).unwrap()
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
