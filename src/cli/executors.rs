//! The executors that a project has beside this machine, from `pipeline.config.yaml`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::remote::{self, SETTINGS};
use super::{Failure, confine, error, variable};
use crate::engine::remote::Shared;
use crate::engine::{
    Away, Cluster, Executors, Fault, LOCAL, ParseError, SlurmSettings, Store, read_parameters,
};
use crate::recipe::{Recipe, RecipeErrors};

/// The variable with the program that nodes start, where it is not this one.
const PROGRAM: &str = "PIPELINE_SLURM_PROGRAM";
/// What the names of variables begin with that Slurm sets in a job.
const OF_A_JOB: &str = "SLURM_";
/// What the names of variables begin with that are settings of Slurm's programs.
const OF_SLURM: [&str; 3] = ["SLURM_", "SBATCH_", "MUNGE"];
/// The one of them that says which cluster is meant, inside of a job and outside.
const WHICH: &str = "SLURM_CONF";

/// How executors are written.
const SHAPE: &str = "as in `executors: { cluster: { slurm: { partition: main } } }`";

/// One executor as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    slurm: SlurmSettings,
}

/// The clusters of a project, by name.
pub(super) struct Clusters(BTreeMap<String, SlurmSettings>);

impl Clusters {
    /// Reads those of the project in `root`.
    pub(super) fn read(root: &Path) -> Result<Self, Failure> {
        let written = remote::read_settings(root)?.and_then(|file| file.executors);
        let path = root.join(SETTINGS);
        let wrong = |place: &str, message: &str, hint: &str| {
            let message = format!("`{}`: `{place}`: {message}", path.display());
            Failure::Usage(error::with_hint(&message, hint))
        };
        let executors = match written {
            None => return Ok(Self(BTreeMap::new())),
            Some(Value::Object(executors)) => executors,
            Some(_) => return Err(wrong("executors", "expected a map", SHAPE)),
        };
        let mut clusters = BTreeMap::new();
        for (name, value) in executors {
            let place = format!("executors.{name}");
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            if name.is_empty() || !name.chars().all(plain) || name == LOCAL {
                let hint = format!(
                    "a name consists of letters, digits, `_` and `-`; `{LOCAL}` is this machine"
                );
                return Err(wrong(
                    &place,
                    "this can't be the name of an executor",
                    &hint,
                ));
            }
            if !value.is_object() {
                return Err(wrong(&place, "expected a map", SHAPE));
            }
            let Written { slurm } = read_parameters(value).map_err(|found| {
                let ParseError { path, fault } = found;
                let place = match path.as_str() {
                    "." => place.clone(),
                    path => format!("{place}.{path}"),
                };
                let hint = match &fault {
                    Fault::Unknown { known, .. } => format!("its keys are {}", known.join(", ")),
                    _ => SHAPE.to_owned(),
                };
                wrong(&place, &fault.to_string(), &hint)
            })?;
            if let Some((key, message, hint)) = slurm.check() {
                return Err(wrong(&format!("{place}.slurm.{key}"), &message, &hint));
            }
            clusters.insert(name, slurm);
        }
        Ok(Self(clusters))
    }

    /// The names in a sentence.
    fn names(&self) -> String {
        let names = self.0.keys().map(String::as_str).chain([LOCAL]);
        names.collect::<Vec<_>>().join(", ")
    }

    fn hint(&self) -> String {
        if self.0.is_empty() {
            format!("`executors:` in `{SETTINGS}` names others than `{LOCAL}`")
        } else {
            format!("those of this project are {}", self.names())
        }
    }

    /// The settings of a cluster.
    pub(super) fn get(&self, name: &str) -> Option<&SlurmSettings> {
        self.0.get(name)
    }

    /// The name of the cluster, if there is one only.
    pub(super) fn only(&self) -> Option<&str> {
        let mut names = self.0.keys().map(String::as_str);
        names.next().filter(|_| names.next().is_none())
    }

    fn has(&self, name: &str) -> bool {
        name == LOCAL || self.0.contains_key(name)
    }

    /// An error if the command line names an executor that is not there.
    pub(super) fn check_name(&self, name: &str) -> Result<(), Failure> {
        if self.has(name) {
            return Ok(());
        }
        let message = format!("there is no executor `{name}`");
        Err(Failure::Usage(error::with_hint(&message, &self.hint())))
    }

    /// The mistakes of a recipe that names executors that are not there.
    pub(super) fn check(&self, recipe: &Recipe) -> Result<(), Failure> {
        let stages = recipe.stages.iter();
        let wrong = stages.filter_map(|stage| {
            let name = stage.handling.executor.as_deref()?;
            let path = format!("stages.{}.executor", stage.name);
            let message = format!("there is no executor `{name}`");
            (!self.has(name)).then(|| confine::error(recipe, &path, message, self.hint()))
        });
        let mut wrong: Vec<_> = wrong.collect();
        // The stages of a matrix are written once.
        wrong.dedup_by_key(|error| error.span.map(|span| (span.line, span.column)));
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Failure::Usage(error::render(&RecipeErrors(wrong))))
    }

    /// Makes executors of them, for a recipe. Jobs on nodes that don't see the store go through the remote `shared`.
    pub(super) fn add_to(
        self,
        executors: &mut Executors,
        recipe: &Path,
        store: &Store,
        shared: &Shared,
    ) -> Result<(), Failure> {
        let name = recipe.file_stem().unwrap_or_default();
        for (cluster, settings) in self.0 {
            let remote = shared.for_jobs().filter(|_| !settings.is_shared());
            let away =
                remote.map(|(shared, variables)| Away::new(shared, variables, store.clone()));
            executors.add(Cluster {
                name: cluster,
                settings,
                program: program()?,
                recipe: name.to_string_lossy().into_owned(),
                unset: of_a_job(),
                private: private(),
                away,
            });
        }
        Ok(())
    }
}

/// This program, where the nodes find it.
pub(super) fn program() -> Result<PathBuf, Failure> {
    if let Some(program) = variable(PROGRAM).filter(|program| !program.is_empty()) {
        return Ok(program.into());
    }
    let own = std::env::current_exe().and_then(|own| own.canonicalize());
    own.map_err(|error| {
        let message = format!("this program can't be found, to be started on nodes: {error}");
        Failure::Usage(error::with_hint(&message, &format!("name it by {PROGRAM}")))
    })
}

/// The variables of this process that are no settings of Slurm's programs.
fn private() -> Vec<OsString> {
    let names = std::env::vars_os().map(|(name, _)| name);
    let is_setting = |name: &OsString| {
        let name = name.as_encoded_bytes();
        OF_SLURM
            .iter()
            .any(|start| name.starts_with(start.as_bytes()))
    };
    names.filter(|name| !is_setting(name)).collect()
}

/// The variables of the job that this process may be in. Slurm's programs would take some of them for settings of new jobs.
fn of_a_job() -> Vec<OsString> {
    let names = std::env::vars_os().map(|(name, _)| name);
    let of_a_job = |name: &OsString| {
        let name = name.as_encoded_bytes();
        name.starts_with(OF_A_JOB.as_bytes()) && name != WHICH.as_bytes()
    };
    names.filter(of_a_job).collect()
}
