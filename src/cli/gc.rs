//! `gc`: removes results that nobody needs any more.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::project::{Project, RecipeArgs, StoreArgs};
use super::{Failure, print, table};
use crate::engine::{Limits, State};
use crate::report::bytes;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The recipes whose results are kept, as they are now
    #[arg(required = true, value_name = "RECIPE")]
    recipes: Vec<PathBuf>,
    /// Keeps the results of each recipe's last runs as well, of all recipes that used the store
    #[arg(long, value_name = "N", default_value_t = 1)]
    keep_runs: usize,
    /// Keeps so many bytes of other results, the newest, such as `20GB`
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    max_size: u64,
    /// Says what would go, and removes nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Bytes, with a unit in powers of 1000.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit: u64 = match text.get(digits.len()..).unwrap_or_default() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err("expected a size such as `500MB` or `20GB`".into()),
    };
    let count = digits.trim().parse::<u64>().ok();
    count
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| "expected a size such as `500MB` or `20GB`".into())
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut needed = BTreeSet::new();
    let mut store = None;
    for recipe in &args.recipes {
        let recipe = RecipeArgs {
            recipe: recipe.clone(),
            set: Vec::new(),
        };
        let project = Project::open(&recipe, &args.store)?;
        for state in project.plan() {
            if let State::Fresh { artifact, .. } = state {
                needed.insert(artifact);
            }
        }
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
        max_size: args.max_size,
    };
    let garbage = store.collect(&needed, limits, !args.dry_run)?;
    let rows: Vec<Vec<String>> = garbage
        .iter()
        .map(|garbage| {
            let name = garbage
                .path
                .file_name()
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
