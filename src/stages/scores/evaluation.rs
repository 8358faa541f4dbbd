//! An evaluation as a stage. In the recipe, the parameters of what it measures and those of all evaluations stand side by side.

use std::borrow::Cow;
use std::path::Path;

use candle_core::DType;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use super::require::{Requirements, is_empty};
use crate::engine::{
    Context, Implied, Input, Neutral, ParseError, Problem, Stage, add_properties,
    read_both_side_by_side,
};
use crate::ml::train::compute_dtype;
use crate::stages::artifacts::{Adapter, Model, Scores};
use crate::stages::model_input::BASE_OF_ADAPTER;
use crate::stages::rules::Rules;

/// What an evaluation measures: its own parameters, and their meaning.
pub trait Measure: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// [`Stage::KIND`].
    const KIND: &'static str;
    /// [`Stage::VERSION`].
    const VERSION: u32;
    /// [`Stage::IMPLIED`].
    const IMPLIED: &'static [Implied] = BASE_OF_ADAPTER;

    /// Checks the rules of its own parameters that bounds in their schema can't express.
    fn check(&self, _arguments: &EvaluationArguments, _rules: &mut Rules) {}

    /// The names of all scores that it may make.
    fn metrics(&self) -> Vec<&'static str>;

    /// Scores the models and fills the stage's output folder.
    ///
    /// # Errors
    /// The rows or the models can't be used, a score is not finite, or the stage is cancelled.
    fn run(&self, arguments: &EvaluationArguments, cx: &Context) -> anyhow::Result<()>;
}

/// The parameters of all evaluations: what is scored, and what the scores must be.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluationArguments {
    /// The model to score. It may be left out where `adapter` is given: then it is the model that the adapter was made for.
    #[schemars(extend("examples" = ["base4"]))]
    pub(super) model: Input<Model>,
    /// An adapter to score beside the model alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["tuned"]))]
    pub(super) adapter: Option<Input<Adapter>>,
    /// Another model to compare with, in place of the model without the adapter. It must have the same tokens, except in
    /// `evaluate_choices`, where each model reads the questions with its own tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["base"]))]
    pub(super) baseline: Option<Input<Model>>,
    /// The split to read. By default it is `test`, or `train` where there is no `test`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["test"]))]
    pub(super) split: Option<String>,
    /// Whether matrix products are computed in bf16. TRL's default: `true`, unless `fp16` is on.
    #[serde(default)]
    pub(super) bf16: bool,
    /// Whether matrix products are computed in f16.
    #[serde(default)]
    pub(super) fp16: bool,
    /// What scores must be, by their names: of the model with the adapter if there is one, and behind `difference/` the change against the
    /// base or the baseline. A run fails where one is not. The scores stay, and other requirements don't compute them again.
    #[serde(default, skip_serializing_if = "is_empty")]
    #[schemars(extend("examples" = [{"rewards/accuracies": ">= 0.6", "difference/perplexity": "<= 0"}]))]
    pub(super) require: Neutral<Requirements>,
}

impl EvaluationArguments {
    /// The type in which products are computed.
    pub(super) fn compute(&self) -> DType {
        compute_dtype(self.bf16, self.fp16)
    }

    /// Whether two models are compared.
    pub(super) fn compares(&self) -> bool {
        self.adapter.is_some() || self.baseline.is_some()
    }
}

/// An evaluation of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation<M: Measure> {
    #[serde(flatten)]
    pub(super) own: M,
    #[serde(flatten)]
    pub(super) arguments: EvaluationArguments,
}

impl<'de, M: Measure> Deserialize<'de> for Evaluation<M> {
    /// Recipes are read by [`Stage::read`], which reports the positions of mistakes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(Deserialize::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl<M: Measure> JsonSchema for Evaluation<M> {
    fn schema_name() -> Cow<'static, str> {
        M::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = M::json_schema(generator);
        add_properties(&mut schema, EvaluationArguments::json_schema(generator));
        schema
    }
}

impl<M: Measure> Stage for Evaluation<M> {
    const KIND: &'static str = M::KIND;
    const VERSION: u32 = M::VERSION;
    const EXCLUSIVE: bool = true;
    type Output = Scores;
    const IMPLIED: &'static [Implied] = M::IMPLIED;

    fn read(parameters: serde_json::Value) -> Result<Self, ParseError> {
        let (own, arguments) = read_both_side_by_side(parameters)?;
        Ok(Self { own, arguments })
    }

    fn check(&self) -> Vec<Problem> {
        let arguments = &self.arguments;
        let mut rules = Rules::default();
        self.own.check(arguments, &mut rules);
        rules.one_precision(arguments.bf16, arguments.fp16);
        let required = &arguments.require;
        let problems = required.check(&self.own.metrics(), arguments.compares());
        rules.0.extend(problems);
        rules.0
    }

    fn has_requirements(&self) -> bool {
        !self.arguments.require.is_empty()
    }

    fn accept(&self, result: &Path) -> anyhow::Result<()> {
        self.arguments.require.accept(result)
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        self.own.run(&self.arguments, cx)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::evaluate::Evaluate;
    use super::super::evaluate_answers::EvaluateAnswers;
    use super::super::evaluate_choices::EvaluateChoices;
    use super::*;

    fn written<S: Stage>(parameters: Value) -> Vec<(String, Value)> {
        let stage = S::read(parameters).unwrap();
        let Value::Object(all) = serde_json::to_value(stage).unwrap() else {
            panic!("parameters are an object")
        };
        // Inputs are marked for the engine.
        let plain = all.into_iter();
        let plain = plain.filter(|(name, _)| name != "model" && name != "dataset");
        let mut plain: Vec<(String, Value)> = plain.collect();
        plain.sort_by(|a, b| a.0.cmp(&b.0));
        plain
    }

    /// What fingerprints are made of: a parameter that is not given must not come into those of results that were made before it was there.
    #[test]
    fn parameters_that_are_not_given_are_written_as_before() {
        let given = || json!({"model": "m", "dataset": "d"});
        let expected = |all: Value| -> Vec<(String, Value)> {
            let Value::Object(all) = all else {
                panic!("an object")
            };
            all.into_iter().collect()
        };
        let common = json!({
            "beta": 0.1, "bf16": false, "fp16": false, "max_new_tokens": 64, "num_answers": 4, "per_device_eval_batch_size": 8,
        });
        assert_eq!(written::<Evaluate>(given()), expected(common));
        let choices = json!({
            "bf16": false, "doc_to_text": "Question: {{question}}\nAnswer:", "fp16": false, "per_device_eval_batch_size": 8,
            "target_delimiter": " ",
        });
        assert_eq!(written::<EvaluateChoices>(given()), expected(choices));
        let answers = written::<EvaluateAnswers>(given());
        let names: Vec<&str> = answers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "bf16",
                "do_sample",
                "fp16",
                "group_select",
                "ignore_case",
                "ignore_punctuation",
                "max_new_tokens",
                "per_device_eval_batch_size",
                "repetition_penalty",
                "seed",
                "temperature",
                "top_k",
                "top_p",
            ]
        );
    }

    #[test]
    fn a_parameter_of_neither_is_told() {
        let read = |name: &str| {
            let mut all = json!({"model": "m", "dataset": "d"});
            all[name] = json!(1);
            Evaluate::read(all)
        };
        let error = read("splitt").unwrap_err();
        assert!(format!("{error:?}").contains("splitt"), "{error:?}");
    }
}
