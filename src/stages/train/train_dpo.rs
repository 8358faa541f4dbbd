//! `train_dpo`: preference training against a reference model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::loss_types::{FDivergenceType, LossTypes};
use super::method::{Method, Prepared, Use};
use super::preferences::{PreferenceArguments, pairs_as_rendered};
use super::reference_arguments::ReferenceArguments;
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::dpo::{Dpo, LossType};
use crate::ml::model::batch::Row;
use crate::stages::artifacts::Adapter;
use crate::stages::rules::Rules;

/// The stage.
pub type TrainDpo = Train<Parameters>;

/// Trains a model on preferences by direct preference optimisation (DPO, arXiv 2305.18290), with the numbers of TRL's
/// `DPOTrainer`.
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
    /// The loss by TRL's name, or a list of several that are added. TRL's default: `["sigmoid"]`, which is the same.
    #[serde(default, skip_serializing_if = "LossTypes::is_default")]
    #[schemars(extend("examples" = ["sigmoid", "ipo", ["sigmoid", "sft"]]))]
    loss_type: LossTypes,
    /// The weights of several losses, in their order; without them each weighs 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [[1.0, 0.2]]))]
    loss_weights: Vec<f64>,
    /// The weight of the tokens by which one answer of a pair is longer than the other (LD-DPO, arXiv 2409.06411). Without it they weigh as
    /// much as all others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.5]))]
    ld_alpha: Option<f64>,
    /// Whether each pair is weighted by how probable both of its answers are for the model that is trained (WPO, arXiv 2406.11827), so that
    /// rows of another model count about as if it had written them itself. Not for `aot`, `aot_unpaired` and `sft`.
    #[serde(default, skip_serializing_if = "is_off")]
    use_weighting: bool,
    /// What measures the distance to the reference model (arXiv 2309.16240), for the losses `sigmoid`, `sigmoid_norm`, `hinge`, `ipo`,
    /// `exo_pair`, `robust`, `discopop` and `sft`. TRL's default: `reverse_kl`.
    #[serde(default, skip_serializing_if = "FDivergenceType::is_default")]
    f_divergence_type: FDivergenceType,
    /// The order of `alpha_divergence`. TRL's default: `0.5`.
    #[serde(default = "alpha", skip_serializing_if = "is_alpha")]
    #[schemars(extend("examples" = [0.5]))]
    f_alpha_divergence_coef: f64,
    /// The temperature at which `discopop` blends its two parts. TRL's default: `0.05`.
    #[serde(default = "tau", skip_serializing_if = "is_tau")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.05]))]
    discopop_tau: f64,
    /// The assumed probability that a preference is the wrong way round. Above 0, the losses `sigmoid`, `aot` and `aot_unpaired` pull a
    /// little in the other direction too (conservative DPO), and `robust` makes up for it; TRL 1.16's `sigmoid` ignores it. `exo_pair`
    /// needs one, such as 0.001.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 0.5))]
    #[schemars(extend("examples" = [0.1]))]
    label_smoothing: f64,
}

fn beta() -> f64 {
    0.1
}

fn alpha() -> f64 {
    0.5
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_alpha(value: &f64) -> bool {
    value.to_bits() == alpha().to_bits()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_off(value: &bool) -> bool {
    !value
}

fn tau() -> f64 {
    0.05
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_tau(value: &f64) -> bool {
    value.to_bits() == tau().to_bits()
}

impl Method for Parameters {
    const KIND: &'static str = "train_dpo";
    const VERSION: u32 = 1;
    type Output = Adapter;
    type Common = PreferenceArguments;
    type Reference = ReferenceArguments;

    fn check(&self, _: &TrainingArguments, rules: &mut Rules) {
        let kinds = &self.loss_type.0;
        rules.rule(
            self.loss_weights.is_empty() || self.loss_weights.len() == kinds.len(),
            "loss_weights",
            &format!(
                "there are {} weights and {} losses, expected a weight for each loss of `loss_type`",
                self.loss_weights.len(),
                kinds.len()
            ),
        );
        rules.rule(
            self.label_smoothing > 0. || !kinds.contains(&LossType::ExoPair),
            "label_smoothing",
            "the loss `exo_pair` needs a value above 0, such as 0.001",
        );
        let unweighted = kinds.iter().find(|kind| !kind.is_weighted());
        if let (true, Some(kind)) = (self.use_weighting, unweighted) {
            rules.rule(
                false,
                "use_weighting",
                &format!(
                    "the loss `{}` is not one of single pairs, which could be weighted",
                    kind.name()
                ),
            );
        }
        let plain = self.f_divergence_type == FDivergenceType::ReverseKl;
        let without = kinds.iter().find(|kind| !kind.has_divergence());
        if let (false, Some(kind)) = (plain, without) {
            rules.rule(
                false,
                "f_divergence_type",
                &format!(
                    "the loss `{}` has no other divergence than `reverse_kl`",
                    kind.name()
                ),
            );
        }
    }

    fn loss(&self) -> Box<dyn Loss> {
        let weights = self.loss_weights.iter().copied();
        let kinds = self.loss_type.0.iter().copied();
        Box::new(Dpo {
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            terms: kinds.zip(weights.chain(std::iter::repeat(1.))).collect(),
            ld_alpha: self.ld_alpha,
            use_weighting: self.use_weighting,
            divergence: self
                .f_divergence_type
                .divergence(self.f_alpha_divergence_coef),
            discopop_tau: self.discopop_tau,
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
