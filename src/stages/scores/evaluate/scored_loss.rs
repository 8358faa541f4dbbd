//! The losses that rows are scored by.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Parameters;
use crate::ml::loss::Loss;
use crate::ml::loss::cpo::{self, Cpo};
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::kto::{self, Kto};
use crate::ml::loss::orpo::Orpo;
use crate::stages::rules::Rules;

/// A loss that rows are scored by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ScoredLoss {
    /// The odds ratio; `logps/*` are means over the tokens of an answer.
    #[default]
    Orpo,
    /// The log-ratio to the reference model; `logps/*` are sums over the tokens of an answer.
    Dpo,
    /// CPO's own; `logps/*` are sums over the tokens of an answer.
    Cpo,
    /// SimPO's; `logps/*` are means over the tokens of an answer.
    Simpo,
    /// KTO's, for labelled rows, with the numbers of an evaluation by `KTOTrainer`.
    Kto,
}

impl ScoredLoss {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Its name in a recipe.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Orpo => "orpo",
            Self::Dpo => "dpo",
            Self::Cpo => "cpo",
            Self::Simpo => "simpo",
            Self::Kto => "kto",
        }
    }

    /// Whether it compares with a reference model.
    pub(super) fn compares(self) -> bool {
        matches!(self, Self::Dpo | Self::Kto)
    }
}

impl Parameters {
    /// The loss of preferences, or of labelled rows.
    pub(super) fn scored_loss(&self) -> Box<dyn Loss> {
        let beta = self.beta;
        let cpo = |loss_type| Cpo {
            loss_type,
            beta,
            label_smoothing: 0.,
            cpo_alpha: self.cpo_alpha.unwrap_or(1.),
            simpo_gamma: self.simpo_gamma.unwrap_or(0.5),
            alpha: 0.,
        };
        match self.loss {
            ScoredLoss::Orpo => Box::new(Orpo { beta }),
            ScoredLoss::Dpo => Box::new(Dpo::sigmoid(beta, 0.)),
            ScoredLoss::Cpo => Box::new(cpo(cpo::LossType::Sigmoid)),
            ScoredLoss::Simpo => Box::new(cpo(cpo::LossType::Simpo)),
            ScoredLoss::Kto => Box::new(Kto {
                loss_type: kto::LossType::Kto,
                beta,
                desirable_weight: self.desirable_weight.unwrap_or(1.),
                undesirable_weight: self.undesirable_weight.unwrap_or(1.),
            }),
        }
    }

    /// Parameters that the loss does not have.
    pub(super) fn check_loss(&self, rules: &mut Rules) {
        use ScoredLoss::{Cpo, Kto, Simpo};
        for (name, given, losses) in [
            ("cpo_alpha", self.cpo_alpha.is_some(), &[Cpo, Simpo][..]),
            ("simpo_gamma", self.simpo_gamma.is_some(), &[Simpo]),
            ("desirable_weight", self.desirable_weight.is_some(), &[Kto]),
            (
                "undesirable_weight",
                self.undesirable_weight.is_some(),
                &[Kto],
            ),
        ] {
            let known: Vec<String> = losses
                .iter()
                .map(|loss| format!("`loss: {}`", loss.name()))
                .collect();
            rules.rule(
                !given || losses.contains(&self.loss),
                name,
                &format!("expected only with {}", known.join(" or ")),
            );
        }
        rules.rule(
            self.loss != Kto || self.per_device_eval_batch_size > 1,
            "per_device_eval_batch_size",
            "expected more than 1: `kto` estimates the divergence from the answers of other rows in each batch",
        );
    }
}
