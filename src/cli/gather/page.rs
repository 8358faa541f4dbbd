//! All that a report shows of a recipe.

use std::collections::BTreeMap;

use serde_json::json;

use super::stages::{Standing, standings};
use super::{curves, data, environment, evaluation, moment, now, plain, stages, training};
use crate::cli::project::Project;
use crate::engine::Artifact as _;
use crate::engine::{LoggedEvent, Record, Run};
use crate::report::duration;
use crate::report::page::{Data, Page, Table};
use crate::stages::artifacts::{Chats, Dataset, Scores, Tokens};

/// The most runs in the table.
const MOST_RUNS: usize = 50;
/// The most earlier results beside an evaluation.
const MOST_EARLIER: usize = 3;

/// What need not be gathered again for the next page: rows by the fingerprint of their stage.
#[derive(Default)]
pub(in crate::cli) struct Memo {
    data: BTreeMap<String, Option<Data>>,
}

/// Gathers a report. A `live` one is served and looks for changes.
///
/// # Errors
/// A chart can't be drawn.
pub(in crate::cli) fn page(project: &Project, live: bool, memo: &mut Memo) -> anyhow::Result<Page> {
    let recipe = &project.recipe;
    let running = project.running_events();
    let runs = project.runs();
    let last = || {
        let number = runs.last()?.number;
        Some(project.events(number)?.collect::<Vec<LoggedEvent>>())
    };
    let events = match &running {
        Some(events) => events.clone(),
        None => last().unwrap_or_default(),
    };
    let standings = standings(project);
    let stages = stages::stages(project, &standings, &events, running.is_some());
    let mut counts: Vec<(String, String)> = Vec::new();
    for (class, label) in [
        ("fresh", "up to date"),
        ("running", "running"),
        ("failed", "failed"),
        ("runs", "to run"),
        ("waits", "waiting"),
        ("unknown", "unknown"),
    ] {
        let count = stages.iter().filter(|stage| stage.state == class).count();
        if count > 0 {
            counts.push((class.to_owned(), format!("{count} {label}")));
        }
    }
    let mut page = Page {
        title: recipe.path.file_name().map_or_else(
            || recipe.path.display().to_string(),
            |name| name.to_string_lossy().into_owned(),
        ),
        description: recipe.description.clone(),
        recipe: recipe.path.display().to_string(),
        made: moment(now()),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        live,
        running: running.as_ref().map(|events| {
            let seconds = events.last().map_or(0., |event| event.at);
            format!("a run is in progress, {} so far", duration(seconds))
        }),
        counts,
        runs: runs_table(&runs),
        environment: environment::environment(project),
        ..Page::default()
    };
    for (index, standing) in standings.iter().enumerate() {
        add(
            project,
            &mut page,
            index,
            standing,
            &runs,
            running.as_deref(),
            memo,
        )?;
    }
    page.stages = stages;
    Ok(page)
}

/// Adds what a stage made to the parts of the page.
fn add(
    project: &Project,
    page: &mut Page,
    index: usize,
    standing: &Standing,
    runs: &[Run],
    running: Option<&[LoggedEvent]>,
    memo: &mut Memo,
) -> anyhow::Result<()> {
    let Some(stage) = project.recipe.stages.get(standing.index) else {
        return Ok(());
    };
    let record = standing.record.as_ref();
    if stage.kind.name.starts_with("train_") {
        let attempts = curves::attempts(project, &stage.name, record, running);
        let training = training::training(&stage.name, stage.kind.name, &attempts)?;
        page.trainings.extend(training);
    }
    let Some(record) = record else {
        return Ok(());
    };
    if record.output == Scores::NAME {
        let earlier = earlier(project, runs, &stage.name, record);
        let mut evaluation = evaluation::evaluation(project, index, record, &earlier);
        if let Some(evaluation) = &mut evaluation {
            stage.name.clone_into(&mut evaluation.name);
        }
        page.evaluations.extend(evaluation);
    }
    if [Dataset::NAME, Chats::NAME, Tokens::NAME].contains(&record.output.as_str()) {
        let mut data = match memo.data.get(&record.fingerprint.digest()) {
            Some(data) => data.clone(),
            None => data::data(project, record)?,
        };
        memo.data.insert(record.fingerprint.digest(), data.clone());
        if let Some(data) = &mut data {
            stage.name.clone_into(&mut data.name);
        }
        page.data.extend(data);
    }
    Ok(())
}

/// Earlier results of a stage that are other than this one, the latest first, with the runs that made them.
fn earlier(project: &Project, runs: &[Run], stage: &str, current: &Record) -> Vec<(u64, Record)> {
    let mut seen = vec![current.artifact.clone()];
    let mut found = Vec::new();
    for run in runs.iter().rev() {
        let Some(made) = run.stages.get(stage).filter(|made| made.ran) else {
            continue;
        };
        let Some(record) = project.store.record(&made.fingerprint) else {
            continue;
        };
        if made.artifact.is_none() || seen.contains(&record.artifact) {
            continue;
        }
        seen.push(record.artifact.clone());
        found.push((run.number, record));
        if found.len() == MOST_EARLIER {
            break;
        }
    }
    found
}

fn runs_table(runs: &[Run]) -> Table {
    let rows = runs.iter().rev().take(MOST_RUNS).map(|run| {
        let ran = run.stages.iter().filter(|(_, stage)| stage.ran);
        let ran: Vec<&str> = ran.map(|(name, _)| name.as_str()).collect();
        let name = run.label.name.iter().chain(&run.label.tags);
        vec![
            run.number.to_string(),
            name.cloned().collect::<Vec<_>>().join(" "),
            moment(run.started),
            plain(&json!(run.outcome)),
            duration(run.seconds),
            if ran.is_empty() {
                "nothing ran".into()
            } else {
                ran.join(", ")
            },
        ]
    });
    Table {
        head: [
            "run",
            "name and tags",
            "started",
            "outcome",
            "took",
            "what ran",
        ]
        .map(str::to_owned)
        .into(),
        rows: rows.collect(),
    }
}
