//! `why`: every reason of one stage, with the places of the parameters in the recipe.

use std::fmt::Write as _;

use super::plan::describe;
use super::project::{Project, RecipeArgs, StoreArgs};
use super::{Failure, print};
use crate::engine::{Reason, State};
use crate::recipe::RecipeStage;
use crate::report::{ago, duration};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stage
    stage: String,
    #[command(flatten)]
    store: StoreArgs,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let index = project.find(&args.stage)?;
    let states = project.plan();
    let mut text = String::new();
    explain(&project, &states, index, &mut text);
    // What it waits on, and what that waits on: each once, nearest first.
    let mut told = vec![index];
    let mut next = 0;
    while let Some(&index) = told.get(next) {
        next += 1;
        if let Some(State::WaitsOn { .. }) = states.get(index) {
            for &input in &project.graph.inputs[index] {
                let open = !matches!(states.get(input), Some(State::Fresh { .. }));
                if open && !told.contains(&input) {
                    text.push('\n');
                    explain(&project, &states, input, &mut text);
                    told.push(input);
                }
            }
        }
    }
    print(&text);
    Ok(())
}

fn explain(project: &Project, states: &[State], index: usize, text: &mut String) {
    let (Some(stage), Some(state)) = (project.recipe.stages.get(index), states.get(index)) else {
        return;
    };
    let name = &stage.name;
    let (word, lines) = describe(state);
    match state {
        State::Fresh { artifact, .. } => {
            _ = writeln!(text, "`{name}` is fresh: {}", lines.join(" "));
            if let Some(record) = project.record_of(index) {
                _ = writeln!(
                    text,
                    "  made {} in {} from the same parameters and contents",
                    ago(record.started),
                    duration(record.seconds)
                );
            }
            _ = writeln!(text, "  {}", project.store.artifact(artifact).display());
        }
        State::Unknown { error } => _ = writeln!(text, "`{name}` can't be told: {error}"),
        State::Runs { reasons } => {
            _ = writeln!(text, "`{name}` {word}:");
            list(project, stage, reasons, text);
        }
        State::WaitsOn { stages, reasons } => {
            _ = writeln!(text, "`{name}` {word} on {}", stages.join(", "));
            list(project, stage, reasons, text);
        }
    }
}

fn list(project: &Project, stage: &RecipeStage, reasons: &[Reason], text: &mut String) {
    for reason in reasons {
        _ = writeln!(text, "  - {reason}");
        let (Reason::ParameterChanged { parameter, .. }
        | Reason::InputChanged { parameter, .. }
        | Reason::FileChanged { parameter, .. }) = reason
        else {
            continue;
        };
        let path = format!("stages.{}.{}.{parameter}", stage.name, stage.kind.name);
        if let Some(place) = project.recipe.place_of(&path) {
            _ = writeln!(text, "    {}:{place}", project.recipe.path.display());
        }
    }
}
