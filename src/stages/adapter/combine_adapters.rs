//! `combine_adapters`: several adapters as one.

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::{Context, Implied, ImpliedBy, Input, Problem, Stage};
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::lora::combine::{Combination, CombinationType, MajoritySignMethod, combine};
use crate::ml::model::arch::Arch;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::text::chat_template;

/// Combines adapters of the same model into one, each with a weight, as PEFT's `add_weighted_adapter` does.
///
/// The result is an adapter like any other: to score, to merge, to train on. With `combination_type: cat` and the weights `[1, -1]`, an adapter
/// that began with `init_lora_weights: pissa` or `olora` and the one that it began as become an adapter of the original model.
///
/// PEFT's own result differs in two things: an adapter with `use_rslora` gives one that is scaled by the root of its rank, where here it is
/// not scaled, and singular vectors may have other signs.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base", "adapters": ["lora", "tuned"], "weights": [0.7, 0.3]}]))]
pub struct CombineAdapters {
    /// The model that the adapters were made for. It may be left out: then it is the model of the first one.
    #[schemars(extend("examples" = ["base"]))]
    model: Input<Model>,
    /// The adapters.
    #[schemars(extend("minItems" = 1))]
    #[schemars(extend("examples" = [["lora", "tuned"]]))]
    adapters: Vec<Input<Adapter>>,
    /// The weight of each adapter. A negative one takes away what its adapter adds.
    #[schemars(extend("examples" = [[0.7, 0.3]]))]
    weights: Vec<f64>,
    /// How they become one.
    #[serde(default)]
    combination_type: CombinationType,
    /// The share of values that are kept, for the types that leave some out (`ties`, `dare_..`, `magnitude_prune`), which need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.5]))]
    density: Option<f64>,
    /// Which sign prevails in `ties` and `dare_ties`.
    #[serde(default)]
    majority_sign_method: MajoritySignMethod,
    /// The rank of the result of `svd` and the types that end so; the largest rank of the adapters if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [16]))]
    svd_rank: Option<usize>,
    /// The seed of the values that `dare_..` keeps, which are those that torch keeps after `torch.manual_seed(seed)`.
    #[serde(default = "default_seed")]
    seed: u64,
}

fn default_seed() -> u64 {
    42
}

impl Stage for CombineAdapters {
    const KIND: &'static str = "combine_adapters";
    const VERSION: u32 = 1;
    type Output = Adapter;
    const IMPLIED: &'static [Implied] = &[Implied {
        parameter: "model",
        unless: &[],
        with: &[],
        sources: &[ImpliedBy::Input {
            input: "adapters",
            parameter: "model",
            before: Some("quantize"),
        }],
    }];

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, parameter: &str, message: String| {
            if !holds {
                problems.push(Problem::new(parameter, message));
            }
        };
        rule(
            self.weights.len() == self.adapters.len(),
            "weights",
            format!(
                "expected a weight for each adapter: {} for `adapters`, not {}",
                self.adapters.len(),
                self.weights.len()
            ),
        );
        rule(
            self.weights.iter().all(|weight| weight.is_finite()),
            "weights",
            "expected finite numbers".to_owned(),
        );
        let prunes = self.combination_type.prunes();
        rule(
            prunes == self.density.is_some(),
            "density",
            if prunes {
                "this `combination_type` leaves values out and needs the share of those that are kept"
            } else {
                "this `combination_type` leaves nothing out; expected none"
            }
            .to_owned(),
        );
        rule(
            self.svd_rank.is_none() || self.combination_type.decomposes(),
            "svd_rank",
            "expected a `combination_type` that is `svd` or ends with it".to_owned(),
        );
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let arch = Arch::read(cx.input(&self.model)?)?;
        let mut adapters = Vec::new();
        let mut template: Option<String> = None;
        for adapter in &self.adapters {
            let folder = cx.input(adapter)?;
            adapters.push(LoraAdapter::load(folder)?);
            let own = chat_template::read(folder)?;
            if let (Some(one), Some(other)) = (&template, &own)
                && one != other
            {
                cx.warn(
                    "the adapters were trained with different chat templates; the result has that of the first one",
                );
            }
            template = template.or(own);
        }
        let how = Combination {
            combination_type: self.combination_type,
            density: self.density.unwrap_or(1.),
            majority_sign_method: self.majority_sign_method,
            svd_rank: self.svd_rank,
            seed: self.seed,
        };
        let weighted = adapters.iter().zip(self.weights.iter().copied());
        let weighted: Vec<(&LoraAdapter, f64)> = weighted.collect();
        let combined = combine(&arch, &weighted, &how, &mut |done, total| {
            cx.progress(done as u64, Some(total as u64), "modules");
            cx.check_cancelled()
        });
        let combined = combined.context("could not combine `adapters`")?;
        cx.note("modules", combined.tensors.len());
        cx.note("r", combined.config.r);
        combined.save(cx.out())?;
        if let Some(template) = template {
            chat_template::write(&template, cx.out())?;
        }
        Ok(())
    }
}
