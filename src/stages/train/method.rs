//! A training as a stage: the parameters of its method beside those that all trainings have, flat in the recipe.
//!
//! A new method is a file beside this one with a struct of its own parameters that implements [`Method`], and one line in
//! `stages::KINDS`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use super::arguments::TrainingArguments;
use super::reference::Reference;
use super::run::{Prepared, run};
use crate::engine::{Artifact, Context, ParseError, Problem, Stage, read_side_by_side};
use crate::ml::loss::Loss;
use crate::ml::model::batch::Row;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::rules::Rules;

/// A method of training: its own parameters, and what they mean.
pub trait Method: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// [`Stage::KIND`].
    const KIND: &'static str;
    /// [`Stage::VERSION`].
    const VERSION: u32;
    /// What it usually makes. It makes an adapter if it is given one, and else a model.
    type Output: Artifact;

    /// The highest learning rate.
    fn learning_rate(&self) -> f64;

    /// Whether the adapter's dropout is at work.
    fn dropout(&self) -> bool;

    /// Whether what sequences begin with is computed once for all of a step.
    fn share_prompts(&self) -> bool {
        false
    }

    /// Checks the rules of its own parameters.
    fn check(&self, arguments: &TrainingArguments, rules: &mut Rules);

    /// What is minimised.
    fn loss(&self) -> Box<dyn Loss>;

    /// The reference model, for a loss that needs one.
    fn reference(&self, _cx: &Context) -> anyhow::Result<Reference> {
        Ok(Reference::None)
    }

    /// Whether the reference model's log-probabilities are computed for all rows before the first step.
    fn precomputes_reference(&self) -> bool {
        false
    }

    /// From the rows of a split, as `tokenize` made them, to those that are trained or evaluated on.
    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        rows: Vec<Row>,
        split: Use,
    ) -> anyhow::Result<Prepared>;
}

/// What a split is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To train on.
    Training,
    /// To evaluate on.
    Evaluation,
}

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
    const GROWS: &'static [&'static str] = &["num_train_epochs", "max_steps"];
    type Output = M::Output;

    fn read(parameters: serde_yaml::Value) -> Result<Self, ParseError> {
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

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        run(cx, &self.method, &self.arguments)
    }
}
