//! The runs of a recipe with their parameters and metrics, for tables and comparisons.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::curves;
use super::evaluation::{OF_EVALUATIONS, scores};
use crate::cli::project::Project;
use crate::engine::{Artifact as _, Origin, Record, Run, short};
use crate::stages::artifacts::Scores;

/// The numbers of a training that stand for it in a table: the last ones.
const OF_TRAININGS: [&str; 2] = ["loss", "eval_loss"];

/// A run with what its stages were given and came to.
pub(in crate::cli) struct RunInfo {
    /// The run.
    pub(in crate::cli) run: Run,
    /// Parameters by `stage.parameter`; contents of files by their digest.
    pub(in crate::cli) parameters: BTreeMap<String, Value>,
    /// Metrics by `stage.metric`.
    pub(in crate::cli) metrics: BTreeMap<String, f64>,
}

/// All runs, the oldest first.
pub(in crate::cli) fn runs(project: &Project) -> Vec<RunInfo> {
    let mut memo: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    let runs = project.runs().into_iter();
    runs.map(|run| {
        let mut parameters = BTreeMap::new();
        let mut metrics = BTreeMap::new();
        for (name, stage) in &run.stages {
            let Some(record) = project.store.record(&stage.fingerprint) else {
                continue;
            };
            for (parameter, value) in self::parameters(&record) {
                parameters.insert(format!("{name}.{parameter}"), value);
            }
            if stage.artifact.is_none() {
                continue;
            }
            let numbers = memo
                .entry(stage.fingerprint.clone())
                .or_insert_with(|| self::metrics(project, &record));
            for (metric, value) in numbers.iter() {
                metrics.insert(format!("{name}.{metric}"), *value);
            }
        }
        RunInfo {
            run,
            parameters,
            metrics,
        }
    })
    .collect()
}

/// What a stage was given, but for the results of other stages.
pub(super) fn parameters(record: &Record) -> BTreeMap<String, Value> {
    let mut parameters = BTreeMap::new();
    for (name, value) in record.fingerprint.leaves() {
        match record.origins.get(&name) {
            Some(Origin::Stage(_)) => {}
            Some(Origin::File(_)) => {
                let digest = crate::engine::content(&value);
                parameters.insert(name, Value::from(short(digest)));
            }
            None => _ = parameters.insert(name, value),
        }
    }
    let outside = record.fingerprint.outside.iter();
    parameters.extend(outside.map(|(name, value)| (name.clone(), Value::from(short(Some(value))))));
    parameters
}

/// The numbers of a stage's result: all scores of an evaluation, and the last ones of a training. Where its files are gone, those that its
/// record has.
pub(in crate::cli) fn metrics(project: &Project, record: &Record) -> BTreeMap<String, f64> {
    let folder = project.store.artifact(&record.artifact);
    let mut found = BTreeMap::new();
    if record.output == Scores::NAME {
        let scores = scores(&folder);
        let part = |name: &str| scores.as_ref()?.get(name)?.as_object().cloned();
        let shown = ["adapter", "model", "base"].into_iter().find_map(part);
        let noted = || record.notes.clone().into_iter().collect();
        for (name, value) in shown.unwrap_or_else(noted) {
            if let Some(value) = value.as_f64() {
                found.insert(name, value);
            }
        }
        return found;
    }
    for log in curves::read(&folder) {
        for (name, value) in log.values {
            found.insert(name, value);
        }
    }
    found
}

/// The metrics that stand for a stage, those of evaluations first.
pub(in crate::cli) fn watched() -> impl Iterator<Item = &'static str> {
    OF_EVALUATIONS
        .into_iter()
        .chain(OF_TRAININGS.into_iter().rev())
}

/// Those of these metrics (`stage.metric`) that stand for their stage in a table that has no room for all: what every evaluation or training
/// has, or all that there are of a stage with scores of its own.
pub(in crate::cli) fn standing<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let mut of_stage: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in names {
        of_stage.entry(parts(name).0).or_default().push(name);
    }
    let standing = of_stage.into_values().flat_map(|names| {
        let usual: Vec<&str> = names
            .iter()
            .copied()
            .filter(|name| watched().any(|metric| metric == parts(name).1))
            .collect();
        if usual.is_empty() { names } else { usual }
    });
    standing.collect()
}

/// A stage and its metric. The names of stages may have dots, those of metrics don't.
pub(in crate::cli) fn parts(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

/// Whether `name` is that of a parameter of this stage.
fn is_of(name: &str, stage: &str) -> bool {
    let rest = name.strip_prefix(stage);
    rest.is_some_and(|rest| rest.starts_with('.'))
}

/// The names of parameters whose values are not the same in all of these runs.
pub(in crate::cli) fn differing(runs: &[&RunInfo]) -> Vec<String> {
    let names: BTreeSet<&String> = runs.iter().flat_map(|run| run.parameters.keys()).collect();
    // A stage that a run does not know differs in nothing; of one that it knows, an optional parameter may be absent.
    let knows = |run: &&&RunInfo, name: &str| {
        let stages = run.run.stages.keys();
        let mut stages = stages.filter(|stage| is_of(name, stage));
        stages.any(|stage| run.parameters.keys().any(|other| is_of(other, stage)))
    };
    let differs = |name: &&String| {
        let knowing = runs.iter().filter(|run| knows(run, name));
        let mut values = knowing.map(|run| run.parameters.get(*name));
        let first = values.next().flatten();
        values.any(|value| value != first)
    };
    names.into_iter().filter(differs).cloned().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn info(parameters: &[(&str, Value)]) -> RunInfo {
        let stages: BTreeMap<&str, Value> = ["tuned[beta=0.1]", "scores"]
            .into_iter()
            .map(|stage| {
                let ran = json!({ "fingerprint": "f", "artifact": null, "ran": true });
                (stage, ran)
            })
            .collect();
        let run = json!({
            "format": 1, "number": 1, "started": 0, "seconds": 1.0, "outcome": "done", "stages": stages,
        });
        let parameters = parameters.iter();
        RunInfo {
            run: serde_json::from_value(run).unwrap(),
            parameters: parameters
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect(),
            metrics: BTreeMap::new(),
        }
    }

    #[test]
    fn a_stage_that_a_run_did_not_reach_differs_in_nothing() {
        let whole = info(&[
            ("tuned[beta=0.1].r", json!(8)),
            ("tuned[beta=0.1].seed", json!(1)),
            ("scores.split", json!("test")),
        ]);
        let stopped = info(&[("tuned[beta=0.1].r", json!(8))]);
        assert_eq!(differing(&[&whole, &stopped]), ["tuned[beta=0.1].seed"]);
    }

    #[test]
    fn scores_of_any_name_stand_for_their_stage_if_it_has_no_usual_ones() {
        let names = [
            "tuned[beta=0.1].eval_loss",
            "tuned[beta=0.1].grad_norm",
            "prep.scores.rewards/accuracies",
            "prep.scores.rewards/chosen",
            "choices.acc",
            "own.f1",
            "own.recall",
        ];
        let expected = [
            "choices.acc",
            "own.f1",
            "own.recall",
            "prep.scores.rewards/accuracies",
            "tuned[beta=0.1].eval_loss",
        ];
        assert_eq!(standing(names), expected.into());
    }
}
