//! `graph`: draws the graph of a recipe.

use clap::ValueEnum;

use crate::cli::args::RecipeArgs;
use crate::cli::project::load;
use crate::cli::{Failure, print};
use crate::recipe::graph::{Format, draw};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// How to draw
    #[arg(long, value_enum, default_value_t = Drawing::Text)]
    format: Drawing,
}

#[derive(Clone, Copy, ValueEnum)]
enum Drawing {
    /// One line per stage
    Text,
    /// A Mermaid flowchart
    Mermaid,
    /// A Graphviz digraph
    Dot,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let recipe = load(&args.recipe)?;
    let format = match args.format {
        Drawing::Text => Format::Text,
        Drawing::Mermaid => Format::Mermaid,
        Drawing::Dot => Format::Dot,
    };
    print(&draw(&recipe, format, |_| None));
    Ok(())
}
