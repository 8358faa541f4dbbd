//! `train_sft`: supervised fine-tuning.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::method::{Common, Method, NoReference, Prepared, Use};
use super::stage::Train;
use crate::engine::Context;
use crate::ml::loss::Loss;
use crate::ml::loss::dft::Dft;
use crate::ml::loss::sft::{self, Answers, PackingStrategy, Sft};
use crate::ml::loss::smoothed::Smoothed;
use crate::ml::model::batch::Row;
use crate::stages::artifacts::Model;
use crate::stages::rules::Rules;
use crate::stages::text::added::Added;

/// The stage.
pub type TrainSft = Train<Parameters>;

/// Trains a model on answers (supervised fine-tuning), with the numbers of TRL's `SFTTrainer`.
///
/// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and makes a
/// model. Beside the weights lie `metrics.jsonl` and transformers' `trainer_state.json` with the metrics of every step. Parameters
/// have TRL's names, and TRL's defaults unless something else is said.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "TrainSft")]
#[schemars(extend("examples" = [{"adapter": "lora", "dataset": "tokens", "learning_rate": 0.000_2}]))]
pub struct Parameters {
    /// Whether only the answer's tokens count in the loss, and not the prompt's. TRL's default: none, which means `true` for rows
    /// with a prompt of their own and `false` for whole conversations. Of rows whose chat template was applied with
    /// `assistant_only_loss`, only what the assistant says counts in either case.
    #[serde(default = "completion_only_loss")]
    completion_only_loss: bool,
    /// Which answers of a preference dataset are learnt.
    #[serde(default)]
    answers: Answers,
    /// The loss: `nll`, the negative log-likelihood of the tokens, or `dft`, the same weighted by each token's probability (dynamic
    /// fine-tuning, arXiv 2508.05629).
    #[serde(default, skip_serializing_if = "LossType::is_nll")]
    #[schemars(extend("default" = "nll"))]
    loss_type: LossType,
    /// The part of each token's probability that is spread over the whole vocabulary (label smoothing), for `loss_type: nll`.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(extend("default" = 0))]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.1]))]
    label_smoothing_factor: f64,
    /// Whether rows are packed into sequences of up to `max_length` tokens, so that there is little padding. Rows in one sequence
    /// don't see each other, and positions begin again with each. Which rows go together is decided as by TRL's `packing_strategy`;
    /// `per_device_train_batch_size` then counts sequences.
    #[serde(default)]
    packing: bool,
    /// What `packing` does with rows that are longer than `max_length`: `bfd` cuts their end off, `bfd_split` splits them, which loses no token
    /// but tears what belongs together.
    #[serde(default, skip_serializing_if = "is_bfd")]
    #[schemars(extend("default" = "bfd"))]
    packing_strategy: PackingStrategy,
    /// The longest sequence that `packing` makes, in tokens; longer rows are cut or split. Without `packing` it has no effect: rows
    /// are as long as `tokenize` made them.
    #[serde(default = "max_length")]
    #[schemars(extend("minimum" = 2))]
    #[schemars(extend("examples" = [2048]))]
    max_length: usize,
}

/// A loss of supervised fine-tuning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum LossType {
    /// The negative log-likelihood.
    #[default]
    Nll,
    /// The negative log-likelihood, weighted by the probability.
    Dft,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's signature of a condition"
)]
fn is_zero(factor: &f64) -> bool {
    factor.to_bits() == 0f64.to_bits()
}

impl LossType {
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde's signature of a condition"
    )]
    fn is_nll(&self) -> bool {
        *self == Self::Nll
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's signature of a condition"
)]
fn is_bfd(strategy: &PackingStrategy) -> bool {
    *strategy == PackingStrategy::Bfd
}

/// The parameters that other methods have too, with the defaults of `SFTTrainer`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SftArguments {
    /// The highest learning rate. For LoRA, rates from 1e-4 to 2e-4 are common; for all weights, about 1e-5.
    #[serde(default = "learning_rate")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.000_2]))]
    learning_rate: f64,
    /// The strength of the noise that is added to the embeddings in training (NEFTune, arXiv 2310.05914), commonly 5 to 15. Its numbers have
    /// the distribution of transformers', but another stream, because torch's depends on all that was drawn before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [5]))]
    neftune_noise_alpha: Option<f64>,
}

impl Common for SftArguments {
    fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    fn neftune_noise_alpha(&self) -> Option<f64> {
        self.neftune_noise_alpha
    }
}

fn completion_only_loss() -> bool {
    true
}

fn max_length() -> usize {
    1024
}

fn learning_rate() -> f64 {
    2e-5
}

impl Method for Parameters {
    const KIND: &'static str = "train_sft";
    const VERSION: u32 = 7;
    type Output = Model;
    type Common = SftArguments;
    type Reference = NoReference;

    fn check(&self, _: &TrainingArguments, rules: &mut Rules) {
        rules.rule(
            self.loss_type == LossType::Nll || self.label_smoothing_factor <= 0.,
            "label_smoothing_factor",
            "expected `loss_type: nll`, which alone has label smoothing",
        );
    }

    fn loss(&self) -> Box<dyn Loss> {
        let sft = Sft {
            completion_only: self.completion_only_loss,
        };
        match self.loss_type {
            LossType::Nll if self.label_smoothing_factor > 0. => Box::new(Smoothed {
                sft,
                label_smoothing_factor: self.label_smoothing_factor,
            }),
            LossType::Nll => Box::new(sft),
            LossType::Dft => Box::new(Dft(sft)),
        }
    }

    fn prepare(
        &self,
        cx: &Context,
        arguments: &TrainingArguments,
        mut rows: Vec<Row>,
        purpose: Use,
    ) -> anyhow::Result<Prepared> {
        let completion_only = self.completion_only_loss;
        let added = Added::read(cx.input(&arguments.dataset)?)?;
        if purpose == Use::Training {
            tell(cx, completion_only, &rows, added);
        }
        for row in &mut rows {
            added.take_off(row);
        }
        let rows = sft::rows(&rows, self.answers)?;
        let rows_each = self.answers.each();
        for (index, row) in rows.iter().enumerate() {
            anyhow::ensure!(
                !row.chosen.is_empty(),
                "row {} has no answer to learn",
                index / rows_each + 1
            );
            anyhow::ensure!(
                row.mask.is_none() || sft::has_target(row, completion_only),
                "the assistant says nothing in the answer of row {}; hint: `completion_only_loss: false` learns what it says in the \
                 prompt as well",
                index / rows_each + 1
            );
        }
        if !self.packing {
            return Ok(Prepared { rows, rows_each });
        }
        let count = rows.len();
        let pack = sft::pack(
            rows,
            self.max_length,
            completion_only,
            self.packing_strategy,
        );
        anyhow::ensure!(
            !pack.rows.is_empty(),
            "no row has a token left to learn within `max_length` {}; hint: raise it",
            self.max_length
        );
        if purpose == Use::Training {
            cx.note("rows_packed", count - pack.dropped);
            if pack.cut > 0 {
                cx.note(
                    match self.packing_strategy {
                        PackingStrategy::Bfd => "rows_cut",
                        PackingStrategy::BfdSplit => "rows_split",
                    },
                    pack.cut,
                );
            }
            if pack.dropped > 0 {
                cx.note("rows_dropped", pack.dropped);
            }
        }
        Ok(Prepared {
            rows: pack.rows,
            rows_each,
        })
    }
}

/// Tells what is learnt of a row, and what is left out of preferences.
fn tell(cx: &Context, completion_only: bool, rows: &[Row], added: Added) {
    let whole = rows.iter().filter(|row| row.prompt.is_empty()).count();
    let masked = rows.iter().any(|row| row.mask.is_some());
    cx.info(match (completion_only, whole) {
        (false, _) if masked => "learns all that the assistant says (`assistant_only_loss`)",
        (true, whole) if masked && whole == rows.len() => {
            "learns all that the assistant says (`assistant_only_loss`)"
        }
        (true, _) if masked => {
            "learns what the assistant says in each row's answer; `completion_only_loss: false` learns what it says in prompts as well"
        }
        (false, _) => "learns all tokens of each row, prompts included (`completion_only_loss: false`)",
        (true, whole) if whole == rows.len() => {
            "learns all tokens of each row, for the rows are texts without a prompt"
        }
        (true, _) => {
            "learns each row's answer, which is the last turn of its chat; `completion_only_loss: false` learns prompts as well, and \
             `assistant_only_loss: true` where the chat template is applied all turns of the assistant"
        }
    });
    if rows.iter().all(|row| row.rejected.is_none()) {
        return;
    }
    let taken: Vec<&str> = [added.bos.map(|_| "BOS"), added.eos.map(|_| "EOS")]
        .into_iter()
        .flatten()
        .collect();
    if !taken.is_empty() {
        cx.info(format!(
            "the rows are preferences, and the {} that these get is left out, as `SFTTrainer` puts none around a chat",
            taken.join(" and the ")
        ));
    }
    if added.mixed {
        cx.warn(
            "the rows are preferences, some of which got a BOS or an EOS that their chat template did not print; it stays, where \
             `SFTTrainer` has none. hint: tokenize the rows without `rejected`",
        );
    }
}
