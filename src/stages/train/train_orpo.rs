//! `train_orpo`: preference training by odds ratio.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::method::{Method, NoReference, Prepared, Use};
use super::preferences::{PreferenceArguments, need_two_answers};
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::orpo::Orpo;
use crate::ml::model::batch::Row;
use crate::stages::artifacts::Adapter;

/// The stage.
pub type TrainOrpo = Train<Parameters>;

/// Trains a model on preferences by the odds ratio (ORPO, arXiv 2403.07691), with the numbers of TRL's `ORPOTrainer`.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step.
/// Parameters have TRL's names, and TRL's defaults unless something else is said.
///
/// A metric is the mean of its micro-batches' means, each over all of its rows. TRL's log differs in one place: where an epoch's
/// last micro-batch has fewer rows than the others, it takes only that many rows of every micro-batch of that step for `logps/*`
/// and `rewards/*` (accelerate's `gather_for_metrics`). Losses, gradients and all other metrics are the same.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainOrpo")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "learning_rate": 0.000_008, "num_train_epochs": 1}]))]
pub struct Parameters {
    /// The weight of the odds ratio beside the likelihood, lambda in the paper.
    #[serde(default = "beta")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [0.1, 0.25]))]
    beta: f64,
}

fn beta() -> f64 {
    0.1
}

impl Method for Parameters {
    const KIND: &'static str = "train_orpo";
    const VERSION: u32 = 5;
    type Output = Adapter;
    type Common = PreferenceArguments;
    type Reference = NoReference;

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Orpo { beta: self.beta })
    }

    fn prepare(
        &self,
        _: &Context,
        _: &TrainingArguments,
        rows: Vec<Row>,
        _: Use,
    ) -> anyhow::Result<Prepared> {
        need_two_answers(Self::KIND, &rows)?;
        Ok(Prepared { rows, rows_each: 1 })
    }
}
