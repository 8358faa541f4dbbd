//! How events are shown to people, and what they call their recipe.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How much is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Warnings and failures.
    Quiet,
    /// What people want to know.
    #[default]
    Normal,
    /// Every reason and every metric as well.
    Verbose,
}

/// The size of a terminal in columns and lines, asked for before each drawing.
pub type Size = fn() -> (usize, usize);

/// How events are shown.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Whether colours are wanted.
    pub color: bool,
    /// Whether more than ASCII can be shown.
    pub unicode: bool,
    /// How much is shown.
    pub verbosity: Verbosity,
    /// For a terminal that can move its cursor; without, there are only lines that stay.
    pub size: Option<Size>,
    /// The columns for lines that stay where no `size` says it; without, as many as they need.
    pub columns: Option<usize>,
    /// Set when the user has asked the run to stop.
    pub stopping: Arc<AtomicBool>,
}

/// What the events' recipe is called and where its stages stand, for messages.
#[derive(Debug, Clone, Default)]
pub struct RecipeNames {
    /// The recipe as a command names it.
    pub recipe: String,
    /// What the recipe was given by `--set`, as a command has it: empty, or with a space in front.
    pub set: String,
    /// Where each stage is defined, by its name.
    pub stages: BTreeMap<String, String>,
}

impl RecipeNames {
    /// A command about the recipe, or about one of its stages.
    pub fn command(&self, command: &str, stage: Option<&str>) -> String {
        let stage = stage.map(|stage| format!(" {}", quoted(stage)));
        let Self { recipe, set, .. } = self;
        format!(
            "pipeline {command} {recipe}{}{set}",
            stage.unwrap_or_default()
        )
    }
}

/// An argument as a shell reads it.
pub fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}
