//! Where a remote is: a folder or a URL, the client that speaks to it, and what must never be shown of either.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::{Position, Url};

/// The parts of names of variables whose values are secret.
const SECRET: [&str; 6] = ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL"];
/// The longest part of a server's answer that is shown.
const LONGEST: usize = 600;

/// A folder or a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Folder(PathBuf),
    Url(ObjectStoreScheme, Url),
}

impl Address {
    /// Reads what somebody wrote. A relative folder starts at `folder`.
    pub fn parse(text: &str, folder: &std::path::Path) -> anyhow::Result<Self> {
        const KNOWN: &str = "expected a folder, or a URL that starts with `file://`, `s3://`, `gs://`, `az://` or `https://`";
        if !text.contains("://") {
            let place = Place::Folder(folder.join(text));
            return Ok(Self { place });
        }
        let shown = text.split("://").next().unwrap_or_default();
        let Ok(url) = Url::parse(text) else {
            bail!("the remote that starts with `{shown}://` is no URL; {KNOWN}");
        };
        if url.scheme() == "file" {
            let Ok(path) = url.to_file_path() else {
                bail!("`{url}` is no folder of this machine; {KNOWN}");
            };
            let place = Place::Folder(path);
            return Ok(Self { place });
        }
        match ObjectStoreScheme::parse(&url) {
            Ok((ObjectStoreScheme::Memory | ObjectStoreScheme::Local, _)) | Err(_) => {
                bail!("`{shown}://` is no place for a remote; {KNOWN}")
            }
            Ok((scheme, _)) => {
                let place = Place::Url(scheme, url);
                Ok(Self { place })
            }
        }
    }

    /// Whether a name or a password is part of it.
    pub fn has_credentials(&self) -> bool {
        match &self.place {
            Place::Folder(_) => false,
            // In `az://container@account` the part before `@` is no secret.
            Place::Url(scheme, url) => {
                url.password().is_some()
                    || url.query().is_some()
                    || (*scheme != ObjectStoreScheme::MicrosoftAzure && !url.username().is_empty())
            }
        }
    }

    /// Whether reaching it needs the network.
    pub fn is_far(&self) -> bool {
        matches!(self.place, Place::Url(..))
    }

    pub(super) fn is_read_only(&self) -> bool {
        matches!(&self.place, Place::Url(ObjectStoreScheme::Http, _))
    }

    /// As it may be shown: without credentials.
    pub fn shown(&self) -> String {
        match &self.place {
            Place::Folder(path) => path.display().to_string(),
            Place::Url(scheme, url) => {
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
        let (scheme, url) = match &self.place {
            Place::Folder(folder) => {
                if !folder.is_dir() {
                    bail!("there is no folder `{}`; make it first", folder.display());
                }
                let store = LocalFileSystem::new_with_prefix(folder)
                    .with_context(|| format!("could not open `{}`", folder.display()))?;
                return Ok((Arc::new(store.with_fsync(true)), Path::default()));
            }
            Place::Url(scheme, url) => (scheme, url),
        };
        let (_, folder) = ObjectStoreScheme::parse(url)?;
        // An address in plain text was meant so.
        let plain = |name: &str| {
            let value = variables.get(name);
            value.is_some_and(|value| value.starts_with("http://"))
        };
        let options = |plain| {
            ClientOptions::new()
                .with_user_agent(object_store::HeaderValue::from_static(concat!(
                    "pipeline/",
                    env!("CARGO_PKG_VERSION")
                )))
                .with_allow_http(plain)
                .with_connect_timeout(Duration::from_secs(5))
                .with_read_timeout(Duration::from_mins(1))
                .with_pool_idle_timeout(Duration::from_secs(20))
                // A large file takes as long as it takes; a stalled one ends by the read timeout.
                .with_timeout_disabled()
        };
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 3,
            retry_timeout: Duration::from_secs(15),
        };
        // The builders know their variables by the same names in lower case; others are not theirs.
        let of = |prefix: &str| {
            let theirs = variables
                .iter()
                .filter(|(name, _)| name.starts_with(prefix));
            let lower = theirs.map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
            lower.collect::<Vec<_>>()
        };
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::AmazonS3 => {
                let plain = plain("AWS_ENDPOINT_URL_S3")
                    || plain("AWS_ENDPOINT_URL")
                    || plain("AWS_ENDPOINT");
                let mut builder = AmazonS3Builder::new().with_client_options(options(plain));
                for (name, value) in of("AWS_") {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let mut builder =
                    GoogleCloudStorageBuilder::new().with_client_options(options(false));
                if let Some(path) = variables.get("SERVICE_ACCOUNT") {
                    builder = builder.with_service_account_path(path);
                }
                for (name, value) in of("GOOGLE_") {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let mut builder = MicrosoftAzureBuilder::new().with_client_options(options(false));
                for (name, value) in of("AZURE_") {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Arc::new(builder.with_url(url.as_str()).with_retry(retry).build()?)
            }
            ObjectStoreScheme::Http => {
                let builder = HttpBuilder::new()
                    .with_client_options(options(url.scheme() == "http"))
                    .with_url(&url[..Position::BeforePath])
                    .with_retry(retry);
                Arc::new(builder.build()?)
            }
            _ => bail!("`{}` is no place for a remote", self.shown()),
        };
        Ok((store, folder))
    }

    /// Every text that must not be shown.
    pub(super) fn secrets(&self, variables: &BTreeMap<String, String>) -> Vec<String> {
        let secret = |name: &str| SECRET.iter().any(|part| name.contains(part));
        let mut secrets: Vec<String> = variables
            .iter()
            .filter(|(name, value)| secret(name) && value.len() >= 4)
            .map(|(_, value)| value.clone())
            .collect();
        if let Place::Url(_, url) = &self.place {
            secrets.extend(url.password().map(str::to_owned));
            secrets.extend(url.query().map(str::to_owned));
            if self.has_credentials() && !url.username().is_empty() {
                secrets.push(url.username().to_owned());
            }
        }
        secrets.retain(|secret| !secret.is_empty());
        // Longest first, should one be part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets
    }
}

/// A sentence of a server or a library, without secrets, in one line.
pub(super) fn clean(text: &str, secrets: &[String]) -> String {
    let mut text = text
        .split_whitespace()
        .map(without_query)
        .collect::<Vec<_>>()
        .join(" ");
    for secret in secrets {
        text = text.replace(secret, "***");
    }
    if text.chars().count() > LONGEST {
        text = text.chars().take(LONGEST).chain(['…']).collect();
    }
    text
}

/// A word that is a URL loses its user and its query, which may be a signature.
fn without_query(word: &str) -> String {
    let Some((scheme, rest)) = word.split_once("://") else {
        return word.to_owned();
    };
    let (rest, cut) = match rest.split_once('?') {
        Some((rest, _)) => (rest, "?***"),
        None => (rest, ""),
    };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}{cut}")
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
