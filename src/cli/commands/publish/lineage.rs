//! What a result was made of, by the records of the recipe's stages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::cli::project::Project;
use crate::engine::Record;

/// Numbers of an evaluation.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scores {
    /// The stage.
    pub(super) stage: String,
    /// The split and how many rows it has.
    pub(super) split: String,
    pub(super) rows: u64,
    /// By metric: of the base alone, and with what was trained.
    pub(super) metrics: BTreeMap<String, (Option<f64>, Option<f64>)>,
}

/// A result with all that it was made of.
#[derive(Debug, Clone)]
pub(super) struct Lineage {
    /// The result's own record.
    pub(super) record: Record,
    /// The records of what it was made of, those that others need first.
    pub(super) ancestors: Vec<Record>,
    /// Evaluations of it.
    pub(super) scores: Vec<Scores>,
    /// The recipe's text.
    pub(super) recipe: String,
}

impl Lineage {
    pub(super) fn of(project: &Project, record: &Record) -> Self {
        let indices = project.recipe.order();
        let records: Vec<Record> = indices
            .into_iter()
            .filter_map(|index| project.record_of(index))
            .collect();
        let folder = |content: &str| project.store.artifact(content);
        Self::among(record, &records, project.recipe.text.clone(), &folder)
    }

    /// The same with the records of all stages, those that others need first.
    fn among(
        record: &Record,
        records: &[Record],
        recipe: String,
        folder: &dyn Fn(&str) -> std::path::PathBuf,
    ) -> Self {
        let mut wanted = BTreeSet::from([record.artifact.clone()]);
        let mut ancestors = Vec::new();
        for other in records.iter().rev() {
            if wanted.contains(&other.artifact) {
                wanted.extend(other.fingerprint.contents().into_values());
                if other.artifact != record.artifact {
                    ancestors.push(other.clone());
                }
            }
        }
        ancestors.reverse();
        // Of a merged model its adapter was evaluated, before.
        let mut evaluated = BTreeSet::from([record.artifact.as_str()]);
        let own = record.fingerprint.contents();
        if record.fingerprint.kind == "merge" {
            evaluated.extend(own.get("adapter").map(String::as_str));
        }
        let scores = records.iter().filter_map(|other| {
            let contents = other.fingerprint.contents();
            let of = |parameter: &str| {
                let content = contents.get(parameter);
                content.is_some_and(|content| evaluated.contains(content.as_str()))
            };
            let of_it = other.output == "scores" && (of("adapter") || of("model"));
            of_it.then(|| scores(&other.stage, &folder(&other.artifact), of("adapter")))?
        });
        Self {
            scores: scores.collect(),
            record: record.clone(),
            ancestors,
            recipe,
        }
    }

    /// The records of these kinds among what it was made of, itself included.
    pub(super) fn kinds(&self, starts: &str) -> Vec<&Record> {
        let all = self.ancestors.iter().chain([&self.record]);
        all.filter(|record| record.fingerprint.kind.starts_with(starts))
            .collect()
    }

    /// The record of the model that it began with.
    pub(super) fn base(&self) -> Option<&Record> {
        let mut record = &self.record;
        // As many steps as there are records.
        for _ in 0..=self.ancestors.len() {
            let contents = record.fingerprint.contents();
            let Some(model) = contents.get("model") else {
                return (record.artifact != self.record.artifact).then_some(record);
            };
            let Some(next) = self.ancestors.iter().find(|other| &other.artifact == model) else {
                return (record.artifact != self.record.artifact).then_some(record);
            };
            record = next;
        }
        None
    }

    /// The repository of the hub that the base came from.
    pub(super) fn base_repo(&self) -> Option<&str> {
        self.base_on_hub().map(|(repo, _)| repo)
    }

    /// The same with its commit.
    pub(super) fn base_on_hub(&self) -> Option<(&str, &str)> {
        let base = self.base()?;
        let repo = base.params.get("repo")?.as_str()?;
        let commit = base.fingerprint.outside.get("commit")?;
        (base.fingerprint.kind == "download_model").then_some((repo, commit.as_str()))
    }

    /// The datasets of the hub that it learnt from.
    pub(super) fn datasets(&self) -> Vec<&str> {
        let repos = self.kinds("download_dataset").into_iter();
        let mut repos: Vec<&str> = repos
            .filter_map(|record| record.params.get("repo")?.as_str())
            .collect();
        repos.sort_unstable();
        repos.dedup();
        repos
    }
}

fn scores(stage: &str, folder: &Path, with_adapter: bool) -> Option<Scores> {
    let text = std::fs::read(folder.join("scores.json")).ok()?;
    let report: Value = serde_json::from_slice(&text).ok()?;
    let part = |name: &str| -> BTreeMap<String, f64> {
        let part = report.get(name).and_then(Value::as_object);
        let entries = part.into_iter().flatten();
        entries
            .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
            .collect()
    };
    let base = part("base");
    // With a baseline the model has a part of its own.
    let tuned = part(if with_adapter { "adapter" } else { "model" });
    let metrics = base.keys().chain(tuned.keys()).map(|name| {
        let numbers = if with_adapter || !tuned.is_empty() {
            (base.get(name).copied(), tuned.get(name).copied())
        } else {
            // The model was scored by itself.
            (None, base.get(name).copied())
        };
        (name.clone(), numbers)
    });
    Some(Scores {
        stage: stage.to_owned(),
        split: report.get("split")?.as_str()?.to_owned(),
        rows: report.get("rows")?.as_u64()?,
        metrics: metrics.collect(),
    })
}
