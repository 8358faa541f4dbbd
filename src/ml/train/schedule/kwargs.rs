//! The settings of schedules (`lr_scheduler_kwargs`).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::SchedulerType;

/// The settings of a schedule, by transformers' names. Each is for some schedules only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SchedulerKwargs {
    /// The number of waves of a cosine, 0.5 by default; for `cosine_with_restarts` the number of cycles, 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub num_cycles: Option<f64>,
    /// The learning rate at the end of `polynomial`, 1e-7 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0))]
    pub lr_end: Option<f64>,
    /// The degree of `polynomial`, 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub power: Option<f64>,
    /// The time scale of `inverse_sqrt` in steps; by default the warm-up, or 10,000 steps without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    pub timescale: Option<u64>,
    /// The lowest learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0))]
    pub min_lr: Option<f64>,
    /// The lowest learning rate as a share of `learning_rate`, instead of `min_lr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub min_lr_rate: Option<f64>,
    /// The first learning rate of `cosine_warmup_with_min_lr` as a share of `learning_rate`; by default 1 / the steps of the warm-up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub warmup_lr_rate: Option<f64>,
    /// The number of steps at the top of `warmup_stable_decay`; by default what warm-up and decay leave of all steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_stable_steps: Option<u64>,
    /// The number of steps of the decay of `warmup_stable_decay`, which needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_decay_steps: Option<u64>,
    /// The shape of the warm-up of `warmup_stable_decay`, `linear` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_type: Option<Ramp>,
    /// The shape of the decay of `warmup_stable_decay`, `cosine` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_type: Option<Ramp>,
    /// The lowest learning rate of `warmup_stable_decay` as a share of `learning_rate`, 0 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    pub min_lr_ratio: Option<f64>,
    /// Whether the metric improves when it falls (`min`, the default) or rises (`max`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Direction>,
    /// What the learning rate is multiplied by: 0.1 by default, 0.95 for `greedy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub factor: Option<f64>,
    /// The number of evaluations in a row without an improvement, or with `greedy` also with one, after which the next changes the learning
    /// rate; 10 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// By how much the metric has to change to count as an improvement: 1e-4 by default, 1e-6 for `greedy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0))]
    pub threshold: Option<f64>,
    /// Whether `threshold` is a share of the best value (`rel`, the default) or a difference (`abs`, the default of `greedy`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold_mode: Option<ThresholdMode>,
    /// The number of evaluations that are not counted after the learning rate was lowered, 0 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown: Option<u64>,
    /// The number of evaluations that are not counted after `greedy` raised the learning rate, 0 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// The highest learning rate of `greedy`, 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max_lr: Option<f64>,
    /// A change of the learning rate by less than this is not made; 1e-8 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0))]
    pub eps: Option<f64>,
    /// Whether `greedy` follows the mean of the last `window_size` evaluations instead of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<bool>,
    /// The number of evaluations of that mean, 50 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    pub window_size: Option<u64>,
    /// How often `greedy` finds the learning rate at its lowest before it begins again with `learning_rate`; 500 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    pub reset_start: Option<u64>,
}

/// The shape of a rise or a decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ramp {
    /// A line.
    Linear,
    /// Half a wave.
    Cosine,
    /// 1 minus a square root.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// Which way a metric improves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Downwards.
    #[default]
    Min,
    /// Upwards.
    Max,
}

/// What a threshold is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdMode {
    /// The change as a share of the best value.
    Rel,
    /// The change itself.
    Abs,
}

/// The settings of a schedule.
fn known(scheduler: SchedulerType) -> &'static [&'static str] {
    match scheduler {
        SchedulerType::Linear | SchedulerType::Constant | SchedulerType::ConstantWithWarmup => &[],
        SchedulerType::Cosine | SchedulerType::CosineWithRestarts => &["num_cycles"],
        SchedulerType::Polynomial => &["lr_end", "power"],
        SchedulerType::InverseSqrt => &["timescale"],
        SchedulerType::CosineWithMinLr => &["num_cycles", "min_lr", "min_lr_rate"],
        SchedulerType::CosineWarmupWithMinLr => {
            &["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"]
        }
        SchedulerType::WarmupStableDecay => &[
            "num_decay_steps",
            "num_stable_steps",
            "warmup_type",
            "decay_type",
            "min_lr_ratio",
            "num_cycles",
        ],
        SchedulerType::ReduceLrOnPlateau => &[
            "mode",
            "factor",
            "patience",
            "threshold",
            "threshold_mode",
            "cooldown",
            "min_lr",
            "eps",
        ],
        SchedulerType::Greedy => &[
            "mode",
            "factor",
            "patience",
            "threshold",
            "threshold_mode",
            "cooldown",
            "warmup",
            "min_lr",
            "max_lr",
            "eps",
            "smooth",
            "window_size",
            "reset_start",
        ],
    }
}

impl SchedulerKwargs {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is wrong with these settings for a schedule of this type, as transformers would refuse it: a sentence fragment.
    pub fn mistake(&self, scheduler: SchedulerType) -> Option<String> {
        let name = serde_json::to_value(scheduler).unwrap_or_default();
        let name = name.as_str().unwrap_or_default();
        let (known, given) = (known(scheduler), serde_json::to_value(self));
        if let Ok(Value::Object(given)) = given
            && let Some(other) = given.keys().find(|key| !known.contains(&key.as_str()))
        {
            let expected: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
            return Some(if expected.is_empty() {
                format!("`{name}` takes no settings, but `{other}` is given")
            } else {
                format!(
                    "`{name}` has no setting `{other}`, expected some of {}",
                    expected.join(", ")
                )
            });
        }
        match scheduler {
            SchedulerType::CosineWithMinLr | SchedulerType::CosineWarmupWithMinLr
                if self.min_lr.is_some() == self.min_lr_rate.is_some() =>
            {
                Some(format!("`{name}` needs one of `min_lr` and `min_lr_rate`"))
            }
            SchedulerType::WarmupStableDecay if self.num_decay_steps.is_none() => {
                Some(format!("`{name}` needs `num_decay_steps`"))
            }
            _ => None,
        }
    }
}
