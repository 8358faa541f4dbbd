//! The arguments that several commands share.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::recipe::{Override, PROFILE};

/// What every command that reads a recipe takes.
#[derive(Args)]
pub(super) struct RecipeArgs {
    /// The recipe, a YAML file
    pub(super) recipe: PathBuf,
    #[command(flatten)]
    pub(super) reading: ReadingArgs,
}

/// How recipes are read, for every command that reads one or several.
#[derive(Clone, Default, Args)]
pub(super) struct ReadingArgs {
    /// Sets a value of the recipe, such as `stages.tuned.train_orpo.beta=0.2` or `vars.seed=1`; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = assignment)]
    set: Vec<Override>,
    /// Uses a profile of the recipe, before `--set`; the same as `--set profile=NAME`; may be repeated
    #[arg(long, value_name = "NAME", value_parser = profile)]
    profile: Vec<Override>,
    /// Allows the recipe to read files in this folder outside its project, also through links; may be repeated
    #[arg(long, value_name = "DIR")]
    pub(super) allow_path: Vec<PathBuf>,
}

/// What every command that looks into the store takes.
#[derive(Args)]
pub(super) struct StoreArgs {
    /// The store, the folder with all results [default: `.pipeline` in the project]
    #[arg(long, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    /// Does not access the network
    #[arg(long)]
    pub(super) offline: bool,
    /// Verifies the contents of every result instead of trusting unchanged times and sizes
    #[arg(long)]
    pub(super) verify: bool,
}

impl RecipeArgs {
    /// A recipe, read as `reading` says.
    pub(super) fn of(recipe: &Path, reading: &ReadingArgs) -> Self {
        Self {
            recipe: recipe.to_owned(),
            reading: reading.clone(),
        }
    }

    /// Everything that the command line changes in the recipe, in its order.
    pub(super) fn changes(&self) -> Vec<Override> {
        let ReadingArgs { profile, set, .. } = &self.reading;
        profile.iter().chain(set).cloned().collect()
    }
}

#[expect(clippy::unnecessary_wraps, reason = "a parser of values may fail")]
fn profile(name: &str) -> Result<Override, String> {
    Ok(Override {
        path: PROFILE.to_owned(),
        value: name.to_owned(),
    })
}

fn assignment(text: &str) -> Result<Override, String> {
    let (path, value) = text
        .split_once('=')
        .ok_or("expected PATH=VALUE, such as `vars.seed=1`")?;
    Ok(Override {
        path: path.trim().to_owned(),
        value: value.to_owned(),
    })
}
