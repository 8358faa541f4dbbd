//! Learning-rate schedules as transformers defines them (optimization.py): the factor of the learning rate as a function of the number of
//! finished steps.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Linear decay to 0.
    #[default]
    Linear,
    /// Cosine decay to 0.
    Cosine,
    /// Cosine decay to 0 that begins again at the top after each cycle. There is one cycle, transformers' default, so this is `cosine`.
    CosineWithRestarts,
    /// Constant from the first step on, without warm-up.
    Constant,
    /// Constant after the warm-up.
    ConstantWithWarmup,
    /// Decay with the inverse square root of the step.
    InverseSqrt,
}

/// A schedule for a whole training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// The type of the schedule.
    pub scheduler: SchedulerType,
    /// The number of cycles of [`SchedulerType::CosineWithRestarts`].
    pub cycles: u32,
    /// The number of steps over which the rate rises from 0.
    pub warmup: u64,
    /// The number of all steps.
    pub total: u64,
}

impl Schedule {
    /// The factor of the learning rate, from 0 to 1, after `step` finished steps; the first step uses `factor(0)`.
    pub fn factor(&self, step: u64) -> f64 {
        let (s, warmup, total) = (step as f64, self.warmup as f64, self.total as f64);
        if self.scheduler == SchedulerType::Constant {
            return 1.;
        }
        if step < self.warmup {
            return s / warmup.max(1.);
        }
        let progress = (s - warmup) / (total - warmup).max(1.);
        match self.scheduler {
            SchedulerType::Cosine => (0.5 * (1. + (std::f64::consts::PI * progress).cos())).max(0.),
            SchedulerType::CosineWithRestarts => {
                if progress >= 1. {
                    return 0.;
                }
                let cycle = (f64::from(self.cycles) * progress) % 1.;
                (0.5 * (1. + (std::f64::consts::PI * cycle).cos())).max(0.)
            }
            SchedulerType::Linear => ((total - s) / (total - warmup).max(1.)).max(0.),
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.,
            SchedulerType::InverseSqrt => {
                // In transformers the time scale is the warm-up, or 10,000 steps without one.
                let scale = if self.warmup == 0 { 10_000. } else { warmup };
                let shift = scale - warmup;
                1. / ((s + shift) / scale).sqrt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_transformers() {
        let text = include_str!("../../../tests/golden/lr_schedules.json");
        let golden: std::collections::BTreeMap<String, Vec<f64>> =
            serde_json::from_str(text).unwrap();
        assert_eq!(golden.len(), 8);
        let mut largest = 0f64;
        for (name, factors) in golden {
            let (name_of_type, warmup) = name.rsplit_once("_warmup").unwrap();
            let scheduler = match name_of_type {
                "cosine" => SchedulerType::Cosine,
                "linear" => SchedulerType::Linear,
                "constant" => SchedulerType::Constant,
                "constant_with_warmup" => SchedulerType::ConstantWithWarmup,
                other => panic!("{other}"),
            };
            let warmup = warmup.parse().unwrap();
            let schedule = Schedule {
                scheduler,
                cycles: 1,
                warmup,
                total: 20,
            };
            for (step, factor) in (0..).zip(factors) {
                let far = (schedule.factor(step) - factor).abs();
                assert!(far < 1e-7, "{name} {step}");
                largest = largest.max(far);
            }
        }
        println!("| schedules | cosine, linear, constant | {largest:.1e} | | 1e-7 |");
    }

    #[test]
    fn the_other_factors_are_those_of_transformers() {
        let text = include_str!("../../../tests/golden/lr_schedules_more.json");
        let golden: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert_eq!(golden.len(), 15);
        let mut largest = 0f64;
        for case in golden {
            let kwargs = case["kwargs"].as_object().unwrap();
            let scheduler: SchedulerType = serde_json::from_value(case["kind"].clone()).unwrap();
            // Of half a cycle there is only plain `cosine`.
            let cycles = kwargs.get("num_cycles").and_then(serde_json::Value::as_u64);
            let number = |name: &str| case[name].as_u64().unwrap();
            let (warmup, total) = (number("warmup"), number("total"));
            let schedule = Schedule {
                scheduler,
                cycles: cycles.unwrap_or(1) as u32,
                warmup,
                total,
            };
            let factors = case["factors"].as_array().unwrap();
            assert_eq!(factors.len() as u64, total + 1);
            for (step, factor) in (0..).zip(factors) {
                let far = (schedule.factor(step) - factor.as_f64().unwrap()).abs();
                assert!(
                    far < 1e-7,
                    "{scheduler:?} warmup {warmup} step {step}: {far}"
                );
                largest = largest.max(far);
            }
        }
        println!("| schedules | cosine_with_restarts, inverse_sqrt | {largest:.1e} | | 1e-7 |");
    }

    #[test]
    fn restarts_begin_at_the_top_again() {
        let schedule = Schedule {
            scheduler: SchedulerType::CosineWithRestarts,
            cycles: 2,
            warmup: 0,
            total: 20,
        };
        assert!((schedule.factor(10) - 1.).abs() < 1e-12);
        assert!((schedule.factor(15) - 0.5).abs() < 1e-12);
        assert!(schedule.factor(20).abs() < 1e-12);
    }
}
