//! What a recipe is put together of: its files, the vars of those that it includes, and what is known of values that are not written in
//! their places.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use serde_yaml::Value;

use crate::engine::declared;

use super::source_map::{RecipePath, SourceSpan};

/// The values of vars by name.
pub(crate) type Vars = BTreeMap<String, Value>;

/// A file of a recipe: its own, or one that it includes or extends.
#[derive(Debug, Clone)]
pub struct RecipeFile {
    /// The file, from where paths in it start.
    pub path: PathBuf,
    /// How messages call it.
    pub shown: PathBuf,
    /// Its text.
    pub text: Arc<str>,
    /// Whether it came from elsewhere by `git` or from the hub, so that it may read its own folder alone.
    pub fetched: Option<PathBuf>,
}

/// The files so far, which a recipe and those that it includes have together.
pub(crate) type Files = Rc<RefCell<Vec<RecipeFile>>>;

/// Where a value was given that is not written in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The argument, or the place: `--set vars.seed=1`, `r.yaml:3:9`.
    pub(crate) text: String,
    /// The file where paths in it start; none for the command line.
    pub(crate) file: Option<usize>,
}

/// The vars of an included recipe.
#[derive(Debug, Clone)]
pub(crate) struct Namespace {
    pub(crate) vars: Vars,
    /// Where they are in the source map.
    pub(crate) at: RecipePath,
}

/// The name before the stage's own in that of an included stage: `prep` of `prep.chats[seed=1]`.
pub(crate) fn namespace(stage: &str) -> Option<&str> {
    let plain = declared(stage);
    plain.rsplit_once('.').map(|(namespace, _)| namespace)
}

/// A change to a recipe that another one includes, from there.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) steps: RecipePath,
    pub(crate) value: Value,
    pub(crate) origin: Origin,
    /// Of how many recipes above the value is, where it is a var.
    pub(crate) levels: usize,
}

/// A stage that its `when` leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// Its kind, if it has a known one.
    pub kind: Option<&'static str>,
    /// The expression that is false.
    pub when: String,
    /// Where that is written.
    pub span: Option<SourceSpan>,
}
