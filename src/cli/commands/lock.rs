//! `lock`: pins what can move, in a file beside the recipe.

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, includes, lock_file, print};
use crate::engine::pin_changes;
use crate::report::count;

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
    let all_anew = args.update && args.stages.is_empty();
    let project = Project::open_with(&args.recipe, &args.store, all_anew)?;
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
    let mut changes = includes::changes(&project.include_pins, &project.included);
    changes.extend(pin_changes(&project.pins, &pins));
    let path = lock_file::path(&args.recipe.recipe);
    let pinned = count(pins.len() as u64, "stages");
    let recipes = match project.included.len() {
        0 => String::new(),
        recipes => format!(" and {}", count(recipes as u64, "recipes")),
    };
    lock_file::write(&path, pins, project.included)?;
    print(&format!(
        "{}`{}` pins {pinned}{recipes}\n",
        lock_file::list(&changes),
        path.display(),
    ));
    Ok(())
}
