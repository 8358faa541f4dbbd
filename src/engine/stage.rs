//! The trait that a new kind of stage implements.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::reading::{ParseError, read_parameters};
use super::{Artifact, Context, Estimate, Position, RunEnv};

/// One kind of stage. The implementing struct is its parameters, and the single source of parsing, defaults, JSON Schema,
/// reference docs, fingerprint and graph edges.
///
/// Parameters use three marker types that the engine finds by itself: [`super::Input`] (an edge), [`super::SourcePath`]
/// (a local file whose content counts) and [`super::Neutral`] (a setting that can't change the result).
pub trait Stage: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The key in the recipe, a verb in `snake_case`.
    const KIND: &'static str;
    /// Raised whenever the code below would make other bytes from the same parameters and inputs.
    const VERSION: u32;
    /// What the stage makes.
    type Output: Artifact;
    /// Whether the stage takes the whole machine (a training): the runner starts only one such stage at a time.
    const EXCLUSIVE: bool = false;

    /// Whether the stage reads rows, texts or models that anybody may have written, and never needs to hold more than a few
    /// of them: its process may then take no more than a few GiB of memory (see [`super::Task`]).
    const BOUNDED: bool = false;

    /// Whether its rows can be made by several tasks (`resources: { shards: n }`). Such a stage asks [`Context::shard`] for the rows to make, and
    /// [`Context::shards`] for what was made of them.
    const SHARDS: bool = false;

    /// Whether [`Stage::external_facts`] gives facts that can change by themselves, such as the commit of a branch.
    const HAS_EXTERNAL_FACTS: bool = false;

    /// Whether the stage runs programs that the recipe names: then it is not tried out before a run.
    const RUNS_PROGRAMS: bool = false;

    /// Parameters that only say how far the stage goes, such as a number of epochs. Stages whose fingerprints differ in
    /// nothing else are a family: what one of them left in [`Context::continuation`] the others find by [`Context::continuations`].
    const LENGTH_PARAMETERS: &'static [&'static str] = &[];

    /// Parameters that a recipe may leave out, because the rest of the recipe says what they are.
    const IMPLIED: &'static [Implied] = &[];

    /// Reads the parameters. Overridden where several structs stand side by side in one map ([`super::read_side_by_side`]).
    fn read(parameters: serde_json::Value) -> Result<Self, ParseError> {
        read_parameters(parameters)
    }

    /// The noun of what the stage makes with these parameters. Overridden where a parameter decides between two artifacts
    /// (a training makes an adapter, or without one a model).
    fn output(&self) -> &'static str {
        Self::Output::NAME
    }

    /// Checks rules between parameters that neither their types nor bounds in their schema (`#[schemars(extend("minimum" = 1))]`, see
    /// [`super::Bounds`]) can express. It is called before any stage runs, and must not read files.
    fn check(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// Checks whether so many processes, more than one, can share the work (`resources: { processes: n }`); a problem says why they can't.
    /// Each of them runs [`Stage::run`], and the first one alone writes to the folders of its context.
    fn check_processes(&self, _processes: usize) -> Result<(), Problem> {
        Err(Problem::new(
            "processes",
            format!(
                "`{}` runs in one process: `processes` is for trainings",
                Self::KIND
            ),
        ))
    }

    /// External facts that determine the result, such as the commit that `main` refers to now. They become part of the fingerprint, and
    /// [`Stage::run`] reads them with [`Context::external_fact`]. Local files are not listed here.
    fn external_facts(&self, _world: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    /// Environment variables that [`Stage::run`] reads by [`RunEnv::lookup`]. Their values are no part of the fingerprint.
    fn variables(&self) -> Vec<String> {
        Vec::new()
    }

    /// What [`Stage::run`] would take, from the inputs alone; none where nothing is known. It writes nothing.
    fn estimate(&self, _cx: &Context) -> anyhow::Result<Option<Estimate>> {
        Ok(None)
    }

    /// Where an interrupted run of the stage stopped and the next one resumes, according to its scratch folder. Reads only names and
    /// small files.
    fn position(&self, _scratch: &Path) -> Option<Position> {
        None
    }

    /// The same stage limited to the first `rows` rows of its local files, so that mistakes in them are found at once; `None` unless the
    /// stage reads only such files.
    fn on_first_rows(&self, _rows: usize) -> Option<Self> {
        None
    }

    /// Whether [`Stage::accept`] asks anything of the result.
    fn has_requirements(&self) -> bool {
        false
    }

    /// Holds the result in the folder `result` against requirements, which are neutral parameters: whenever it was made, and whenever it
    /// is fresh. An error fails the stage in this run, but the result stays in the store and is not made again.
    fn accept(&self, _result: &Path) -> anyhow::Result<()> {
        Ok(())
    }

    /// Makes the artifact in [`Context::out`]. On an error, only the scratch folder is kept.
    fn run(&self, cx: &Context) -> anyhow::Result<()>;
}

/// A parameter that names another stage, and that a recipe may leave out because the rest of the recipe says which one is meant.
/// The recipe's reader fills it in, so a stage never sees the difference, and neither does its fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Implied {
    /// The parameter: an [`super::Input`], optional or not.
    pub parameter: &'static str,
    /// Parameters that say the same in another way. Where one of them is given, nothing is implied.
    pub unless: &'static [&'static str],
    /// Parameters of which one must be given, or else nothing is implied; none where it does not hang on others.
    pub with: &'static [&'static str],
    /// Where the name comes from; the first source that has one counts.
    pub sources: &'static [ImpliedBy],
}

/// Where the name of an implied stage comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImpliedBy {
    /// What the stage that `input` names has for `parameter`: the `model` of the stage that made the adapter.
    Input {
        /// A parameter of this stage.
        input: &'static str,
        /// A parameter of the stage that it names.
        parameter: &'static str,
        /// A kind to step over: where the stage that was found is of this kind, what it has for `parameter` is meant. `merge` steps over
        /// `quantize`, because merging into the dense weights loses less.
        before: Option<&'static str>,
    },
    /// The only stage of the recipe that makes such an artifact without taking one: the model that everything starts from.
    OnlyFirst,
}

/// A parameter that breaks a rule of its stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The parameter, as it is written in the recipe; dots for nested ones.
    pub parameter: String,
    /// What is wrong and what was expected: a sentence fragment without a final stop.
    pub message: String,
    /// What to do, when there is something to say.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem without a hint.
    pub fn new(parameter: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            parameter: parameter.into(),
            message: message.into(),
            hint: None,
        }
    }

    /// The same problem with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
