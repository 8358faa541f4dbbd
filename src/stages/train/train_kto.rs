//! `train_kto`: training on labelled answers against a reference model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::arguments::TrainingArguments;
use super::method::{Method, Prepared, Use};
use super::preferences::PreferenceArguments;
use super::reference_arguments::ReferenceArguments;
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::kto::{Kto, LossType, pair_with_neighbours};
use crate::ml::model::batch::Row;
use crate::ml::train::sampler::SamplingStrategy;
use crate::stages::artifacts::Adapter;
use crate::stages::rules::Rules;
use crate::stages::text::labelled::Labelled;

/// The stage.
pub type TrainKto = Train<Parameters>;

/// Trains a model on answers that are labelled as good or bad, by Kahneman-Tversky optimisation (KTO, arXiv 2402.01306), with the numbers of
/// TRL's `KTOTrainer`.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's metrics of every step.
/// Parameters have TRL's names, and TRL's defaults unless something else is said.
///
/// The rows come from `tokenize` with `trainer: kto`. Preferences will do as well: each becomes two rows.
///
/// The loss `kto` estimates how far the model is from the reference by putting each answer of a micro-batch behind the next row's prompt.
/// So it needs micro-batches of more than one row, and the order of the dataset. The reference model is that of `train_dpo`: the trained
/// one before its first step, unless `ref_model` or `ref_adapter` name another.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainKto")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "learning_rate": 0.000_005, "beta": 0.1}]))]
pub struct Parameters {
    /// How strongly the model is held to the reference. Smaller values let it go further away.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.1, 0.01]))]
    beta: f64,
    /// The kind of loss.
    #[serde(default)]
    loss_type: LossType,
    /// The weight of good answers. With many more good answers than bad ones, lower it until the weights times the numbers of both are about
    /// the same (equation 8 of the paper).
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [1.0, 0.5]))]
    desirable_weight: f64,
    /// The weight of bad answers.
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 0))]
    #[schemars(extend("examples" = [1.0, 1.5]))]
    undesirable_weight: f64,
}

fn beta() -> f64 {
    0.1
}

fn one() -> f64 {
    1.
}

impl Method for Parameters {
    const KIND: &'static str = "train_kto";
    const VERSION: u32 = 1;
    type Output = Adapter;
    type Common = PreferenceArguments;
    type Reference = ReferenceArguments;

    fn defaults() -> Vec<(&'static str, Value)> {
        vec![("train_sampling_strategy", json!("sequential"))]
    }

    fn check(&self, arguments: &TrainingArguments, rules: &mut Rules) {
        if !self.loss_type.estimates_kl() {
            return;
        }
        let settings = arguments.settings(0., false);
        rules.rule(
            settings.batch_size > 1,
            "per_device_train_batch_size",
            "expected more than 1: the loss `kto` needs the answers of other rows in each micro-batch; hint: `loss_type: apo_zero_unpaired` \
             does not",
        );
        rules.rule(
            settings.sampling == SamplingStrategy::Sequential,
            "train_sampling_strategy",
            "expected `sequential`: the loss `kto` puts each answer behind the prompt of the next row",
        );
    }

    fn loss(&self) -> Box<dyn Loss> {
        Box::new(Kto {
            loss_type: self.loss_type,
            beta: self.beta,
            desirable_weight: self.desirable_weight,
            undesirable_weight: self.undesirable_weight,
        })
    }

    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        mut rows: Vec<Row>,
        purpose: Use,
    ) -> anyhow::Result<Prepared> {
        let labelled = Labelled::read(cx.input(&arguments.dataset)?, Self::KIND)?;
        if purpose == Use::Training {
            self.tell(cx, &rows);
        }
        // As in TRL, neighbours are those of a training even in an evaluation with larger batches.
        let size = arguments.settings(0., false).batch_size;
        pair_with_neighbours(&mut rows, size, labelled.max_length);
        for row in &mut rows {
            labelled.cut(row);
        }
        Ok(Prepared { rows, rows_each: 1 })
    }
}

impl Parameters {
    /// Tells how many answers are good and bad, and of weights that are out of proportion to that (equation 8 of the paper).
    fn tell(&self, cx: &Context, rows: &[Row]) {
        let good = rows.iter().filter(|row| row.label == Some(true)).count();
        let bad = rows.len() - good;
        cx.info(format!("{good} answers are labelled as good, {bad} as bad"));
        if good == bad {
            return;
        }
        let ratio = self.desirable_weight * good.max(1) as f64
            / (self.undesirable_weight * bad.max(1) as f64);
        if !(1. - 5e-3..=4. / 3. + 5e-3).contains(&ratio) {
            let desirable = self.undesirable_weight * bad.max(1) as f64 / good.max(1) as f64;
            let undesirable = self.desirable_weight * good.max(1) as f64 / bad.max(1) as f64;
            cx.warn(format!(
                "all good answers together weigh {ratio:.2} times as much as all bad ones, where 1 to 1.33 is recommended; hint: a \
                 `desirable_weight` from {desirable:.2} to {:.2}, or an `undesirable_weight` from {:.2} to {undesirable:.2}",
                1.33 * desirable,
                undesirable / 1.33
            ));
        }
    }
}
