//! `log`: what a stage told in its last run, from the events that the run left.

use std::time::{Duration, UNIX_EPOCH};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::console::{Output, look_of_output};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print};
use crate::engine::{Event, LoggedEvent};
use crate::report::{JsonLines, Reporter as _, Terminal, Verbosity, ago, quoted};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stage
    stage: String,
    /// The run, by its number in `history` [default: the last one in which the stage ran]
    #[arg(long, value_name = "RUN")]
    run: Option<u64>,
    /// The events as JSON, one per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let stage = &project.recipe.stages[project.find(&args.stage)?].name;
    let runs = project.runs();
    let wanted = runs
        .iter()
        .rev()
        .filter(|run| args.run.is_none_or(|wanted| wanted == run.number));
    for run in wanted {
        let events = project.events(run.number).into_iter().flatten();
        let own: Vec<LoggedEvent> = events.filter(|logged| is_of(logged, stage)).collect();
        if !own.iter().any(|logged| told(&logged.event)) {
            continue;
        }
        if !args.json {
            print(&format!(
                "`{stage}` in run {}, {}\n",
                run.number,
                ago(run.started)
            ));
        }
        replay(&project, &args.recipe, own.into_iter(), args.json);
        return Ok(());
    }
    let recipe = quoted(&project.recipe.path.display().to_string());
    let (message, hint) = match args.run {
        Some(run) => (
            format!("no log of `{stage}` in run {run} is kept"),
            format!("`pipeline history {recipe}` lists the runs and what ran in each"),
        ),
        None => (
            format!("no log of `{stage}` is kept"),
            format!(
                "it did not run here yet, or long ago: the logs of the last 50 runs are kept; `pipeline why {recipe} {}` says where \
                 its result is from",
                quoted(stage)
            ),
        ),
    };
    Err(Failure::Usage(error::with_hint(&message, &hint)))
}

/// Hands events to a reporter again, with everything that they tell.
pub(super) fn replay(
    project: &Project,
    recipe: &RecipeArgs,
    events: impl Iterator<Item = LoggedEvent>,
    json: bool,
) {
    if json {
        let mut lines = JsonLines::new(Output);
        for logged in events {
            let time = UNIX_EPOCH + Duration::from_millis(logged.unix_ms);
            lines.event_at(&logged.event, time);
        }
        return;
    }
    let mut look = look_of_output();
    look.verbosity = Verbosity::Verbose;
    let mut names = project.recipe_names(recipe);
    names.recipe.clear();
    let mut terminal = Terminal::new(names, look, Output);
    for logged in events {
        terminal.event(&logged.event);
        terminal.flush();
    }
}

/// Whether it is an event of this stage.
fn is_of(logged: &LoggedEvent, wanted: &str) -> bool {
    logged.event.stage() == Some(wanted)
}

/// Whether the stage did something, so that there is something to tell.
fn told(event: &Event) -> bool {
    matches!(
        event,
        Event::StageStarted { .. } | Event::StageFailed { .. } | Event::StageFetched { .. }
    )
}
