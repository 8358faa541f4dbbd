//! One request: redirects followed by hand so that the token stays with the hub, time limits set, answers judged by status.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, HeaderValue, Response, Uri, header};
use ureq::{Agent, Body, Proxy};

use super::endpoint::{Endpoint, Origin};
use super::headers::{Facts, check_encoding, finish, text, told_wait};
use super::http_error::HttpError;
use super::{HubSettings, tls};

pub(super) const MAX_REDIRECTS: usize = 10;
/// The longest sentence of a server that is passed on.
const LONGEST_SENTENCE: usize = 300;

/// An answer with a body, and the headers of the redirects before it.
pub(super) struct Reply {
    pub(super) response: Response<Body>,
    hops: Vec<HeaderMap<HeaderValue>>,
}

impl Reply {
    /// What the hub says of the file, before it sends one elsewhere.
    pub(super) fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        for headers in self.hops.iter().chain([self.response.headers()]) {
            facts.add(headers);
        }
        facts
    }
}

/// The HTTP client: hf-hub's headers on our own agents, because hf-hub's has no time limits.
pub(super) struct Http {
    settings: HubSettings,
    pub(super) headers: HeaderMap<HeaderValue>,
    pub(super) authorization: Option<HeaderValue>,
    pub(super) endpoint: Endpoint,
    /// Made when first needed.
    agents: Mutex<BTreeMap<AgentKind, Agent>>,
}

/// Whether it is for https, through which proxy, and whether a file is awaited.
type AgentKind = (bool, Option<String>, bool);

impl Http {
    /// A client that sends `headers` (hf-hub's) to the hub at `endpoint`.
    pub(super) fn new(
        settings: &HubSettings,
        endpoint: &Endpoint,
        mut headers: HeaderMap<HeaderValue>,
    ) -> anyhow::Result<Self> {
        let mut authorization = headers.remove(header::AUTHORIZATION);
        // As in huggingface_hub, the name and password of the address come first: there is one header for both.
        if let Some(login) = &endpoint.login {
            let login = HeaderValue::from_str(login);
            authorization =
                Some(login.context("`HF_ENDPOINT` holds a password that can't be sent")?);
        }
        if let Some(value) = &mut authorization {
            value.set_sensitive(true);
        }
        // Compressed bodies would make sizes and ranges meaningless.
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        let http = Self {
            settings: settings.clone(),
            headers,
            authorization,
            endpoint: endpoint.clone(),
            agents: Mutex::default(),
        };
        if !settings.offline {
            // What is wrong with certificates or proxies is told before anything is asked.
            http.agent(&endpoint.origin, false)?;
        }
        Ok(http)
    }

    /// Whether anything that lets people in is sent.
    pub(super) fn has_token(&self) -> bool {
        self.authorization.is_some()
    }

    pub(super) fn agent(&self, origin: &Origin, for_file: bool) -> anyhow::Result<Agent> {
        let secure = origin.scheme == "https";
        let proxy = self.settings.proxies.for_host(&origin.scheme, &origin.host);
        let key = (secure, proxy.map(str::to_owned), for_file);
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(&key) {
            return Ok(agent.clone());
        }
        let limit = if for_file {
            self.settings.timeout
        } else {
            self.settings.answer_timeout
        };
        let agent = build(&self.settings, secure, proxy, limit)?;
        agents.insert(key, agent.clone());
        Ok(agent)
    }

    /// The answer to `GET uri`, from byte `start` on. Only 200 and 206 are answers.
    pub(super) fn get(&self, uri: &Uri, start: u64) -> Result<Reply, HttpError> {
        let range = (start > 0).then(|| format!("bytes={start}-"));
        self.follow(uri, range.as_deref(), true)
    }

    fn follow(&self, uri: &Uri, range: Option<&str>, for_file: bool) -> Result<Reply, HttpError> {
        let mut uri = uri.clone();
        let mut hops = Vec::new();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&uri, "GET", range, for_file)?;
            match response.status().as_u16() {
                200 | 206 => {
                    check_encoding(response.headers())?;
                    return Ok(Reply { response, hops });
                }
                status @ (301 | 302 | 303 | 307 | 308) => {
                    uri = target(&uri, status, response.headers())?;
                    hops.push(response.headers().clone());
                }
                status => return Err(status_error(status, response.headers())),
            }
        }
        Err(too_many())
    }

    /// A description, and the address of its next page. At most `left` bytes of it are read.
    pub(super) fn read<T: DeserializeOwned>(
        &self,
        uri: &Uri,
        left: &mut u64,
    ) -> Result<(T, Option<Uri>), HttpError> {
        let mut response = self.follow(uri, None, false)?.response;
        let link = text(response.headers(), "link").unwrap_or_default();
        let next = next_page(link, uri, &self.endpoint)?;
        let body = response.body_mut().with_config().limit(*left);
        let text = body.read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                HttpError::Malformed("it answers with a list of files that is too long".into())
            }
            error => HttpError::Connection(error.to_string()),
        })?;
        *left = left.saturating_sub(text.len() as u64);
        let read = serde_json::from_slice(&text).map_err(|_| {
            HttpError::Malformed(
                "it answers with something that is no description of a repository".into(),
            )
        })?;
        Ok((read, next))
    }

    /// What the hub says of a file without sending it: by `HEAD`, or by a range of one byte where that is refused.
    pub(super) fn head(&self, uri: &Uri) -> Result<Facts, HttpError> {
        match self.ask_head(uri) {
            Err(HttpError::Status {
                status: 400 | 403 | 405 | 501,
                code: None,
                ..
            }) => self.ask_byte(uri),
            Ok(facts) if facts.size.is_none() => self.ask_byte(uri).map(|more| Facts {
                commit: facts.commit.or(more.commit),
                size: more.size,
                etag: facts.etag.or(more.etag),
            }),
            asked => asked,
        }
    }

    fn ask_head(&self, uri: &Uri) -> Result<Facts, HttpError> {
        let mut uri = uri.clone();
        let mut facts = Facts::default();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&uri, "HEAD", None, false)?;
            let headers = response.headers();
            match response.status().as_u16() {
                200 => {
                    let own =
                        Origin::from_uri(&uri).is_some_and(|origin| self.endpoint.trusts(&origin));
                    return Ok(finish(facts, headers, own));
                }
                status @ (301 | 302 | 303 | 307 | 308) => {
                    facts.add(headers);
                    uri = target(&uri, status, headers)?;
                    let away =
                        !Origin::from_uri(&uri).is_some_and(|origin| self.endpoint.trusts(&origin));
                    // A signed address is good for one GET.
                    if away && facts.size.is_some() {
                        return Ok(facts);
                    }
                }
                status => return Err(status_error(status, headers)),
            }
        }
        Err(too_many())
    }

    fn ask_byte(&self, uri: &Uri) -> Result<Facts, HttpError> {
        let mut uri = uri.clone();
        let mut facts = Facts::default();
        let mut range = Some("bytes=0-0");
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&uri, "GET", range, false)?;
            let headers = response.headers();
            match response.status().as_u16() {
                // An empty file has no first byte, and costs nothing whole.
                416 if range.is_some() => range = None,
                200 | 206 => {
                    let own =
                        Origin::from_uri(&uri).is_some_and(|origin| self.endpoint.trusts(&origin));
                    return Ok(finish(facts, headers, own));
                }
                status @ (301 | 302 | 303 | 307 | 308) => {
                    facts.add(headers);
                    uri = target(&uri, status, headers)?;
                }
                status => return Err(status_error(status, headers)),
            }
        }
        Err(too_many())
    }

    fn send(
        &self,
        uri: &Uri,
        method: &str,
        range: Option<&str>,
        for_file: bool,
    ) -> Result<Response<Body>, HttpError> {
        let origin = Origin::from_uri(uri)
            .ok_or_else(|| HttpError::Malformed("it names an address that is none".into()))?;
        let agent = self
            .agent(&origin, for_file)
            .map_err(|error| HttpError::Malformed(format!("{error:#}")))?;
        let mut request = if method == "HEAD" {
            agent.head(uri)
        } else {
            agent.get(uri)
        };
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        if let Some(authorization) = &self.authorization
            && self.endpoint.trusts(&origin)
        {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.call().map_err(|error| failure(&error, &origin))
    }

    /// A server's sentence as people may read it: no control characters, no end of a page, no token.
    pub(super) fn quotable(&self, says: &str) -> String {
        let plain: String = says
            .chars()
            .filter(|c| !c.is_control())
            .take(LONGEST_SENTENCE)
            .collect();
        let token = self.settings.token.as_deref().unwrap_or_default();
        // A token of a letter or two is none, and would be found in every word.
        if token.len() >= 8 {
            plain.replace(token, "(token)")
        } else {
            plain
        }
    }
}

/// The error of a request that brought no answer.
pub(super) fn failure(error: &ureq::Error, origin: &Origin) -> HttpError {
    match error {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
            HttpError::Malformed("it names an address that is none".into())
        }
        error => match tls::refusal(error, &origin.host) {
            Some(reason) => HttpError::Certificate(reason),
            None => HttpError::Connection(error.to_string()),
        },
    }
}

/// The error of an answer with another status than was asked for.
pub(super) fn status_error(status: u16, headers: &HeaderMap<HeaderValue>) -> HttpError {
    HttpError::Status {
        status,
        code: text(headers, "x-error-code").map(str::to_owned),
        says: text(headers, "x-error-message").map(str::to_owned),
        wait: told_wait(status, headers),
    }
}

pub(super) fn too_many() -> HttpError {
    HttpError::Malformed(format!("it redirects more than {MAX_REDIRECTS} times"))
}

pub(super) fn target(
    from: &Uri,
    status: u16,
    headers: &HeaderMap<HeaderValue>,
) -> Result<Uri, HttpError> {
    text(headers, "location")
        .and_then(|target| follow(from, target))
        .ok_or_else(|| {
            HttpError::Malformed(format!(
                "it redirects ({status}) without a usable `Location`"
            ))
        })
}

/// The next page of `Link: <..>; rel="next"`. A mirror passes on the hub's own address: it is asked for at the mirror. A next
/// page that can't be asked for is an error, since the list would end there without a word.
fn next_page(link: &str, asked: &Uri, endpoint: &Endpoint) -> Result<Option<Uri>, HttpError> {
    let mut rest = link;
    loop {
        let found = rest
            .split_once('<')
            .and_then(|(_, start)| start.split_once('>'));
        let Some((address, after)) = found else {
            return Ok(None);
        };
        let end = after.find('<').unwrap_or(after.len());
        let is_next = after[..end]
            .split([';', ','])
            .filter_map(|part| part.split_once('='))
            .any(|(name, value)| {
                name.trim().eq_ignore_ascii_case("rel") && value.trim().trim_matches('"') == "next"
            });
        if is_next {
            let next = address_of(asked, address).and_then(|next| {
                if Origin::from_uri(&next)? == endpoint.origin {
                    return Some(next);
                }
                let path = next.path_and_query()?;
                format!("{}{path}", endpoint.address).parse().ok()
            });
            let nonsense = || HttpError::Malformed("its list of files goes on nowhere".into());
            return next.ok_or_else(nonsense).map(Some);
        }
        rest = &after[end..];
    }
}

/// The address that a redirect from `from` to `target` means; `None` when it is none, or leaves https for http.
fn follow(from: &Uri, target: &str) -> Option<Uri> {
    let uri = address_of(from, target)?;
    let downgrade = from.scheme_str() == Some("https") && uri.scheme_str() != Some("https");
    (!downgrade).then_some(uri)
}

/// The address that `target` means on the page `from`.
fn address_of(from: &Uri, target: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    let address = if target.contains("://") && !target.starts_with('/') {
        target.to_owned()
    } else if target.starts_with("//") {
        format!("{scheme}:{target}")
    } else if target.starts_with('/') {
        format!("{scheme}://{}{target}", from.authority()?)
    } else {
        let folder = from
            .path()
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        format!("{scheme}://{}{folder}/{target}", from.authority()?)
    };
    let uri: Uri = address.parse().ok()?;
    Origin::from_uri(&uri).map(|_| uri)
}

/// Waits, but looks up often: `tick` ends the wait by an error.
pub(super) fn wait(
    time: Duration,
    tick: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let slice = Duration::from_millis(100);
    let mut left = time;
    while !left.is_zero() {
        tick()?;
        std::thread::sleep(left.min(slice));
        left = left.saturating_sub(slice);
    }
    tick()
}

/// A client for another server, with the proxies and certificates of the surroundings.
///
/// # Errors
/// The address is none, or a proxy or the certificates can't be used.
pub fn agent_for(settings: &HubSettings, address: &str) -> anyhow::Result<Agent> {
    let address: ureq::http::Uri = address.parse().context("the address makes no sense")?;
    let scheme = address.scheme_str().context("the address has no scheme")?;
    let host = address.host().context("the address names no host")?;
    let proxy = settings.proxies.for_host(scheme, host);
    build(settings, scheme == "https", proxy, OTHER_SERVERS)
}

/// How long another server than the hub may take.
const OTHER_SERVERS: Duration = Duration::from_secs(10);

/// A client that keeps to a time limit in every part of a request. Statuses are no errors to it, and redirects are not followed.
fn build(
    settings: &HubSettings,
    secure: bool,
    proxy: Option<&str>,
    limit: Duration,
) -> anyhow::Result<Agent> {
    let proxy = match proxy {
        None => None,
        // The address may hold a password.
        Some(address) => Some(Proxy::new(address).ok().context(
            "the address of the proxy (`HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY`) makes no sense",
        )?),
    };
    let limit = Some(limit);
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_resolve(limit)
        .timeout_connect(limit)
        .timeout_send_request(limit)
        .timeout_recv_response(limit)
        .timeout_per_read(limit)
        .proxy(proxy);
    if secure {
        config = config.tls_config(tls::config(settings)?);
    }
    Ok(config.build().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_understood() {
        let from: Uri = "https://hub.example/a/b?q=1".parse().unwrap();
        let to = |target| follow(&from, target).map(|uri| uri.to_string());
        assert_eq!(to("/x?y=1").as_deref(), Some("https://hub.example/x?y=1"));
        assert_eq!(to("c").as_deref(), Some("https://hub.example/a/c"));
        assert_eq!(
            to("//cdn.example/c").as_deref(),
            Some("https://cdn.example/c")
        );
        assert_eq!(
            to("https://cdn.example/c").as_deref(),
            Some("https://cdn.example/c")
        );
        assert_eq!(to("http://hub.example/c"), None);
        assert_eq!(to("file:///etc/passwd"), None);
    }

    #[test]
    fn the_next_page_is_found_and_never_on_another_host() {
        let endpoint = Endpoint::parse("https://mirror.example/hub").unwrap();
        let asked: Uri = "https://mirror.example/hub/api/models/a/b/tree/c?recursive=true"
            .parse()
            .unwrap();
        let next = |link| {
            let next = next_page(link, &asked, &endpoint).unwrap();
            next.map(|uri| uri.to_string())
        };
        assert_eq!(
            next("<https://huggingface.co/api/models/a/b/tree/c?cursor=x>; rel=\"next\"")
                .as_deref(),
            Some("https://mirror.example/hub/api/models/a/b/tree/c?cursor=x")
        );
        assert_eq!(
            next("<https://mirror.example/hub/api/x?cursor=y>; rel=next").as_deref(),
            Some("https://mirror.example/hub/api/x?cursor=y")
        );
        assert_eq!(
            next("<https://a/b?x=1,2>; rel=\"prev\", </hub/api/x?cursor=z>; rel=\"next\"")
                .as_deref(),
            Some("https://mirror.example/hub/api/x?cursor=z")
        );
        assert_eq!(next("<https://a/b>; rel=\"last\""), None);
        assert_eq!(next("nonsense"), None);
        // The mirror is behind something that ends https.
        assert_eq!(
            next("<http://mirror.example/api/x?cursor=y>; rel=\"next\"").as_deref(),
            Some("https://mirror.example/hub/api/x?cursor=y")
        );
        next_page("<ftp://x>; rel=\"next\"", &asked, &endpoint).unwrap_err();
    }
}
