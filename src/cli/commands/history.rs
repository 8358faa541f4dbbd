//! `history`: the runs of a recipe.

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print, print_json, table};
use crate::engine::{Outcome, Run, RunStage};
use crate::report::{ago, duration};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Shows the events of this run, as they were shown when it ran
    #[arg(long, value_name = "RUN")]
    events: Option<u64>,
    /// The runs, or with `--events` the events one a line, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    if let Some(run) = args.events {
        return show_events(&project, &args.recipe, run, args.json);
    }
    let runs = project.runs();
    if args.json {
        return print_json(&runs);
    }
    if runs.is_empty() {
        print("no runs yet\n");
        return Ok(());
    }
    print(&table(&runs.iter().map(row).collect::<Vec<_>>()));
    Ok(())
}

/// So many stages are named.
const MOST_NAMES: usize = 4;

fn row(run: &Run) -> Vec<String> {
    let outcome = match run.outcome {
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Interrupted => "interrupted",
        Outcome::Running => "running",
        Outcome::Killed => "killed",
    };
    let named = |wanted: fn(&RunStage) -> bool| {
        let stages = run.stages.iter().filter(|(_, stage)| wanted(stage));
        let names: Vec<&str> = stages.map(|(name, _)| name.as_str()).collect();
        match names.get(..MOST_NAMES) {
            Some(first) if names.len() > MOST_NAMES + 1 => {
                let more = names.len() - MOST_NAMES;
                format!("{} and {more} more", first.join(", "))
            }
            _ => names.join(", "),
        }
    };
    let mut what = vec![named(|stage| stage.ran)];
    if what[0].is_empty() {
        what[0] = "nothing ran".into();
    }
    let missing = named(|stage| stage.artifact.is_none());
    if !missing.is_empty() {
        what.push(format!("without a result: {missing}"));
    }
    vec![
        run.number.to_string(),
        ago(run.started),
        outcome.to_owned(),
        format!("in {}", duration(run.seconds)),
        what.join("; "),
    ]
}

/// Hands the events of a run to a reporter again.
fn show_events(
    project: &Project,
    recipe: &RecipeArgs,
    run: u64,
    json: bool,
) -> Result<(), Failure> {
    let Some(events) = project.events(run) else {
        let message = format!("no events of run {run} are kept");
        let hint =
            "`pipeline history` lists the runs; `pipeline gc` removes the events of old ones";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    };
    super::log::replay(project, recipe, events, json);
    Ok(())
}
