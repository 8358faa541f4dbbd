//! What will fail is told before anything runs, as far as the recipe and a cheap look at local files can tell: a chain of stages that
//! can't work together, rows that lack what a training learns from, a model that is not computed.
//!
//! Only what is certain is told: a file that can't be looked at is left to its stage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::adapter::attach_lora::AttachLora;
use super::dataset::import_dataset::ImportDataset;
use super::model::gguf;
use super::model::merge::Merge;
use crate::engine::{AnyStage, Marker, Stage, markers, unmarked};
use crate::ml::model::families;

/// The longest `config.json` that is looked at, in bytes.
const LONGEST_CONFIG: u64 = 1 << 20;

/// A stage of a recipe, as far as is needed here.
pub struct Planned<'a> {
    /// Its name in the recipe.
    pub name: &'a str,
    /// The stage.
    pub stage: &'a dyn AnyStage,
    /// Where the local files are that it reads, by the path as it was written.
    pub files: BTreeMap<String, PathBuf>,
}

/// Something that will fail.
#[derive(Debug, PartialEq, Eq)]
pub struct Foreseen {
    /// The stage.
    pub stage: String,
    /// The parameter that is wrong.
    pub parameter: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// Looks at all stages of a recipe.
pub fn foresee(stages: &[Planned<'_>]) -> Vec<Foreseen> {
    let recipe = Stages {
        by_name: stages.iter().map(|stage| (stage.name, stage)).collect(),
    };
    let mut found = Vec::new();
    for planned in stages {
        found.extend(recipe.whole_beside_a_part_of_it(planned));
        let mut tell = |parameter, message: String, hint: String| {
            found.push(Foreseen {
                stage: planned.name.to_owned(),
                parameter,
                message,
                hint,
            });
        };
        match planned.stage.kind() {
            "import_model" => {
                if let Some(path) = gguf_file(planned) {
                    if let Some(error) = gguf::unsupported(path) {
                        let hint =
                            "take another file of the model, or one of a model that is supported";
                        tell("path", format!("{error:#}"), hint.to_owned());
                    }
                } else if let Some((_, config)) = config(planned)
                    && let Err(error) = families::family(model_type(&config))
                {
                    let hint = "docs/families.md has the models that can be computed";
                    tell("path", error.to_string(), hint.to_owned());
                }
            }
            "quantize" => {
                if let Some(quantised) = recipe.quantised(planned) {
                    let hint =
                        format!("use `{}` where `{}` is used", quantised.stage, planned.name);
                    let message = format!("{} already", quantised.sentence);
                    tell("model", message, hint);
                }
            }
            "train_sft" | "train_orpo" | "train_dpo" | "train_cpo" | "train_kto"
            | "train_reward" => {
                if recipe.edge(planned, "adapter").is_none()
                    && let Some(quantised) = recipe.quantised(planned)
                {
                    let hint = "give `adapter` a stage that makes one (`attach_lora`), or name the dense model here";
                    let message = format!(
                        "{}, and without `adapter` the model itself is trained, which needs dense weights",
                        quantised.sentence
                    );
                    tell("model", message, hint.to_owned());
                }
                if !["train_sft", "train_kto"].contains(&planned.stage.kind())
                    && let Some(rows) = recipe.rows(planned)
                    && !rows.columns.iter().any(|column| column == "rejected")
                {
                    let message = format!(
                        "`{}` learns from preferences, but the rows of `{}` (stage `{}`) have no `rejected`",
                        planned.stage.kind(),
                        rows.path,
                        rows.stage
                    );
                    let hint = format!(
                        "they have {}; `train_sft` learns from single answers, and `columns: {{ rejected: .. }}` of `{}` names a column \
                         of another name",
                        rows.columns.join(", "),
                        rows.stage
                    );
                    tell("dataset", message, hint);
                }
            }
            _ => {}
        }
        if let Some((scored, theirs, own)) = recipe.scored_otherwise(planned) {
            let message = format!(
                "the reference log-probabilities of `{scored}` are computed in {theirs}, and this training computes in {own}"
            );
            let hint = "set `bf16` and `fp16` of both alike".to_owned();
            found.push(Foreseen {
                stage: planned.name.to_owned(),
                parameter: "dataset",
                message,
                hint,
            });
        }
    }
    found
}

/// The type in which a stage computes products.
fn compute(params: &Value) -> &'static str {
    let is_on = |name: &str| params[name] == Value::Bool(true);
    match (is_on("bf16"), is_on("fp16")) {
        (true, _) => "bf16",
        (_, true) => "f16",
        _ => "f32",
    }
}

struct Stages<'a> {
    by_name: BTreeMap<&'a str, &'a Planned<'a>>,
}

/// A model that is stored in 4 bits.
struct Quantised {
    stage: String,
    sentence: String,
}

/// Rows of a local file.
struct Rows {
    stage: String,
    path: String,
    columns: Vec<String>,
}

impl<'a> Stages<'a> {
    /// The stage that a parameter names.
    fn edge(&self, planned: &Planned<'_>, parameter: &str) -> Option<&'a Planned<'a>> {
        let params = planned.stage.params().ok()?;
        let named = markers(params.get(parameter)?)
            .into_iter()
            .find_map(|(below, marker)| match marker {
                Marker::Stage { stage, .. } if below.is_empty() => Some(stage),
                _ => None,
            })?;
        self.by_name.get(named.as_str()).copied()
    }

    /// Whether an adapter that began with a part of the weights is beside a model that still has that part.
    fn whole_beside_a_part_of_it(&self, planned: &Planned<'a>) -> Option<Foreseen> {
        let attached = self.part_of_weights(self.edge(planned, "adapter")?)?;
        let model = self.edge(planned, "model")?;
        let is_attached =
            |other: Option<&Planned<'_>>| other.is_some_and(|other| other.name == attached.name);
        let mut at = model;
        while at.stage.kind() == "quantize" {
            if is_attached(self.edge(at, "loftq")) {
                return None;
            }
            at = self.edge(at, "model")?;
        }
        let subtracts = |stage: &Planned<'_>| {
            is_attached(self.edge(stage, "adapter"))
                && params::<Merge>(stage).is_some_and(|merge| merge.subtracts())
        };
        // A model from elsewhere may be what it has to be.
        let is_base = self
            .edge(attached, "model")
            .is_some_and(|base| base.name == at.name);
        if subtracts(planned) || subtracts(at) || !is_base {
            return None;
        }
        Some(Foreseen {
            stage: planned.name.to_owned(),
            parameter: "model",
            message: format!(
                "the adapter of `{}` began as a part of the weights of `{}`, which are whole here, so that this part counts twice",
                attached.name, at.name
            ),
            hint: format!(
                "let `model` be a stage `merge: {{ model: {}, adapter: {}, weight: -1 }}`, or for 4 bits `quantize: {{ model: {}, loftq: {} }}`",
                at.name, attached.name, at.name, attached.name
            ),
        })
    }

    /// The stage that made an adapter as a part of the weights, through the trainings after it.
    fn part_of_weights(&self, adapter: &'a Planned<'a>) -> Option<&'a Planned<'a>> {
        let mut at = adapter;
        while at.stage.kind().starts_with("train_") {
            at = self.edge(at, "adapter")?;
        }
        let attached = params::<AttachLora>(at)?;
        attached.takes_from_model().then_some(at)
    }

    /// Whether the `model` of a stage is stored in 4 bits.
    fn quantised(&self, planned: &Planned<'_>) -> Option<Quantised> {
        let model = self.edge(planned, "model")?;
        let sentence = match model.stage.kind() {
            "quantize" => format!("`{}` is stored in 4 bits", model.name),
            "import_model" => {
                let (path, config) = config(model)?;
                config
                    .get("quantization_config")
                    .filter(|it| it.is_object())?;
                format!("`{}` (`{path}`) is stored in 4 bits", model.name)
            }
            _ => return None,
        };
        Some(Quantised {
            stage: model.name.to_owned(),
            sentence,
        })
    }

    /// For a training that takes reference log-probabilities which are computed in another type: their stage, its type and the training's.
    fn scored_otherwise(
        &self,
        planned: &Planned<'_>,
    ) -> Option<(&'a str, &'static str, &'static str)> {
        if !["train_dpo", "train_kto"].contains(&planned.stage.kind()) {
            return None;
        }
        let scored = self.edge(planned, "dataset")?;
        if scored.stage.kind() != "score_reference" {
            return None;
        }
        let theirs = scored.stage.params().ok()?;
        let own = planned.stage.params().ok()?;
        let (theirs, own) = (compute(&theirs), compute(&own));
        (theirs != own).then_some((scored.name, theirs, own))
    }

    /// The rows that a stage's `dataset` comes from, where they are in a local file.
    fn rows(&self, planned: &Planned<'a>) -> Option<Rows> {
        let mut at = self.edge(planned, "dataset")?;
        // A recipe has no cycle.
        while at.stage.kind() != "import_dataset" {
            at = self.edge(at, "dataset")?;
        }
        let params = unmarked(Arc::unwrap_or_clone(at.stage.params().ok()?));
        let import: ImportDataset = serde_json::from_value(params).ok()?;
        let (path, columns) = import.columns_of_first_row(&at.files)?;
        Some(Rows {
            stage: at.name.to_owned(),
            path,
            columns,
        })
    }
}

/// The parameters of a stage of this kind.
fn params<S: Stage>(planned: &Planned<'_>) -> Option<S> {
    if planned.stage.kind() != S::KIND {
        return None;
    }
    let params = Arc::unwrap_or_clone(planned.stage.params().ok()?);
    serde_json::from_value(unmarked(params)).ok()
}

/// The `config.json` of an imported model, with the folder as it was written.
fn config(planned: &Planned<'_>) -> Option<(String, Value)> {
    let (written, folder) = planned.files.first_key_value()?;
    let path: &Path = &folder.join("config.json");
    let about = std::fs::metadata(path).ok()?;
    if !about.is_file() || about.len() > LONGEST_CONFIG {
        return None;
    }
    // What is no map is for the stage to refuse.
    let config: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    config.is_object().then(|| (written.clone(), config))
}

/// The GGUF file that a stage imports.
fn gguf_file<'a>(planned: &'a Planned<'_>) -> Option<&'a Path> {
    let (written, path) = planned.files.first_key_value()?;
    Some(path.as_path()).filter(|path| gguf::is_gguf(written) && path.is_file())
}

fn model_type(config: &Value) -> Option<&str> {
    config.get("model_type").and_then(Value::as_str)
}
