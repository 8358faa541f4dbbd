//! A kind of stage as a value, and a stage of any kind behind one object-safe trait.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use schemars::{Schema, SchemaGenerator};

use super::reading::ParseError;
use super::{Artifact, Context, Estimate, Implied, Position, Problem, RunEnv, Stage};

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
    pub parse: fn(serde_json::Value) -> Result<Arc<dyn AnyStage>, ParseError>,
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

fn parse<S: Stage>(params: serde_json::Value) -> Result<Arc<dyn AnyStage>, ParseError> {
    S::read(params).map(|stage| Arc::new(stage) as Arc<dyn AnyStage>)
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
    /// Every parameter with its default filled in; inputs, files and neutral settings are marked (see `engine::params`).
    fn params(&self) -> serde_json::Result<serde_json::Value>;
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
    fn on_first_rows(&self, rows: usize) -> Option<serde_json::Value>;
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
    fn params(&self) -> serde_json::Result<serde_json::Value> {
        serde_json::to_value(self)
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
    fn on_first_rows(&self, rows: usize) -> Option<serde_json::Value> {
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
