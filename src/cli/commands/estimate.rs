//! `estimate`: what trainings will take, before they run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, print, print_json, table};
use crate::engine::{Estimate, State};
use crate::report::{bytes, duration};

/// Examples, shown below the options.
const EXAMPLES: &str = "Examples:
  pipeline estimate recipe.yaml          every training
  pipeline estimate recipe.yaml tuned --set stages.tuned.train_orpo.per_device_train_batch_size=16

A training prints the same when it begins, and keeps it in its record beside what was measured.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// A training [default: every one whose inputs are there]
    stage: Option<String>,
    /// The estimates as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// A stage with what it will take, and with what it took before.
pub(super) struct Estimated {
    stage: String,
    estimate: Estimate,
    /// Seconds, as long as the same number of tokens took in the last run.
    seconds: Option<f64>,
    /// The most memory that was measured in the last run.
    measured: Option<u64>,
}

/// A training that can't be estimated yet, and the stages that have to run before.
type Missing = (String, Vec<String>);

/// What the trainings that are `wanted` will take, where their inputs are there; and the others.
pub(super) fn estimates(
    project: &Project,
    states: &[State],
    wanted: impl Fn(usize) -> bool,
) -> anyhow::Result<(Vec<Estimated>, Vec<Missing>)> {
    let session = project.session(&[]);
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for index in project.graph.order.iter().copied() {
        let node = &project.graph.nodes[index];
        if !wanted(index) || !node.stage.exclusive() {
            continue;
        }
        let mut inputs: BTreeMap<String, PathBuf> = BTreeMap::new();
        let mut lacks = Vec::new();
        for &input in &project.graph.inputs[index] {
            let name = project.graph.nodes[input].name.clone();
            match states.get(input) {
                Some(State::Fresh { artifact, .. })
                    if project.store.artifact(artifact).is_dir() =>
                {
                    inputs.insert(name, project.store.artifact(artifact));
                }
                _ => lacks.push(name),
            }
        }
        if !lacks.is_empty() {
            missing.push((node.name.clone(), lacks));
            continue;
        }
        let Some(estimate) = session.estimate(index, &inputs)? else {
            continue;
        };
        let record = project.record_of(index);
        let note = |name: &str| record.as_ref()?.notes.get(name).and_then(Value::as_u64);
        let tokens = estimate.counts.get("tokens").copied().unwrap_or(0);
        let seconds = note("tokens")
            .filter(|before| *before > 0)
            .zip(record.as_ref())
            .map(|(before, record)| record.seconds * tokens as f64 / before as f64);
        found.push(Estimated {
            stage: node.name.clone(),
            estimate,
            seconds,
            measured: note("peak_memory"),
        });
    }
    Ok((found, missing))
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let states = project.plan();
    let asked = project.find_all(args.stage.as_slice())?;
    let wanted = |index: usize| asked.is_empty() || asked.contains(&index);
    let (found, missing) = estimates(&project, &states, wanted)?;
    if args.json {
        let all = found.iter().map(|one| {
            json!({
                "stage": one.stage,
                "estimate": one.estimate,
                "seconds": one.seconds,
                "measured_peak_memory": one.measured,
            })
        });
        let waits = missing.iter();
        let waits = waits.map(|(stage, lacks)| json!({ "stage": stage, "needs": lacks }));
        return print_json(&json!({
            "estimates": all.collect::<Vec<_>>(),
            "not_estimated": waits.collect::<Vec<_>>(),
            "memory_of_the_machine": project.env.memory,
        }));
    }
    let mut text: String = found
        .iter()
        .map(|one| shown(one, project.env.memory))
        .collect();
    for (stage, lacks) in &missing {
        _ = writeln!(
            text,
            "{stage}: known as soon as what it reads is made: `pipeline run {} {}`",
            project.recipe.path.display(),
            lacks.join(" ")
        );
    }
    if text.is_empty() {
        text = match asked.first().copied() {
            Some(index) => format!(
                "nothing is known about `{}` before it runs\n",
                project.graph.nodes[index].name
            ),
            None => "the recipe has no training\n".to_owned(),
        };
    }
    print(&text);
    Ok(())
}

/// The lines about one training.
pub(super) fn shown(one: &Estimated, machine: Option<u64>) -> String {
    let mut text = format!("{}\n", one.stage);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![format!("  {name}"), value]);
    for (name, count) in &one.estimate.counts {
        row(&name.replace('_', " "), count.to_string());
    }
    row(
        "time",
        one.seconds.map_or_else(
            || {
                "not known before the first run; a training tells it after its first steps"
                    .to_owned()
            },
            |seconds| format!("about {}, as in the last run", duration(seconds)),
        ),
    );
    let more = if one.estimate.is_lower_bound {
        "at least "
    } else {
        "about "
    };
    let of = machine.map_or(String::new(), |machine| format!(" of {}", bytes(machine)));
    row(
        "memory at most",
        format!("{more}{}{of}", bytes(one.estimate.peak_memory)),
    );
    for (name, size) in one.estimate.largest_first() {
        row(&format!("  {name}"), bytes(size));
    }
    let of_gpu = one.estimate.largest_of_gpu_first();
    if !of_gpu.is_empty() {
        let sum = of_gpu.iter().map(|(_, size)| size).sum();
        row("memory of a GPU, on one", format!("about {}", bytes(sum)));
    }
    for (name, size) in of_gpu {
        row(&format!("  {name}"), bytes(size));
    }
    if let Some(measured) = one.measured {
        row("measured in the last run", bytes(measured));
    }
    text.push_str(&table(&rows));
    text
}
