//! Which remote is meant: by flag, environment, or the project's settings, in this order.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use clap::Args;
use serde::Deserialize;

use super::{Failure, colour, error, tell, variable};
use crate::engine::remote::{Settings, Shared};
use crate::remote::{Address, ObjectRemote};

/// The settings of a project, at its top.
pub(super) const SETTINGS: &str = "pipeline.config.yaml";
const VARIABLE: &str = "PIPELINE_REMOTE";
/// Where the clouds' own tools look for settings and credentials.
const CLOUDS: [&str; 4] = ["AWS_", "GOOGLE_", "AZURE_", "SERVICE_ACCOUNT"];

/// What every command that asks a remote takes.
#[derive(Args)]
pub(super) struct RemoteArgs {
    /// A cache that machines share: a folder, or a URL such as `s3://bucket/folder`; empty for none [default: `PIPELINE_REMOTE`,
    /// or the `remote` of `pipeline.config.yaml`]
    #[arg(long, value_name = "URL")]
    pub(super) remote: Option<String>,
    /// Takes no results from the remote
    #[arg(long)]
    pub(super) no_pull: bool,
    /// Fails if the remote can't be used, instead of going on without it
    #[arg(long)]
    pub(super) remote_required: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    remote: Option<Written>,
}

/// The remote of a project.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    url: String,
    #[serde(default = "yes")]
    pull: bool,
    #[serde(default = "yes")]
    push: bool,
    #[serde(default)]
    required: bool,
}

fn yes() -> bool {
    true
}

impl RemoteArgs {
    /// Opens the remote, if there is one. Nothing is asked yet.
    pub(super) fn open(&self, root: &Path, offline: bool, push: bool) -> Result<Shared, Failure> {
        let written = read(root)?;
        let mut settings = Settings {
            pull: !self.no_pull,
            push,
            required: self.remote_required,
        };
        if let Some(written) = &written {
            settings.pull &= written.pull;
            settings.push &= written.push;
            settings.required |= written.required;
        }
        let here = std::env::current_dir()
            .map_err(|error| anyhow::anyhow!("there is no current folder: {error}"))?;
        let url = self.remote.clone().or_else(|| variable(VARIABLE));
        let (url, folder) = match (url, &written) {
            (Some(url), _) => (url, here.as_path()),
            (None, Some(written)) => (written.url.clone(), root),
            (None, None) => return Ok(Shared::none()),
        };
        if url.is_empty() {
            return Ok(Shared::none());
        }
        let address = Address::parse(&url, folder).map_err(|error| wrong(&format!("{error:#}")))?;
        if written.is_some_and(|written| written.url == url) && address.has_credentials() {
            return Err(wrong(&format!(
                "`{SETTINGS}` holds credentials, and is read by many; set {VARIABLE} in the environment instead"
            )));
        }
        if offline && address.is_far() {
            return Ok(Shared::none());
        }
        Ok(match ObjectRemote::open(&address, &variables()) {
            Ok(remote) => Shared::new(Arc::new(remote), settings),
            Err(error) => Shared::broken(&format!("{error:#}"), settings.required),
        })
    }
}

fn wrong(message: &str) -> Failure {
    Failure::Wrong(error::plain(message, colour()))
}

fn read(root: &Path) -> Result<Option<Written>, Failure> {
    let path = root.join(SETTINGS);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(wrong(&format!(
                "could not read `{}`: {error}",
                path.display()
            )));
        }
    };
    let file: File = crate::recipe::yaml(&text)
        .map_err(|error| wrong(&format!("`{}`: {error}", path.display())))?;
    if file.version != 1 {
        return Err(wrong(&format!(
            "`{}`: version {} is not known; expected 1",
            path.display(),
            file.version
        )));
    }
    Ok(file.remote)
}

/// The clouds' variables. They may hold secrets, and go nowhere but to the client.
fn variables() -> BTreeMap<String, String> {
    let text = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    text.filter(|(name, value)| {
        !value.is_empty() && CLOUDS.iter().any(|prefix| name.starts_with(prefix))
    })
    .collect()
}

/// What there is to say of a remote; an error if it is required and failed.
pub(super) fn tell_warnings(shared: &Shared) -> Result<(), Failure> {
    let warnings = shared.take_warnings();
    shared.check()?;
    for text in warnings {
        tell(&format!("warning: {text}\n"));
    }
    Ok(())
}
