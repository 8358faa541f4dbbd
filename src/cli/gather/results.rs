//! The results of a recipe, one by one: what each was made with, upstream included, and what it came to.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use serde_json::{Value, json};

use super::runs::{metrics, parameters};
use super::stages::standings;
use crate::cli::project::Project;
use crate::engine::{Artifact as _, Fingerprint, Origin, Record, Run, State, content, declared};
use crate::recipe::RecipeStage;
use crate::stages::artifacts::Scores;

/// One result of a stage, or a stage that has none yet.
pub(in crate::cli) struct Row {
    /// The name of the stage that made it.
    pub(in crate::cli) stage: String,
    /// The same without the values of a matrix.
    pub(in crate::cli) declared: String,
    /// The last run that had it.
    pub(in crate::cli) run: Option<u64>,
    /// Whether the recipe as it is now has it.
    pub(in crate::cli) current: bool,
    /// When it was made, in seconds since 1970; none if it is not made.
    pub(in crate::cli) made: Option<u64>,
    /// Its parameters and those of the stages it was made from, by `stage.parameter`.
    pub(in crate::cli) parameters: BTreeMap<String, Value>,
    /// Its metrics and those of the stages it was made from, by `stage.metric`.
    pub(in crate::cli) metrics: BTreeMap<String, f64>,
}

/// The stages whose results are compared if nobody names any: evaluations, and trainings that none of them evaluates.
pub(in crate::cli) fn compared(project: &Project) -> Vec<usize> {
    let stages = &project.recipe.stages;
    let evaluations: Vec<usize> = (0..stages.len())
        .filter(|index| stages[*index].stage.output() == Scores::NAME)
        .collect();
    let evaluated = if evaluations.is_empty() {
        vec![false; stages.len()]
    } else {
        project.graph.needed(&evaluations)
    };
    let trains = |index: &usize| {
        let stage = &stages[*index].stage;
        stage.exclusive() && ["adapter", "model"].contains(&stage.output())
    };
    let mut found = evaluations;
    found.extend((0..stages.len()).filter(|index| trains(index) && !evaluated[*index]));
    found
}

/// The results of these stages in all runs and now, the newest last. One result is one row, however many runs had it.
pub(in crate::cli) fn results(project: &Project, wanted: &[usize]) -> Vec<Row> {
    let names: BTreeSet<&str> = wanted
        .iter()
        .map(|index| project.recipe.stages[*index].declared.as_str())
        .collect();
    let asked: BTreeSet<&str> = wanted
        .iter()
        .map(|index| project.recipe.stages[*index].name.as_str())
        .collect();
    let mut known = Known {
        project,
        records: BTreeMap::new(),
        numbers: BTreeMap::new(),
    };
    let mut rows: Vec<Row> = Vec::new();
    let mut index_of: BTreeMap<(String, String), usize> = BTreeMap::new();
    for run in project.runs() {
        for (name, stage) in &run.stages {
            let is_there = project.recipe.stage(name).is_some();
            let wanted = if is_there {
                asked.contains(name.as_str())
            } else {
                names.contains(declared(name))
            };
            if !wanted || stage.artifact.is_none() {
                continue;
            }
            let Some(row) = known.of_run(&run, name) else {
                continue;
            };
            let key = (row.declared.clone(), stage.fingerprint.clone());
            if let Some(index) = index_of.get(&key) {
                rows[*index] = row;
            } else {
                index_of.insert(key, rows.len());
                rows.push(row);
            }
        }
    }
    let standings = standings(project);
    let mut records: BTreeMap<usize, Rc<Record>> = BTreeMap::new();
    for standing in standings {
        if let (State::Fresh { .. }, Some(record)) = (standing.state, standing.record) {
            records.insert(standing.index, Rc::new(record));
        }
    }
    for &index in wanted {
        let row = known.of_recipe(index, &records);
        let stage = &project.recipe.stages[index];
        let there = records.get(&index).and_then(|record| {
            let key = (stage.declared.clone(), record.fingerprint.digest());
            index_of.get(&key).copied()
        });
        match there {
            Some(index) => {
                let run = rows[index].run;
                rows[index] = Row { run, ..row };
            }
            None => rows.push(row),
        }
    }
    rows
}

/// What was read already.
struct Known<'p> {
    project: &'p Project,
    records: BTreeMap<String, Option<Rc<Record>>>,
    numbers: BTreeMap<String, Rc<BTreeMap<String, f64>>>,
}

impl Known<'_> {
    fn record(&mut self, fingerprint: &str) -> Option<Rc<Record>> {
        let store = &self.project.store;
        let known = self.records.entry(fingerprint.to_owned());
        known
            .or_insert_with(|| store.record(fingerprint).map(Rc::new))
            .clone()
    }

    fn numbers(&mut self, record: &Record) -> Rc<BTreeMap<String, f64>> {
        let project = self.project;
        let known = self.numbers.entry(record.fingerprint.digest());
        Rc::clone(known.or_insert_with(|| Rc::new(metrics(project, record))))
    }

    /// The result that a stage had in a run.
    fn of_run(&mut self, run: &Run, name: &str) -> Option<Row> {
        let mut row = Row {
            stage: name.to_owned(),
            declared: declared(name).to_owned(),
            run: Some(run.number),
            current: false,
            made: Some(self.record(&run.stages.get(name)?.fingerprint)?.started),
            parameters: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        let by_content: BTreeMap<&str, &str> = run
            .stages
            .iter()
            .filter_map(|(name, stage)| Some((stage.artifact.as_deref()?, name.as_str())))
            .collect();
        let mut open = vec![name];
        let mut seen = BTreeSet::from([name]);
        while let Some(name) = open.pop() {
            let Some(record) = run
                .stages
                .get(name)
                .and_then(|stage| self.record(&stage.fingerprint))
            else {
                continue;
            };
            row.add(declared(name), parameters(&record), &self.numbers(&record));
            for (parameter, leaf) in record.fingerprint.leaves() {
                let Some(Origin::Stage(origin)) = record.origins.get(&parameter) else {
                    continue;
                };
                let Some(content) = content(&leaf) else {
                    continue;
                };
                // The record may be from a time when the stage was called otherwise.
                let same = run
                    .stages
                    .get_key_value(origin)
                    .filter(|(_, stage)| stage.artifact.as_deref() == Some(content));
                let upstream = same
                    .map(|(name, _)| name.as_str())
                    .or_else(|| by_content.get(content).copied());
                if let Some(upstream) = upstream
                    && seen.insert(upstream)
                {
                    open.push(upstream);
                }
            }
        }
        Some(row)
    }

    /// The stage as the recipe has it now, with its result if it has one.
    fn of_recipe(&mut self, index: usize, records: &BTreeMap<usize, Rc<Record>>) -> Row {
        let project = self.project;
        let stage = &project.recipe.stages[index];
        let mut row = Row {
            stage: stage.name.clone(),
            declared: stage.declared.clone(),
            run: None,
            current: true,
            made: records.get(&index).map(|record| record.started),
            parameters: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        let needed = project.graph.needed(&[index]);
        let stages = project.recipe.stages.iter().enumerate();
        for (index, stage) in stages.filter(|(index, _)| needed[*index]) {
            match records.get(&index).map(Rc::clone) {
                Some(record) => {
                    let numbers = self.numbers(&record);
                    row.add(&stage.declared, parameters(&record), &numbers);
                }
                None => row.add(&stage.declared, of_stage(stage), &BTreeMap::new()),
            }
        }
        row
    }
}

impl Row {
    fn add(
        &mut self,
        stage: &str,
        parameters: BTreeMap<String, Value>,
        numbers: &BTreeMap<String, f64>,
    ) {
        for (name, value) in parameters {
            let name = format!("{stage}.{name}");
            match self.parameters.get_mut(&name) {
                None => _ = self.parameters.insert(name, value),
                // Several stages of one matrix lead here.
                Some(there) if *there != value => {
                    let mut all = match there.take() {
                        Value::Array(all) => all,
                        one => vec![one],
                    };
                    if !all.contains(&value) {
                        all.push(value);
                    }
                    *there = json!(all);
                }
                Some(_) => {}
            }
        }
        for (name, value) in numbers {
            self.metrics.insert(format!("{stage}.{name}"), *value);
        }
    }
}

/// The parameters of a stage that has no result, but for what it reads.
fn of_stage(stage: &RecipeStage) -> BTreeMap<String, Value> {
    let inputs = stage.edges.iter();
    let inputs = inputs.map(|edge| (edge.stage.clone(), String::new()));
    let files = stage.files.iter();
    let files = files.map(|file| (file.path.clone(), String::new()));
    let Ok(params) = stage.stage.params() else {
        return BTreeMap::new();
    };
    let made = Fingerprint::new(
        stage.kind.name,
        stage.kind.version,
        &params,
        &inputs.collect(),
        &files.collect(),
        BTreeMap::new(),
    );
    let Ok((fingerprint, origins)) = made else {
        return BTreeMap::new();
    };
    let mut leaves = fingerprint.leaves();
    leaves.retain(|name, _| !origins.contains_key(name));
    leaves
}
