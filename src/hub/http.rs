//! One GET: redirects followed by hand so that the token stays with the hub, time limits set, answers judged by status.

use std::time::Duration;

use anyhow::Context as _;
use ureq::http::{HeaderMap, HeaderValue, Response, Uri, header};
use ureq::{Agent, Body};

use super::HubSettings;

const MAX_REDIRECTS: usize = 10;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server answered, but not with what was asked for.
    Status {
        status: u16,
        /// The hub's own word for it: `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`.
        code: Option<String>,
    },
    /// The connection failed or fell silent; another try may work.
    Connection(String),
    /// An answer that makes no sense.
    Nonsense(String),
}

impl Failure {
    /// Whether the same request may work a little later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 408 || *status == 429 || *status >= 500,
            Self::Connection(_) => true,
            Self::Nonsense(_) => false,
        }
    }
}

/// The HTTP client: hf-hub's headers on our own agent, because hf-hub's has no time limits.
pub(super) struct Http {
    agent: Agent,
    headers: HeaderMap<HeaderValue>,
    authorization: Option<HeaderValue>,
    origin: Origin,
}

impl Http {
    /// A client that sends `headers` (hf-hub's) to the hub of `settings`.
    pub(super) fn new(
        settings: &HubSettings,
        mut headers: HeaderMap<HeaderValue>,
    ) -> anyhow::Result<Self> {
        let endpoint = settings.endpoint();
        let origin = endpoint
            .parse::<Uri>()
            .ok()
            .and_then(|uri| Origin::of(&uri));
        let origin = origin.with_context(|| {
            format!("`HF_ENDPOINT` is `{endpoint}`, expected an address such as `https://huggingface.co`")
        })?;
        let authorization = headers.remove(header::AUTHORIZATION).map(|mut value| {
            value.set_sensitive(true);
            value
        });
        // Compressed bodies would make sizes and ranges meaningless.
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        let limit = Some(settings.timeout);
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_send_request(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit);
        if ["127.0.0.1", "localhost", "[::1]"].contains(&origin.host.as_str()) {
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().into(),
            headers,
            authorization,
            origin,
        })
    }

    pub(super) fn has_token(&self) -> bool {
        self.authorization.is_some()
    }

    /// The answer to `GET uri`, from byte `start` on. Only 200 and 206 are answers.
    pub(super) fn get(&self, uri: &Uri, start: u64) -> Result<Response<Body>, Failure> {
        let mut uri = uri.clone();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&uri, start)?;
            let status = response.status().as_u16();
            match status {
                200 | 206 => return Ok(response),
                301 | 302 | 303 | 307 | 308 => {
                    let target = response.headers().get(header::LOCATION);
                    let target = target.and_then(|value| value.to_str().ok());
                    uri = target
                        .and_then(|target| follow(&uri, target))
                        .ok_or_else(|| {
                            Failure::Nonsense(format!(
                                "it redirects ({status}) without a usable `Location`"
                            ))
                        })?;
                }
                _ => {
                    let code = response.headers().get("x-error-code");
                    let code = code.and_then(|value| value.to_str().ok());
                    return Err(Failure::Status {
                        status,
                        code: code.map(str::to_owned),
                    });
                }
            }
        }
        Err(Failure::Nonsense(format!(
            "it redirects more than {MAX_REDIRECTS} times"
        )))
    }

    fn send(&self, uri: &Uri, start: u64) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(uri);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        if let Some(authorization) = &self.authorization
            && Origin::of(uri).as_ref() == Some(&self.origin)
        {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Failure::Nonsense("it names an address that is none".into())
            }
            error => Failure::Connection(error.to_string()),
        })
    }
}

/// Scheme, host and port: what the token belongs to.
#[derive(PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_lowercase();
        let default = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        Some(Self {
            host: uri.host()?.to_lowercase(),
            port: uri.port_u16().unwrap_or(default),
            scheme,
        })
    }
}

/// The address that a redirect from `from` to `target` means; `None` when it is none, or leaves https for http.
fn follow(from: &Uri, target: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    let address = if target.contains("://") {
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
    Origin::of(&uri)?;
    let downgrade = scheme == "https" && uri.scheme_str() != Some("https");
    (!downgrade).then_some(uri)
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
    fn another_port_is_another_origin() {
        let origin = |text: &str| Origin::of(&text.parse().unwrap());
        assert!(origin("https://a/x") == origin("https://A:443/y"));
        assert!(origin("http://a:1/") != origin("http://a:2/"));
        assert!(origin("http://a/") != origin("https://a/"));
    }
}
