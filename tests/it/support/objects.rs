//! A server of objects on this machine, as S3 (one bucket) and as plain HTTP: it serves a folder in memory, and refuses or breaks
//! what a test wants.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub method: String,
    /// The path without its query.
    pub path: String,
    /// Everything the client said of itself.
    pub headers: String,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    asked: Vec<Asked>,
    /// Whether writing is forbidden.
    sealed: bool,
    /// Writes that still succeed before the connection breaks for good.
    writes_left: Option<usize>,
}

/// The server. It lives until the test process ends.
pub(crate) struct ObjectServer {
    /// `http://127.0.0.1:..`
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl ObjectServer {
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Self { endpoint, state }
    }

    /// Forbids or allows writing.
    pub(crate) fn seal(&self, sealed: bool) {
        self.state.lock().unwrap().sealed = sealed;
    }

    /// After so many writes the connection breaks in the middle of each.
    pub(crate) fn break_after(&self, writes: Option<usize>) {
        self.state.lock().unwrap().writes_left = writes;
    }

    /// The requests since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }

    /// The names of objects that contain a text.
    pub(crate) fn keys(&self, part: &str) -> Vec<String> {
        let state = self.state.lock().unwrap();
        let keys = state.objects.keys().filter(|key| key.contains(part));
        keys.cloned().collect()
    }

    /// All objects' bytes together, for searching.
    pub(crate) fn text(&self) -> String {
        let state = self.state.lock().unwrap();
        let bytes: Vec<u8> = state.objects.values().flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() {
        return;
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return;
    };
    let path = target.split('?').next().unwrap().to_owned();
    let mut headers = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).is_err() || line.trim().is_empty() {
            break;
        }
        headers.push_str(&line.to_ascii_lowercase());
    }
    let header = |name: &str| {
        let mut lines = headers.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.trim().to_owned())
    };
    let length: usize = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut held = state.lock().unwrap();
    held.asked.push(Asked {
        method: method.to_owned(),
        path: path.clone(),
        headers: headers.clone(),
    });
    if method == "PUT" {
        if held.sealed {
            drop(held);
            let mut body = vec![0; length];
            // The client says all it has to say before it listens.
            let _ = reader.read_exact(&mut body);
            let page = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>";
            respond(&mut stream, "403 Forbidden", "", page.as_bytes(), true);
            return;
        }
        match &mut held.writes_left {
            Some(0) => {
                drop(held);
                let mut body = vec![0; length / 2];
                let _ = reader.read_exact(&mut body);
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
            Some(left) => *left -= 1,
            None => {}
        }
        drop(held);
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut held = state.lock().unwrap();
        if header("if-none-match").is_some() && held.objects.contains_key(&path) {
            drop(held);
            respond(&mut stream, "412 Precondition Failed", "", b"", true);
            return;
        }
        held.objects.insert(path, body);
        drop(held);
        respond(&mut stream, "200 OK", "", b"", true);
        return;
    }
    let found = held.objects.get(&path).cloned();
    drop(held);
    let Some(bytes) = found else {
        respond(&mut stream, "404 Not Found", "", b"", true);
        return;
    };
    let from = header("range").and_then(|range| {
        let from = range.strip_prefix("bytes=")?.split('-').next()?.to_owned();
        from.parse::<usize>().ok()
    });
    match from {
        Some(from) => {
            let last = bytes.len() - 1;
            let range = format!("Content-Range: bytes {from}-{last}/{}\r\n", bytes.len());
            respond(
                &mut stream,
                "206 Partial Content",
                &range,
                &bytes[from..],
                method == "GET",
            );
        }
        None => respond(&mut stream, "200 OK", "", &bytes, method == "GET"),
    }
}

fn respond(stream: &mut TcpStream, status: &str, more: &str, body: &[u8], with_body: bool) {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"1\"\r\n\
         Last-Modified: Tue, 24 Nov 2026 04:00:00 GMT\r\n{more}Connection: close\r\n\r\n",
        body.len()
    );
    // A client that went away is a part of some tests.
    let _ = stream.write_all(head.as_bytes());
    if with_body {
        let _ = stream.write_all(body);
    }
    let _ = stream.flush();
}
