//! `validate`: checks a recipe without running anything.

use crate::cli::args::RecipeArgs;
use crate::cli::project::load;
use crate::cli::{Failure, print};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let recipe = load(&args.recipe)?;
    print(&format!(
        "`{}` is valid: {} stages, {} outputs\n",
        recipe.path.display(),
        recipe.stages.len(),
        recipe.outputs.len()
    ));
    Ok(())
}
