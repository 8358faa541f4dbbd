//! Requests that bring something: the token goes to the hub alone, and the bodies are told by their length.

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, HeaderValue, Response, Uri, header};
use ureq::{Agent, Body, SendBody};

use super::endpoint::Origin;
use super::headers::text;
use super::http::{Http, MAX_REDIRECTS, failure, status_error, target, too_many};
use super::http_error::HttpError;

/// The longest answer to something that was sent.
const LONGEST_ANSWER: u64 = 64 << 20;
/// The slowest line on which a body still gets through, in bytes a second; what takes longer is broken off and tried again.
const SLOWEST: u64 = 16 << 10;
/// What a body may take at least.
const SHORTEST: Duration = Duration::from_mins(1);

impl Http {
    /// Sends a body to the hub, and reads the JSON that it answers.
    pub(super) fn post<T: DeserializeOwned>(
        &self,
        uri: &Uri,
        content_type: &str,
        body: &[u8],
    ) -> Result<T, HttpError> {
        let mut response = self.deliver(uri, content_type, body, true)?;
        let body = response.body_mut().with_config().limit(LONGEST_ANSWER);
        let text = body
            .read_to_vec()
            .map_err(|error| HttpError::Connection(error.to_string()))?;
        let text = if text.is_empty() {
            b"null".to_vec()
        } else {
            text
        };
        serde_json::from_slice(&text).map_err(|_| {
            HttpError::Malformed("it answers with something else than was asked for".into())
        })
    }

    /// The same to an address that the hub named, whatever it answers.
    pub(super) fn post_any(
        &self,
        uri: &Uri,
        content_type: &str,
        body: &[u8],
    ) -> Result<(), HttpError> {
        self.deliver(uri, content_type, body, true).map(|_| ())
    }

    /// The same to a signed address, which needs no token.
    pub(super) fn post_signed(&self, uri: &Uri, body: &[u8]) -> Result<(), HttpError> {
        let kind = "application/vnd.git-lfs+json";
        self.deliver(uri, kind, body, false).map(|_| ())
    }

    fn deliver(
        &self,
        uri: &Uri,
        content_type: &str,
        body: &[u8],
        with_token: bool,
    ) -> Result<Response<Body>, HttpError> {
        let mut uri = uri.clone();
        for _ in 0..=MAX_REDIRECTS {
            let origin = self.origin(&uri)?;
            let agent = self.agent_for(&origin)?;
            let mut request = agent
                .post(&uri)
                .header(header::CONTENT_TYPE, content_type)
                .header(header::ACCEPT, accepted(content_type));
            for (name, value) in &self.headers {
                request = request.header(name, value);
            }
            if let Some(authorization) = &self.authorization
                && with_token
                && self.endpoint.trusts(&origin)
            {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let request = request
                .config()
                .timeout_send_body(Some(patience(body.len() as u64)))
                .build();
            let response = request
                .send(body)
                .map_err(|error| failure(&error, &origin))?;
            match response.status().as_u16() {
                200..=299 => return Ok(response),
                // A renamed repository. What is sent goes to no other host.
                status @ (307 | 308) => {
                    uri = target(&uri, status, response.headers())?;
                    if self.origin(&uri)? != origin {
                        return Err(HttpError::Malformed(
                            "it redirects what is sent to another host".into(),
                        ));
                    }
                }
                status => return Err(status_error(status, response.headers())),
            }
        }
        Err(too_many())
    }

    /// Puts `size` bytes to a signed address; returns the etag of what they became there.
    pub(super) fn put(
        &self,
        uri: &Uri,
        source: &mut dyn Read,
        size: u64,
    ) -> Result<Option<String>, HttpError> {
        let origin = self.origin(uri)?;
        let agent = self.agent_for(&origin)?;
        // Stores of objects take nothing without a length.
        let request = agent
            .put(uri)
            .header(header::CONTENT_LENGTH, size)
            .config()
            .timeout_send_body(Some(patience(size)))
            .build();
        let mut source = source;
        let response = request
            .send(SendBody::from_reader(&mut source))
            .map_err(|error| failure(&error, &origin))?;
        match response.status().as_u16() {
            200..=299 => Ok(etag(response.headers())),
            status => Err(status_error(status, response.headers())),
        }
    }

    fn origin(&self, uri: &Uri) -> Result<Origin, HttpError> {
        let origin = Origin::from_uri(uri);
        let origin = origin.filter(|origin| {
            // The hub by https sends nobody to open lines.
            origin.scheme == "https" || self.endpoint.origin.scheme != "https"
        });
        origin.ok_or_else(|| {
            HttpError::Malformed("it names an address that is none, or is open".into())
        })
    }

    fn agent_for(&self, origin: &Origin) -> Result<Agent, HttpError> {
        self.agent(origin, true)
            .map_err(|error| HttpError::Malformed(format!("{error:#}")))
    }
}

/// What is awaited from an address to which such a body goes.
fn accepted(content_type: &str) -> &str {
    match content_type {
        "application/vnd.git-lfs+json" => content_type,
        _ => "application/json",
    }
}

fn etag(headers: &HeaderMap<HeaderValue>) -> Option<String> {
    text(headers, "etag")
        .filter(|etag| !etag.is_empty())
        .map(str::to_owned)
}

fn patience(size: u64) -> Duration {
    SHORTEST + Duration::from_secs(size / SLOWEST)
}
