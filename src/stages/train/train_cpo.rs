//! `train_cpo`: preference training without a reference model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::method::{Method, Prepared, Use};
use super::preferences::{PreferenceArguments, need_two_answers};
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::cpo::{self, Cpo};
use crate::ml::model::batch::Row;
use crate::stages::artifacts::Adapter;

/// The stage.
pub type TrainCpo = Train<Parameters>;

/// Trains a model on preferences by contrastive preference optimisation (CPO, arXiv 2401.08417), or by SimPO (arXiv 2405.14734) or AlphaPO
/// (arXiv 2501.03884), with the numbers of TRL's `CPOTrainer`. There is no reference model.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step.
/// Parameters have TRL's names, and TRL's defaults unless something else is said.
///
/// SimPO is `loss_type: simpo` with `cpo_alpha: 0`, a `beta` from 2 to 10 and a `simpo_gamma` from 0.3 to 1.6 times `beta`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainCpo")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "loss_type": "simpo", "cpo_alpha": 0, "beta": 2.0, "simpo_gamma": 1.0}]))]
pub struct Parameters {
    /// The scale of the rewards.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.1, 2.0]))]
    beta: f64,
    /// The kind of loss.
    #[serde(default)]
    loss_type: LossType,
    /// The assumed probability that a preference is the wrong way round, for `sigmoid`, `simpo` and `alphapo`.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 0.5))]
    #[schemars(extend("examples" = [0.1]))]
    label_smoothing: f64,
    /// The weight of the chosen answers' negative log-likelihood beside the preferences. For `alphapo` it is 0.
    #[serde(default = "cpo_alpha")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [1.0, 0.0]))]
    cpo_alpha: f64,
    /// The margin between the two rewards that `simpo` aims at.
    #[serde(default = "simpo_gamma")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [0.5, 1.0]))]
    simpo_gamma: f64,
    /// The shape of the rewards (AlphaPO): with 0 they are log-probabilities, else `(1 - p^(-alpha)) / alpha` of the probability p.
    #[serde(default)]
    #[schemars(extend("examples" = [0.25]))]
    alpha: f64,
}

/// A loss of pairs, by TRL's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum LossType {
    /// CPO's own: the logistic loss of the difference between the answers' log-probabilities.
    #[default]
    Sigmoid,
    /// Nothing to learn from pairs whose difference is `1 / beta` or more.
    Hinge,
    /// The square of how far the difference of the means over tokens is from `1 / (2 beta)`.
    Ipo,
    /// The logistic loss of the difference of the means over tokens, less the margin `simpo_gamma`.
    Simpo,
    /// `simpo` with `cpo_alpha: 0`.
    Alphapo,
}

fn beta() -> f64 {
    0.1
}

fn cpo_alpha() -> f64 {
    1.
}

fn simpo_gamma() -> f64 {
    0.5
}

impl Method for Parameters {
    const KIND: &'static str = "train_cpo";
    const VERSION: u32 = 1;
    type Output = Adapter;
    type Common = PreferenceArguments;

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Cpo {
            loss_type: match self.loss_type {
                LossType::Sigmoid => cpo::LossType::Sigmoid,
                LossType::Hinge => cpo::LossType::Hinge,
                LossType::Ipo => cpo::LossType::Ipo,
                LossType::Simpo | LossType::Alphapo => cpo::LossType::Simpo,
            },
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            cpo_alpha: match self.loss_type {
                LossType::Alphapo => 0.,
                _ => self.cpo_alpha,
            },
            simpo_gamma: self.simpo_gamma,
            alpha: self.alpha,
        })
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
