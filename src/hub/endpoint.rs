//! The hub's address, apart from the name and password that may stand in it: those are a secret and go into a header only.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ureq::http::Uri;

use super::names::unescape;

/// The hub everybody means.
pub(super) const DEFAULT: &str = "https://huggingface.co";

/// Where the hub is.
#[derive(Clone)]
pub(super) struct Endpoint {
    /// Without a slash at its end, and without a name and password.
    pub(super) address: String,
    /// `Basic ..`, for an address with a name and a password.
    pub(super) login: Option<String>,
    pub(super) origin: Origin,
}

impl Endpoint {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let text = text.trim().trim_end_matches('/');
        let expected = || {
            format!(
                "`HF_ENDPOINT` is `{}`, expected an address such as `{DEFAULT}`",
                shown(text)
            )
        };
        let uri: Uri = text.parse().ok().with_context(expected)?;
        // A `@` behind the host: a password with a slash that is not escaped.
        ensure!(
            uri.query().is_none() && !text.contains('#') && !uri.path().contains('@'),
            "{}; a password in it has to be escaped (`%40` for `@`, `%2F` for `/`, `%23` for `#`)",
            expected()
        );
        let origin = Origin::from_uri(&uri).with_context(expected)?;
        let authority = uri.authority().with_context(expected)?.as_str();
        let (login, host) = match authority.rsplit_once('@') {
            None => (None, authority),
            Some((login, host)) => {
                let (name, password) = login.split_once(':').unwrap_or((login, ""));
                let plain = [unescape(name), unescape(password)].join(&b':');
                (Some(format!("Basic {}", STANDARD.encode(plain))), host)
            }
        };
        if host.is_empty() {
            bail!(expected());
        }
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            address: format!("{}://{host}{path}", origin.scheme),
            login,
            origin,
        })
    }
}

impl Endpoint {
    /// Whether the secret may go to an origin that this one redirects to: to itself, and a token of the hub to the hub.
    pub(super) fn trusts(&self, origin: &Origin) -> bool {
        let hub = ["huggingface.co", "hf.co"];
        let is_hub = origin.scheme == "https" && origin.port == 443;
        *origin == self.origin
            || self.login.is_none() && is_hub && hub.contains(&origin.host.as_str())
    }
}

/// An address for people: without a name, a password and a query, whether it makes sense or not.
pub(super) fn shown(text: &str) -> String {
    let (scheme, rest) = text
        .split_once("://")
        .map_or((None, text), |(scheme, rest)| (Some(scheme), rest));
    let (plain, query) = match rest.find(['?', '#']) {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let shown = match plain.rsplit_once('@') {
        // A password may have these marks too; what is the host can't be told then.
        _ if query.contains('@') => "(hidden)".to_owned(),
        Some((_, host)) => format!("(hidden)@{host}"),
        None => plain.to_owned(),
    };
    match scheme {
        Some(scheme) => format!("{scheme}://{shown}"),
        None => shown,
    }
}

/// Scheme, host and port: what the token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) scheme: String,
    pub(super) host: String,
    pub(super) port: u16,
}

impl Origin {
    pub(super) fn from_uri(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_lowercase();
        let default = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host()?.to_lowercase();
        if host.is_empty() {
            return None;
        }
        Some(Self {
            host,
            port: uri.port_u16().unwrap_or(default),
            scheme,
        })
    }

    /// Whether it is this very machine.
    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

pub(super) fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.ends_with(".localhost")
        || host
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_password_leave_the_address() {
        let found = Endpoint::parse("https://me:p%40ss@mirror.example:8443/hub/").unwrap();
        assert_eq!(found.address, "https://mirror.example:8443/hub");
        // printf 'me:p@ss' | base64
        assert_eq!(found.login.as_deref(), Some("Basic bWU6cEBzcw=="));
        assert_eq!(found.origin.port, 8443);
        let found = Endpoint::parse("http://x@127.0.0.1:1").unwrap();
        assert_eq!(found.address, "http://127.0.0.1:1");
        assert_eq!(found.login.as_deref(), Some("Basic eDo="));
        assert_eq!(Endpoint::parse(DEFAULT).unwrap().login, None);
    }

    #[test]
    fn the_token_goes_to_the_hub_that_a_mirror_leads_to_and_a_password_does_not() {
        let trusts = |endpoint: &str, origin: &str| {
            let origin = Origin::from_uri(&origin.parse().unwrap()).unwrap();
            Endpoint::parse(endpoint).unwrap().trusts(&origin)
        };
        assert!(trusts("https://hf.co", "https://huggingface.co/x"));
        assert!(trusts("https://mirror.example", "https://huggingface.co/x"));
        for origin in [
            "http://huggingface.co/x",
            "https://huggingface.co:8443/x",
            "https://cdn.huggingface.co/x",
            "https://huggingface.co.evil.example/x",
            "https://cdn.example/x",
        ] {
            assert!(!trusts("https://mirror.example", origin), "{origin}");
        }
        let login = "https://me:x@mirror.example";
        assert!(trusts(login, "https://mirror.example/x"));
        assert!(!trusts(login, "https://huggingface.co/x"));
    }

    #[test]
    fn an_address_that_is_none_shows_no_secret() {
        for text in [
            "https://me:s3cret/x@mirror.example",
            "https://me:12/s3cret@mirror.example",
            "ftp://me:s3cret@mirror.example",
            "me:s3cret@mirror.example",
            "https://me:s3cret@",
            "https://me:s3cret@mirror.example/x y",
            "https://mirror.example/?token=s3cret",
            "https://mirror.example/#s3cret",
            "https://me:s3cret#x@mirror.example",
            "https://me:s3cret?x@mirror.example",
            "https://me:x#s3cret@mirror.example",
            "https://me:s3cret x#y@mirror.example",
            "me:s3cret#x@mirror.example",
        ] {
            let error = Endpoint::parse(text)
                .map(|found| found.address)
                .unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains("HF_ENDPOINT"), "{error}");
            assert!(
                !error.contains("s3cret") && !error.contains("me:"),
                "{error}"
            );
        }
    }

    #[test]
    fn another_port_is_another_origin() {
        let origin = |text: &str| Origin::from_uri(&text.parse().unwrap());
        assert!(origin("https://a/x") == origin("https://A:443/y"));
        assert!(origin("http://a:1/") != origin("http://a:2/"));
        assert!(origin("http://a/") != origin("https://a/"));
        for host in [
            "127.0.0.1",
            "127.9.9.9",
            "[::1]",
            "localhost",
            "a.localhost",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["10.0.0.1", "localhost.example", "example"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
