//! A kind of stage as a value, and a stage of any kind behind one object-safe trait.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use schemars::{Schema, SchemaGenerator};
use serde_json::Value;

use super::reading::ParseError;
use super::{Artifact, Context, Estimate, Implied, Position, Problem, RunEnv, Stage, bounds};

/// An entry of the list of kinds: everything that is known about a kind without its parameters.
#[derive(Clone, Copy)]
pub struct Kind {
    /// The key in the recipe.
    pub name: &'static str,
    /// [`Stage::VERSION`].
    pub version: u32,
    /// The noun of what it makes, unless its parameters say otherwise ([`Stage::output`]).
    pub output: &'static str,
    /// Reads parameters.
    pub parse: fn(Value) -> Result<Arc<dyn AnyStage>, ParseError>,
    /// [`Stage::IMPLIED`].
    pub implied: &'static [Implied],
    /// The JSON Schema of the parameters; its description is the kind's documentation.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

impl Kind {
    /// The entry for `S`.
    pub const fn of<S: Stage>() -> Self {
        Self {
            name: S::KIND,
            version: S::VERSION,
            output: <S::Output as Artifact>::NAME,
            parse: parse::<S>,
            implied: S::IMPLIED,
            schema: S::json_schema,
        }
    }
}

fn parse<S: Stage>(params: Value) -> Result<Arc<dyn AnyStage>, ParseError> {
    let stage = S::read(params)?;
    Ok(Arc::new(Parsed {
        stage,
        params: OnceLock::new(),
    }))
}

/// A stage of any kind. Implemented for every [`Stage`]; nothing else should implement it.
pub trait AnyStage: Send + Sync {
    /// [`Stage::KIND`].
    fn kind(&self) -> &'static str;
    /// [`Stage::VERSION`].
    fn version(&self) -> u32;
    /// [`Stage::output`].
    fn output(&self) -> &'static str;
    /// [`Stage::EXCLUSIVE`].
    fn exclusive(&self) -> bool;
    /// [`Stage::BOUNDED`].
    fn bounded(&self) -> bool;
    /// [`Stage::SHARDS`].
    fn shards(&self) -> bool;
    /// [`Stage::HAS_EXTERNAL_FACTS`].
    fn has_external_facts(&self) -> bool;
    /// [`Stage::RUNS_PROGRAMS`].
    fn runs_programs(&self) -> bool;
    /// [`Stage::LENGTH_PARAMETERS`].
    fn length_parameters(&self) -> &'static [&'static str];
    /// Every parameter with its default filled in; inputs, files and neutral settings are marked (see `engine::params`). A stage of a
    /// recipe writes them once, since all who plan ask for them.
    fn params(&self) -> serde_json::Result<Arc<Value>>;
    /// [`super::check`]: numbers out of bounds, and [`Stage::check`].
    fn check(&self) -> Vec<Problem>;
    /// [`Stage::check_processes`].
    fn check_processes(&self, processes: usize) -> Result<(), Problem>;
    /// [`Stage::external_facts`].
    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>>;
    /// [`Stage::variables`].
    fn variables(&self) -> Vec<String>;
    /// [`Stage::estimate`].
    fn estimate(&self, cx: &Context) -> anyhow::Result<Option<Estimate>>;
    /// [`Stage::position`].
    fn position(&self, scratch: &Path) -> Option<Position>;
    /// The parameters of [`Stage::on_first_rows`], marked as those of [`AnyStage::params`].
    fn on_first_rows(&self, rows: usize) -> Option<Value>;
    /// [`Stage::has_requirements`].
    fn has_requirements(&self) -> bool;
    /// [`Stage::accept`].
    fn accept(&self, result: &Path) -> anyhow::Result<()>;
    /// [`Stage::run`].
    fn run(&self, cx: &Context) -> anyhow::Result<()>;
}

impl<S: Stage> AnyStage for S {
    fn kind(&self) -> &'static str {
        S::KIND
    }
    fn version(&self) -> u32 {
        S::VERSION
    }
    fn output(&self) -> &'static str {
        Stage::output(self)
    }
    fn exclusive(&self) -> bool {
        S::EXCLUSIVE
    }
    fn bounded(&self) -> bool {
        S::BOUNDED
    }
    fn shards(&self) -> bool {
        S::SHARDS
    }
    fn has_external_facts(&self) -> bool {
        S::HAS_EXTERNAL_FACTS
    }
    fn runs_programs(&self) -> bool {
        S::RUNS_PROGRAMS
    }
    fn length_parameters(&self) -> &'static [&'static str] {
        S::LENGTH_PARAMETERS
    }
    fn params(&self) -> serde_json::Result<Arc<Value>> {
        serde_json::to_value(self).map(Arc::new)
    }
    fn check(&self) -> Vec<Problem> {
        super::check(self)
    }
    fn check_processes(&self, processes: usize) -> Result<(), Problem> {
        Stage::check_processes(self, processes)
    }
    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        Stage::external_facts(self, env)
    }
    fn variables(&self) -> Vec<String> {
        Stage::variables(self)
    }
    fn estimate(&self, cx: &Context) -> anyhow::Result<Option<Estimate>> {
        Stage::estimate(self, cx)
    }
    fn position(&self, scratch: &Path) -> Option<Position> {
        Stage::position(self, scratch)
    }
    fn on_first_rows(&self, rows: usize) -> Option<Value> {
        serde_json::to_value(Stage::on_first_rows(self, rows)?).ok()
    }
    fn has_requirements(&self) -> bool {
        Stage::has_requirements(self)
    }
    fn accept(&self, result: &Path) -> anyhow::Result<()> {
        Stage::accept(self, result)
    }
    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        Stage::run(self, cx)
    }
}

/// A stage as a recipe has it: its parameters stay as they are, and are serialised once.
struct Parsed<S> {
    stage: S,
    params: OnceLock<Arc<Value>>,
}

impl<S: Stage> AnyStage for Parsed<S> {
    fn kind(&self) -> &'static str {
        S::KIND
    }
    fn version(&self) -> u32 {
        S::VERSION
    }
    fn output(&self) -> &'static str {
        AnyStage::output(&self.stage)
    }
    fn exclusive(&self) -> bool {
        S::EXCLUSIVE
    }
    fn bounded(&self) -> bool {
        S::BOUNDED
    }
    fn shards(&self) -> bool {
        S::SHARDS
    }
    fn has_external_facts(&self) -> bool {
        S::HAS_EXTERNAL_FACTS
    }
    fn runs_programs(&self) -> bool {
        S::RUNS_PROGRAMS
    }
    fn length_parameters(&self) -> &'static [&'static str] {
        S::LENGTH_PARAMETERS
    }
    fn params(&self) -> serde_json::Result<Arc<Value>> {
        if let Some(params) = self.params.get() {
            return Ok(Arc::clone(params));
        }
        let params = self.stage.params()?;
        Ok(Arc::clone(self.params.get_or_init(|| params)))
    }
    fn check(&self) -> Vec<Problem> {
        let params = self.params().ok();
        bounds::check_written(&self.stage, params.as_deref())
    }
    fn check_processes(&self, processes: usize) -> Result<(), Problem> {
        AnyStage::check_processes(&self.stage, processes)
    }
    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        AnyStage::external_facts(&self.stage, env)
    }
    fn variables(&self) -> Vec<String> {
        AnyStage::variables(&self.stage)
    }
    fn estimate(&self, cx: &Context) -> anyhow::Result<Option<Estimate>> {
        AnyStage::estimate(&self.stage, cx)
    }
    fn position(&self, scratch: &Path) -> Option<Position> {
        AnyStage::position(&self.stage, scratch)
    }
    fn on_first_rows(&self, rows: usize) -> Option<Value> {
        AnyStage::on_first_rows(&self.stage, rows)
    }
    fn has_requirements(&self) -> bool {
        AnyStage::has_requirements(&self.stage)
    }
    fn accept(&self, result: &Path) -> anyhow::Result<()> {
        AnyStage::accept(&self.stage, result)
    }
    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        AnyStage::run(&self.stage, cx)
    }
}
