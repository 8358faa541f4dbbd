//! `plan`: what `run` would do, one line a stage.

use serde_json::json;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::remote::RemoteArgs;
use crate::cli::{Failure, print, print_json, table};
use crate::engine::{State, short};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The plan as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote, true)?;
    let states = project.plan();
    project.report_warnings()?;
    let order = project.recipe.order();
    let planned = || {
        let pairs = order
            .iter()
            .map(|&index| (project.recipe.stages.get(index), states.get(index)));
        pairs.filter_map(|(stage, state)| Some((stage?, state?)))
    };
    if args.json {
        let stages: Vec<_> = planned()
            .map(|(stage, state)| json!({ "stage": stage.name, "kind": stage.kind.name, "plan": state }))
            .collect();
        return print_json(&stages);
    }
    let rows: Vec<Vec<String>> = planned()
        .flat_map(|(stage, state)| {
            let (state, mut why) = describe(state);
            let first = if why.is_empty() {
                String::new()
            } else {
                why.remove(0)
            };
            let head = vec![
                stage.name.clone(),
                stage.kind.name.to_owned(),
                state.to_owned(),
                first,
            ];
            let more = why
                .into_iter()
                .map(|why| vec![String::new(), String::new(), String::new(), why]);
            std::iter::once(head).chain(more).collect::<Vec<_>>()
        })
        .collect();
    print(&table(&rows));
    if let Some(implied) = project.recipe.implied() {
        print(&format!("{implied}\n"));
    }
    let count = |wanted: fn(&State) -> bool| states.iter().filter(|state| wanted(state)).count();
    print(&format!(
        "{} fresh, {} to run, {} waiting\n",
        count(|state| matches!(state, State::Fresh { .. })),
        count(|state| matches!(state, State::Runs { .. })),
        count(|state| matches!(state, State::WaitsOn { .. })),
    ));
    Ok(())
}

/// One word for a state, and a line for each thing to say about it.
pub(in crate::cli) fn describe(state: &State) -> (&'static str, Vec<String>) {
    match state {
        State::Fresh {
            artifact,
            restored,
            remote,
        } => {
            let from = match (restored, remote) {
                (true, true) => " (an earlier state, in the remote)",
                (true, false) => " (an earlier state)",
                (false, true) => " (in the remote)",
                (false, false) => "",
            };
            ("fresh", vec![format!("{}{from}", short(Some(artifact)))])
        }
        State::Runs { reasons } => ("runs", reasons.iter().map(ToString::to_string).collect()),
        State::WaitsOn { stages, reasons } => {
            let waits = format!("on {}", stages.join(", "));
            let reasons = reasons.iter().map(ToString::to_string);
            ("waits", std::iter::once(waits).chain(reasons).collect())
        }
        State::Unknown { error } => ("unknown", vec![error.clone()]),
    }
}
