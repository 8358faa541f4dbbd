//! What the methods that train on preferences have in common.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::Common;
use crate::ml::model::batch::Row;

/// The parameters of all methods that train on preferences.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PreferenceArguments {
    /// Whether the adapter's dropout is off during training, as in TRL.
    #[serde(default = "yes")]
    disable_dropout: bool,
    /// Whether the tokens that sequences have in common at their beginning are computed once for all of a step, if `padding_free` is
    /// on and no dropout is at work: a prompt for its two answers, a system prompt for all rows. The same numbers in less time.
    #[serde(default = "yes")]
    share_prompts: bool,
    /// The highest learning rate.
    #[serde(default = "learning_rate")]
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
