//! What people want to talk to: a stage of a recipe, or a folder with a model or an adapter.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::args::{ReadingArgs, RecipeArgs, StoreArgs};
use super::project::Project;
use super::{Failure, error, read_text};
use crate::engine::State;
use crate::inference::Folders;

/// The longest `adapter_config.json`.
const LONGEST_CONFIG: u64 = 1 << 20;
/// Files by which a folder is known.
const ADAPTER_CONFIG: &str = "adapter_config.json";
const MODEL_CONFIG: &str = "config.json";

/// What every command takes that runs a model.
#[derive(clap::Args)]
pub(super) struct TargetArgs {
    /// A recipe, or a folder with a model or an adapter as transformers and PEFT write them
    #[arg(value_name = "RECIPE|FOLDER")]
    target: PathBuf,
    /// The stage of the recipe: one that makes a model or an adapter, or an evaluation of one [default: the last such stage with a result]
    stage: Option<String>,
    /// The folder of the model that an adapter belongs to, or that `--compare` compares with [default: what the recipe says]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// A model that is there.
pub(super) struct Target {
    /// What people call it.
    pub(super) name: String,
    /// Where it is.
    pub(super) tuned: Folders,
    /// What it was made of, where that is another folder; an adapter's base is in `tuned`.
    pub(super) base: Option<Folders>,
    /// What people should know of it.
    pub(super) note: Option<String>,
}

impl TargetArgs {
    pub(super) fn open(&self) -> Result<Target, Failure> {
        if self.target.is_dir() {
            if let Some(stage) = &self.stage {
                let message = format!(
                    "`{}` is a folder and has no stage `{stage}`",
                    self.target.display()
                );
                let hint = "give a recipe to name a stage";
                return Err(Failure::Usage(error::with_hint(&message, hint)));
            }
            return self.folder();
        }
        let recipe = RecipeArgs::of(&self.target, &self.reading);
        let project = Project::open(&recipe, &self.store)?;
        let mut target = of_stage(&project, self.stage.as_deref())?;
        if let Some(base) = &self.base {
            match &mut target.tuned {
                Folders {
                    model,
                    adapter: Some(_),
                } => model.clone_from(base),
                Folders { .. } => target.base = Some(Folders::model(base)),
            }
        }
        Ok(target)
    }

    fn folder(&self) -> Result<Target, Failure> {
        let folder = &self.target;
        let name = folder
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        let name = name.unwrap_or_else(|| folder.display().to_string());
        let (tuned, base) = if folder.join(ADAPTER_CONFIG).is_file() {
            let model = match &self.base {
                Some(base) => base.clone(),
                None => base_of(folder)?,
            };
            (Folders::with_adapter(model, folder), None)
        } else if folder.join(MODEL_CONFIG).is_file() {
            let base = self.base.as_ref().map(Folders::model);
            (Folders::model(folder), base)
        } else {
            let message = format!(
                "`{}` holds neither a model (`{MODEL_CONFIG}`) nor an adapter (`{ADAPTER_CONFIG}`)",
                folder.display()
            );
            let hint = "give a folder as transformers or PEFT write it, or a recipe";
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        };
        Ok(Target {
            name,
            tuned,
            base,
            note: None,
        })
    }
}

/// The folder that an adapter names as its base.
fn base_of(adapter: &Path) -> Result<PathBuf, Failure> {
    let path = adapter.join(ADAPTER_CONFIG);
    let text = read_text(&path, LONGEST_CONFIG)
        .map_err(|error| anyhow::anyhow!("could not read `{}`: {error}", path.display()))?;
    let config: Value = serde_json::from_str(&text)
        .map_err(|error| anyhow::anyhow!("could not read `{}`: {error}", path.display()))?;
    let named = config["base_model_name_or_path"].as_str();
    match named.map(PathBuf::from) {
        Some(base) if base.join(MODEL_CONFIG).is_file() => Ok(base),
        _ => {
            let message = match named {
                Some(named) => format!(
                    "the adapter `{}` belongs to `{named}`, which is no folder here",
                    adapter.display()
                ),
                None => format!(
                    "the adapter `{}` does not name its model",
                    adapter.display()
                ),
            };
            let hint = "give the model's folder with `--base DIR`";
            Err(Failure::Usage(error::with_hint(&message, hint)))
        }
    }
}

/// Nouns of artifacts that can be talked to, or that lead to one.
const SPEAKING: [&str; 3] = ["model", "adapter", "scores"];

fn of_stage(project: &Project, stage: Option<&str>) -> Result<Target, Failure> {
    let index = match stage {
        Some(stage) => project.find(stage)?,
        None => last(project)?,
    };
    let node = &project.recipe.stages[index];
    let (name, recipe) = (node.name.clone(), project.recipe.path.display().to_string());
    let output = node.stage.output();
    if !SPEAKING.contains(&output) {
        let can = speaking(project, &SPEAKING);
        let message = format!("`{name}` makes {output}, which can't answer");
        let hint = if can.is_empty() {
            format!("`{recipe}` has no stage that makes a model or an adapter")
        } else {
            format!("choose one of {}", can.join(", "))
        };
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    let Some(record) = project.record_of(index) else {
        return Err(anyhow::anyhow!(
            "`{name}` has no result yet; `pipeline run {recipe} {name}` makes it"
        )
        .into());
    };
    let stale = matches!(
        project.plan().get(index),
        Some(State::Runs { .. } | State::WaitsOn { .. })
    );
    let note = stale.then(|| {
        format!(
            "this is the last result of `{name}`, which is stale now: `pipeline why {recipe} {name}` tells why"
        )
    });
    let of = |parameter: &str| record.fingerprint.contents().remove(parameter);
    let here = |content: &str| {
        let folder = project.store.artifact(content);
        if folder.is_dir() {
            return Ok(folder);
        }
        Err(Failure::Failed(anyhow::anyhow!(
            "the files that `{name}` needs are not here any more; `pipeline run {recipe} {name}` makes them again, \
             `pipeline cache pull {recipe} {name}` fetches them from a remote"
        )))
    };
    let (tuned, base) = match record.output.as_str() {
        "model" => {
            let base = of("model").map(|content| here(&content)).transpose();
            // A model can be talked to without what it was made of.
            let base = base.ok().flatten().map(Folders::model);
            (Folders::model(here(&record.artifact)?), base)
        }
        "adapter" => {
            let model = match of("model") {
                Some(content) => content,
                None => companion(project, &name)?,
            };
            let adapter = here(&record.artifact)?;
            (Folders::with_adapter(here(&model)?, adapter), None)
        }
        _ => {
            let Some(model) = of("model") else {
                let message = format!("the record of `{name}` names no model");
                return Err(anyhow::anyhow!(message).into());
            };
            let adapter = of("adapter").map(|content| here(&content)).transpose()?;
            let model = here(&model)?;
            (Folders { model, adapter }, None)
        }
    };
    Ok(Target {
        name,
        tuned,
        base,
        note,
    })
}

/// The names of the stages that make something of these nouns.
fn speaking<'p>(project: &'p Project, nouns: &[&str]) -> Vec<&'p str> {
    let stages = project.recipe.stages.iter();
    stages
        .filter(|stage| nouns.contains(&stage.stage.output()))
        .map(|stage| stage.name.as_str())
        .collect()
}

/// The last stage that makes a model or an adapter and has a result.
fn last(project: &Project) -> Result<usize, Failure> {
    let order = project.recipe.order();
    let makes = |index: &&usize| {
        let output = project.recipe.stages[**index].stage.output();
        ["model", "adapter"].contains(&output)
    };
    let mut candidates = order.iter().rev().filter(makes).copied().peekable();
    let recipe = project.recipe.path.display();
    if candidates.peek().is_none() {
        let message = format!("`{recipe}` has no stage that makes a model or an adapter");
        let hint = "name a recipe that trains, or a folder with a model";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    let made = |index: &usize| project.record_of(*index).is_some();
    candidates.find(made).ok_or_else(|| {
        anyhow::anyhow!(
            "`{recipe}` has made no model and no adapter yet; `pipeline run {recipe}` makes them"
        )
        .into()
    })
}

/// The model that another stage of the recipe uses together with an adapter, whose own stage names none.
fn companion(project: &Project, adapter: &str) -> Result<String, Failure> {
    for stage in &project.recipe.stages {
        let of = |parameter: &str| {
            let mut edges = stage.edges.iter();
            let edge = edges.find(|edge| edge.parameter == parameter)?;
            Some(edge.stage.as_str())
        };
        if of("adapter") == Some(adapter)
            && let Some(model) = of("model")
            && let Some(index) = project.graph.find(model)
            && let Some(record) = project.record_of(index)
        {
            return Ok(record.artifact);
        }
    }
    let message = format!("the recipe does not say to which model the adapter `{adapter}` belongs");
    let hint = "give the model's folder with `--base DIR`";
    Err(Failure::Usage(error::with_hint(&message, hint)))
}
