//! A method of training as a stage: its own parameters, and their meaning.
//!
//! A new method is a file beside this one with a struct of its own parameters that implements [`Method`], and one line in
//! `stages::KINDS`.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::arguments::TrainingArguments;
use super::reference::Reference;
use crate::engine::{Artifact, Context};
use crate::ml::loss::Loss;
use crate::ml::model::batch::Row;
use crate::stages::rules::Rules;

/// Parameters that several methods have in common, though maybe with other defaults.
pub trait Common:
    Serialize + DeserializeOwned + JsonSchema + Clone + Send + Sync + 'static
{
    /// The highest learning rate.
    fn learning_rate(&self) -> f64;

    /// Whether the adapter's dropout is applied.
    fn dropout(&self) -> bool {
        true
    }

    /// The strength of the noise on the embeddings (NEFTune), if there is any.
    fn neftune_noise_alpha(&self) -> Option<f64> {
        None
    }

    /// Whether the tokens that sequences have in common at their beginning are computed once for all of a step.
    fn share_prompts(&self) -> bool {
        true
    }
}

/// The parameters that say what a training compares its model with.
pub trait Compares: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The reference model, for a loss that needs one.
    ///
    /// # Errors
    /// An input that it names has no folder.
    fn reference(&self, cx: &Context) -> anyhow::Result<Reference>;

    /// Whether the reference model's log-probabilities are computed for all rows before the first step.
    fn precomputes(&self) -> bool;
}

/// The parameters of a method without a reference model: there are none.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoReference {}

impl Compares for NoReference {
    fn reference(&self, _: &Context) -> anyhow::Result<Reference> {
        Ok(Reference::None)
    }

    fn precomputes(&self) -> bool {
        false
    }
}

/// A method of training: its own parameters, and their meaning.
pub trait Method: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// [`crate::engine::Stage::KIND`].
    const KIND: &'static str;
    /// [`crate::engine::Stage::VERSION`].
    const VERSION: u32;
    /// Whether it trains a model whose head gives scores, see [`crate::ml::model::arch::Arch::scores`].
    const SCORES: bool = false;
    /// What it usually makes. It makes an adapter if it is given one, and else a model.
    type Output: Artifact;
    /// The parameters that it has in common with other methods.
    type Common: Common;
    /// The parameters that name its reference model.
    type Reference: Compares;

    /// The defaults of parameters that it shares with other methods, where its own differ.
    fn defaults() -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// Checks the rules of its own parameters that bounds in their schema can't express.
    fn check(&self, _arguments: &TrainingArguments, _rules: &mut Rules) {}

    /// The loss that is minimised.
    fn loss(&self) -> Box<dyn Loss>;

    /// Makes the rows to train or to evaluate on from those of a split, as `tokenize` wrote them.
    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        rows: Vec<Row>,
        split: Use,
    ) -> anyhow::Result<Prepared>;
}

/// The use of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Training.
    Training,
    /// Evaluation.
    Evaluation,
}

/// Rows to train or to evaluate on.
#[derive(Debug)]
pub struct Prepared {
    /// The rows.
    pub rows: Vec<Row>,
    /// The number of them that were made from each row of the split.
    pub rows_each: usize,
}
