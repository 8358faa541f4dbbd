//! `train_sft`: supervised fine-tuning.

use std::cell::Cell;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::common::{
    self, EvalStrategy, Job, Optim, SamplingStrategy, SchedulerType, defaults, training_parameters,
};
use crate::engine::{Artifact, Context, Input, Neutral, Problem, Stage};
use crate::ml::fused::Packing;
use crate::ml::loss::{Objective, sft};
use crate::ml::model::batch::Row;
use crate::ml::train::{Settings, Watch, compute_dtype, optim};
use crate::stages::artifacts::{Adapter, Model, Tokens};
use crate::stages::text::added::Added;

training_parameters! {
    /// Trains on answers by their likelihood, with the numbers of TRL's `SFTTrainer`.
    ///
    /// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and
    /// makes a model. Beside it lie `metrics.jsonl` and transformers' `trainer_state.json` with
    /// the metrics of every step. Parameters have TRL's names, and TRL's
    /// defaults where nothing else is said.
    pub struct TrainSft {
        /// Whether only the answer's tokens count in the loss, and not the prompt's. TRL's default: none, which means `true` for rows
        /// with a prompt of their own and `false` for whole conversations.
        #[serde(default = "default_completion_only_loss")]
        completion_only_loss: bool,
        /// Which answers of a preference dataset are learnt.
        #[serde(default)]
        answers: Answers,
        /// Whether rows are packed into sequences of up to `max_length` tokens, so that little is padding. Rows in one
        /// sequence don't see each other, and positions begin again with each. Which rows go together is decided as by TRL's
        /// `packing_strategy: bfd`; `per_device_train_batch_size` then counts sequences.
        #[serde(default)]
        packing: bool,
        /// Longest sequence that `packing` makes, in tokens; longer rows lose their end. Without `packing` it doesn't count:
        /// rows are as long as `tokenize` made them.
        #[serde(default = "default_max_length")]
        max_length: usize,
    }
    learning_rate = 2e-5;
}

/// Which answers are learnt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Answers {
    /// The chosen ones.
    #[default]
    Chosen,
    /// The rejected ones.
    Rejected,
    /// Both, each as a row of its own.
    Both,
}

fn default_completion_only_loss() -> bool {
    true
}

fn default_max_length() -> usize {
    1024
}

impl Stage for TrainSft {
    const KIND: &'static str = "train_sft";
    const VERSION: u32 = 7;
    const EXCLUSIVE: bool = true;
    const LENGTH_PARAMETERS: &'static [&'static str] = common::LENGTH_PARAMETERS;
    type Output = Model;

    fn output(&self) -> &'static str {
        if self.adapter.is_some() {
            Adapter::NAME
        } else {
            Model::NAME
        }
    }

    fn check(&self) -> Vec<Problem> {
        let mut rules = self.common_rules();
        rules.rule(
            self.max_length >= 2,
            "max_length",
            "expected at least 2 tokens",
        );
        rules.0
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let job = Job {
            model: cx.input(&self.model)?,
            adapter: self.adapter.as_ref().map(|a| cx.input(a)).transpose()?,
            dataset: cx.input(&self.dataset)?,
            train_split: &self.train_split,
            eval_split: &self.eval_split,
            compute: compute_dtype(self.bf16, self.fp16),
            cache_frozen_layers: *self.cache_frozen_layers,
            packing: Packing {
                padding_free: self.padding_free,
                ..Packing::default()
            },
        };
        let completion_only = self.completion_only_loss;
        let answers = match self.answers {
            Answers::Chosen => sft::Answers::Chosen,
            Answers::Rejected => sft::Answers::Rejected,
            Answers::Both => sft::Answers::Both,
        };
        let mut settings = self.settings(Objective::Sft { completion_only }, true);
        if answers == sft::Answers::Both {
            settings.rows_each = 2;
        }
        let noted = Cell::new(false);
        let told = Cell::new(false);
        let added = Added::read(job.dataset)?;
        common::run(cx, &job, settings, &|mut rows| {
            if !told.replace(true) {
                tell(cx, completion_only, &rows, added);
            }
            for row in &mut rows {
                added.take_off(row);
            }
            let rows = sft::rows(&rows, answers)?;
            for (place, row) in rows.iter().enumerate() {
                anyhow::ensure!(
                    !row.chosen.is_empty(),
                    "row {} has no answer to learn",
                    place / answers.each() + 1
                );
            }
            if !self.packing {
                return Ok(rows);
            }
            let count = rows.len();
            let pack = sft::pack(rows, self.max_length, completion_only);
            anyhow::ensure!(
                !pack.rows.is_empty(),
                "no row has a token left to learn within `max_length` {}; hint: raise it",
                self.max_length
            );
            // The rows to train on are prepared first; those to evaluate on are not counted.
            if !noted.replace(true) {
                cx.note("rows_packed", count - pack.dropped);
                if pack.cut > 0 {
                    cx.note("rows_cut", pack.cut);
                }
                if pack.dropped > 0 {
                    cx.note("rows_dropped", pack.dropped);
                }
            }
            Ok(pack.rows)
        })
    }
}

/// Tells what is learnt of a row, and what is left out of preferences.
fn tell(cx: &Context, completion_only: bool, rows: &[Row], added: Added) {
    let whole = rows.iter().filter(|row| row.prompt.is_empty()).count();
    cx.info(match (completion_only, whole) {
        (false, _) => "learns all tokens of each row, prompts included (`completion_only_loss: false`)",
        (true, whole) if whole == rows.len() => {
            "learns all tokens of each row, for the rows are texts without a prompt"
        }
        (true, _) => {
            "learns each row's answer, which is the last turn of its chat; `completion_only_loss: false` learns prompts as well"
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
