//! Which proxy a request goes through: the variables that `curl` and `huggingface_hub` read.

use std::net::Ipv4Addr;

use super::endpoint::is_loopback;

/// The proxies of the surroundings. May hold passwords: never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For `http` addresses.
    pub http: Option<String>,
    /// For `https` addresses.
    pub https: Option<String>,
    /// For both, where there is none of its own.
    pub all: Option<String>,
    /// Hosts that are reached without one: names, `.endings`, addresses, `10.0.0.0/8`, or `*`.
    pub none: Vec<String>,
}

impl Proxies {
    /// What the variables say: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in small letters first.
    pub(super) fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let of = |name: &str| {
            let found = variable(&name.to_lowercase()).or_else(|| variable(name));
            found.filter(|value| !value.trim().is_empty())
        };
        let none = of("NO_PROXY").unwrap_or_default();
        let none = none.split(',').map(|host| host.trim().to_lowercase());
        Self {
            http: of("HTTP_PROXY"),
            https: of("HTTPS_PROXY"),
            all: of("ALL_PROXY"),
            none: none.filter(|host| !host.is_empty()).collect(),
        }
    }

    /// The proxy for an address; this machine is always reached without one.
    pub(super) fn for_host(&self, scheme: &str, host: &str) -> Option<&str> {
        let host = host.to_lowercase();
        if is_loopback(&host) || self.none.iter().any(|rule| rule_matches(rule, &host)) {
            return None;
        }
        let own = if scheme == "https" {
            &self.https
        } else {
            &self.http
        };
        own.as_deref().or(self.all.as_deref())
    }
}

fn rule_matches(rule: &str, host: &str) -> bool {
    if rule == "*" {
        return true;
    }
    if let (Some((network, bits)), Ok(address)) = (rule.split_once('/'), host.parse::<Ipv4Addr>()) {
        let network: Option<Ipv4Addr> = network.parse().ok();
        let bits = bits.parse::<u32>().ok().filter(|bits| *bits <= 32);
        return network.zip(bits).is_some_and(|(network, bits)| {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        });
    }
    let ending = rule.trim_start_matches('*').trim_start_matches('.');
    let is_ending = host
        .strip_suffix(ending)
        .is_some_and(|before| before.ends_with('.'));
    is_ending || host == ending && !rule.starts_with(['*', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(pairs: &[(&str, &str)]) -> Proxies {
        Proxies::from_variables(&|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_scheme_has_its_own() {
        let found = proxies(&[
            ("https_proxy", "http://small:1"),
            ("HTTPS_PROXY", "http://large:1"),
            ("ALL_PROXY", "http://all:1"),
        ]);
        assert_eq!(
            found.for_host("https", "hub.example"),
            Some("http://small:1")
        );
        assert_eq!(found.for_host("http", "hub.example"), Some("http://all:1"));
        assert_eq!(found.for_host("http", "127.0.0.1"), None);
        // As in curl and huggingface_hub, a proxy for http is none for https.
        let found = proxies(&[("HTTP_PROXY", "http://plain:1")]);
        assert_eq!(found.for_host("https", "hub.example"), None);
    }

    #[test]
    fn some_hosts_have_none() {
        let found = proxies(&[
            ("ALL_PROXY", "http://all:1"),
            (
                "NO_PROXY",
                "mirror.corp, .inner.example,10.0.0.0/8, 192.168.1.7",
            ),
        ]);
        for host in [
            "mirror.corp",
            "a.mirror.corp",
            "x.inner.example",
            "10.1.2.3",
            "192.168.1.7",
        ] {
            assert_eq!(found.for_host("http", host), None, "{host}");
        }
        for host in ["amirror.corp", "inner.example", "11.1.2.3", "192.168.1.8"] {
            assert!(found.for_host("http", host).is_some(), "{host}");
        }
        let found = proxies(&[("ALL_PROXY", "http://all:1"), ("NO_PROXY", "*")]);
        assert_eq!(found.for_host("https", "huggingface.co"), None);
    }
}
