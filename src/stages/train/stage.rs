//! A training as a stage. In the recipe, the parameters of its method, those of its reference model, those common to several methods and
//! those of all trainings stand side by side.

use std::borrow::Cow;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::arguments::TrainingArguments;
use super::estimate::estimate;
use super::inputs::Inputs;
use super::method::Method;
use super::run::run;
use crate::engine::{
    Artifact, Context, Estimate, Implied, ParseError, Position, Problem, Stage, add_properties,
    read_both_side_by_side, read_side_by_side,
};
use crate::ml::train::newest_checkpoint;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::model_input::BASE_OF_ADAPTER;
use crate::stages::rules::Rules;

/// A training by a method.
#[derive(Debug, Clone, Serialize)]
pub struct Train<M: Method> {
    #[serde(flatten)]
    method: M,
    #[serde(flatten)]
    reference: M::Reference,
    #[serde(flatten)]
    common: M::Common,
    #[serde(flatten)]
    arguments: TrainingArguments,
}

impl<'de, M: Method> Deserialize<'de> for Train<M> {
    /// Recipes are read by [`Stage::read`], which reports the positions of mistakes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(Deserialize::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<M: Method> JsonSchema for Train<M> {
    fn schema_name() -> Cow<'static, str> {
        M::schema_name()
    }

    /// The method's schema with the properties of the others added.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = M::json_schema(generator);
        add_properties(&mut schema, M::Reference::json_schema(generator));
        add_properties(&mut schema, M::Common::json_schema(generator));
        add_properties(&mut schema, TrainingArguments::json_schema(generator));
        for (name, default) in M::defaults() {
            let properties = schema.ensure_object().get_mut("properties");
            let own = properties.and_then(|properties| properties.get_mut(name));
            if let Some(own) = own.and_then(serde_json::Value::as_object_mut) {
                own.insert("default".into(), default);
            }
        }
        schema
    }
}

impl<M: Method> Stage for Train<M> {
    const KIND: &'static str = M::KIND;
    const VERSION: u32 = M::VERSION;
    const EXCLUSIVE: bool = true;
    /// The length of a training. With another length it may continue from where an earlier one ended.
    const LENGTH_PARAMETERS: &'static [&'static str] = &["num_train_epochs", "max_steps"];
    const IMPLIED: &'static [Implied] = BASE_OF_ADAPTER;
    type Output = M::Output;

    fn read(mut parameters: serde_json::Value) -> Result<Self, ParseError> {
        if let Some(given) = parameters.as_object_mut() {
            for (name, default) in M::defaults() {
                given.entry(name).or_insert(default);
            }
        }
        let (reference, others) = read_both_side_by_side(parameters)?;
        let (method, common, arguments) = read_side_by_side(others)?;
        Ok(Self {
            method,
            reference,
            common,
            arguments,
        })
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
        self.arguments.check(&mut rules);
        self.method.check(&self.arguments, &mut rules);
        rules.0
    }

    fn check_processes(&self, processes: usize) -> Result<(), Problem> {
        self.arguments.check_processes(processes)
    }

    fn estimate(&self, cx: &Context) -> anyhow::Result<Option<Estimate>> {
        let Self {
            method,
            reference,
            common,
            arguments,
        } = self;
        let inputs = Inputs::read(cx, method, reference, common, arguments)?;
        Ok(Some(estimate(method, &inputs)?))
    }

    fn position(&self, scratch: &Path) -> Option<Position> {
        let step = newest_checkpoint(scratch)?;
        Some(Position::at(step, "steps", scratch))
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let Self {
            method,
            reference,
            common,
            arguments,
        } = self;
        run(cx, method, reference, common, arguments)
    }
}
