//! Evaluations with their intervals and answers, for the report.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{head, number};
use crate::cli::project::Project;
use crate::engine::Record;
use crate::report::page::{Answer, Evaluation, Table};

/// The longest text of an answer or prompt in the page.
const LONGEST: usize = 4000;
/// The most answers in the page.
const MOST_ANSWERS: usize = 50;
/// The parts of `scores.json`, and what they are called.
const PARTS: [(&str, &str); 3] = [
    ("base", "base"),
    ("adapter", "with adapter"),
    ("difference", "difference"),
];

/// An evaluation for the page; none if its files are not here. `earlier` are other results of the stage, with their runs.
pub(super) fn evaluation(
    project: &Project,
    place: usize,
    record: &Record,
    earlier: &[(u64, Record)],
) -> Option<Evaluation> {
    let folder = project.store.artifact(&record.artifact);
    let scores = scores(&folder)?;
    let intervals = record.notes.get("intervals");
    let parts: Vec<(&str, &str)> = PARTS
        .into_iter()
        .filter(|(part, _)| scores.get(part).is_some_and(Value::is_object))
        .collect();
    let mut names: Vec<&String> = scores.get("base")?.as_object()?.keys().collect();
    names.sort_by_key(|name| {
        let first = [
            "rewards/accuracies",
            "margin",
            "perplexity",
            "loss",
            "nll_loss",
        ];
        first
            .iter()
            .position(|wanted| name == wanted)
            .unwrap_or(first.len())
    });
    let mut table = Table::default();
    table.head.push("score".into());
    table
        .head
        .extend(parts.iter().map(|(_, title)| (*title).to_owned()));
    let earlier: Vec<(u64, Value)> = earlier
        .iter()
        .filter_map(|(run, record)| {
            Some((
                *run,
                self::scores(&project.store.artifact(&record.artifact))?,
            ))
        })
        .collect();
    table
        .head
        .extend(earlier.iter().map(|(run, _)| format!("run {run}")));
    for name in names {
        let mut row = vec![name.clone()];
        for (part, _) in &parts {
            let value = scores
                .get(part)
                .and_then(|part| part.get(name))
                .and_then(Value::as_f64);
            let mut cell = value.map_or_else(String::new, number);
            let interval = intervals
                .and_then(|intervals| intervals.get(part)?.get(name)?.as_array())
                .and_then(|ends| Some((ends.first()?.as_f64()?, ends.get(1)?.as_f64()?)));
            if let Some((low, high)) = interval {
                _ = write!(cell, " [{}, {}]", number(low), number(high));
            }
            row.push(cell);
        }
        for (_, scores) in &earlier {
            let shown = scores
                .get("adapter")
                .filter(|part| part.is_object())
                .or(scores.get("base"));
            let value = shown
                .and_then(|part| part.get(name))
                .and_then(Value::as_f64);
            row.push(value.map_or_else(String::new, number));
        }
        table.rows.push(row);
    }
    let count = |name: &str| scores.get(name).map(super::plain).unwrap_or_default();
    let mut about = format!("{} rows of the split {}.", count("rows"), count("split"));
    let setting = |name: &str| {
        intervals
            .and_then(|found| found.get(name))
            .and_then(Value::as_f64)
    };
    match (setting("confidence"), setting("resamples")) {
        (Some(confidence), Some(resamples)) => {
            _ = write!(
                about,
                " In brackets: {} % intervals by {} bootstrap resamples of the rows, from a fixed seed; those of the difference \
                 resample both sides alike.",
                number(confidence * 100.),
                number(resamples)
            );
        }
        _ => about += " No intervals: this result was made before they were computed.",
    }
    Some(Evaluation {
        stage: place,
        name: record.stage.clone(),
        about,
        table,
        answers: answers(&folder),
    })
}

/// The numbers of an evaluation; none if its files are not here.
pub(in crate::cli) fn scores(folder: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(folder.join("scores.json")).ok()?).ok()
}

fn answers(folder: &Path) -> Vec<Answer> {
    let text = fs::read_to_string(folder.join("answers.jsonl")).unwrap_or_default();
    let lines = text.lines().take(MOST_ANSWERS);
    let answers = lines.filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let text = |name: &str| Some(head(line.get(name)?.as_str()?.trim(), LONGEST));
        let after = text("adapter");
        Some(Answer {
            prompt: text("prompt")?,
            before_label: if after.is_some() {
                "Without the adapter"
            } else {
                "The model"
            }
            .into(),
            before: text("base")?,
            after,
            chosen: text("chosen"),
            rejected: text("rejected"),
        })
    });
    answers.collect()
}
