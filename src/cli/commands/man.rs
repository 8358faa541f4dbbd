//! `man`: manual pages.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::cli::{Failure, help, print};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline man ~/.local/share/man/man1      # then `man pipeline` and `man pipeline-run`")]
pub(in crate::cli) struct Args {
    /// The folder for the pages, one for each command
    folder: PathBuf,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let folder = args.folder.display();
    std::fs::create_dir_all(&args.folder).with_context(|| format!("could not make `{folder}`"))?;
    // A page has commands as sections of its own; the groups are for the terminal.
    let command = help::command().help_template("{all-args}");
    clap_mangen::generate_to(command, &args.folder)
        .with_context(|| format!("could not write into `{folder}`"))?;
    print(&format!("the manual pages are in `{folder}`\n"));
    Ok(())
}
