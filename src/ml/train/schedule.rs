//! Learning-rate schedules as transformers defines them (optimization.py): the factor of the learning rate as a function of the number of
//! finished steps. Two follow an evaluation's metric instead ([`super::adaptive`]).

mod kwargs;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use kwargs::{Direction, Ramp, SchedulerKwargs, ThresholdMode};

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Linear decay to 0.
    #[default]
    Linear,
    /// Cosine decay to 0.
    Cosine,
    /// Cosine decay to 0 that begins again at the top after each of `num_cycles` cycles. Of one cycle, transformers' default, it is `cosine`.
    CosineWithRestarts,
    /// Polynomial decay of degree `power` to `lr_end`.
    Polynomial,
    /// Constant from the first step on, without warm-up.
    Constant,
    /// Constant after the warm-up.
    ConstantWithWarmup,
    /// Decay with the inverse square root of the step.
    InverseSqrt,
    /// Cosine decay to `min_lr`.
    CosineWithMinLr,
    /// Cosine decay to `min_lr` after a warm-up that begins above 0.
    CosineWarmupWithMinLr,
    /// Constant between a warm-up and a decay over the last `num_decay_steps`.
    WarmupStableDecay,
    /// Constant, and less each time that evaluations stop improving (torch's `ReduceLROnPlateau`).
    ReduceLrOnPlateau,
    /// More while evaluations improve, and less while they don't (`GreedyLR`, arXiv 2512.14527).
    Greedy,
}

impl SchedulerType {
    /// Whether it follows a metric of the evaluations and not the number of steps.
    pub fn follows_evaluations(self) -> bool {
        matches!(self, Self::ReduceLrOnPlateau | Self::Greedy)
    }
}

/// A schedule for a whole training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The type of the schedule.
    pub scheduler: SchedulerType,
    /// Its settings.
    pub kwargs: SchedulerKwargs,
    /// The highest learning rate, of which some settings are a part.
    pub learning_rate: f64,
    /// The number of steps over which the rate rises from 0.
    pub warmup: u64,
    /// The number of all steps.
    pub total: u64,
}

impl Schedule {
    /// The factor of the learning rate after `step` finished steps; the first step uses `factor(0)`. It is 1 for schedules that follow
    /// evaluations.
    pub fn factor(&self, step: u64) -> f64 {
        let (s, warmup, total) = (step as f64, self.warmup as f64, self.total as f64);
        match self.scheduler {
            SchedulerType::Constant | SchedulerType::ReduceLrOnPlateau | SchedulerType::Greedy => {
                return 1.;
            }
            SchedulerType::CosineWarmupWithMinLr => return self.raised_cosine(s),
            SchedulerType::WarmupStableDecay => return self.stable(s),
            _ => {}
        }
        if step < self.warmup {
            return s / warmup.max(1.);
        }
        let progress = (s - warmup) / (total - warmup).max(1.);
        match self.scheduler {
            SchedulerType::Cosine => self.cosine(progress).max(0.),
            SchedulerType::CosineWithMinLr => {
                let least = self.min_lr_rate();
                (self.cosine(progress) * (1. - least) + least).max(0.)
            }
            SchedulerType::CosineWithRestarts => {
                if progress >= 1. {
                    return 0.;
                }
                let cycle = (self.kwargs.num_cycles.unwrap_or(1.) * progress) % 1.;
                (0.5 * (1. + (std::f64::consts::PI * cycle).cos())).max(0.)
            }
            SchedulerType::Linear => ((total - s) / (total - warmup).max(1.)).max(0.),
            SchedulerType::Polynomial => {
                let (first, last) = (self.learning_rate, self.lr_end());
                let left = if step > self.total { 0. } else { 1. - progress };
                let power = self.kwargs.power.unwrap_or(1.);
                ((first - last) * left.powf(power) + last) / first
            }
            SchedulerType::InverseSqrt => {
                // In transformers the time scale is the warm-up, or 10,000 steps without one.
                let default = if self.warmup == 0 { 10_000. } else { warmup };
                let scale = self.kwargs.timescale.map_or(default, |scale| scale as f64);
                let shift = scale - warmup;
                1. / ((s + shift) / scale).sqrt()
            }
            _ => 1.,
        }
    }

    /// Half a wave, or `num_cycles` waves, from 1.
    fn cosine(&self, progress: f64) -> f64 {
        let cycles = self.kwargs.num_cycles.unwrap_or(0.5);
        0.5 * (1. + (std::f64::consts::PI * cycles * 2. * progress).cos())
    }

    /// The learning rate at the end of a polynomial decay.
    pub(super) fn lr_end(&self) -> f64 {
        self.kwargs.lr_end.unwrap_or(1e-7)
    }

    /// The factor of the lowest learning rate.
    fn min_lr_rate(&self) -> f64 {
        let lowest = self.kwargs.min_lr.map(|rate| rate / self.learning_rate);
        lowest.or(self.kwargs.min_lr_rate).unwrap_or(0.)
    }

    fn raised_cosine(&self, step: f64) -> f64 {
        let (warmup, total) = (self.warmup as f64, self.total as f64);
        if step < warmup {
            return match self.kwargs.warmup_lr_rate {
                None => (step + 1.) / warmup.max(1.),
                Some(first) => first + (1. - first) * step / (warmup - 1.).max(1.),
            };
        }
        let progress = (step - warmup + 1.) / (total - warmup).max(1.);
        let least = self.min_lr_rate();
        (self.cosine(progress) * (1. - least) + least).max(0.)
    }

    fn stable(&self, step: f64) -> f64 {
        let (warmup, total) = (self.warmup as f64, self.total as f64);
        let least = self.kwargs.min_lr_ratio.unwrap_or(0.);
        let above = |factor: f64| (factor * (1. - least) + least).max(0.);
        if step < warmup {
            let progress = step / warmup.max(1.);
            return above(match self.kwargs.warmup_type.unwrap_or(Ramp::Linear) {
                Ramp::Linear => progress,
                Ramp::Cosine => 0.5 * (1. - (std::f64::consts::PI * progress).cos()),
                Ramp::OneMinusSqrt => 1. - (1. - progress).sqrt(),
            });
        }
        let decay = self.kwargs.num_decay_steps.unwrap_or(0) as f64;
        let stable = self.kwargs.num_stable_steps;
        let stable = stable.map_or(total - warmup - decay, |steps| steps as f64);
        if step < warmup + stable {
            return 1.;
        }
        if step >= warmup + stable + decay {
            return least;
        }
        let progress = (step - warmup - stable) / decay.max(1.);
        above(match self.kwargs.decay_type.unwrap_or(Ramp::Cosine) {
            Ramp::Linear => 1. - progress,
            Ramp::Cosine => self.cosine(progress),
            Ramp::OneMinusSqrt => 1. - progress.sqrt(),
        })
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
                kwargs: SchedulerKwargs::default(),
                learning_rate: 1.,
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
        assert_eq!(golden.len(), 48);
        let mut largest = 0f64;
        for case in golden {
            let scheduler: SchedulerType = serde_json::from_value(case["kind"].clone()).unwrap();
            let kwargs: SchedulerKwargs = serde_json::from_value(case["kwargs"].clone()).unwrap();
            assert_eq!(kwargs.mistake(scheduler), None, "{case}");
            let number = |name: &str| case[name].as_u64().unwrap();
            let (warmup, total) = (number("warmup"), number("total"));
            let schedule = Schedule {
                scheduler,
                kwargs,
                learning_rate: case["learning_rate"].as_f64().unwrap(),
                warmup,
                total,
            };
            let factors = case["factors"].as_array().unwrap();
            assert_eq!(factors.len() as u64, total + 1);
            for (step, factor) in (0..).zip(factors) {
                let far = (schedule.factor(step) - factor.as_f64().unwrap()).abs();
                assert!(
                    far < 1e-7,
                    "{scheduler:?} {kwargs:?} warmup {warmup} step {step}: {far}"
                );
                largest = largest.max(far);
            }
        }
        println!("| schedules | the others, with settings | {largest:.1e} | | 1e-7 |");
    }

    #[test]
    fn settings_of_other_schedules_are_mistakes() {
        let kwargs = |json: serde_json::Value| serde_json::from_value::<SchedulerKwargs>(json);
        let power = kwargs(serde_json::json!({"power": 2})).unwrap();
        assert_eq!(power.mistake(SchedulerType::Polynomial), None);
        let told = power.mistake(SchedulerType::Cosine).unwrap();
        assert!(
            told.contains("`power`") && told.contains("`num_cycles`"),
            "{told}"
        );
        let told = power.mistake(SchedulerType::Linear).unwrap();
        assert!(told.contains("takes no settings"), "{told}");
        let none = SchedulerKwargs::default();
        let needs = none.mistake(SchedulerType::WarmupStableDecay).unwrap();
        assert!(needs.contains("`num_decay_steps`"), "{needs}");
        let both = kwargs(serde_json::json!({"min_lr": 1e-6, "min_lr_rate": 0.1})).unwrap();
        for kwargs in [none, both] {
            let told = kwargs.mistake(SchedulerType::CosineWithMinLr).unwrap();
            assert!(told.contains("one of `min_lr` and `min_lr_rate`"), "{told}");
        }
        assert!(kwargs(serde_json::json!({"cycles": 2})).is_err());
    }

    #[test]
    fn restarts_begin_at_the_top_again() {
        let schedule = Schedule {
            scheduler: SchedulerType::CosineWithRestarts,
            kwargs: SchedulerKwargs {
                num_cycles: Some(2.),
                ..SchedulerKwargs::default()
            },
            learning_rate: 1.,
            warmup: 0,
            total: 20,
        };
        assert!((schedule.factor(10) - 1.).abs() < 1e-12);
        assert!((schedule.factor(15) - 0.5).abs() < 1e-12);
        assert!(schedule.factor(20).abs() < 1e-12);
    }
}
