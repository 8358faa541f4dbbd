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
use crate::stages::rules::Rules;
use crate::stages::text::added::Added;

/// The stage.
pub type TrainDpo = Train<Parameters>;

/// Trains on preferences by direct preference optimisation (DPO, arXiv 2305.18290), with the numbers of TRL's `DPOTrainer` and its
/// `sigmoid` loss.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and
/// makes a model. Beside it lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step. Parameters
/// have TRL's names, and TRL's defaults unless something else is said.
///
/// The reference model is the trained one before its first step, unless `ref_model` or `ref_adapter` name another. For a new adapter that
/// is the model without it, whose weights are in memory anyway; otherwise a second model is loaded, but for `ref_model` with the name
/// that `model` has, which means the model without its adapter.
///
/// `tokenize` with `trainer: dpo` gives the rows their ids as `DPOTrainer` does. Of other rows a BOS and EOS that `tokenize` added for
/// `ORPOTrainer` are left out again. The adapter of a model in 4 bits is trained in f32; TRL keeps it in bf16.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainDpo")]
pub struct Parameters {
    /// How strongly the model is held to the reference; smaller values let it go further away.
    #[serde(default = "beta")]
    beta: f64,
    /// The probability that a preference is the wrong way round, from 0 to below 0.5. The loss then pulls a little in the other direction
    /// (conservative DPO). TRL 1.16's `sigmoid` loss ignores it.
    #[serde(default)]
    label_smoothing: f64,
    /// The reference model; by default the trained one before its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_model: Option<Input<Model>>,
    /// The adapter of the reference model. Without `ref_model` it stands beside `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_adapter: Option<Input<Adapter>>,
    /// Whether the log-probabilities by the reference model are computed once for all rows before the first step, instead of anew in each
    /// epoch. A reference model of its own is then not kept in memory.
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

    fn check(&self, _: &TrainingArguments, rules: &mut Rules) {
        rules.positive(self.beta, "beta");
        rules.rule(
            (0. ..0.5).contains(&self.label_smoothing),
            "label_smoothing",
            "expected a number from 0 to below 0.5",
        );
    }

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
