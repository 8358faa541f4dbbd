//! What the methods that train on preferences have in common.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::arguments::TrainingArguments;
use super::method::{Common, Prepared};
use crate::engine::Context;
use crate::ml::model::batch::Row;
use crate::stages::text::added::Added;

/// The parameters of all methods that train on preferences.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreferenceArguments {
    /// Whether the adapter's dropout is off during training, as in TRL.
    #[serde(default = "yes")]
    disable_dropout: bool,
    /// Whether tokens that sequences of a step have in common at their beginning are computed once: a prompt for its two answers, a
    /// system prompt for all rows. The numbers are the same in less time. It needs `padding_free`, and no dropout at work.
    #[serde(default = "yes")]
    share_prompts: bool,
    /// The highest learning rate. For LoRA, rates from 5e-6 to 1e-4 are common.
    #[serde(default = "learning_rate")]
    #[schemars(extend("exclusiveMinimum" = 0, "examples" = [0.000_008]))]
    learning_rate: f64,
}

fn yes() -> bool {
    true
}

fn learning_rate() -> f64 {
    1e-6
}

impl Common for PreferenceArguments {
    fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    fn dropout(&self) -> bool {
        !self.disable_dropout
    }

    fn share_prompts(&self) -> bool {
        self.share_prompts
    }
}

/// The rows as `DPOTrainer` and `RewardTrainer` take them: two answers each, without the tokens that `ORPOTrainer` adds.
///
/// # Errors
/// A row lacks an answer, or what `tokenize` noted can't be read.
pub(super) fn pairs_as_rendered(
    kind: &str,
    cx: &Context,
    arguments: &TrainingArguments,
    mut rows: Vec<Row>,
) -> anyhow::Result<Prepared> {
    let added = Added::read(cx.input(&arguments.dataset)?)?;
    for row in &mut rows {
        added.take_off(row);
    }
    need_two_answers(kind, &rows)?;
    Ok(Prepared { rows, rows_each: 1 })
}

/// Fails if a row lacks one of its two answers.
pub(super) fn need_two_answers(kind: &str, rows: &[Row]) -> anyhow::Result<()> {
    for (number, row) in rows.iter().enumerate() {
        let answers = [Some(&row.chosen), row.rejected.as_ref()];
        anyhow::ensure!(
            answers
                .iter()
                .all(|ids| ids.is_some_and(|ids| !ids.is_empty())),
            "row {} of the tokens lacks a chosen or rejected answer, and `{kind}` needs both; hint: a preference dataset has \
             the column `rejected`, and `train_sft` learns answers alone",
            number + 1
        );
    }
    Ok(())
}
