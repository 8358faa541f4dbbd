//! Kahneman-Tversky optimisation (Ethayarajh, Xu, Muennighoff, Jurafsky and Kiela 2024, arXiv 2402.01306), as TRL's `KTOTrainer` computes
//! it: learning from answers of which each is labelled as desirable or not, instead of from pairs.
//!
//! With `r` the log-probability of an answer (the sum over its tokens) minus that under the reference model, and `z` an estimate of the KL
//! divergence of the trained model from the reference model, the loss of a row is
//!
//! ```text
//! desirable_weight (1 - sigmoid(beta (r - z)))      if the answer is desirable,
//! undesirable_weight (1 - sigmoid(beta (z - r)))    if it is not
//! ```
//!
//! (equations 7 and 8, where the weights are `lambda_D` and `lambda_U`). `z` is the mean of `r` over the batch with each prompt followed
//! by the answer of the row before, the first one by that of the last, or 0 if that is negative. It is a constant for the gradient. The
//! loss of a micro-batch is the mean over its rows.

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pairs::mean;
use super::{Loss, Metrics, Needs, Outcome, Preferences, Scored, sigmoid};
use crate::ml::model::batch::{Batch, Mismatched, Row};
use crate::ml::model::head::TokenStats;

/// A loss of labelled answers, by TRL's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// KTO's own.
    #[default]
    Kto,
    /// KTO's without its estimate of the divergence: the loss `apo_zero` of APO (D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7) for
    /// single answers. It needs no other answers in a batch.
    ApoZeroUnpaired,
}

impl LossType {
    /// Whether it estimates the divergence from the reference model.
    pub fn estimates_kl(self) -> bool {
        self == Self::Kto
    }
}

/// The loss of Kahneman-Tversky optimisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kto {
    /// The kind of loss.
    pub loss_type: LossType,
    /// The strength of the constraint to stay close to the reference model (beta in the paper).
    pub beta: f64,
    /// The weight of desirable answers.
    pub desirable_weight: f64,
    /// The weight of the other answers.
    pub undesirable_weight: f64,
}

/// Gives each row the answer of the row before it among every `batch_size` rows, and the first one of these that of the last
/// ([`Row::mismatched`]), as TRL does (`trl/trainer/kto_trainer.py`, `add_kl_completion_ids`). A prompt and the other answer are cut to
/// `max_length` ids together.
pub fn pair_with_neighbours(rows: &mut [Row], batch_size: usize, max_length: usize) {
    for rows in rows.chunks_mut(batch_size.max(1)) {
        let mut before = rows.last().map(|row| row.chosen.clone());
        for row in rows {
            let mut answer = before.replace(row.chosen.clone()).unwrap_or_default();
            answer.truncate(max_length.saturating_sub(row.prompt.len()));
            row.mismatched = Some(Mismatched {
                answer,
                reference_logps: None,
            });
        }
    }
}

impl Kto {
    /// The loss of an answer with the log-ratio `r`, and its derivative by `r`, if the divergence is `kl`.
    pub fn answer(&self, r: f64, kl: f64, desirable: bool) -> (f64, f64) {
        let (weight, sign) = if desirable {
            (self.desirable_weight, 1.)
        } else {
            (self.undesirable_weight, -1.)
        };
        let x = self.beta * sign * (r - kl);
        let slope = -self.beta * sign * sigmoid(x) * sigmoid(-x);
        (weight * sigmoid(-x), weight * slope)
    }
}

/// The mean over the rows whose label is `desirable`; `None` if there are none.
fn side(values: &[f64], labels: &[bool], desirable: bool) -> Option<f64> {
    let own: Vec<f64> = { values.iter().zip(labels) }
        .filter(|(_, label)| **label == desirable)
        .map(|(value, _)| *value)
        .collect();
    (!own.is_empty()).then(|| mean(own.into_iter()))
}

impl Loss for Kto {
    fn batch(&self, rows: &[&Row], pad: u32) -> anyhow::Result<Batch> {
        Ok(Batch::unpaired(rows, self.loss_type.estimates_kl(), pad)?)
    }

    fn needs(&self) -> Needs {
        Needs::beside_reference()
    }

    /// Those of the desirable answers (`chosen`) and of the others (`rejected`) are left out where a micro-batch has none.
    fn metrics(&self) -> &'static [&'static str] {
        &[
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "logits/chosen",
            "logits/rejected",
            "kl",
            "entropy",
        ]
    }

    fn logs_num_tokens(&self) -> bool {
        true
    }

    fn loss(&self, scored: &Scored<'_>) -> anyhow::Result<Outcome> {
        let &Scored { batch, targets, .. } = scored;
        let labels = batch.labels();
        let count = batch.sequences.len();
        ensure!(
            labels.len() == count,
            "the rows have no labels that say which answers are desirable"
        );
        let reference = scored
            .reference_logps
            .context("there are no log-probabilities by a reference model")?;
        let kl = match self.loss_type {
            LossType::ApoZeroUnpaired => 0.,
            LossType::Kto => {
                let divergence = scored
                    .mismatched
                    .context("the answers of other rows are not scored")?;
                // `max` would make a number of a NaN.
                if divergence < 0. { 0. } else { divergence }
            }
        };
        let policy = Preferences::new(batch, targets, scored.logps)?.answers;
        let reference = Preferences::new(batch, targets, reference)?.answers;
        let logps: Vec<f64> = policy.iter().map(|(sum, _)| *sum).collect();
        let ratios = policy.iter().zip(&reference);
        let ratios: Vec<f64> = ratios.map(|((p, _), (r, _))| p - r).collect();
        let answers: Vec<(f64, f64)> = { ratios.iter().zip(labels) }
            .map(|(ratio, desirable)| self.answer(*ratio, kl, *desirable))
            .collect();
        let gradient = targets.iter();
        let gradient = gradient.map(|target| (answers[target.row].1 / count as f64) as f32);

        let mut metrics = Metrics::from([("kl", kl)]);
        let both = |values: &[f64]| [true, false].map(|desirable| side(values, labels, desirable));
        let mut add = |names: [&'static str; 2], values: [Option<f64>; 2], factor: f64| {
            let known = names.into_iter().zip(values);
            metrics.extend(known.filter_map(|(name, value)| Some((name, factor * value?))));
        };
        let rewards = both(&ratios);
        add(["rewards/chosen", "rewards/rejected"], rewards, self.beta);
        if let [Some(chosen), Some(rejected)] = rewards {
            add(
                ["rewards/margins"; 2],
                [Some(chosen - rejected), None],
                self.beta,
            );
        }
        add(["logps/chosen", "logps/rejected"], both(&logps), 1.);
        if let Some(logits) = scored.target_logits {
            let by_token: Vec<bool> = targets.iter().map(|target| labels[target.row]).collect();
            let sides = [true, false].map(|desirable| side(logits, &by_token, desirable));
            add(["logits/chosen", "logits/rejected"], sides, 1.);
        }
        if let Some(stats) = scored.token_stats {
            metrics.insert("entropy", TokenStats::mean_entropy(stats));
        }
        Ok(Outcome {
            loss: mean(answers.iter().map(|(loss, _)| *loss)),
            gradient: gradient.collect(),
            metrics,
        })
    }
}

#[cfg(test)]
mod tests;
