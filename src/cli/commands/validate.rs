//! `validate`: checks recipes, the local files that they name, and the first rows of those with their chat templates, without running anything.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::PathBuf;

use super::preview::trials::Trials;
use super::run::warn_of_unused;
use crate::cli::args::{ReadingArgs, RecipeArgs, StoreArgs};
use crate::cli::console::verbosity;
use crate::cli::project::Project;
use crate::cli::{Failure, eprint_rendered, error, print};
use crate::engine::{Artifact as _, files_at};
use crate::recipe::SourceSpan;
use crate::report::{Verbosity, count};
use crate::stages::artifacts::Chats;

/// So many of the first rows of a file are looked at.
const FIRST_ROWS: usize = 100;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The recipes, YAML files
    #[arg(required = true, value_name = "RECIPE")]
    recipes: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Checks the recipes alone, and not whether the files they read are there and can be read
    #[arg(long)]
    no_files: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut failure = None;
    for recipe in &args.recipes {
        let recipe = RecipeArgs::of(recipe, &args.reading);
        if let Err(failed) = validate(&recipe, args) {
            // The next recipe may be wrong as well.
            match failed {
                Failure::Usage(text) => {
                    eprint_rendered(&text);
                    failure = Some(Failure::Usage(String::new()));
                }
                Failure::Failed(error) => {
                    eprint_rendered(&error::plain(&format!("{error:#}")));
                    failure = failure.or(Some(Failure::Reported));
                }
                other => failure = failure.or(Some(other)),
            }
        }
    }
    failure.map_or(Ok(()), Err)
}

fn validate(recipe: &RecipeArgs, args: &Args) -> Result<(), Failure> {
    let project = Project::open(recipe, &args.store)?;
    warn_of_unused(&project);
    let path = project.recipe.path.display();
    let wrong = Cell::new(0);
    let tell = |span: Option<SourceSpan>, message: &str| {
        wrong.set(wrong.get() + 1);
        let place = span.map_or_else(|| path.to_string(), |span| project.recipe.place(span));
        eprint_rendered(&error::plain(&format!("{message}\n  at {place}")));
    };
    let mut files = 0;
    let mut tried = BTreeSet::new();
    let session = project.session(&[]);
    for (index, stage) in project.recipe.stages.iter().enumerate() {
        if args.no_files {
            break;
        }
        // Nothing of a frozen stage is read.
        if stage.handling.frozen {
            continue;
        }
        let mut all_there = true;
        for file in &stage.files {
            let parameter = format!(
                "stages.{}.{}.{}",
                stage.name, stage.kind.name, file.parameter
            );
            let span = || {
                let span = project.recipe.span_of(&parameter);
                span.or(Some(project.recipe.span_of_stage(stage)))
            };
            let found = project.graph.nodes.get(index);
            let found = found.and_then(|node| node.sources.get(&file.path));
            let listed = found.map(|found| files_at(found));
            match listed {
                Some(Ok(listed)) => files += listed.len() as u64,
                Some(Err(error)) => {
                    all_there = false;
                    tell(span(), &format!("`{}`: {error:#}", stage.name));
                }
                None => {}
            }
        }
        if all_there && let Err(error) = session.try_first_rows(index, FIRST_ROWS, &mut tried) {
            let span = project.recipe.span_of_stage(stage);
            tell(Some(span), &format!("`{}`: {error:#}", stage.name));
        }
    }
    if wrong.get() == 0 && !args.no_files {
        let mut trials = Trials::new(&project, FIRST_ROWS)?;
        for index in project.graph.order.iter().copied() {
            let stage = &project.recipe.stages[index];
            let needed = project.graph.needed(&[index]);
            let mut upstream = project.graph.nodes.iter().zip(needed);
            // No program runs for a look.
            let runs_programs = upstream.any(|(node, needed)| needed && node.stage.runs_programs());
            if stage.kind.output == Chats::NAME
                && !runs_programs
                && let Err(error) = trials.check(index)
            {
                tell(
                    Some(project.recipe.span_of_stage(stage)),
                    &format!("{error:#}"),
                );
            }
        }
    }
    if wrong.get() > 0 {
        return Err(Failure::Reported);
    }
    if verbosity() > Verbosity::Quiet {
        let files = if files == 0 {
            String::new()
        } else {
            format!(", {} read", count(files, "files"))
        };
        print(&format!(
            "`{path}` is valid: {}, {}{files}\n",
            count(project.recipe.stages.len() as u64, "stages"),
            count(project.recipe.outputs.len() as u64, "outputs"),
        ));
    }
    Ok(())
}
