//! Evaluations with their intervals and answers, for the report.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::{head, number};
use crate::cli::project::Project;
use crate::engine::Record;
use crate::report::page::{Answer, Evaluation, Table};

/// The numbers of an evaluation that stand for it in a table, the first ones first.
pub(super) const OF_EVALUATIONS: [&str; 8] = [
    "rewards/accuracies",
    "acc",
    "acc_norm",
    "exact_match",
    "regex_match",
    "margin",
    "perplexity",
    "loss",
];
/// The longest text of an answer or prompt in the page.
const LONGEST: usize = 4000;
/// The most answers in the page.
const MOST_ANSWERS: usize = 50;
/// The parts of `scores.json`, and what they are called.
const PARTS: [(&str, &str); 4] = [
    ("base", "base"),
    ("adapter", "with adapter"),
    ("model", "model"),
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
        let place = OF_EVALUATIONS.iter().position(|wanted| name == wanted);
        place.unwrap_or(OF_EVALUATIONS.len())
    });
    let mut table = Table::default();
    table.head.push("score".into());
    table
        .head
        .extend(parts.iter().map(|(_, title)| (*title).to_owned()));
    let p_values = intervals.and_then(|intervals| intervals.get("p_values"));
    if p_values.is_some() {
        table.head.push("p".into());
    }
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
        if let Some(p_values) = p_values {
            let value = p_values.get(name).and_then(Value::as_f64);
            row.push(value.map_or_else(String::new, number));
        }
        for (_, scores) in &earlier {
            let shown = ["adapter", "model", "base"]
                .into_iter()
                .find_map(|part| scores.get(part).filter(|part| part.is_object()));
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
            if p_values.is_some() {
                about += " p is the two-sided p-value of that paired bootstrap for no difference.";
            }
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

/// The intervals that a record notes, as a table with a head; none if it notes none.
pub(in crate::cli) fn intervals(record: &Record) -> Option<Vec<Vec<String>>> {
    let noted = record.notes.get("intervals")?;
    let parts: Vec<(&Value, &str)> = PARTS
        .into_iter()
        .filter_map(|(part, title)| Some((noted.get(part)?, title)))
        .collect();
    let confidence = noted.get("confidence").and_then(Value::as_f64)?;
    let p_values = noted.get("p_values");
    let mut head = vec![format!("{} % intervals", number(confidence * 100.))];
    head.extend(parts.iter().map(|(_, title)| (*title).to_owned()));
    head.extend(p_values.map(|_| "p".to_owned()));
    let mut rows = vec![head];
    for name in parts.first()?.0.as_object()?.keys() {
        let ends = |part: &Value| {
            let ends = part.get(name)?.as_array()?;
            let (low, high) = (ends.first()?.as_f64()?, ends.get(1)?.as_f64()?);
            Some(format!("{low:.4} to {high:.4}"))
        };
        let cells = parts.iter().map(|(part, _)| ends(part).unwrap_or_default());
        let p = p_values.map(|p_values| {
            let value = p_values.get(name).and_then(Value::as_f64);
            value.map_or_else(String::new, |value| format!("{value:.4}"))
        });
        rows.push(
            std::iter::once(name.clone())
                .chain(cells)
                .chain(p)
                .collect(),
        );
    }
    Some(rows)
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
        let (with_adapter, model) = (text("adapter"), text("model"));
        let (before_label, after_label) = match (&with_adapter, &model) {
            (Some(_), _) => ("Without the adapter", "With the adapter"),
            (None, Some(_)) => ("The baseline", "The model"),
            (None, None) => ("The model", ""),
        };
        let after = with_adapter.or(model);
        Some(Answer {
            prompt: text("prompt")?,
            before_label: before_label.into(),
            after_label: after_label.into(),
            before: text("base")?,
            after,
            chosen: text("chosen"),
            rejected: text("rejected"),
        })
    });
    answers.collect()
}
