//! `show`: where a stage's result is, its record, and a look inside.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::evaluation::intervals;
use crate::cli::gather::number;
use crate::cli::project::{Project, load_vars};
use crate::cli::{Failure, paragraphs, print, print_headed, print_json, table};
use crate::engine::{Estimate, Record, State, View, canonical_json};
use crate::report::sparkline::sparkline;
use crate::report::{ago, bytes, duration, quoted};
use crate::stages::artifacts::ARTIFACTS;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stage
    #[arg(required_unless_present = "vars")]
    stage: Option<String>,
    /// Shows the recipe's vars in place of a stage: type, value, default, where the value comes from, and what it is for
    #[arg(long, conflicts_with = "stage")]
    vars: bool,
    /// The vars as JSON
    #[arg(long, requires = "vars")]
    json: bool,
    /// How many rows of each split and answers of an evaluation to show
    #[arg(long, short = 'n', value_name = "N", default_value_t = 3)]
    rows: usize,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let Some(stage) = &args.stage else {
        return show_vars(args);
    };
    let project = Project::open(&args.recipe, &args.store)?;
    let index = project.find(stage)?;
    let stage = &project.recipe.stages[index].name;
    let arguments = format!(
        "{} {}",
        quoted(&project.recipe.path.display().to_string()),
        quoted(stage)
    );
    let Some(record) = project.record_of(index) else {
        let hint = format!("`pipeline run {arguments}` makes it");
        return Err(anyhow::anyhow!("`{stage}` has no result yet; {hint}").into());
    };
    let folder = project.store.artifact(&record.artifact);
    let mut text = about(&project, stage, &record, &folder);
    if let Some(State::Runs { .. } | State::WaitsOn { .. }) = project.plan().get(index) {
        let hint = format!("pipeline why {arguments}");
        let stale = format!("This is the last result; the stage is stale now: `{hint}` says why.");
        _ = write!(text, "\n{}", paragraphs(&stale));
    }
    if !folder.is_dir() {
        _ = writeln!(
            text,
            "\nIts files are not here: `pipeline cache pull {arguments}` fetches them, if a remote has them."
        );
        print_headed(&text);
        return Ok(());
    }
    let artifact = ARTIFACTS
        .iter()
        .find(|artifact| artifact.name == record.output);
    if let Some(artifact) = artifact {
        let views = (artifact.show)(&folder, args.rows)
            .with_context(|| format!("could not look into `{}`", folder.display()))?;
        for view in views {
            match view {
                View::Line(line) => _ = writeln!(text, "{line}"),
                View::Table(rows) => text.push_str(&table(&rows)),
                View::Curves(curves) => text.push_str(&table(&drawn(&curves))),
            }
        }
    }
    if let Some(rows) = intervals(&record) {
        text.push('\n');
        text.push_str(&table(&rows));
    }
    print_headed(&text);
    Ok(())
}

/// The vars of the recipe.
fn show_vars(args: &Args) -> Result<(), Failure> {
    let vars = load_vars(&args.recipe, args.store.offline)?;
    if args.json {
        return print_json(&vars);
    }
    if vars.is_empty() {
        print("the recipe has no vars\n");
        return Ok(());
    }
    let shown = |value: Option<&Value>| match value {
        None => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => canonical_json(value),
    };
    let head = ["var", "type", "value", "default", "from", "help"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for var in vars {
        let mut help = var.help.unwrap_or_default();
        let mut bounds = Vec::new();
        bounds.extend(var.minimum.map(|least| format!("at least {least}")));
        bounds.extend(var.maximum.map(|most| format!("at most {most}")));
        if !var.choices.is_empty() {
            let choices = var.choices.iter().map(|choice| shown(Some(choice)));
            bounds.push(format!("one of {}", choices.collect::<Vec<_>>().join(", ")));
        }
        if !bounds.is_empty() {
            help = format!("{help} ({})", bounds.join(", "));
        }
        rows.push(vec![
            var.name,
            var.type_name.unwrap_or("-").to_owned(),
            shown(var.value.as_ref()),
            shown(var.default.as_ref()),
            var.from
                .unwrap_or_else(|| "nobody: give one by --set".to_owned()),
            help.trim().to_owned(),
        ]);
    }
    print_headed(&table(&rows));
    Ok(())
}

/// Curves as a table: each with its shape, where it begins and ends, and its extremes.
fn drawn(curves: &[(String, Vec<f64>)]) -> Vec<Vec<String>> {
    const WIDTH: usize = 32;
    let head = ["  metric", "curve", "first", "last", "lowest", "highest"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for (name, values) in curves {
        let lowest = values.iter().copied().fold(f64::NAN, f64::min);
        let highest = values.iter().copied().fold(f64::NAN, f64::max);
        let shown = |value: Option<f64>| value.map(number).unwrap_or_default();
        rows.push(vec![
            format!("  {name}"),
            sparkline(values, WIDTH),
            shown(values.first().copied()),
            shown(values.last().copied()),
            number(lowest),
            number(highest),
        ]);
    }
    rows
}

/// What a stage noted, for people: sizes with units, and of an estimate its memory, for what else it has stands beside it as it was in the end.
fn noted(name: &str, value: &Value) -> String {
    if name == "peak_memory"
        && let Some(size) = value.as_u64()
    {
        return bytes(size);
    }
    if name == "estimate"
        && let Ok(estimate) = serde_json::from_value::<Estimate>(value.clone())
    {
        let parts = estimate.largest_first().into_iter();
        let parts: Vec<_> = parts
            .map(|(name, size)| format!("{name} {}", bytes(size)))
            .collect();
        let parts = parts.join(", ");
        let least = if estimate.is_lower_bound {
            "at least "
        } else {
            ""
        };
        return format!("{least}{} of memory: {parts}", bytes(estimate.peak_memory));
    }
    canonical_json(value)
}

fn about(project: &Project, stage: &str, record: &Record, folder: &Path) -> String {
    let mut text = format!(
        "{stage} ({}) made {}\n\n",
        record.fingerprint.kind, record.output
    );
    let manifest = project.store.manifest(&record.artifact);
    let size = manifest.map_or(0, |manifest| manifest.size());
    let mut rows = vec![
        vec!["artifact".into(), folder.display().to_string()],
        vec!["size".into(), bytes(size)],
        vec!["fingerprint".into(), record.fingerprint.digest()],
        vec![
            "made".into(),
            format!("{} in {}", ago(record.started), duration(record.seconds)),
        ],
        vec![
            "version".into(),
            format!(
                "{} of pipeline {}",
                record.fingerprint.version, record.pipeline
            ),
        ],
    ];
    if record.stage != stage {
        let made = format!("by the same stage under the name `{}`", record.stage);
        rows.push(vec!["first made".into(), made]);
    }
    // Intervals are many; they are shown at the end.
    let notes = record.notes.iter().filter(|(name, _)| *name != "intervals");
    for (name, value) in notes {
        rows.push(vec![name.clone(), noted(name, value)]);
    }
    for (fact, value) in &record.fingerprint.outside {
        rows.push(vec![fact.clone(), value.clone()]);
    }
    text.push_str(&table(&rows));
    text.push_str("\nparameters\n");
    let mut rows = Vec::new();
    let stage = project.recipe.stage(&record.stage);
    let implied =
        |name: &str| stage.is_some_and(|stage| stage.implied().any(|edge| edge.parameter == name));
    if let Value::Object(params) = &record.fingerprint.params {
        for (name, value) in params {
            let from = record.origins.get(name).map(|origin| match origin {
                crate::engine::Origin::Stage(stage) => stage.clone(),
                crate::engine::Origin::File(path) => path.clone(),
            });
            let mut text = from.unwrap_or_else(|| canonical_json(value));
            if implied(name) {
                text.push_str(" (implied)");
            }
            rows.push(vec![format!("  {name}"), text]);
        }
    }
    text.push_str(&table(&rows));
    text
}
