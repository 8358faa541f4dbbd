//! Learning rates that follow a metric of the evaluations: torch's `ReduceLROnPlateau` (`torch/optim/lr_scheduler.py`) and transformers'
//! `GreedyLR` (`optimization.py`; arXiv 2512.14527, algorithm 1).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::schedule::{Direction, Schedule, SchedulerType, ThresholdMode};

/// The state of such a learning rate. Floats are kept as their bits, so that checkpoints round nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::ml) struct Adaptive {
    rate: u64,
    best: u64,
    /// Evaluations in a row without an improvement, and with one.
    bad: u64,
    good: u64,
    /// Evaluations that are not counted any more after the rate was lowered, and after it was raised.
    cooldown: u64,
    warmup: u64,
    /// How often the rate may still be found at its lowest before it is set back.
    reset: u64,
    window: VecDeque<u64>,
    sum: u64,
}

/// The default of `reset_start`.
const RESET: u64 = 500;

impl Adaptive {
    /// The state before the first evaluation; `None` for a schedule that follows the number of steps.
    pub(super) fn new(schedule: &Schedule) -> Option<Self> {
        if !schedule.scheduler.follows_evaluations() {
            return None;
        }
        Some(Self {
            rate: schedule.learning_rate.to_bits(),
            best: worst(schedule).to_bits(),
            bad: 0,
            good: 0,
            cooldown: 0,
            warmup: 0,
            reset: schedule.kwargs.reset_start.unwrap_or(RESET),
            window: VecDeque::new(),
            sum: 0f64.to_bits(),
        })
    }

    /// The learning rate.
    pub(super) fn rate(&self) -> f64 {
        f64::from_bits(self.rate)
    }

    /// Takes notice of an evaluation's metric.
    pub(super) fn follow(&mut self, schedule: &Schedule, metric: f64) {
        if schedule.scheduler == SchedulerType::Greedy {
            self.greedy(schedule, metric);
        } else {
            self.plateau(schedule, metric);
        }
    }

    fn improves(&self, schedule: &Schedule, metric: f64) -> bool {
        let kwargs = &schedule.kwargs;
        let (threshold, mode) = match schedule.scheduler {
            SchedulerType::Greedy => (1e-6, ThresholdMode::Abs),
            _ => (1e-4, ThresholdMode::Rel),
        };
        let threshold = kwargs.threshold.unwrap_or(threshold);
        let best = f64::from_bits(self.best);
        let mode = kwargs.threshold_mode.unwrap_or(mode);
        match (kwargs.mode.unwrap_or_default(), mode) {
            (Direction::Min, ThresholdMode::Rel) => metric < best * (1. - threshold),
            (Direction::Min, ThresholdMode::Abs) => metric < best - threshold,
            (Direction::Max, ThresholdMode::Rel) => metric > best * (1. + threshold),
            (Direction::Max, ThresholdMode::Abs) => metric > best + threshold,
        }
    }

    fn plateau(&mut self, schedule: &Schedule, metric: f64) {
        let kwargs = &schedule.kwargs;
        if self.improves(schedule, metric) {
            (self.best, self.bad) = (metric.to_bits(), 0);
        } else {
            self.bad += 1;
        }
        if self.cooldown > 0 {
            self.cooldown -= 1;
            self.bad = 0;
        }
        if self.bad > kwargs.patience.unwrap_or(10) {
            self.lower(
                schedule,
                kwargs.factor.unwrap_or(0.1),
                kwargs.min_lr.unwrap_or(0.),
            );
            self.cooldown = kwargs.cooldown.unwrap_or(0);
            self.bad = 0;
        }
    }

    fn lower(&mut self, schedule: &Schedule, factor: f64, lowest: f64) {
        let old = self.rate();
        let new = (old * factor).max(lowest);
        if old - new > schedule.kwargs.eps.unwrap_or(1e-8) {
            self.rate = new.to_bits();
        }
    }

    fn greedy(&mut self, schedule: &Schedule, metric: f64) {
        let kwargs = &schedule.kwargs;
        let metric = if kwargs.smooth.unwrap_or(false) {
            self.smoothed(metric, kwargs.window_size.unwrap_or(50))
        } else {
            metric
        };
        if self.cooldown > 0 || self.warmup > 0 {
            let waiting = if self.cooldown > 0 {
                &mut self.cooldown
            } else {
                &mut self.warmup
            };
            *waiting -= 1;
            (self.bad, self.good) = (0, 0);
            return;
        }
        if self.improves(schedule, metric) {
            self.best = metric.to_bits();
            (self.bad, self.good) = (0, self.good + 1);
        } else {
            (self.bad, self.good) = (self.bad + 1, 0);
        }
        let patience = kwargs.patience.unwrap_or(10);
        let factor = kwargs.factor.unwrap_or(0.95);
        if self.good > patience {
            let old = self.rate();
            let new = (old / factor).min(kwargs.max_lr.unwrap_or(1.));
            if new - old > kwargs.eps.unwrap_or(1e-8) {
                self.rate = new.to_bits();
            }
            self.reset = kwargs.reset_start.unwrap_or(RESET);
            self.warmup = kwargs.warmup.unwrap_or(0);
            self.good = 0;
        } else if self.bad > patience {
            let lowest = kwargs.min_lr.unwrap_or(1e-3);
            self.lower(schedule, factor, lowest);
            // As in transformers, what is begun anew here is then counted on: the cooldown holds after it, too.
            if self.rate() <= lowest {
                self.reset = self.reset.saturating_sub(1);
                if self.reset == 0 {
                    *self = Self::new(schedule).unwrap_or_else(|| self.clone());
                }
            }
            self.cooldown = kwargs.cooldown.unwrap_or(0);
            self.bad = 0;
        }
    }

    /// The mean of the last metrics.
    fn smoothed(&mut self, metric: f64, window: u64) -> f64 {
        self.window.push_back(metric.to_bits());
        let mut sum = f64::from_bits(self.sum) + metric;
        if self.window.len() as u64 > window
            && let Some(first) = self.window.pop_front()
        {
            sum -= f64::from_bits(first);
        }
        self.sum = sum.to_bits();
        sum / self.window.len() as f64
    }
}

/// A value that every other improves on.
fn worst(schedule: &Schedule) -> f64 {
    match schedule.kwargs.mode.unwrap_or_default() {
        Direction::Min => f64::INFINITY,
        Direction::Max => f64::NEG_INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::testing::golden_compare::json;
    use crate::ml::train::schedule::SchedulerKwargs;

    #[test]
    fn rates_are_those_of_torch_and_transformers() {
        let golden = json("lr_adaptive.json");
        let cases = golden.as_array().unwrap();
        assert_eq!(cases.len(), 9);
        for case in cases {
            let kwargs: SchedulerKwargs = serde_json::from_value(case["kwargs"].clone()).unwrap();
            let schedule = Schedule {
                scheduler: serde_json::from_value(case["kind"].clone()).unwrap(),
                kwargs,
                learning_rate: case["learning_rate"].as_f64().unwrap(),
                warmup: 0,
                total: 1,
            };
            assert_eq!(kwargs.mistake(schedule.scheduler), None);
            let mut adaptive = Adaptive::new(&schedule).unwrap();
            let metrics = case["metrics"].as_array().unwrap();
            let rates = case["rates"].as_array().unwrap();
            assert_eq!(metrics.len(), rates.len());
            for (number, (metric, rate)) in metrics.iter().zip(rates).enumerate() {
                // A state that went through a checkpoint goes on as if nothing had been.
                let saved = serde_json::to_string(&adaptive).unwrap();
                adaptive = serde_json::from_str(&saved).unwrap();
                adaptive.follow(&schedule, metric.as_f64().unwrap());
                let (ours, theirs) = (adaptive.rate(), rate.as_f64().unwrap());
                let far = (ours - theirs).abs();
                assert!(
                    far <= 1e-15 * theirs,
                    "{kwargs:?}, evaluation {number}: {ours} {theirs}"
                );
            }
        }
    }

    #[test]
    fn schedules_by_steps_have_none() {
        let schedule = Schedule {
            scheduler: SchedulerType::Cosine,
            kwargs: SchedulerKwargs::default(),
            learning_rate: 1.,
            warmup: 0,
            total: 1,
        };
        assert_eq!(Adaptive::new(&schedule), None);
    }
}
