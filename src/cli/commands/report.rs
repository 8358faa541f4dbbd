//! `report`: a recipe's stages, curves, scores, answers and data as one HTML file, or served while a run goes on.

use std::path::{Path, PathBuf};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::page::{Memo, page};
use crate::cli::project::Project;
use crate::cli::serve::{serve, show};
use crate::cli::{Failure, error, print};
use crate::engine::write_atomically;
use crate::report::page::render;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline report recipe.yaml                 writes recipe.html
  pipeline report recipe.yaml --open          and shows it in the browser
  pipeline report recipe.yaml --serve --open  follows a run in the browser; Ctrl-C ends it")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The file to write [default: the recipe's name with `.html`, in the current folder]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Shows the report in the browser
    #[arg(long)]
    open: bool,
    /// Serves the report on this machine and follows a run in progress, instead of writing a file
    #[arg(long, conflicts_with = "output")]
    serve: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    if args.serve {
        return serve(&args.recipe, &args.store, args.open);
    }
    let project = Project::open(&args.recipe, &args.store)?;
    let text = render(&page(&project, false, &mut Memo::default())?)?;
    let stem = project.recipe.path.file_stem().unwrap_or_default();
    let path = match &args.output {
        Some(path) => path.clone(),
        None => PathBuf::from(format!("{}.html", stem.to_string_lossy())),
    };
    let file = std::path::absolute(&path).map_err(anyhow::Error::from)?;
    if same_file(&file, &project.recipe.path) {
        let message = format!("`{}` is the recipe", path.display());
        let hint = "name another file by `--output`";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    write_atomically(&file, text.as_bytes())?;
    print(&format!("{}\n", path.display()));
    if args.open {
        show(&path.display().to_string());
    }
    Ok(())
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
