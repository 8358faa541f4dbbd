//! Trainings with their curves, for the report and for pictures.

use std::collections::{BTreeMap, BTreeSet};

use super::curves::Attempt;
use super::{number, plain};
use crate::engine::Record;
use crate::report::chart::{Chart, Content, Look, Series};
use crate::report::duration;
use crate::report::page::{Fact, Figure, LegendEntry, Table, Training};

/// The numbers that people look at first, in their order.
pub(in crate::cli) const FIRST: [&str; 12] = [
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "mean_token_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
];
/// What numbers of evaluations during a training begin with.
const EVAL: &str = "eval_";
/// The most rows of the table of numbers.
const MOST_ROWS: usize = 200;
/// The colour of evaluations beside the training's own.
const EVAL_COLOR: usize = 1;

/// The numbers of an attempt, without `eval_`, in the order in which they are shown.
pub(in crate::cli) fn names(attempts: &[Attempt]) -> Vec<String> {
    let all: BTreeSet<String> = attempts
        .iter()
        .flat_map(Attempt::names)
        .map(|name| name.strip_prefix(EVAL).map_or(name.clone(), str::to_owned))
        .collect();
    let first = FIRST.iter().map(|name| (*name).to_owned());
    let first: Vec<String> = first.filter(|name| all.contains(name)).collect();
    let others = all.iter().filter(|name| !first.contains(name)).cloned();
    let others: Vec<String> = others.collect();
    first.into_iter().chain(others).collect()
}

/// A chart of one number: the first attempt with its evaluations, and the others beside it.
pub(in crate::cli) fn chart(attempts: &[Attempt], name: &str) -> Chart {
    let mut series = Vec::new();
    let mut add = |label: String, color: usize, look: Look, points: Vec<(f64, f64)>| {
        if !points.is_empty() {
            series.push(Series {
                name: label,
                color,
                look,
                points,
            });
        }
    };
    for (index, attempt) in attempts.iter().enumerate() {
        let look = if index == 0 { Look::Line } else { Look::Thin };
        add(attempt.label(), color(index), look, attempt.points(name));
        if index == 0 {
            let points = attempt.points(&format!("{EVAL}{name}"));
            add("evaluation".into(), EVAL_COLOR, Look::Marks, points);
        }
    }
    Chart {
        title: name.to_owned(),
        x_label: "step".into(),
        content: Content::Lines(series),
    }
}

/// The colour of an attempt: the second one is that of evaluations.
pub(in crate::cli) fn color(index: usize) -> usize {
    if index == 0 { 0 } else { index + 1 }
}

/// A training for the page.
///
/// # Errors
/// A chart can't be drawn.
pub(super) fn training(
    name: &str,
    kind: &str,
    attempts: &[Attempt],
) -> anyhow::Result<Option<Training>> {
    let Some(current) = attempts.first().filter(|current| !current.logs.is_empty()) else {
        return Ok(None);
    };
    let names = names(attempts);
    let mut legend = Vec::new();
    for (index, attempt) in attempts.iter().enumerate() {
        let detail = match (index, &current.record, &attempt.record) {
            (0, ..) => String::new(),
            (_, Some(now), Some(then)) => changes(then, now),
            _ => String::new(),
        };
        legend.push(LegendEntry::new(attempt.label(), color(index), detail));
        if index == 0 && current.names().iter().any(|name| name.starts_with(EVAL)) {
            legend.push(LegendEntry::new(
                "evaluation".into(),
                EVAL_COLOR,
                String::new(),
            ));
        }
    }
    let mut charts = Vec::new();
    let mut more = Vec::new();
    for metric in &names {
        let chart = chart(attempts, metric);
        let last = current
            .points(metric)
            .last()
            .map(|(step, value)| format!("; {} at step {step}", number(*value)));
        let label = format!("{metric} of {name} by step{}", last.unwrap_or_default());
        let figure = Figure::new(&chart, label)?;
        if FIRST.contains(&metric.as_str()) {
            charts.push(figure);
        } else {
            more.push(figure);
        }
    }
    let (table, thinned) = table(current, &names);
    Ok(Some(Training {
        name: name.to_owned(),
        kind: kind.to_owned(),
        facts: facts(current),
        legend,
        charts,
        more,
        table,
        thinned,
    }))
}

/// What in the parameters of an earlier training is other than now.
fn changes(then: &Record, now: &Record) -> String {
    let (then, now) = (then.fingerprint.leaves(), now.fingerprint.leaves());
    let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let changed = names
        .into_iter()
        .filter(|name| then.get(*name) != now.get(*name));
    let parts: Vec<String> = changed
        .map(|name| match then.get(name) {
            Some(value) if value.is_object() => format!("another {name}"),
            Some(value) => format!("{name} {}", plain(value)),
            None => format!("{name} not set"),
        })
        .collect();
    parts.join(", ")
}

fn facts(attempt: &Attempt) -> Vec<Fact> {
    let mut facts = Vec::new();
    if let Some(log) = attempt.logs.last() {
        facts.push(("steps".to_owned(), log.step.to_string()));
        if log.epoch.is_finite() {
            facts.push(("epochs".to_owned(), number(log.epoch)));
        }
    }
    let mut last = |title: &str, name: &str| {
        if let Some((_, value)) = attempt.points(name).last() {
            facts.push((title.to_owned(), number(*value)));
        }
    };
    last("last loss", "loss");
    last("last eval loss", "eval_loss");
    let Some(record) = &attempt.record else {
        return facts;
    };
    facts.push(("took".to_owned(), duration(record.seconds)));
    for (title, note) in [
        ("trained parameters", "trained_parameters"),
        ("tokens", "tokens"),
        ("rows", "rows"),
        ("best step", "best_step"),
        ("skipped steps", "skipped_nan_steps"),
    ] {
        if let Some(value) = record.notes.get(note).filter(|value| *value != 0) {
            facts.push((title.to_owned(), plain(value)));
        }
    }
    let tokens = record
        .notes
        .get("tokens")
        .and_then(serde_json::Value::as_f64);
    if let Some(tokens) = tokens.filter(|_| record.seconds > 0.) {
        facts.push((
            "tokens/s, all in all".to_owned(),
            number(tokens / record.seconds),
        ));
    }
    facts
}

/// The numbers of an attempt by step, and a sentence on what is left out.
pub(in crate::cli) fn table(attempt: &Attempt, names: &[String]) -> (Table, Option<String>) {
    let mut steps: BTreeMap<u64, BTreeMap<&str, f64>> = BTreeMap::new();
    for log in &attempt.logs {
        let values = steps.entry(log.step).or_default();
        values.extend(
            log.values
                .iter()
                .map(|(name, value)| (name.as_str(), *value)),
        );
        if log.epoch.is_finite() {
            values.insert("epoch", log.epoch);
        }
    }
    let with_eval = names
        .iter()
        .flat_map(|name| [name.clone(), format!("{EVAL}{name}")]);
    let columns: Vec<String> = std::iter::once("epoch".to_owned())
        .chain(with_eval)
        .filter(|name| {
            steps
                .values()
                .any(|values| values.contains_key(name.as_str()))
        })
        .collect();
    let stride = steps.len().div_ceil(MOST_ROWS).max(1);
    let last = steps.len().saturating_sub(1);
    let rows = steps.iter().enumerate().filter(|(index, (_, values))| {
        let evaluated = values.keys().any(|name| name.starts_with(EVAL));
        index % stride == 0 || *index == last || evaluated
    });
    let rows: Vec<Vec<String>> = rows
        .map(|(_, (step, values))| {
            let cells = columns.iter().map(|name| {
                let value = values.get(name.as_str());
                value.map_or_else(String::new, |value| number(*value))
            });
            std::iter::once(step.to_string()).chain(cells).collect()
        })
        .collect();
    let thinned = (rows.len() < steps.len()).then(|| {
        format!(
            "{} of {} steps; `pipeline metrics` writes all of them.",
            rows.len(),
            steps.len()
        )
    });
    let head = std::iter::once("step".to_owned()).chain(columns).collect();
    (Table { head, rows }, thinned)
}
