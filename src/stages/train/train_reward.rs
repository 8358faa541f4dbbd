//! `train_reward`: a reward model from preferences.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::arguments::TrainingArguments;
use super::method::{Method, NoReference, Prepared, Use};
use super::preferences::{PreferenceArguments, pairs_as_rendered};
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::reward::Reward;
use crate::ml::model::batch::Row;
use crate::stages::artifacts::Adapter;

/// The stage.
pub type TrainReward = Train<Parameters>;

/// Trains a reward model on preferences: one that gives the chosen answer a higher score than the rejected one, with the numbers of TRL's
/// `RewardTrainer`.
///
/// The model is one of `add_score_head`, or a sequence classification of transformers with one label. With `adapter` the stage trains the
/// adapter and the head (`modules_to_save: [score]`) on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step.
/// Parameters have TRL's names, and TRL's defaults unless something else is said.
///
/// The rows come from `tokenize` with `trainer: reward`, which keeps their margins and drops those that are too long. A sequence's score is
/// that at its last token which is not the padding's.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainReward")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "learning_rate": 0.000_1, "num_train_epochs": 1}]))]
pub struct Parameters {
    /// The weight of the squared sum of a pair's scores, which holds scores near 0 (arXiv 2312.09244); 0.01 is usual. Without it, only
    /// differences between scores count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [0.01]))]
    center_rewards_coefficient: Option<f64>,
}

impl Method for Parameters {
    const KIND: &'static str = "train_reward";
    const VERSION: u32 = 1;
    const SCORES: bool = true;
    type Output = Adapter;
    type Common = PreferenceArguments;
    type Reference = NoReference;

    fn defaults() -> Vec<(&'static str, Value)> {
        vec![("learning_rate", json!(1e-4))]
    }

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Reward {
            center_rewards_coefficient: self.center_rewards_coefficient.unwrap_or(0.),
        })
    }

    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        rows: Vec<Row>,
        _: Use,
    ) -> anyhow::Result<Prepared> {
        pairs_as_rendered(Self::KIND, cx, arguments, rows)
    }
}
