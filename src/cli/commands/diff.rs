//! `diff`: what differs between two runs: parameters, results and metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::why::list;
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::{number, runs};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print, print_json, table};
use crate::engine::{Difference, Run, short};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The earlier run, by its number in `runs` or its name [default: the last but one]
    old: Option<String>,
    /// The later run [default: the last]
    new: Option<String>,
    /// The differences as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let runs = project.runs();
    let new = match &args.new {
        Some(new) => find(&runs, new)?,
        None => runs.last().ok_or_else(|| no_two(&runs))?,
    };
    let old = match &args.old {
        Some(old) => find(&runs, old)?,
        None => runs
            .iter()
            .rfind(|run| run.number < new.number)
            .ok_or_else(|| no_two(&runs))?,
    };
    let differences = project.store.compare(old, new);
    let metrics: Metrics = differences
        .keys()
        .map(|name| (name.as_str(), metrics(&project, old, new, name)))
        .collect();
    if args.json {
        return print_json(&as_json(&differences, &metrics)?);
    }
    let mut text = format!("{} -> {}\n", called(old), called(new));
    if differences.is_empty() {
        text.push_str("no stage differs\n");
    }
    // In the order of the recipe, and then what it no longer has.
    let order = project.recipe.order();
    let here = order
        .iter()
        .filter_map(|&index| project.recipe.stages.get(index));
    let here: Vec<&str> = here.map(|stage| stage.name.as_str()).collect();
    let gone = differences
        .keys()
        .map(String::as_str)
        .filter(|name| !here.contains(name));
    for name in here.iter().copied().chain(gone) {
        let Some(difference) = differences.get(name) else {
            continue;
        };
        match difference {
            Difference::Added => _ = writeln!(text, "\n`{name}` is new"),
            Difference::Removed => _ = writeln!(text, "\n`{name}` is gone"),
            Difference::Changed {
                reasons,
                same_bytes,
            } => {
                _ = writeln!(text, "\n`{name}`");
                list(&project, name, reasons, &mut text);
                result(old, new, name, *same_bytes, &mut text);
                let rows = metrics.get(name).into_iter().flatten().map(row);
                text.push_str(&table(&rows.collect::<Vec<_>>()));
            }
        }
    }
    print(&text);
    Ok(())
}

fn result(old: &Run, new: &Run, name: &str, same_bytes: bool, text: &mut String) {
    let artifact = |run: &Run| {
        run.stages
            .get(name)
            .and_then(|stage| stage.artifact.clone())
    };
    _ = match (artifact(old), artifact(new)) {
        (Some(_), Some(_)) if same_bytes => writeln!(text, "  the result has the same bytes"),
        (old, new) => writeln!(
            text,
            "  result {} -> {}",
            short(old.as_deref()),
            short(new.as_deref())
        ),
    };
}

/// Metrics that are not the same in both runs, by stage and name, with the old and the new value.
type Metrics<'a> = BTreeMap<&'a str, BTreeMap<String, (Option<f64>, Option<f64>)>>;

fn metrics(
    project: &Project,
    old: &Run,
    new: &Run,
    stage: &str,
) -> BTreeMap<String, (Option<f64>, Option<f64>)> {
    let of = |run: &Run| {
        let made = run.stages.get(stage).filter(|made| made.artifact.is_some());
        let record = made.and_then(|made| project.store.record(&made.fingerprint));
        record.map_or_else(BTreeMap::new, |record| runs::metrics(project, &record))
    };
    let (old, new) = (of(old), of(new));
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let pairs = names.into_iter().map(|name| {
        let pair = (old.get(name).copied(), new.get(name).copied());
        (name.clone(), pair)
    });
    pairs.filter(|(_, (old, new))| old != new).collect()
}

fn row((name, (old, new)): (&String, &(Option<f64>, Option<f64>))) -> Vec<String> {
    let shown = |value: &Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    let change = old.zip(*new).map_or_else(String::new, |(old, new)| {
        let sign = if new >= old { "+" } else { "" };
        format!("({sign}{})", number(new - old))
    });
    vec![
        format!("  {name}"),
        shown(old),
        "->".into(),
        shown(new),
        change,
    ]
}

fn as_json(
    differences: &BTreeMap<String, Difference>,
    metrics: &Metrics<'_>,
) -> anyhow::Result<Value> {
    let mut all = serde_json::to_value(differences)?;
    for (stage, metrics) in metrics {
        let values = metrics
            .iter()
            .map(|(name, (old, new))| (name.clone(), json!({ "old": old, "new": new })));
        let values: Map<String, Value> = values.collect();
        if let Some(stage) = all.get_mut(*stage).and_then(Value::as_object_mut)
            && !values.is_empty()
        {
            stage.insert("metrics".into(), Value::Object(values));
        }
    }
    Ok(all)
}

/// A run by its number and, if it has one, its name.
fn called(run: &Run) -> String {
    match &run.label.name {
        Some(name) => format!("run {} ({name})", run.number),
        None => format!("run {}", run.number),
    }
}

fn find<'a>(runs: &'a [Run], wanted: &str) -> Result<&'a Run, Failure> {
    let is =
        |run: &&Run| run.number.to_string() == wanted || run.label.name.as_deref() == Some(wanted);
    // Of several runs of a name the last one is meant.
    runs.iter().rfind(is).ok_or_else(|| {
        let message = format!("there is no run {wanted}");
        Failure::Usage(error::with_hint(&message, &known(runs)))
    })
}

fn no_two(runs: &[Run]) -> Failure {
    Failure::Usage(error::with_hint(
        "there are no two runs to compare",
        &known(runs),
    ))
}

fn known(runs: &[Run]) -> String {
    match runs {
        [] => "there are no runs yet".to_owned(),
        [only] => format!("there is only run {}", only.number),
        [first, .., last] => format!(
            "there are the runs {} to {}: see `pipeline runs`",
            first.number, last.number
        ),
    }
}
