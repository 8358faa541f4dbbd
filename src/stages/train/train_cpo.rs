//! `train_cpo`: preference training without a reference model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::method::{Method, NoReference, Prepared, Use};
use super::preferences::{PreferenceArguments, need_two_answers};
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::cpo::{Cpo, LossType};
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
    type Reference = NoReference;

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Cpo {
            loss_type: self.loss_type,
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            cpo_alpha: self.cpo_alpha,
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
