//! The mistakes of a recipe, as data. `cli::error` renders them.

use std::path::PathBuf;

use super::source_map::SourceSpan;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeError {
    /// The recipe's file.
    pub file: PathBuf,
    /// What is wrong.
    pub message: String,
    /// Where it is written, when it is in the file.
    pub span: Option<SourceSpan>,
    /// The argument it came from, when it is on the command line: `--set vars.seed=one`.
    pub origin: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// The line at the span.
    pub source_line: Option<String>,
}

/// All mistakes of a recipe, by line; those of the command line come last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipeErrors(pub Vec<RecipeError>);

impl std::fmt::Display for RecipeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.origin, self.span) {
            (Some(origin), _) => write!(f, "{origin}: ")?,
            (None, Some(span)) => write!(f, "{}:{span}: ", self.file.display())?,
            (None, None) => write!(f, "{}: ", self.file.display())?,
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl std::fmt::Display for RecipeErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for RecipeError {}
impl std::error::Error for RecipeErrors {}
