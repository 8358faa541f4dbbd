//! `preview`: the first rows as a training will see them, without a run.

pub(super) mod trials;
mod view;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, print_json, print_rendered};
use trials::{Found, Trials};

/// Examples, shown below the options.
const EXAMPLES: &str = "Examples:
  pipeline preview recipe.yaml              the rows of each `tokenize`, with what is trained and what is cut
  pipeline preview recipe.yaml tuned        the rows that the training `tuned` reads
  pipeline preview recipe.yaml --ids -n 1   one row, token by token";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// A stage that makes or reads rows [default: every stage that makes tokens]
    stage: Option<String>,
    /// Reads so many rows of each dataset
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Shows so many rows of each split
    #[arg(long, short = 'n', value_name = "N", default_value_t = 2)]
    number: usize,
    /// Shows each token with its id
    #[arg(long)]
    ids: bool,
    /// Everything as JSON, ids included
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let settings = StoreArgs {
        // Whatever is not here is not worth a download for a look.
        offline: true,
        store: args.store.store.clone(),
        verify: args.store.verify,
    };
    let project = Project::open(&args.recipe, &settings)?;
    crate::cli::commands::run::stop_on_signal(&project.env.cancel, true)?;
    let asked = args.stage.as_deref().map(|name| project.find(name));
    let mut trials = Trials::new(&project, args.rows as usize)?;
    let targets = trials.targets(asked.transpose()?)?;
    let found = targets
        .into_iter()
        .map(|target| trials.look(target, args.number))
        .collect::<anyhow::Result<Vec<Found>>>()?;
    if args.json {
        return print_json(&view::json(&trials, &found));
    }
    print_rendered(&view::text(&trials, &found, args.ids));
    Ok(())
}
