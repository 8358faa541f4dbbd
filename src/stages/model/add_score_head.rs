//! `add_score_head`: a language model with a new head that gives scores.

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::{Context, Input, Stage};
use crate::ml::io::folder;
use crate::ml::model::tied;
use crate::ml::reward;
use crate::stages::artifacts::Model;
use crate::stages::model_input::pad_id;

/// Replaces a model's head by one that gives a single number, as transformers does for `AutoModelForSequenceClassification` with
/// `num_labels: 1`. `train_reward` makes a reward model of it.
///
/// The new head (`score.weight`) has random numbers with a standard deviation of `initializer_range` in `config.json`; those of TRL's
/// `RewardTrainer` for the same seed. An adapter that `attach_lora` makes for the result trains it whole (`modules_to_save: [score]`).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base"}]))]
pub struct AddScoreHead {
    /// The language model, dense or in 4 bits.
    #[schemars(extend("examples" = ["base"]))]
    model: Input<Model>,
    /// The seed of the head's numbers, which are those after `torch.manual_seed(seed)`.
    #[serde(default = "default_seed")]
    seed: u64,
}

fn default_seed() -> u64 {
    42
}

impl Stage for AddScoreHead {
    const KIND: &'static str = "add_score_head";
    const VERSION: u32 = 1;
    type Output = Model;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let source = cx.input(&self.model)?;
        let (arch, _) = tied::open(source)?;
        let range = folder::config(source)?;
        let range = range.get("initializer_range").map_or(Some(0.02), |range| {
            range
                .as_f64()
                .filter(|range| range.is_finite() && *range >= 0.)
        });
        let range = range.context("`initializer_range` in `config.json` is no number from 0 on")?;
        let pad = pad_id(source, &arch);
        let files = reward::add_score_head(
            source,
            cx.out(),
            range,
            self.seed,
            pad,
            &mut |done, total| {
                cx.progress(done, Some(total), "bytes");
                cx.check_cancelled()
            },
        )?;
        for file in &files {
            cx.written(&file.name, &file.blake3)?;
        }
        Ok(())
    }
}
