//! `gc`: removes results that nobody needs any more.

use std::path::PathBuf;

use crate::cli::args::{ReadingArgs, RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, print, table};
use crate::engine::{Bytes, Limits, Needs};
use crate::report::bytes;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The recipes whose current results are kept
    #[arg(required = true, value_name = "RECIPE")]
    recipes: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Also keeps the results of the last N runs of every recipe that used the store
    #[arg(long, value_name = "N", default_value_t = 1)]
    keep_runs: usize,
    /// Keeps the newest other results up to this size, such as `20GB`
    #[arg(long, value_name = "SIZE", default_value = "0")]
    max_size: Bytes,
    /// Shows what would be removed, without removing anything
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut needs = Needs::default();
    let mut store = None;
    for recipe in &args.recipes {
        let recipe = RecipeArgs::of(recipe, &args.reading);
        let project = Project::open(&recipe, &args.store)?;
        project.session(&[]).needs(&mut needs);
        // The recipes of one call belong to one store.
        match &store {
            None => store = Some(project.store),
            Some(first) if *first != project.store => {
                return Err(anyhow::anyhow!(
                    "the recipes belong to different stores; collect them one by one"
                )
                .into());
            }
            Some(_) => {}
        }
    }
    let Some(store) = store else {
        return Ok(());
    };
    let limits = Limits {
        keep_runs: args.keep_runs,
        max_size: args.max_size.0,
    };
    let garbage = store.collect(&needs, limits, !args.dry_run)?;
    let rows: Vec<Vec<String>> = garbage
        .iter()
        .map(|garbage| {
            let name = garbage
                .path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy();
            let name = name.chars().take(10).collect();
            let stage = garbage.stage.clone().unwrap_or_default();
            vec![garbage.what.to_owned(), name, stage, bytes(garbage.size)]
        })
        .collect();
    let all = bytes(garbage.iter().map(|garbage| garbage.size).sum());
    let would = if args.dry_run {
        "would be freed"
    } else {
        "freed"
    };
    print(&format!("{}{all} {would}\n", table(&rows)));
    Ok(())
}
