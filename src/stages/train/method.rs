//! A method of training, as a stage has it: its own parameters, and what they mean.
//!
//! A new method is a file beside this one with a struct of its own parameters that implements [`Method`], and one line in
//! `stages::KINDS`.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::arguments::TrainingArguments;
use super::reference::Reference;
use crate::engine::{Artifact, Context};
use crate::ml::loss::Loss;
use crate::ml::model::batch::Row;
use crate::stages::rules::Rules;

/// A method of training: its own parameters, and what they mean.
pub trait Method: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// [`crate::engine::Stage::KIND`].
    const KIND: &'static str;
    /// [`crate::engine::Stage::VERSION`].
    const VERSION: u32;
    /// What it usually makes. It makes an adapter if it is given one, and else a model.
    type Output: Artifact;

    /// The highest learning rate.
    fn learning_rate(&self) -> f64;

    /// Whether the adapter's dropout is at work.
    fn dropout(&self) -> bool;

    /// Whether the tokens that sequences have in common at their beginning are computed once for all of a step.
    fn share_prompts(&self) -> bool {
        true
    }

    /// Checks the rules of its own parameters that bounds in their schema can't express.
    fn check(&self, _arguments: &TrainingArguments, _rules: &mut Rules) {}

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

/// Rows to train or to evaluate on.
#[derive(Debug)]
pub struct Prepared {
    /// The rows.
    pub rows: Vec<Row>,
    /// How many of them were made of each row of the split.
    pub rows_each: usize,
}
