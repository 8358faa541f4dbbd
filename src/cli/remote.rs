//! Which remote is meant: by flag, environment, or the project's settings, in this order.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use super::{Failure, eprint_warning, error, read_text, trust, variable};
use crate::engine::remote::{Settings, Shared};
use crate::remote::{Address, ObjectRemote};

/// The settings of a project, at its top.
pub(super) const SETTINGS: &str = "pipeline.config.yaml";
const VARIABLE: &str = "PIPELINE_REMOTE";
/// More than anybody writes into the settings.
const LONGEST: u64 = 1 << 20;
/// Where the clouds' own tools look for settings and credentials.
const CLOUDS: [&str; 4] = ["AWS_", "GOOGLE_", "AZURE_", "SERVICE_ACCOUNT"];

/// What every command that asks a remote takes.
#[derive(Args)]
pub(super) struct RemoteArgs {
    /// A cache that machines share: a folder, or a URL such as `s3://bucket/folder`; empty for none [default: `PIPELINE_REMOTE`,
    /// or the `remote` of `pipeline.config.yaml` once `pipeline cache trust` has allowed it]
    #[arg(long, value_name = "URL")]
    pub(super) remote: Option<String>,
    /// Takes no results from the remote
    #[arg(long)]
    pub(super) no_pull: bool,
    /// Fails if the remote can't be used, instead of going on without it
    #[arg(long)]
    pub(super) remote_required: bool,
}

/// The settings of a project.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    version: u32,
    remote: Option<Value>,
    /// Read by `super::on_finish`.
    pub(super) on_finish: Option<Value>,
    /// Read by `super::executors`.
    pub(super) executors: Option<Value>,
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
        let asked = url.is_some();
        let (url, folder) = match (url, &written) {
            (Some(url), _) => (url, here.as_path()),
            (None, Some(written)) => (written.url.clone(), root),
            (None, None) => return Ok(Shared::none()),
        };
        if url.is_empty() {
            return Ok(Shared::none());
        }
        let address = Address::parse(&url, folder).map_err(|error| wrong(&format!("{error:#}")))?;
        if written.as_ref().is_some_and(|written| written.url == url) {
            without_credentials(&address)?;
        }
        if offline && address.is_far() {
            return Ok(Shared::none());
        }
        if !asked {
            let shown = address.shown();
            if !trust::is_trusted(root, &shown)? {
                let message = format!(
                    "`{SETTINGS}` in `{}` names the remote `{shown}`, which is not allowed on this machine",
                    root.display()
                );
                let hint = format!(
                    "results would be sent there and taken from there: `pipeline cache trust` in that folder allows it for good, \
                     `--remote` or {VARIABLE} name a remote for now, and `--remote \"\"` means none"
                );
                return Err(Failure::Usage(error::with_hint(&message, &hint)));
            }
        }
        if address.is_exposed() {
            let shown = address.shown();
            eprint_warning(&format!(
                "the password for `{shown}` is sent over plain HTTP, where anyone on the way can read it"
            ));
        }
        let mut variables = variables();
        Ok(match ObjectRemote::open(&address, &variables) {
            Ok(remote) => {
                variables.insert(VARIABLE.to_owned(), address.from_anywhere(&url));
                Shared::new(Arc::new(remote), settings).found_by(variables)
            }
            Err(error) => Shared::broken(&format!("{error:#}"), settings.required),
        })
    }
}

/// The remote of a job, which its environment names.
pub(super) fn of_job() -> anyhow::Result<Shared> {
    let url = variable(VARIABLE).filter(|url| !url.is_empty());
    let url = url.with_context(|| format!("the environment of the job has no {VARIABLE}"))?;
    let address = Address::parse(&url, Path::new("/"))?;
    let settings = Settings {
        pull: true,
        push: true,
        required: true,
    };
    let remote = ObjectRemote::open(&address, &variables())?;
    Ok(Shared::new(Arc::new(remote), settings))
}

/// Allows the remote that a project's own file names, or no longer. Gives the remote as it is shown.
pub(super) fn set_trust(root: &Path, trusted: bool) -> Result<String, Failure> {
    let Some(written) = read(root)? else {
        let message = format!("`{}` names no remote", root.join(SETTINGS).display());
        return Err(wrong(&message));
    };
    let address =
        Address::parse(&written.url, root).map_err(|error| wrong(&format!("{error:#}")))?;
    without_credentials(&address)?;
    let shown = address.shown();
    trust::set(root, &shown, trusted)?;
    Ok(shown)
}

fn without_credentials(address: &Address) -> Result<(), Failure> {
    if address.has_credentials() {
        return Err(wrong(&format!(
            "`{SETTINGS}` holds credentials, and is read by many; set {VARIABLE} in the environment instead"
        )));
    }
    Ok(())
}

fn wrong(message: &str) -> Failure {
    Failure::Usage(error::plain(message))
}

/// The settings of the project in `root`; none where it has none.
pub(super) fn read_settings(root: &Path) -> Result<Option<File>, Failure> {
    let path = root.join(SETTINGS);
    let text = match read_text(&path, LONGEST) {
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
    Ok(Some(file))
}

fn read(root: &Path) -> Result<Option<Written>, Failure> {
    let path = root.join(SETTINGS);
    let Some(remote) = read_settings(root)?.and_then(|file| file.remote) else {
        return Ok(None);
    };
    // The value is not shown: it may be an address with a password.
    if !remote.is_object() {
        return Err(wrong(&format!(
            "`{}`: `remote` has the wrong shape; expected a mapping with `url`, as in `remote: {{ url: \
             s3://bucket/folder }}`",
            path.display()
        )));
    }
    let remote = serde_json::from_value(remote);
    remote.map_err(|error| wrong(&format!("`{}`: `remote`: {error}", path.display())))
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
pub(super) fn report_warnings(shared: &Shared) -> Result<(), Failure> {
    let warnings = shared.take_warnings();
    shared.check()?;
    for text in warnings {
        eprint_warning(&text);
    }
    Ok(())
}
