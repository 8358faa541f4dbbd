//! `train_sft`: supervised fine-tuning.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::{Adapter, Model, Tokens};
use super::training::{
    self, EvalStrategy, Job, Optim, SamplingStrategy, SchedulerType, defaults, training_parameters,
};
use crate::engine::{Artifact, Context, Input, Neutral, Problem, Stage};
use crate::ml::objective::Objective;
use crate::ml::train::{Settings, Watch, compute_dtype};
use crate::ml::{optim, sft};

training_parameters! {
    /// Trains on answers by their likelihood, with the numbers of TRL's `SFTTrainer`.
    ///
    /// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and
    /// makes a model. Beside it lie `metrics.jsonl` and transformers' `trainer_state.json` with
    /// the metrics of every step. Parameters have TRL's names and
    /// defaults but one: `bf16` is off.
    pub struct TrainSft {
        /// Whether only the answer's tokens count in the loss, and not the prompt's.
        #[serde(default = "default_completion_only_loss")]
        completion_only_loss: bool,
        /// Which answers of a preference dataset are learnt.
        #[serde(default)]
        answers: Answers,
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

impl Stage for TrainSft {
    const KIND: &'static str = "train_sft";
    const VERSION: u32 = 2;
    const EXCLUSIVE: bool = true;
    type Output = Model;

    fn output(&self) -> &'static str {
        if self.adapter.is_some() {
            Adapter::NAME
        } else {
            Model::NAME
        }
    }

    fn check(&self) -> Vec<Problem> {
        self.common_rules().0
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let job = Job {
            model: cx.input(&self.model)?,
            adapter: self.adapter.as_ref().map(|a| cx.input(a)).transpose()?,
            dataset: cx.input(&self.dataset)?,
            train_split: &self.train_split,
            eval_split: &self.eval_split,
            compute: compute_dtype(self.bf16, self.fp16),
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
        training::run(cx, &job, settings, &|rows| {
            let rows = sft::rows(&rows, answers)?;
            for (number, row) in rows.iter().enumerate() {
                anyhow::ensure!(
                    !row.chosen.is_empty(),
                    "row {number} has no answer to learn"
                );
            }
            Ok(rows)
        })
    }
}
