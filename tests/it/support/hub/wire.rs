//! Requests and answers on plain sockets, since the interesting faults (a cut body, a lying length, silence) are ones that HTTP
//! libraries prevent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex};

use super::{Asked, Fault, State, api, files, write};

/// One request.
pub(super) struct Request {
    pub method: String,
    /// The path with its query, as it was sent.
    pub target: String,
    /// Names in small letters.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The path without its query, still escaped.
    pub(super) fn path(&self) -> &str {
        self.target
            .split_once('?')
            .map_or(self.target.as_str(), |(path, _)| path)
    }

    pub(super) fn query(&self) -> &str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }
}

/// One answer.
pub(super) struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Arc<Vec<u8>>,
    /// The address on the hub of the file that the body is.
    pub file: Option<String>,
}

impl Answer {
    pub(super) fn text(status: u16, text: impl Into<String>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Arc::new(text.into().into_bytes()),
            file: None,
        }
    }

    pub(super) fn json(value: &serde_json::Value) -> Self {
        Self::text(200, value.to_string()).with("Content-Type", "application/json; charset=utf-8")
    }

    /// A refusal with the hub's own word for it, which may be none, and its sentence.
    pub(super) fn error(status: u16, code: &str, message: &str) -> Self {
        let body = serde_json::json!({ "error": message }).to_string();
        let answer = Self::text(status, body)
            .with("Content-Type", "application/json; charset=utf-8")
            .with("X-Error-Message", message);
        if code.is_empty() {
            answer
        } else {
            answer.with("X-Error-Code", code)
        }
    }

    pub(super) fn redirect(status: u16, target: &str) -> Self {
        Self::text(
            status,
            format!("Temporary Redirect. Redirecting to {target}"),
        )
        .with("Content-Type", "text/plain; charset=utf-8")
        .with("Location", target)
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// Answers requests until the other side goes or a fault ends it.
pub(super) fn converse(
    stream: impl Read + Write,
    state: &Mutex<State>,
    cdn: bool,
) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader)? {
        let (answer, fault) = {
            let mut state = state.lock().unwrap();
            let fault = refusal(&mut state, &request);
            let answer = match (&fault, cdn) {
                // Whatever it brings is not taken.
                (Some(_), _) => Answer::text(500, ""),
                (None, true) if request.method == "PUT" => write::put(&mut state, &request),
                (None, true) => files::from_cdn(&state, &request),
                (None, false) => answer(&mut state, &request),
            };
            state.requests.push(Asked {
                method: request.method.clone(),
                path: request.target.clone(),
                range: request.header("range").and_then(first_byte),
                authorization: request.header("authorization").map(str::to_owned),
                cdn,
                file: answer.file.clone().filter(|_| request.method == "GET"),
            });
            let fault = fault.or_else(|| self::fault(&mut state, &request, &answer));
            (answer, fault)
        };
        if !send(&mut reader, &request, answer, fault.as_ref())? {
            return Ok(());
        }
    }
    Ok(())
}

fn answer(state: &mut State, request: &Request) -> Answer {
    if request.header("host").is_none() {
        return Answer::text(400, "no host");
    }
    let login = request.header("authorization").unwrap_or_default();
    if state.login.is_some() && state.login.as_deref() != login.strip_prefix("Basic ") {
        return Answer::text(401, "<html>who are you?</html>")
            .with("WWW-Authenticate", "Basic realm=\"mirror\"");
    }
    let checked = api::check_token(state, request);
    if let (Ok(()), Some(answer)) = (checked, write::answer(state, request)) {
        return answer;
    }
    let answer = match request.path().strip_prefix("/api/") {
        Some(rest) if !rest.starts_with("resolve-cache/") => api::answer(state, request, rest),
        _ => files::answer(state, request),
    };
    // Every answer says how much may still be asked.
    answer
        .with("RateLimit", "\"api\";r=499;t=297")
        .with("RateLimit-Policy", "\"fixed window\";\"api\";q=500;w=300")
}

/// What goes wrong with a request that would change something, before it does.
fn refusal(state: &mut State, request: &Request) -> Option<Fault> {
    if !["POST", "PUT"].contains(&request.method.as_str()) {
        return None;
    }
    let concerns =
        |part: &str, fault: &Fault| !fault.is_of_a_body() && request.target.contains(part);
    let found = state
        .faults
        .iter_mut()
        .find(|(part, fault, left)| *left > 0 && concerns(part, fault));
    found.map(|(_, fault, left)| {
        *left -= 1;
        fault.clone()
    })
}

fn fault(state: &mut State, request: &Request, answer: &Answer) -> Option<Fault> {
    let concerns = |part: &str, fault: &Fault| {
        let in_file = answer.file.as_ref().is_some_and(|file| file.contains(part));
        if fault.is_of_a_body() {
            answer.file.is_some()
                && request.method == "GET"
                && (in_file || request.target.contains(part))
        } else {
            request.target.contains(part)
        }
    };
    let found = state
        .faults
        .iter_mut()
        .find(|(part, fault, left)| *left > 0 && concerns(part, fault));
    found.map(|(_, fault, left)| {
        *left -= 1;
        fault.clone()
    })
}

fn read(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let mut first = String::new();
    if reader.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut words = first.split_whitespace();
    let mut request = Request {
        method: words.next().unwrap_or_default().to_owned(),
        target: words.next().unwrap_or_default().to_owned(),
        headers: BTreeMap::new(),
        body: Vec::new(),
    };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length = request.header("content-length").map(str::parse::<u64>);
    if let Some(Ok(length)) = length {
        reader.take(length).read_to_end(&mut request.body)?;
    }
    Ok(Some(request))
}

/// The first byte of `bytes=5-` and `bytes=5-9`.
fn first_byte(range: &str) -> Option<u64> {
    let (start, _) = range.strip_prefix("bytes=")?.split_once('-')?;
    start.parse().ok()
}

/// The first and the last byte of a range; `None` when it is none of `total` bytes.
fn span(range: &str, total: usize) -> Option<(usize, usize)> {
    let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = match end {
        "" => total.checked_sub(1)?,
        end => end.parse::<usize>().ok()?.min(total.checked_sub(1)?),
    };
    (start <= end).then_some((start, end))
}

/// Writes an answer; false when the connection is over.
fn send<S: Read + Write>(
    reader: &mut BufReader<S>,
    request: &Request,
    mut answer: Answer,
    fault: Option<&Fault>,
) -> io::Result<bool> {
    match fault {
        Some(Fault::Page(status, text)) => answer = Answer::text(*status, text),
        Some(Fault::Busy(status, headers)) => {
            answer = Answer::text(*status, "busy");
            answer.headers.clone_from(headers);
        }
        Some(Fault::RedirectNowhere) => answer = Answer::text(302, ""),
        Some(Fault::RedirectForever) => {
            answer = Answer::text(302, "").with("Location", request.target.clone());
        }
        Some(Fault::Header(name, value)) => {
            answer.headers.retain(|(other, _)| other != name);
            answer.headers.push((name, value.clone()));
        }
        _ => {}
    }
    let mut body = answer.body.to_vec();
    if answer.status == 200
        && answer.file.is_some()
        && let Some(range) = request.header("range")
        && !matches!(fault, Some(Fault::IgnoreRange))
    {
        let total = body.len();
        if let Some((mut start, end)) = span(range, total) {
            if matches!(fault, Some(Fault::WrongRange)) {
                start = 0;
            }
            body = body.drain(start..=end).collect();
            answer.status = 206;
            let range = format!("bytes {start}-{end}/{total}");
            answer = answer.with("Content-Range", range);
        } else {
            answer = Answer::text(416, "").with("Content-Range", format!("bytes */{total}"));
            body = Vec::new();
        }
    }
    let mut announce = !answer
        .headers
        .iter()
        .any(|(name, _)| *name == "Unannounced");
    match fault {
        Some(Fault::WrongBytes) if !body.is_empty() => body[0] ^= 1,
        Some(Fault::Longer(more)) => body.resize(body.len() + more, 0),
        Some(Fault::LongerUnannounced(more)) => {
            body.resize(body.len() + more, 0);
            announce = false;
        }
        _ => {}
    }
    let closes = !announce && request.method != "HEAD"
        || matches!(fault, Some(Fault::CutAfter(_) | Fault::Silence(_)))
        || request.header("connection") == Some("close");
    let mut head = format!("HTTP/1.1 {} x\r\n", answer.status);
    for (name, value) in &answer.headers {
        if *name != "Unannounced" {
            let _ = write!(head, "{name}: {value}\r\n");
        }
    }
    if announce && answer.status != 304 {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    if closes {
        head.push_str("Connection: close\r\n");
    }
    head.push_str("\r\n");
    let stream = reader.get_mut();
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" && answer.status != 304 {
        match fault {
            Some(Fault::CutAfter(bytes)) => stream.write_all(&body[..body.len().min(*bytes)])?,
            Some(Fault::Silence(bytes)) => {
                stream.write_all(&body[..body.len().min(*bytes)])?;
                stream.flush()?;
                // Until the other side gives up.
                let _ = stream.read(&mut [0])?;
            }
            _ => stream.write_all(&body)?,
        }
    }
    stream.flush()?;
    Ok(!closes)
}

/// The text behind `%20` and the like; `None` when it is not well formed.
pub(super) fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// The text as a part of an address, where nothing but letters and digits stays as it is.
pub(super) fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
        escaped
    })
}

/// The names and values of a query or a form; `None` when it is not well formed.
pub(super) fn pairs(query: &str) -> Option<Vec<(String, String)>> {
    let parts = query.split('&').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let plain = |text: &str| unescape(&text.replace('+', " "));
            Some((plain(name)?, plain(value)?))
        })
        .collect()
}
