//! `validate`: checks a recipe without running anything.

use super::project::{RecipeArgs, load};
use super::{Failure, print};

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let recipe = load(&args.recipe)?;
    print(&format!(
        "`{}` is valid: {} stages, {} outputs\n",
        recipe.path.display(),
        recipe.stages.len(),
        recipe.outputs.len()
    ));
    Ok(())
}
