//! Where the hub is, who asks, and where files are kept: the variables that `huggingface_hub` documents.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

/// The hub everybody means.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings of a [`super::Hub`].
#[derive(Clone)]
pub struct HubSettings {
    /// The address of the hub; `None` is `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// The access token. Never shown.
    pub token: Option<String>,
    /// The shared cache (`~/.cache/huggingface/hub`).
    pub cache: PathBuf,
    /// Never touch the network.
    pub offline: bool,
    /// The longest silence of a server before a request counts as broken.
    pub timeout: Duration,
    /// The wait before the first retry of a broken request; it doubles with each one.
    pub retry_wait: Duration,
}

impl HubSettings {
    /// The public hub without a token, with files kept in `cache`.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: None,
            token: None,
            cache: cache.into(),
            offline: false,
            timeout: Duration::from_secs(30),
            retry_wait: Duration::from_millis(500),
        }
    }

    /// What the variables say: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`,
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `HF_HUB_DOWNLOAD_TIMEOUT` and `XDG_CACHE_HOME`.
    pub fn from_variables(
        variable: &dyn Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| set(name).map(|value| expand(&value, home));
        let hub_home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home.map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| hub_home.as_ref().map(|home| home.join("hub")))
            .context("no place for the hub's cache: there is no home folder; set `HF_HOME`")?;

        let mut settings = Self::new(cache);
        settings.endpoint = set("HF_ENDPOINT");
        settings.offline = set("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value));
        if let Some(seconds) = set("HF_HUB_DOWNLOAD_TIMEOUT") {
            let seconds: u64 = seconds.trim().parse().with_context(|| {
                format!("`HF_HUB_DOWNLOAD_TIMEOUT` is `{seconds}`, expected whole seconds")
            })?;
            settings.timeout = Duration::from_secs(seconds.max(1));
        }
        if !set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_true(&value)) {
            let file = path("HF_TOKEN_PATH").or_else(|| hub_home.map(|home| home.join("token")));
            let kept = || file.and_then(|file| std::fs::read_to_string(file).ok());
            settings.token = set("HF_TOKEN")
                .or_else(kept)
                .map(|token| token.replace(['\r', '\n'], "").trim().to_owned())
                .filter(|token| !token.is_empty());
        }
        Ok(settings)
    }

    /// The address of the hub without a slash at its end.
    pub(super) fn endpoint(&self) -> &str {
        let endpoint = self.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT);
        endpoint.trim().trim_end_matches('/')
    }
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint())
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

pub(crate) fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_uppercase().as_str())
}

fn expand(path: &str, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)], home: Option<&Path>) -> anyhow::Result<HubSettings> {
        let variable = |name: &str| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        HubSettings::from_variables(&variable, home)
    }

    #[test]
    fn home_is_the_default_place() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(home.path().join(".cache/huggingface")).unwrap();
        std::fs::write(home.path().join(".cache/huggingface/token"), "hf_kept\n").unwrap();
        let found = settings(&[], Some(home.path())).unwrap();
        assert_eq!(found.cache, home.path().join(".cache/huggingface/hub"));
        assert_eq!(found.token.as_deref(), Some("hf_kept"));
        assert_eq!(found.endpoint(), "https://huggingface.co");
        assert!(!found.offline);
    }

    #[test]
    fn each_variable_counts() {
        let folder = tempfile::tempdir().unwrap();
        let hub_home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("token"), "hf_kept").unwrap();
        let found = settings(&[("HF_HOME", hub_home)], None).unwrap();
        assert_eq!(found.cache, folder.path().join("hub"));
        assert_eq!(found.token.as_deref(), Some("hf_kept"));

        let found = settings(
            &[
                ("HF_HOME", hub_home),
                ("HF_HUB_CACHE", "/elsewhere"),
                ("HF_TOKEN", " hf_env\n"),
                ("HF_ENDPOINT", "http://127.0.0.1:1/"),
                ("HF_HUB_OFFLINE", "yes"),
            ],
            None,
        )
        .unwrap();
        assert_eq!(found.cache, Path::new("/elsewhere"));
        assert_eq!(found.token.as_deref(), Some("hf_env"));
        assert_eq!(found.endpoint(), "http://127.0.0.1:1");
        assert!(found.offline);

        let other = folder.path().join("other");
        std::fs::write(&other, "hf_other").unwrap();
        let pairs = [
            ("HF_HOME", hub_home),
            ("HF_TOKEN_PATH", other.to_str().unwrap()),
        ];
        assert_eq!(
            settings(&pairs, None).unwrap().token.as_deref(),
            Some("hf_other")
        );
        let pairs = [
            ("HF_HOME", hub_home),
            ("HF_TOKEN", "hf_env"),
            ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ];
        assert_eq!(settings(&pairs, None).unwrap().token, None);
    }

    #[test]
    fn no_home_is_an_error_and_the_token_is_not_shown() {
        let error = settings(&[], None).unwrap_err().to_string();
        assert!(error.contains("HF_HOME"), "{error}");
        let found = settings(&[("HF_HOME", "/h"), ("HF_TOKEN", "hf_secret")], None).unwrap();
        assert!(!format!("{found:?}").contains("hf_secret"));
    }
}
