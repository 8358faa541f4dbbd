//! Where the hub is, who asks, and where files are kept: the variables that `huggingface_hub` documents.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::endpoint;
use super::proxies::Proxies;

/// Every variable that is read: those that `huggingface_hub` documents, and those of its HTTP client.
pub const VARIABLES: [&str; 26] = [
    "ALL_PROXY",
    "CURL_CA_BUNDLE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_HUB_DISABLE_SYMLINKS",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "NO_PROXY",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TRANSFORMERS_OFFLINE",
    "XDG_CACHE_HOME",
    "all_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// Settings of a [`super::Hub`].
#[derive(Clone)]
pub struct HubSettings {
    /// The address of the hub; `None` is `https://huggingface.co`. May hold a name and a password.
    pub endpoint: Option<String>,
    /// The access token. Never shown.
    pub token: Option<String>,
    /// Whether there is a token that a variable forbids to send.
    pub token_withheld: bool,
    /// The shared cache (`~/.cache/huggingface/hub`).
    pub cache: PathBuf,
    /// Never touch the network.
    pub offline: bool,
    /// The longest silence of a server before a request for a file counts as broken.
    pub timeout: Duration,
    /// The same for descriptions, lists of files and headers.
    pub answer_timeout: Duration,
    /// The wait before the first retry of a broken request; it doubles with each one.
    pub retry_wait: Duration,
    /// Whether the cache may hold symbolic links.
    pub links: bool,
    /// The variable that names certificates to trust instead of the system's, with the file or folder it names.
    pub authorities: Option<(&'static str, PathBuf)>,
    /// The proxies of the surroundings.
    pub proxies: Proxies,
}

impl HubSettings {
    /// The public hub without a token, with files kept in `cache`.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: None,
            token: None,
            token_withheld: false,
            cache: cache.into(),
            offline: false,
            timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(30),
            retry_wait: Duration::from_millis(500),
            links: true,
            authorities: None,
            proxies: Proxies::default(),
        }
    }

    /// What [`VARIABLES`] say, as `huggingface_hub` reads them.
    pub fn from_variables(
        variable: &dyn Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| {
            set(name)
                .map(|value| expand(name, &value, home))
                .transpose()
        };
        let hub_home = hub_home(variable, home)?;
        let cache = path("HF_HUB_CACHE")?
            .or(path("HUGGINGFACE_HUB_CACHE")?)
            .or(hub_home.as_ref().map(|home| home.join("hub")))
            .context("no place for the hub's cache: there is no home folder; set `HF_HOME`")?;

        let mut settings = Self::new(cache);
        settings.endpoint = set("HF_ENDPOINT");
        settings.offline = is_offline(variable);
        if let Some(timeout) = seconds(&set, "HF_HUB_DOWNLOAD_TIMEOUT")? {
            settings.timeout = timeout;
            settings.answer_timeout = timeout;
        }
        if let Some(timeout) = seconds(&set, "HF_HUB_ETAG_TIMEOUT")? {
            settings.answer_timeout = timeout;
        }
        settings.links = !set("HF_HUB_DISABLE_SYMLINKS").is_some_and(|value| is_true(&value));
        settings.proxies = Proxies::from_variables(variable);
        settings.authorities = [
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
        ]
        .into_iter()
        .find_map(|name| Some((name, PathBuf::from(set(name)?))));
        let file = token_file(variable, home)?;
        let token = match set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")) {
            None => file.map_or(Ok(None), |file| kept_token(&file))?,
            token => token,
        };
        let token = token
            .map(|token| token.replace(['\r', '\n'], "").trim().to_owned())
            .filter(|token| !token.is_empty());
        if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_true(&value)) {
            settings.token_withheld = token.is_some();
        } else {
            settings.token = token;
        }
        Ok(settings)
    }

    /// The hub's address, which may hold a name and a password: for [`super::endpoint::Endpoint::parse`] alone.
    pub(super) fn written_endpoint(&self) -> &str {
        self.endpoint.as_deref().unwrap_or(endpoint::DEFAULT)
    }
}

/// The folder of the hub's programs.
fn hub_home(
    variable: &dyn Fn(&str) -> Option<String>,
    home: Option<&Path>,
) -> anyhow::Result<Option<PathBuf>> {
    let path = |name: &str| {
        let set = variable(name).filter(|value| !value.trim().is_empty());
        set.map(|value| expand(name, &value, home)).transpose()
    };
    Ok(path("HF_HOME")?
        .or(path("XDG_CACHE_HOME")?.map(|cache| cache.join("huggingface")))
        .or(home.map(|home| home.join(".cache/huggingface"))))
}

/// The file with the token of `hf auth login`.
pub(super) fn token_file(
    variable: &dyn Fn(&str) -> Option<String>,
    home: Option<&Path>,
) -> anyhow::Result<Option<PathBuf>> {
    let set = variable("HF_TOKEN_PATH").filter(|value| !value.trim().is_empty());
    match set {
        Some(path) => expand("HF_TOKEN_PATH", &path, home).map(Some),
        None => Ok(hub_home(variable, home)?.map(|home| home.join("token"))),
    }
}

/// Whether a variable forbids the network.
pub(crate) fn is_offline(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let found = set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE"));
    found.is_some_and(|value| is_true(&value))
}

/// The token that `hf auth login` left, if it did.
fn kept_token(file: &Path) -> anyhow::Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(token) => Ok(Some(token)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => {
            let message = format!("could not read the hub's token in `{}`", file.display());
            Err(anyhow::Error::new(error).context(message))
        }
    }
}

/// Whole seconds; 0 means the default, as in `huggingface_hub`.
fn seconds(set: &dyn Fn(&str) -> Option<String>, name: &str) -> anyhow::Result<Option<Duration>> {
    let Some(text) = set(name) else {
        return Ok(None);
    };
    let seconds: u64 = text
        .trim()
        .parse()
        .with_context(|| format!("`{name}` is `{text}`, expected whole seconds"))?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("endpoint", &endpoint::shown(self.written_endpoint()))
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_uppercase().as_str())
}

/// A path with the home folder for `~` and `$HOME`; another variable in it would become a folder of that name.
fn expand(name: &str, path: &str, home: Option<&Path>) -> anyhow::Result<PathBuf> {
    let at_home = ["~/", "$HOME/", "${HOME}/"]
        .iter()
        .find_map(|start| path.strip_prefix(start));
    if let (Some(rest), Some(home)) = (at_home, home) {
        return Ok(home.join(rest));
    }
    ensure!(
        !path.contains('$'),
        "`{name}` is `{path}`; only `~` and `$HOME` are filled in, so write the path out"
    );
    Ok(PathBuf::from(path))
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
        assert_eq!(found.written_endpoint(), "https://huggingface.co");
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
        assert_eq!(found.written_endpoint(), "http://127.0.0.1:1/");
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
        let found = settings(&pairs, None).unwrap();
        assert_eq!(found.token, None);
        assert!(found.token_withheld);
    }

    #[test]
    fn what_older_programs_read_counts_too() {
        let pairs = [
            ("HF_HOME", "/h"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
            ("TRANSFORMERS_OFFLINE", "1"),
            ("HF_HUB_DISABLE_SYMLINKS", "1"),
            ("REQUESTS_CA_BUNDLE", "/corp.pem"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "20"),
            ("HF_HUB_ETAG_TIMEOUT", "5"),
        ];
        let found = settings(&pairs, None).unwrap();
        assert_eq!(found.cache, Path::new("/old"));
        assert_eq!(found.token.as_deref(), Some("hf_old"));
        assert!(found.offline && !found.links);
        let corp = Some(("REQUESTS_CA_BUNDLE", PathBuf::from("/corp.pem")));
        assert_eq!(found.authorities, corp);
        assert_eq!(found.timeout, Duration::from_secs(20));
        assert_eq!(found.answer_timeout, Duration::from_secs(5));

        let newer = [
            ("HF_HUB_CACHE", "/new"),
            ("HF_TOKEN", "hf_new"),
            ("HF_HUB_OFFLINE", "0"),
            ("SSL_CERT_FILE", "/mine.pem"),
        ];
        let found = settings(&[&pairs[..], &newer[..]].concat(), None).unwrap();
        assert_eq!(found.cache, Path::new("/new"));
        assert_eq!(found.token.as_deref(), Some("hf_new"));
        assert!(!found.offline);
        assert_eq!(found.authorities.unwrap().0, "SSL_CERT_FILE");
    }

    #[test]
    fn the_home_folder_is_filled_in_and_nothing_else() {
        let home = Path::new("/home/me");
        for written in ["~/x", "$HOME/x", "${HOME}/x"] {
            let found = settings(&[("HF_HOME", written)], Some(home)).unwrap();
            assert_eq!(found.cache, Path::new("/home/me/x/hub"));
        }
        let error = settings(&[("HF_HOME", "$SCRATCH/x")], Some(home)).unwrap_err();
        assert!(error.to_string().contains("`HF_HOME`"), "{error}");
    }

    #[test]
    fn a_token_that_can_not_be_read_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        std::fs::create_dir(folder.path().join("token")).unwrap();
        let error = settings(&[("HF_HOME", path)], None).unwrap_err();
        assert!(error.to_string().contains("the hub's token"), "{error}");
        settings(&[("HF_HOME", path), ("HF_TOKEN", "hf_env")], None).unwrap();
    }

    #[test]
    fn no_home_is_an_error_and_the_token_is_not_shown() {
        let error = settings(&[], None).unwrap_err().to_string();
        assert!(error.contains("HF_HOME"), "{error}");
        let found = settings(&[("HF_HOME", "/h"), ("HF_TOKEN", "hf_secret")], None).unwrap();
        assert!(!format!("{found:?}").contains("hf_secret"));
    }
}
