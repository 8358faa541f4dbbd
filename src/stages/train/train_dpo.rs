//! `train_dpo`: preference training against a reference model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Reference;
use super::arguments::TrainingArguments;
use super::method::{Method, Prepared, Use};
use super::preferences::{PreferenceArguments, need_two_answers};
use super::stage::Train;
use crate::engine::{Context, Input};
use crate::ml::loss::Loss;
use crate::ml::loss::dpo::Dpo;
use crate::ml::model::batch::Row;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::text::added::Added;

/// The stage.
pub type TrainDpo = Train<Parameters>;

/// Trains a model on preferences by direct preference optimisation (DPO, arXiv 2305.18290), with the numbers of TRL's `DPOTrainer`
/// and its `sigmoid` loss.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step.
/// Parameters have TRL's names, and TRL's defaults unless something else is said.
///
/// The reference model is the trained one before its first step, unless `ref_model` or `ref_adapter` name another. For a new
/// adapter that is the model without it, whose weights are in memory anyway. Otherwise a second model is loaded, except where
/// `ref_model` names the same stage as `model`: that means the model without its adapter.
///
/// `tokenize` with `trainer: dpo` gives the rows their ids as `DPOTrainer` does. From other rows, a BOS and EOS that `tokenize`
/// added for `ORPOTrainer` are taken off again. The adapter of a model in 4 bits is trained in f32; TRL keeps it in bf16.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainDpo")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "learning_rate": 0.000_005, "beta": 0.1}]))]
pub struct Parameters {
    /// How strongly the model is held to the reference. Smaller values let it go further away.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.1, 0.01]))]
    beta: f64,
    /// The assumed probability that a preference is the wrong way round. Above 0, the loss pulls a little in the other direction
    /// too (conservative DPO). TRL 1.16's `sigmoid` loss ignores it.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 0.5))]
    #[schemars(extend("examples" = [0.1]))]
    label_smoothing: f64,
    /// The reference model. By default it is the trained model before its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_model: Option<Input<Model>>,
    /// The adapter of the reference model. Without `ref_model` it stands beside `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_adapter: Option<Input<Adapter>>,
    /// Whether the reference model's log-probabilities are computed once for all rows before the first step, instead of anew in
    /// each epoch. A reference model of its own is then not kept in memory.
    #[serde(default)]
    precompute_ref_log_probs: bool,
}

fn beta() -> f64 {
    0.1
}

impl Method for Parameters {
    const KIND: &'static str = "train_dpo";
    const VERSION: u32 = 1;
    type Output = Adapter;
    type Common = PreferenceArguments;

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Dpo {
            beta: self.beta,
            label_smoothing: self.label_smoothing,
        })
    }

    fn reference(&self, cx: &Context) -> anyhow::Result<Reference> {
        if self.ref_model.is_none() && self.ref_adapter.is_none() {
            return Ok(Reference::Initial);
        }
        let model = self.ref_model.as_ref().map(|model| cx.input(model));
        let adapter = self.ref_adapter.as_ref().map(|adapter| cx.input(adapter));
        Ok(Reference::Other {
            model: model.transpose()?.map(Into::into),
            adapter: adapter.transpose()?.map(Into::into),
        })
    }

    fn precomputes_reference(&self) -> bool {
        self.precompute_ref_log_probs
    }

    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        mut rows: Vec<Row>,
        _: Use,
    ) -> anyhow::Result<Prepared> {
        let added = Added::read(cx.input(&arguments.dataset)?)?;
        for row in &mut rows {
            added.take_off(row);
        }
        need_two_answers(Self::KIND, &rows)?;
        Ok(Prepared { rows, rows_each: 1 })
    }
}
