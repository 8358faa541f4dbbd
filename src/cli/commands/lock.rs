//! `lock`: pins what can move, in a file beside the recipe.

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, lock_file, print};
use crate::engine::pin_changes;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages to update, with `--update` [default: all]
    #[arg(requires = "update")]
    stages: Vec<String>,
    /// Updates pins to the current branches and files; without it only missing pins are added
    #[arg(long)]
    update: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let wanted = project.find_all(&args.stages)?;
    let fresh = |stage: &str| {
        let named = || {
            project
                .graph
                .find(stage)
                .is_some_and(|index| wanted.contains(&index))
        };
        args.update && (args.stages.is_empty() || named())
    };
    let pins = project.session(&[]).pin(&fresh)?;
    let changes = pin_changes(&project.pins, &pins);
    let path = lock_file::path(&args.recipe.recipe);
    let count = pins.len();
    lock_file::write(&path, pins)?;
    print(&format!(
        "{}`{}` pins {} stages\n",
        lock_file::list(&changes),
        path.display(),
        count
    ));
    Ok(())
}
