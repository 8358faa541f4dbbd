//! A training as a stage: the parameters of its method beside those that all trainings have, flat in the recipe.

use std::borrow::Cow;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::arguments::TrainingArguments;
use super::method::Method;
use super::run::run;
use crate::engine::{Artifact, Context, ParseError, Position, Problem, Stage, read_side_by_side};
use crate::ml::train::newest_checkpoint;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::rules::Rules;

/// A training by a method.
#[derive(Debug, Clone, Serialize)]
pub struct Train<M> {
    #[serde(flatten)]
    method: M,
    #[serde(flatten)]
    arguments: TrainingArguments,
}

impl<'de, M: Method> Deserialize<'de> for Train<M> {
    /// Recipes are read by [`Stage::read`], which tells the places of mistakes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(Deserialize::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<M: Method> JsonSchema for Train<M> {
    fn schema_name() -> Cow<'static, str> {
        M::schema_name()
    }

    /// The method's schema with the arguments' properties added.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = M::json_schema(generator);
        let mut arguments = TrainingArguments::json_schema(generator);
        if let Some(serde_json::Value::Object(all)) = arguments.remove("properties")
            && let Some(own) = schema.ensure_object().get_mut("properties")
            && let Some(own) = own.as_object_mut()
        {
            own.extend(all);
        }
        if let Some(serde_json::Value::Array(all)) = arguments.remove("required") {
            let own = schema.ensure_object().entry("required");
            let own = own.or_insert_with(|| serde_json::Value::Array(Vec::new()));
            if let Some(own) = own.as_array_mut() {
                own.extend(all);
            }
        }
        schema
    }
}

impl<M: Method> Stage for Train<M> {
    const KIND: &'static str = M::KIND;
    const VERSION: u32 = M::VERSION;
    const EXCLUSIVE: bool = true;
    /// How far a training goes. With another number it may go on from where an earlier one ended.
    const LENGTH_PARAMETERS: &'static [&'static str] = &["num_train_epochs", "max_steps"];
    type Output = M::Output;

    fn read(parameters: serde_json::Value) -> Result<Self, ParseError> {
        let (method, arguments) = read_side_by_side(parameters)?;
        Ok(Self { method, arguments })
    }

    fn output(&self) -> &'static str {
        if self.arguments.adapter.is_some() {
            Adapter::NAME
        } else {
            Model::NAME
        }
    }

    fn check(&self) -> Vec<Problem> {
        let mut rules = Rules::default();
        rules.positive(self.method.learning_rate(), "learning_rate");
        self.arguments.check(&mut rules);
        self.method.check(&self.arguments, &mut rules);
        rules.0
    }

    fn position(&self, scratch: &Path) -> Option<Position> {
        let step = newest_checkpoint(scratch)?;
        Some(Position::at(step, "steps", scratch))
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        run(cx, &self.method, &self.arguments)
    }
}
