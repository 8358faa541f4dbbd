//! What headers say: of a file, of a wait, of the way a body is packed.

use std::time::Duration;

use ureq::http::{HeaderMap, HeaderValue};

use super::http_error::HttpError;

/// What headers say of a file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// The commit that the file is of.
    pub(super) commit: Option<String>,
    /// The size of the file behind a redirect.
    pub(super) size: Option<u64>,
    /// The hash of the file, without quotes.
    pub(super) etag: Option<String>,
}

impl Facts {
    pub(super) fn add(&mut self, headers: &HeaderMap<HeaderValue>) {
        let set = |name| text(headers, name).map(str::to_owned);
        self.commit = self.commit.take().or_else(|| set("x-repo-commit"));
        let size = || text(headers, "x-linked-size")?.trim().parse().ok();
        self.size = self.size.or_else(size);
        let etag = || text(headers, "x-linked-etag").and_then(plain_etag);
        self.etag = self.etag.take().or_else(etag);
    }

    /// Those of the answer that stands for the file itself.
    fn last(mut self, headers: &HeaderMap<HeaderValue>) -> Self {
        self.add(headers);
        let etag = || text(headers, "etag").and_then(plain_etag);
        self.etag = self.etag.take().or_else(etag);
        self.size = self.size.or_else(|| whole_length(headers));
        self
    }
}

/// The facts of a last answer. The etag of another host is no hash of the hub's.
pub(super) fn finish(facts: Facts, headers: &HeaderMap<HeaderValue>, own: bool) -> Facts {
    let etag = facts.etag.clone();
    let mut facts = facts.last(headers);
    if !own {
        facts.etag = etag;
    }
    facts
}

pub(super) fn text<'a>(headers: &'a HeaderMap<HeaderValue>, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The file's size: behind the slash of `Content-Range: bytes 0-0/5`, or the length of the whole body.
fn whole_length(headers: &HeaderMap<HeaderValue>) -> Option<u64> {
    let found = match text(headers, "content-range") {
        Some(range) => range.rsplit_once('/')?.1,
        None => text(headers, "content-length")?,
    };
    found.trim().parse().ok()
}

/// The etag without quotes and without the mark of a weak one.
fn plain_etag(etag: &str) -> Option<String> {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    (!etag.is_empty()).then(|| etag.to_owned())
}

/// A body that is packed all the same has another size and other bytes.
pub(super) fn check_encoding(headers: &HeaderMap<HeaderValue>) -> Result<(), HttpError> {
    match text(headers, "content-encoding").map(str::trim) {
        None | Some("" | "identity") => Ok(()),
        Some(other) => {
            let other: String = other.chars().take(20).collect();
            Err(HttpError::Malformed(format!(
                "it sends a packed body (`{other}`) though none was asked for"
            )))
        }
    }
}

/// How long a server asks to wait: until its count starts anew, if that is used up, or as `Retry-After` says in seconds.
pub(super) fn told_wait(status: u16, headers: &HeaderMap<HeaderValue>) -> Option<Duration> {
    let used_up = || {
        let limit = text(headers, "ratelimit")?;
        let of = |name: &str| -> Option<u64> {
            let mut parts = limit.split(';').filter_map(|part| part.split_once('='));
            let (_, value) = parts.find(|(found, _)| found.trim() == name)?;
            value.trim().parse().ok()
        };
        (of("r") == Some(0)).then(|| of("t")).flatten()
    };
    let after = || text(headers, "retry-after")?.trim().parse().ok();
    let seconds = if status == 429 { used_up() } else { None };
    seconds.or_else(after).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_told_wait_is_read() {
        let told = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            told_wait(429, &headers).map(|wait| wait.as_secs())
        };
        assert_eq!(told(&[("retry-after", " 7 ")]), Some(7));
        assert_eq!(told(&[("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        let both = [
            ("ratelimit", "\"api\"; r = 0 ; t = 55"),
            ("retry-after", "7"),
        ];
        assert_eq!(told(&both), Some(55));
        // There is still something left: that is not the reason.
        let left = [("ratelimit", "\"api\";r=3;t=55"), ("retry-after", "7")];
        assert_eq!(told(&left), Some(7));
        assert_eq!(told(&[("ratelimit", "\"api\";r=3;t=55")]), None);
        assert_eq!(
            told(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]),
            None
        );
        assert_eq!(told(&[("retry-after", "-1")]), None);
    }
}
