//! `table`: the results of a recipe side by side: what each was made with where that differs, and its metrics.

mod condition;

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::runs::{csv, shortened};
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::results::{Row, compared, results};
use crate::cli::gather::runs::{parts, standing, watched};
use crate::cli::gather::{number, plain};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print, print_json, table_or_lists};
use condition::{Condition, column};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline table
  pipeline table recipe.yaml --sort scores.margin
  pipeline table recipe.yaml --where 'beta>0.1' --where 'seed=1'
  pipeline table recipe.yaml tuned --csv > trainings.csv")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages whose results are compared [default: evaluations, and trainings that no stage evaluates]
    stages: Vec<String>,
    /// Sorts by a parameter or metric, metrics the best first [default: by the first metric of an evaluation or training]
    #[arg(long, value_name = "COLUMN")]
    sort: Option<String>,
    /// Turns the order round
    #[arg(long)]
    reverse: bool,
    /// Shows only results for which this is true, such as `beta>0.1` or `scores.margin>=0`; may be repeated
    #[arg(long = "where", value_name = "CONDITION")]
    conditions: Vec<Condition>,
    /// Shows only results that the recipe has now, without those of earlier runs
    #[arg(long)]
    current: bool,
    /// All parameters and all metrics, not only those that differ or stand for their stage
    #[arg(long)]
    all: bool,
    /// The table as JSON, with all parameters and metrics
    #[arg(long, conflicts_with_all = ["csv", "markdown"])]
    json: bool,
    /// The table as CSV
    #[arg(long, conflicts_with = "markdown")]
    csv: bool,
    /// The table as Markdown
    #[arg(long)]
    markdown: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let mut wanted = project.find_all(&args.stages)?;
    if args.stages.is_empty() {
        wanted = compared(&project);
    }
    if wanted.is_empty() {
        let message = "no stage of the recipe evaluates or trains a model";
        let hint = "name the stages whose results are compared";
        return Err(Failure::Usage(error::with_hint(message, hint)));
    }
    let mut rows = results(&project, &wanted);
    if args.current {
        rows.retain(|row| row.current);
    }
    // Names are looked up among all results, also where a condition leaves none.
    let mut conditions = Vec::new();
    for condition in &args.conditions {
        conditions.push((condition, found(&rows, &condition.column)?));
    }
    let sorted = match &args.sort {
        Some(wanted) => Some(found(&rows, wanted)?),
        None => usual(&rows),
    };
    for (condition, name) in conditions {
        rows.retain(|row| condition.holds(value(row, &name).as_ref()));
    }
    if let Some(name) = &sorted {
        rows.sort_by(|a, b| compare(a, b, name));
    }
    if args.reverse {
        // What has no value comes last either way.
        let has = |row: &Row| {
            sorted
                .as_ref()
                .is_none_or(|name| value(row, name).is_some())
        };
        let with = rows.iter().take_while(|row| has(row)).count();
        rows[..with].reverse();
    }
    let best = sorted.as_ref().and_then(|name| best(&rows, name));
    if args.json {
        let rows = rows.iter().enumerate();
        let rows: Vec<Value> = rows
            .map(|(index, row)| as_json(row, best == Some(index)))
            .collect();
        return print_json(&rows);
    }
    if rows.is_empty() {
        print("no results yet\n");
        return Ok(());
    }
    let cells = cells(args, &rows, sorted.as_deref(), best);
    if args.csv {
        print(&csv(&cells)?);
    } else if args.markdown {
        print(&markdown(&cells));
    } else {
        print(&table_or_lists(&cells));
    }
    Ok(())
}

/// The value of a column.
fn value(row: &Row, name: &str) -> Option<Value> {
    match name {
        "stage" => Some(row.stage.clone().into()),
        "run" => row.run.map(Value::from),
        name => {
            let metric = row.metrics.get(name).copied().map(json_number);
            metric.or_else(|| row.parameters.get(name).cloned())
        }
    }
}

/// A number as JSON; what is not finite as text.
fn json_number(value: f64) -> Value {
    if value.is_finite() {
        json!(value)
    } else {
        json!(value.to_string())
    }
}

/// The column that is meant by a name.
fn found(rows: &[Row], wanted: &str) -> Result<String, Failure> {
    let mut names: BTreeSet<&str> = BTreeSet::from(["stage", "run"]);
    for row in rows {
        names.extend(
            row.parameters
                .keys()
                .chain(row.metrics.keys())
                .map(String::as_str),
        );
    }
    column(&names, &differing(rows), wanted)
        .map_err(|(message, hint)| Failure::Usage(error::with_hint(&message, &hint)))
}

/// The column that results are sorted by when nobody says: the first that stands for an evaluation, else for a training.
fn usual(rows: &[Row]) -> Option<String> {
    let leaves: BTreeSet<&str> = rows.iter().map(|row| row.declared.as_str()).collect();
    let metrics: BTreeSet<&str> = rows
        .iter()
        .flat_map(|row| row.metrics.keys())
        .map(String::as_str)
        .collect();
    let mut names =
        watched().flat_map(|metric| leaves.iter().map(move |leaf| format!("{leaf}.{metric}")));
    names
        .find(|name| metrics.contains(name.as_str()))
        .or_else(|| {
            let own = |name: &&&str| leaves.iter().any(|leaf| parts(name).0 == *leaf);
            standing(metrics.iter().copied())
                .iter()
                .find(own)
                .map(|name| (*name).to_owned())
        })
}

/// Whether less of a metric is better.
fn less_is_better(name: &str) -> bool {
    let metric = name.rsplit('.').next().unwrap_or(name);
    ["loss", "perplexity", "error"]
        .iter()
        .any(|name| metric.contains(name))
}

/// Parameters upwards, metrics the best first; what has no value last, and the newest first among equals.
fn compare(a: &Row, b: &Row, name: &str) -> Ordering {
    let is_metric = |row: &Row| row.metrics.contains_key(name);
    let down = (is_metric(a) || is_metric(b)) && !less_is_better(name);
    let key = |row: &Row| {
        let value = value(row, name);
        let number = value.as_ref().and_then(Value::as_f64);
        (number, value.as_ref().map(plain))
    };
    let (x, y) = (key(a), key(b));
    let order = match (x.0, y.0) {
        (Some(x), Some(y)) => {
            let order = x.total_cmp(&y);
            if down { order.reverse() } else { order }
        }
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => match (x.1, y.1) {
            (Some(x), Some(y)) => x.cmp(&y),
            (x, y) => y.is_some().cmp(&x.is_some()),
        },
    };
    order.then_with(|| b.made.cmp(&a.made))
}

/// The row with the best value of a metric.
fn best(rows: &[Row], name: &str) -> Option<usize> {
    let values = rows.iter().enumerate().filter_map(|(index, row)| {
        let value = row.metrics.get(name).filter(|value| value.is_finite())?;
        let value = if less_is_better(name) { -value } else { *value };
        Some((index, value))
    });
    // The first of those that are equally good.
    let best = values.reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(index, _)| index)
}

fn as_json(row: &Row, best: bool) -> Value {
    let metrics = row.metrics.iter();
    let metrics: Map<String, Value> = metrics
        .map(|(name, value)| (name.clone(), json_number(*value)))
        .collect();
    json!({
        "stage": row.stage,
        "run": row.run,
        "current": row.current,
        "made": row.made,
        "best": best,
        "parameters": row.parameters,
        "metrics": metrics,
    })
}

/// The names of parameters that have more than one value among the rows.
fn differing(rows: &[Row]) -> Vec<String> {
    let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.parameters.keys()).collect();
    let differs = |name: &&String| {
        let mut values = rows.iter().filter_map(|row| row.parameters.get(*name));
        let first = values.next();
        values.any(|value| Some(value) != first)
    };
    names.into_iter().filter(differs).cloned().collect()
}

fn cells(args: &Args, rows: &[Row], sorted: Option<&str>, best: Option<usize>) -> Vec<Vec<String>> {
    let parameters: Vec<String> = if args.all {
        let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.parameters.keys()).collect();
        names.into_iter().cloned().collect()
    } else {
        differing(rows)
    };
    let names: BTreeSet<&String> = rows.iter().flat_map(|row| row.metrics.keys()).collect();
    let standing = standing(names.iter().map(|name| name.as_str()));
    let shown = |name: &&String| {
        args.all || standing.contains(name.as_str()) || sorted == Some(name.as_str())
    };
    let metrics: Vec<&String> = names.iter().copied().filter(shown).collect();
    let earlier = rows.iter().any(|row| !row.current);
    let mut head = vec!["best".to_owned(), "stage".to_owned(), "run".to_owned()];
    head.extend(earlier.then(|| "now".to_owned()));
    head.extend(parameters.iter().chain(metrics.iter().copied()).cloned());
    let mut cells = vec![head];
    for (index, row) in rows.iter().enumerate() {
        let mark = |is: bool, mark: &str| if is { mark } else { "" }.to_owned();
        let run = match (row.run, row.made) {
            (Some(run), _) => run.to_string(),
            (None, Some(_)) => "-".to_owned(),
            (None, None) => "not run".to_owned(),
        };
        let mut cell = vec![mark(best == Some(index), "*"), row.stage.clone(), run];
        cell.extend(earlier.then(|| mark(row.current, "yes")));
        cell.extend(parameters.iter().map(|name| {
            let value = row.parameters.get(name).map(plain).unwrap_or_default();
            if args.csv { value } else { shortened(&value) }
        }));
        cell.extend(metrics.iter().map(|name| {
            let value = row.metrics.get(*name);
            value.map_or_else(String::new, |value| {
                if args.csv {
                    value.to_string()
                } else {
                    number(*value)
                }
            })
        }));
        cells.push(cell);
    }
    cells
}

/// Rows as a table of Markdown.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |row: &Vec<String>| {
        let cells = row.iter().map(|cell| {
            let cell = cell.replace('\\', r"\\").replace('|', r"\|");
            cell.replace(['\n', '\r'], " ").replace('*', r"\*")
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        text.push_str(&line(row));
        if number == 0 {
            _ = writeln!(text, "|{}", " --- |".repeat(row.len()));
        }
    }
    text
}
