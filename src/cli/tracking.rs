//! The trackers that trainings name by `report_to`, with their addresses from the environment.

use std::collections::BTreeMap;

use serde_json::Value;

use super::gather::stages::unmarked;
use super::gather::{moment, now, plain};
use super::project::Project;
use super::{Failure, eprint_warning, variable};
use crate::hub::{HubSettings, agent_for};
use crate::recipe::RecipeStage;
use crate::report::tracking::{Credentials, EventFiles, Mlflow, Tracker, Tracking, Trackio};
use crate::stages::train::report_to::Service;

/// What kinds that have `report_to` begin with.
const TRAINS: &str = "train_";

/// The trackers of all trainings of a recipe. What can't be used is told at once, and the run goes on without it.
pub(super) fn tracking(project: &Project, name: Option<&str>) -> Result<Tracking, Failure> {
    let mut tracking = Tracking::default();
    let stages = project.recipe.stages.iter();
    for stage in stages.filter(|stage| stage.kind.name.starts_with(TRAINS)) {
        let parameters = stage.stage.params().map_err(anyhow::Error::from)?;
        for service in services(&parameters) {
            match tracker(project, stage, service, &parameters, name) {
                Ok(tracker) => tracking
                    .add(&stage.name, tracker)
                    .map_err(anyhow::Error::from)?,
                Err(error) => eprint_warning(&format!(
                    "the numbers of `{}` are not sent to {service}: {error:#}",
                    stage.name
                )),
            }
        }
    }
    Ok(tracking)
}

/// The services that a training's parameters name.
fn services(parameters: &Value) -> Vec<Service> {
    let named = parameters.get("report_to").map(unmarked);
    match named {
        Some(Value::Array(names)) => names
            .into_iter()
            .filter_map(|name| serde_json::from_value(name).ok())
            .collect(),
        _ => Vec::new(),
    }
}

fn tracker(
    project: &Project,
    stage: &RecipeStage,
    service: Service,
    parameters: &Value,
    name: Option<&str>,
) -> anyhow::Result<Box<dyn Tracker>> {
    let recipe = project.recipe.path.file_stem().unwrap_or_default();
    let recipe = recipe.to_string_lossy().into_owned();
    let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let run = match name {
        Some(name) => format!("{}-{name}", stage.name),
        None => format!("{}-{}", stage.name, moment(now()).replace([' ', ':'], "-")),
    };
    Ok(match service {
        Service::Tensorboard => {
            let folder = set("TENSORBOARD_LOGGING_DIR").map_or_else(
                || project.root.join(".pipeline/tensorboard").join(&recipe),
                |folder| project.root.join(folder),
            );
            Box::new(EventFiles::new(folder.join(run)))
        }
        Service::Mlflow => {
            let address = address(
                set("MLFLOW_TRACKING_URI"),
                "MLFLOW_TRACKING_URI",
                "a tracking server (`mlflow server`)",
            )?;
            let user = set("MLFLOW_TRACKING_USERNAME").zip(set("MLFLOW_TRACKING_PASSWORD"));
            Box::new(Mlflow::new(
                agent(project, &address)?,
                &address,
                Credentials::new(set("MLFLOW_TRACKING_TOKEN"), user),
                set("MLFLOW_EXPERIMENT_NAME").unwrap_or(recipe),
                run,
                flat(parameters),
            ))
        }
        Service::Trackio => {
            let address = address(
                set("TRACKIO_SERVER_URL"),
                "TRACKIO_SERVER_URL",
                "a server, as `trackio show` prints it with its `write_token`",
            )?;
            Box::new(Trackio::new(
                agent(project, &address)?,
                &address,
                set("TRACKIO_PROJECT").unwrap_or(recipe),
                run,
                &flat(parameters),
            ))
        }
    })
}

/// The address of a server. Folders and databases are written by Python's own clients only.
fn address(value: Option<String>, variable: &str, what: &str) -> anyhow::Result<String> {
    match value {
        Some(address) if address.starts_with("http://") || address.starts_with("https://") => {
            Ok(address)
        }
        Some(_) => anyhow::bail!(
            "`{variable}` is no address of a server; expected `http://..` or `https://..`"
        ),
        None => anyhow::bail!("`{variable}` is not set; expected the address of {what}"),
    }
}

fn agent(project: &Project, address: &str) -> anyhow::Result<ureq::Agent> {
    let env = &project.env;
    let settings = HubSettings::from_variables(
        &|name| env.variable(name).map(str::to_owned),
        env.home.as_deref(),
    )?;
    agent_for(&settings, address)
}

/// Parameters by their paths, without the engine's marks.
fn flat(parameters: &Value) -> Vec<(String, String)> {
    let mut found = BTreeMap::new();
    if let Value::Object(parameters) = unmarked(parameters) {
        for (name, value) in parameters {
            found.insert(name, plain(&value));
        }
    }
    found.into_iter().collect()
}
