//! `train_orpo`: preference training by odds ratio.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::common::{
    self, EvalStrategy, Job, Optim, SamplingStrategy, SchedulerType, defaults, training_parameters,
};
use crate::engine::{Artifact, Context, Input, Neutral, Problem, Stage};
use crate::ml::fused::Packing;
use crate::ml::loss::Objective;
use crate::ml::train::{Settings, Watch, compute_dtype, optim};
use crate::stages::artifacts::{Adapter, Model, Tokens};

training_parameters! {
    /// Trains on preferences by the odds ratio (ORPO, arXiv 2403.07691), with the numbers of TRL's `ORPOTrainer`.
    ///
    /// With `adapter` it trains the adapter on the frozen model and makes an adapter; without, it trains every weight and
    /// makes a model. Beside it lie `metrics.jsonl` and transformers' `trainer_state.json` with TRL's
    /// metrics of every step. Parameters have TRL's names, and TRL's
    /// defaults where nothing else is said.
    ///
    /// A metric is the mean of its micro-batches' means, each over all of its rows. TRL's log differs in one place: where an epoch's last
    /// micro-batch has fewer rows than the others, it takes only as many rows of every micro-batch of that step for `logps/*` and
    /// `rewards/*` (accelerate's `gather_for_metrics`). Losses, gradients and all other metrics are the same.
    pub struct TrainOrpo {
        /// The weight of the odds ratio beside the likelihood (lambda in the paper).
        #[serde(default = "default_beta")]
        beta: f64,
        /// Whether the adapter's dropout is off in training, as TRL does it.
        #[serde(default = "default_disable_dropout")]
        disable_dropout: bool,
        /// Whether what sequences begin with is computed once for all of a step, where `padding_free` is on and no dropout is at
        /// work: a prompt for its two answers, a system prompt for all rows. The same numbers in less time.
        #[serde(default = "default_share_prompts")]
        share_prompts: bool,
    }
    learning_rate = 1e-6;
}

fn default_beta() -> f64 {
    0.1
}

fn default_share_prompts() -> bool {
    true
}

fn default_disable_dropout() -> bool {
    true
}

impl Stage for TrainOrpo {
    const KIND: &'static str = "train_orpo";
    const VERSION: u32 = 5;
    const EXCLUSIVE: bool = true;
    const LENGTH_PARAMETERS: &'static [&'static str] = common::LENGTH_PARAMETERS;
    type Output = Adapter;

    fn output(&self) -> &'static str {
        if self.adapter.is_some() {
            Adapter::NAME
        } else {
            Model::NAME
        }
    }

    fn check(&self) -> Vec<Problem> {
        let mut rules = self.common_rules();
        let beta = self.beta >= 0. && self.beta.is_finite();
        rules.rule(beta, "beta", "expected a number not below 0");
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
                share_prompts: self.share_prompts,
            },
        };
        let objective = Objective::Orpo { beta: self.beta };
        let settings = self.settings(objective, !self.disable_dropout);
        common::run(cx, &job, settings, &|rows| {
            for (number, row) in rows.iter().enumerate() {
                let answers = [Some(&row.chosen), row.rejected.as_ref()];
                anyhow::ensure!(
                    answers
                        .iter()
                        .all(|ids| ids.is_some_and(|ids| !ids.is_empty())),
                    "row {} of the tokens lacks a chosen or rejected answer, and `train_orpo` needs both; hint: a preference dataset has \
                     the column `rejected`, and `train_sft` learns answers alone",
                    number + 1
                );
            }
            Ok(rows)
        })
    }
}
