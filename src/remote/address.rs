//! Where a remote is: a folder or a URL, the client that speaks to it, and what must never be shown of either.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use anyhow::{Context as _, bail};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreScheme};
use regex::Regex;
use url::Url;

use super::cloud;

/// The parts of names of variables whose values are secret.
const SECRET: [&str; 6] = ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL"];
/// Paths to secrets, which are none.
const PATHS: [&str; 2] = [
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_FEDERATED_TOKEN_FILE",
];
/// Shorter secrets are hidden only where they stand alone: elsewhere they would be letters of other words.
const SHORT: usize = 8;
/// Even shorter ones are no secrets but words, or less. In addresses they are hidden by their place.
const SHORTEST: usize = 4;
/// The longest part of a server's answer that is shown.
const LONGEST: usize = 600;

/// A folder or a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    location: Location,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Location {
    Folder(PathBuf),
    Url(ObjectStoreScheme, Url),
}

impl Address {
    /// Reads what somebody wrote. A relative folder starts at `folder`.
    pub fn parse(text: &str, folder: &std::path::Path) -> anyhow::Result<Self> {
        const KNOWN: &str = "expected a folder, or a URL that starts with `file://`, `s3://`, `gs://`, `az://` or `https://`";
        if !text.contains("://") {
            let location = Location::Folder(folder.join(text));
            return Ok(Self { location });
        }
        let shown = text.split("://").next().unwrap_or_default();
        let Ok(url) = Url::parse(text) else {
            bail!("the remote that starts with `{shown}://` is no URL; {KNOWN}");
        };
        if url.scheme() == "file" {
            let Ok(path) = url.to_file_path() else {
                bail!(
                    "`{}` is no folder of this machine; {KNOWN}",
                    without_credentials(url.as_str())
                );
            };
            let location = Location::Folder(path);
            return Ok(Self { location });
        }
        match ObjectStoreScheme::parse(&url) {
            Ok((ObjectStoreScheme::Memory | ObjectStoreScheme::Local, _)) | Err(_) => {
                bail!("`{shown}://` is no place for a remote; {KNOWN}")
            }
            Ok((scheme, _)) => {
                let location = Location::Url(scheme, url);
                Ok(Self { location })
            }
        }
    }

    /// Whether a name or a password is part of it.
    pub fn has_credentials(&self) -> bool {
        match &self.location {
            Location::Folder(_) => false,
            // In `az://container@account` the part before `@` is no secret.
            Location::Url(scheme, url) => {
                url.password().is_some()
                    || url.query().is_some()
                    || (*scheme != ObjectStoreScheme::MicrosoftAzure && !url.username().is_empty())
            }
        }
    }

    /// Whether a password in it would travel for everybody to read: over plain HTTP, and not only within this machine.
    pub fn is_exposed(&self) -> bool {
        let Location::Url(ObjectStoreScheme::Http, url) = &self.location else {
            return false;
        };
        let here = match url.host() {
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            None => false,
        };
        url.scheme() == "http" && self.has_credentials() && !here
    }

    /// The address that was written as `text`, as it is understood in any folder.
    pub fn from_anywhere(&self, text: &str) -> String {
        match &self.location {
            Location::Folder(folder) => folder.display().to_string(),
            Location::Url(..) => text.to_owned(),
        }
    }

    /// Whether reaching it needs the network.
    pub fn is_far(&self) -> bool {
        matches!(self.location, Location::Url(..))
    }

    /// The folder, if it is one of this machine.
    pub(super) fn folder(&self) -> Option<&std::path::Path> {
        match &self.location {
            Location::Folder(folder) => Some(folder),
            Location::Url(..) => None,
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        matches!(&self.location, Location::Url(ObjectStoreScheme::Http, _))
    }

    /// As it may be shown: without credentials.
    pub fn shown(&self) -> String {
        match &self.location {
            Location::Folder(path) => {
                let path = path.display().to_string();
                // An address that lacks its beginning counts as a folder.
                let hidden = USER.replace_all(&path, "$1:***@");
                hidden.into_owned()
            }
            Location::Url(scheme, url) => {
                let mut url = url.clone();
                url.set_query(None);
                url.set_fragment(None);
                if *scheme != ObjectStoreScheme::MicrosoftAzure {
                    // Fails only where there can be no user.
                    let _ = url.set_username("");
                }
                let _ = url.set_password(None);
                url.to_string().trim_end_matches('/').to_owned()
            }
        }
    }

    /// A client, and the folder in it. Sends nothing yet.
    pub(super) fn open(
        &self,
        variables: &BTreeMap<String, String>,
    ) -> anyhow::Result<(Arc<dyn ObjectStore>, Path)> {
        let (scheme, url) = match &self.location {
            Location::Folder(folder) => {
                if !folder.is_dir() {
                    bail!("there is no folder `{}`; make it first", self.shown());
                }
                let store = LocalFileSystem::new_with_prefix(folder)
                    .with_context(|| format!("could not open `{}`", self.shown()))?;
                return Ok((Arc::new(store.with_fsync(true)), Path::default()));
            }
            Location::Url(scheme, url) => (scheme, url),
        };
        let (_, folder) = ObjectStoreScheme::parse(url)?;
        Ok((cloud::open(scheme, url, variables)?, folder))
    }

    /// Every text that must not be shown.
    pub(super) fn secrets(&self, variables: &BTreeMap<String, String>) -> Vec<String> {
        let secret =
            |name: &str| SECRET.iter().any(|part| name.contains(part)) && !PATHS.contains(&name);
        let mut secrets = Vec::new();
        for (name, value) in variables {
            if secret(name) {
                secrets.push(value.clone());
            } else if let Ok(url) = Url::parse(value) {
                // An endpoint, say.
                secrets.extend(secrets_of(&url));
            }
        }
        if let Location::Url(scheme, url) = &self.location {
            secrets.extend(secrets_of(url));
            if *scheme != ObjectStoreScheme::MicrosoftAzure && url.password().is_none() {
                // A token may stand where others have a name.
                secrets.push(url.username().to_owned());
            }
        }
        secrets.retain(|secret| secret.len() >= SHORTEST);
        // Longest first, should one be part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets.dedup();
        secrets
    }
}

/// The password and the query of a URL, as they are written and as they are meant.
fn secrets_of(url: &Url) -> Vec<String> {
    let mut secrets = Vec::new();
    if let Some(password) = url.password() {
        let escaped = password.replace('+', "%2B").replace('&', "%26");
        let decoded = url::form_urlencoded::parse(escaped.as_bytes());
        secrets.extend(decoded.map(|(decoded, _)| decoded.into_owned()));
        secrets.push(password.to_owned());
    }
    secrets.extend(url.query().map(str::to_owned));
    secrets.extend(url.query_pairs().map(|(_, value)| value.into_owned()));
    secrets
}

/// Where the clouds' own machines ask who they are. Elsewhere nothing answers there.
const MACHINE_IDENTITY: [&str; 3] = [
    "169.254.169.254",
    "169.254.170.2",
    "metadata.google.internal",
];

/// What a library's error means, in words of ours where there are some.
fn in_words(text: &str) -> &str {
    if MACHINE_IDENTITY.iter().any(|host| text.contains(host)) {
        return "no credentials were found: set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, `GOOGLE_SERVICE_ACCOUNT`, or \
                `AZURE_STORAGE_ACCOUNT_NAME` and `AZURE_STORAGE_ACCOUNT_KEY`; this machine's own identity was asked for, and nothing \
                answered";
    }
    // `Generic S3 error: ..` says nothing.
    text.strip_prefix("Generic ")
        .and_then(|text| text.split_once(" error: "))
        .filter(|(service, _)| !service.contains(' '))
        .map_or(text, |(_, text)| text)
}

/// A sentence of a server or a library, without secrets, in one line.
pub(super) fn clean(text: &str, secrets: &[String]) -> String {
    let text: Vec<_> = in_words(text).split_whitespace().collect();
    let mut text = without_credentials(&text.join(" "));
    for secret in secrets {
        text = hide(&text, secret);
    }
    if text.chars().count() > LONGEST {
        text = text.chars().take(LONGEST).chain(['…']).collect();
    }
    text
}

fn hide(text: &str, secret: &str) -> String {
    if secret.len() >= SHORT {
        return text.replace(secret, "***");
    }
    let mut hidden = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(secret) {
        let (before, found) = rest.split_at(at);
        let after = &found[secret.len()..];
        let last = before.chars().next_back().or(hidden.chars().next_back());
        let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let part = is_word(last) || is_word(after.chars().next());
        hidden.push_str(before);
        hidden.push_str(if part { secret } else { "***" });
        rest = after;
    }
    hidden + rest
}

/// A URL in a text, and a user with a password.
static URL: LazyLock<Regex> = LazyLock::new(|| pattern(r#"[A-Za-z][A-Za-z0-9+.-]*://[^\s"'`<>]*"#));
static USER: LazyLock<Regex> = LazyLock::new(|| pattern(r"([^/\s:@]+):([^/\s@]+)@"));

#[expect(
    clippy::expect_used,
    reason = "constant patterns, which a test compiles"
)]
fn pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern")
}

/// URLs in a text lose their users and their queries, which may be signatures.
fn without_credentials(text: &str) -> String {
    let bare = |url: &regex::Captures<'_>| {
        let Some((scheme, rest)) = url[0].split_once("://") else {
            return url[0].to_owned();
        };
        let (rest, cut) = match rest.split_once('?') {
            Some((rest, _)) => (rest, "?***"),
            None => (rest, ""),
        };
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        format!("{scheme}://{host}{}{cut}", without_credentials(path))
    };
    URL.replace_all(text, bare).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_library_says_is_told_in_words() {
        let raw = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 2s: connection refused";
        assert!(clean(raw, &[]).starts_with("no credentials were found: set `AWS_ACCESS_KEY_ID`"));
        assert_eq!(clean("Generic S3 error: it is  full", &[]), "it is full");
        assert_eq!(
            clean("Generic words in an error: x", &[]),
            "Generic words in an error: x"
        );
    }

    fn address(text: &str) -> Address {
        Address::parse(text, std::path::Path::new("/project")).unwrap()
    }

    #[test]
    fn folders_and_urls_are_told_apart() {
        assert_eq!(address("cache").shown(), "/project/cache");
        assert_eq!(address("file:///team/cache").shown(), "/team/cache");
        assert!(!address("/team/cache").is_far());
        assert!(address("https://host/cache").is_read_only());
        assert!(!address("s3://bucket/cache").is_read_only());
        for wrong in ["memory://x", "ftp://host/x", "s3://", "://"] {
            let error = Address::parse(wrong, std::path::Path::new("/")).unwrap_err();
            assert!(error.to_string().contains("expected a folder"), "{error}");
        }
    }

    #[test]
    fn credentials_are_never_shown() {
        let url = address("https://me:hush-hush@host/cache?sig=abc#x");
        assert!(url.has_credentials());
        assert_eq!(url.shown(), "https://host/cache");
        assert!(!address("az://container@account/x").has_credentials());
        assert!(address("http://me:hush@host/x").is_exposed());
        for safe in [
            "http://host/x",
            "https://me:hush@host/x",
            "http://me:hush@127.0.0.1/x",
            "http://me:hush@[::1]/x",
        ] {
            assert!(!address(safe).is_exposed(), "{safe}");
        }
        let variables = BTreeMap::from([
            ("AWS_SECRET_ACCESS_KEY".to_owned(), "very-secret".to_owned()),
            ("AWS_REGION".to_owned(), "here".to_owned()),
        ]);
        let secrets = url.secrets(&variables);
        let text = clean(
            "GET https://me:hush-hush@host/a?X-Sig=1 here: <Key>very-secret</Key>\n sig=abc",
            &secrets,
        );
        assert_eq!(text, "GET https://host/a?*** here: <Key>***</Key> ***");
    }

    #[test]
    fn short_secrets_leave_messages_readable() {
        let secrets = |url: &str, key: &str| {
            let variables = BTreeMap::from([("AWS_SECRET_ACCESS_KEY".to_owned(), key.to_owned())]);
            address(url).secrets(&variables)
        };
        let text = "a test of the testers: test, attest a";
        let told = |secrets: &[String]| clean(text, secrets);
        assert_eq!(told(&secrets("s3://bucket/x", "a")), text);
        assert_eq!(told(&secrets("https://u:t@host/x", "te")), text);
        assert_eq!(
            told(&secrets("s3://bucket/x", "test")),
            "a *** of the testers: ***, attest a"
        );
        // By its place even a short one is hidden, wherever the address stands.
        assert_eq!(
            clean(
                "(https://u:t@host/x?a=b) and \"http://t@host\"->http://h/http://u:t@i/",
                &[]
            ),
            "(https://host/x?*** and \"http://host\"->http://h/http://i/"
        );
    }

    #[test]
    fn passwords_are_hidden_as_written_and_as_meant() {
        let url = address("https://me:hush%20hush@host/x?sig=long-signature&n=1");
        let secrets = url.secrets(&BTreeMap::from([(
            "AWS_ENDPOINT_URL".to_owned(),
            "http://me:end-point-word@host".to_owned(),
        )]));
        let text = "hush%20hush or hush hush, long-signature, end-point-word";
        assert_eq!(clean(text, &secrets), "*** or ***, ***, ***");
        let path = BTreeMap::from([(PATHS[0].to_owned(), "/keys/service.json".to_owned())]);
        assert_eq!(address("gs://bucket/x").secrets(&path), [""; 0]);
        // Addresses that are none.
        assert_eq!(
            address("me:hush-hush@host/x").shown(),
            "/project/me:***@host/x"
        );
        let root = std::path::Path::new("/");
        let error = Address::parse("file://me:hush-hush@host/x", root).unwrap_err();
        assert!(!error.to_string().contains("hush"), "{error}");
    }
}
