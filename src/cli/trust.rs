//! Which remotes and programs that projects name in their own files may be used: those that the person at this machine allowed, project
//! by project.
//!
//! `pipeline.config.yaml` comes with a project, perhaps from somebody else; the remote that it names would get every result and decide
//! what counts as one, and a program could do anything.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};

use super::{read_text, variable};
use crate::engine::write_atomically;

/// The format of the file.
const VERSION: u32 = 1;
/// More than anybody allows.
const LONGEST: u64 = 16 << 20;

/// Everything that was allowed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    trusted: BTreeSet<Pair>,
}

/// One remote, or one program, for one project.
#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    project: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    remote: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
}

impl Pair {
    fn of(project: &Path) -> Self {
        Self {
            project: project.canonicalize().unwrap_or(project.to_owned()),
            remote: None,
            command: None,
        }
    }

    /// `remote` is the address as it is shown.
    fn remote(project: &Path, remote: &str) -> Self {
        Self {
            remote: Some(remote.to_owned()),
            ..Self::of(project)
        }
    }

    fn command(project: &Path, command: &[String]) -> Self {
        Self {
            command: Some(command.to_vec()),
            ..Self::of(project)
        }
    }

    /// The file that it stands in, among the settings of the person.
    fn file(&self) -> &'static str {
        match self.command {
            Some(_) => "commands.yaml",
            None => "remotes.yaml",
        }
    }
}

/// Whether the person at this machine allowed this remote for this project.
pub(super) fn is_trusted(project: &Path, remote: &str) -> anyhow::Result<bool> {
    is_allowed(&Pair::remote(project, remote))
}

/// Whether the person at this machine allowed this very command for this project.
pub(super) fn is_command_trusted(project: &Path, command: &[String]) -> anyhow::Result<bool> {
    is_allowed(&Pair::command(project, command))
}

fn is_allowed(pair: &Pair) -> anyhow::Result<bool> {
    let Some(path) = path(pair.file()) else {
        return Ok(false);
    };
    Ok(read(&path)?.trusted.contains(pair))
}

/// Allows a remote for a project, or no longer.
pub(super) fn set(project: &Path, remote: &str, trusted: bool) -> anyhow::Result<()> {
    allow(Pair::remote(project, remote), trusted)
}

/// Allows a command for a project, or no longer.
pub(super) fn set_command(project: &Path, command: &[String], trusted: bool) -> anyhow::Result<()> {
    allow(Pair::command(project, command), trusted)
}

fn allow(pair: Pair, trusted: bool) -> anyhow::Result<()> {
    let path = path(pair.file());
    let path = path.context("there is no folder for your settings: HOME is not set")?;
    let mut file = read(&path)?;
    let changed = if trusted {
        file.trusted.insert(pair)
    } else {
        file.trusted.remove(&pair)
    };
    if changed {
        let text = serde_yaml::to_string(&file)?;
        write_atomically(&path, text.as_bytes())?;
    }
    Ok(())
}

/// A file among the settings of the person.
fn path(name: &str) -> Option<PathBuf> {
    let settings = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|folder| folder.is_absolute())
        .or_else(|| {
            Some(std::env::home_dir()?.join(".config")).filter(|folder| folder.is_absolute())
        })?;
    Some(settings.join("pipeline").join(name))
}

fn read(path: &Path) -> anyhow::Result<File> {
    let text = match read_text(path, LONGEST) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(File {
                version: VERSION,
                trusted: BTreeSet::new(),
            });
        }
        Err(error) => return Err(anyhow!("could not read `{}`: {error}", path.display())),
    };
    let broken = || {
        format!(
            "`{}` is damaged; remove it and allow again what stood in it",
            path.display()
        )
    };
    let file: File = serde_yaml::from_str(&text).with_context(broken)?;
    anyhow::ensure!(file.version == VERSION, broken());
    Ok(file)
}
