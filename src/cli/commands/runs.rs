//! `runs`: a table of the runs with their names, the parameters that differ, and metrics; and names for runs.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::runs::{RunInfo, differing, runs, standing};
use crate::cli::gather::{moment, number, plain};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print, print_json, table_or_lists};
use crate::report::duration;

/// The longest value of a parameter in the table.
const LONGEST: usize = 24;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline runs recipe.yaml
  pipeline runs recipe.yaml --sort scores.rewards/accuracies
  pipeline runs recipe.yaml --csv > runs.csv
  pipeline runs recipe.yaml 7 --name wide-lora --tag keep    names run 7")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The run to name or tag, by its number or name
    run: Option<String>,
    /// Names the run; an empty name takes its name away
    #[arg(long, requires = "run")]
    name: Option<String>,
    /// Tags the run; may be repeated
    #[arg(long, value_name = "TAG", requires = "run")]
    tag: Vec<String>,
    /// Takes a tag away; may be repeated
    #[arg(long, value_name = "TAG", requires = "run")]
    untag: Vec<String>,
    /// Shows only runs with this tag
    #[arg(long, value_name = "TAG", conflicts_with = "run")]
    with_tag: Option<String>,
    /// Sorts by a metric or parameter such as `scores.margin`, the largest first [default: by number]
    #[arg(long, value_name = "COLUMN")]
    sort: Option<String>,
    /// With `--sort`, the smallest first
    #[arg(long, requires = "sort")]
    ascending: bool,
    /// All parameters and all metrics, not only those that differ or stand for their stage
    #[arg(long)]
    all: bool,
    /// The table as JSON, with all parameters and metrics
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// The table as CSV
    #[arg(long)]
    csv: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let mut all = runs(&project);
    if let Some(run) = &args.run {
        all.retain(|info| is(info, run));
        let Some(info) = all.first_mut() else {
            let message = format!("there is no run `{run}`");
            let hint = "`pipeline runs` lists them";
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        };
        if args.name.is_some() || !args.tag.is_empty() || !args.untag.is_empty() {
            let label = &mut info.run.label;
            if let Some(name) = &args.name {
                label.name = (!name.is_empty()).then(|| name.clone());
            }
            label.tags.extend(args.tag.iter().cloned());
            label.tags.retain(|tag| !args.untag.contains(tag));
            let label = info.run.label.clone();
            project.label_run(info.run.number, &label)?;
        }
    }
    if let Some(tag) = &args.with_tag {
        all.retain(|info| info.run.label.tags.contains(tag));
    }
    let mut shown: Vec<&RunInfo> = all.iter().rev().collect();
    if let Some(column) = &args.sort {
        sort(&mut shown, column, args.ascending)?;
    }
    if args.json {
        let runs: Vec<Value> = shown.iter().map(|info| as_json(info)).collect();
        return print_json(&runs);
    }
    if shown.is_empty() {
        print("no runs yet\n");
        return Ok(());
    }
    let rows = rows(&shown, args);
    if args.csv {
        print(&csv(&rows)?);
    } else {
        print(&table_or_lists(&rows));
    }
    Ok(())
}

/// Whether a run is meant by a number or a name.
pub(in crate::cli) fn is(info: &RunInfo, wanted: &str) -> bool {
    info.run.label.name.as_deref() == Some(wanted) || info.run.number.to_string() == wanted
}

fn as_json(info: &RunInfo) -> Value {
    let number = |value: &f64| {
        if value.is_finite() {
            json!(value)
        } else {
            json!(value.to_string())
        }
    };
    let metrics = info.metrics.iter();
    json!({
        "number": info.run.number,
        "name": info.run.label.name,
        "tags": info.run.label.tags,
        "started": info.run.started,
        "seconds": info.run.seconds,
        "outcome": info.run.outcome,
        "parameters": info.parameters,
        "metrics": metrics.map(|(name, value)| (name.clone(), number(value))).collect::<serde_json::Map<_, _>>(),
    })
}

fn sort(shown: &mut [&RunInfo], column: &str, ascending: bool) -> Result<(), Failure> {
    let has =
        |info: &&RunInfo| info.metrics.contains_key(column) || info.parameters.contains_key(column);
    if !shown.iter().any(has) {
        let names: Vec<&str> = standing_of(shown).into_iter().collect();
        let message = format!("no run has `{column}`");
        let hint = format!(
            "expected STAGE.METRIC or STAGE.PARAMETER, such as {}",
            names.join(", ")
        );
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    let key = |info: &RunInfo| -> (Option<f64>, Option<String>) {
        let parameter = info.parameters.get(column);
        let value = info.metrics.get(column).copied();
        let value = value
            .or_else(|| parameter?.as_f64())
            .filter(|value| !value.is_nan());
        (value, parameter.map(plain))
    };
    shown.sort_by(|a, b| {
        let (a, b) = (key(a), key(b));
        let turned = |order: Ordering| if ascending { order } else { order.reverse() };
        match (a.0, b.0) {
            (Some(a), Some(b)) => turned(a.total_cmp(&b)),
            // What has no value comes last either way.
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => match (a.1, b.1) {
                (Some(a), Some(b)) => turned(a.cmp(&b)),
                (a, b) => b.is_some().cmp(&a.is_some()),
            },
        }
    });
    Ok(())
}

/// The metrics that stand for their stages.
fn standing_of<'a>(shown: &[&'a RunInfo]) -> BTreeSet<&'a str> {
    let names = shown.iter().flat_map(|info| info.metrics.keys());
    standing(names.map(String::as_str))
}

fn rows(shown: &[&RunInfo], args: &Args) -> Vec<Vec<String>> {
    let mut parameters = if args.all {
        let names = shown
            .iter()
            .flat_map(|info| info.parameters.keys().cloned());
        names.collect()
    } else {
        differing(shown)
    };
    let standing = standing_of(shown);
    let wanted = |name: &&String| {
        args.all || standing.contains(name.as_str()) || args.sort.as_ref() == Some(*name)
    };
    let metrics = shown.iter().flat_map(|info| info.metrics.keys());
    let mut metrics: Vec<String> = metrics.filter(wanted).cloned().collect();
    for names in [&mut parameters, &mut metrics] {
        names.sort_unstable();
        names.dedup();
    }
    let named = shown.iter().any(|info| info.run.label.name.is_some());
    let tagged = shown.iter().any(|info| !info.run.label.tags.is_empty());
    let mut head = vec!["run".to_owned()];
    head.extend(named.then(|| "name".to_owned()));
    head.extend(tagged.then(|| "tags".to_owned()));
    head.extend(["started", "took", "outcome"].map(str::to_owned));
    head.extend(parameters.iter().chain(&metrics).cloned());
    let mut rows = vec![head];
    for info in shown {
        let run = &info.run;
        let mut row = vec![run.number.to_string()];
        row.extend(named.then(|| run.label.name.clone().unwrap_or_default()));
        row.extend(tagged.then(|| run.label.tags.iter().cloned().collect::<Vec<_>>().join(" ")));
        row.push(moment(run.started));
        row.push(if args.csv {
            run.seconds.to_string()
        } else {
            duration(run.seconds)
        });
        row.push(plain(&json!(run.outcome)));
        let value = |name: &String| {
            let value = info.parameters.get(name).map(plain).unwrap_or_default();
            if args.csv { value } else { shortened(&value) }
        };
        row.extend(parameters.iter().map(value));
        row.extend(metrics.iter().map(|name| {
            let value = info.metrics.get(name);
            value.map_or_else(String::new, |value| {
                if args.csv {
                    value.to_string()
                } else {
                    number(*value)
                }
            })
        }));
        rows.push(row);
    }
    rows
}

/// A text that is not too long for a table.
pub(super) fn shortened(text: &str) -> String {
    if text.chars().count() <= LONGEST {
        return text.to_owned();
    }
    text.chars().take(LONGEST - 1).chain(['…']).collect()
}

/// Rows as CSV.
pub(in crate::cli) fn csv(rows: &[Vec<String>]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        writer.write_record(row)?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
