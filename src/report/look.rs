//! How events are shown to people, and what they call their recipe.

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
    /// The names of its stages.
    pub stages: Vec<String>,
    /// Where each of them is defined.
    pub place: StagePlaces,
}

/// Where the stages of a recipe are defined, which is found out when somebody asks.
#[derive(Clone, Default)]
pub struct StagePlaces(Option<Arc<Places>>);

/// The place of a stage by its name.
type Places = dyn Fn(&str) -> String + Send + Sync;

impl StagePlaces {
    /// The places that a function finds.
    pub fn new(find: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(find)))
    }

    /// Where a stage is defined, if that can be found out.
    pub fn of(&self, stage: &str) -> Option<String> {
        self.0.as_ref().map(|find| find(stage))
    }
}

impl std::fmt::Debug for StagePlaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StagePlaces")
    }
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
