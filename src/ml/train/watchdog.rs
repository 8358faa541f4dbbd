//! The watchdog of a training: notices that nothing is learnt any more, or that the training falls apart, while it runs.
//!
//! It judges the numbers of each step, over windows that are long enough for single odd micro-batches to be no reason. What is not finite
//! stops a training anyway ([`super::fault`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// When a training is stopped for its loss: axolotl's `loss_watchdog_threshold` and `loss_watchdog_patience`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossLimit {
    /// The highest loss that is no violation.
    pub threshold: f64,
    /// How many violations in a row stop the training.
    pub patience: u64,
}

/// Steps over which values are compared.
const WINDOW: usize = 10;
/// Steps in which a loss that does not change at all is no accident.
const STILL: usize = 20;
/// A mean loss so many times the first one has exploded.
const LOSS_GROWTH: f64 = 2.;
/// A mean gradient norm so many times the first one has exploded.
const NORM_GROWTH: f64 = 100.;
/// A learning rate below this part of the highest one moves nothing, and is no sign of anything.
const LEAST_RATE: f64 = 1e-3;

/// What a training suffers from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    GradientIsZero,
    LossIsZero,
    LossIsStill,
    LossExplodes,
    NormExplodes,
}

/// Something to tell about a training that goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Alarm {
    kind: Kind,
    /// The step at which it was noticed.
    step: u64,
    loss: f64,
    /// The mean over the first steps, of what has exploded.
    first: f64,
    /// The mean over the last steps.
    last: f64,
    /// Whether it has been so from the first step.
    always: bool,
    learning_rate: f64,
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            step,
            loss,
            first,
            last,
            always,
            learning_rate,
        } = self;
        match kind {
            Kind::GradientIsZero if *always => write!(
                f,
                "the gradient has been 0 from the first step to step {step}, so that nothing is learnt (loss {loss:.4}); hint: see by \
                 `pipeline preview` whether any token is trained and whether both answers differ"
            ),
            Kind::GradientIsZero => write!(
                f,
                "the gradient has been 0 for {WINDOW} steps up to step {step}, so that nothing is learnt any more (loss {loss:.4}): the \
                 weights have probably gone too far; hint: try a lower `learning_rate` (now {learning_rate:e}) and `warmup_ratio: 0.1`"
            ),
            Kind::LossIsZero => write!(
                f,
                "the loss has been 0 for {WINDOW} steps up to step {step}: there is nothing left to learn; hint: fewer epochs, and see by \
                 `pipeline preview` whether the answers are what is to be learnt"
            ),
            Kind::LossIsStill => write!(
                f,
                "the loss has not moved for {STILL} steps up to step {step} (it is {loss:.4}); hint: try another `learning_rate` (now \
                 {learning_rate:e}), lower if the loss was better before and else higher"
            ),
            Kind::LossExplodes => write!(
                f,
                "the loss explodes: {last:.3} in the mean of the last {WINDOW} steps up to step {step}, and {first:.3} in that of the \
                 first; hint: try a lower `learning_rate` (now {learning_rate:e}), `warmup_ratio: 0.1` and a `max_grad_norm` of 1 or less"
            ),
            Kind::NormExplodes => write!(
                f,
                "the gradient explodes: its norm is {last:.3e} in the mean of the last {WINDOW} steps up to step {step}, and {first:.3e} \
                 in that of the first; hint: try a lower `learning_rate` (now {learning_rate:e}), `warmup_ratio: 0.1` and a \
                 `max_grad_norm` of 1 or less"
            ),
        }
    }
}

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    loss: f64,
    grad_norm: f64,
}

/// Watches over the steps of a training.
#[derive(Debug)]
pub(super) struct Watchdog {
    limit: Option<LossLimit>,
    highest_rate: f64,
    first: Vec<Numbers>,
    last: VecDeque<Numbers>,
    /// How many steps in a row the gradient, and the loss, has been 0, and the loss above the limit.
    zero_gradients: u64,
    zero_losses: u64,
    violations: u64,
    told: BTreeSet<Kind>,
}

impl Watchdog {
    /// A watchdog of a training whose learning rate is at most `highest_rate`.
    pub(super) fn new(limit: Option<LossLimit>, highest_rate: f64) -> Self {
        Self {
            limit,
            highest_rate,
            first: Vec::new(),
            last: VecDeque::new(),
            zero_gradients: 0,
            zero_losses: 0,
            violations: 0,
            told: BTreeSet::new(),
        }
    }

    /// Forgets violations of the limit: who goes on after a stop has read why, and gives it another try.
    pub(super) fn forgive(&mut self) {
        self.violations = 0;
    }

    /// Takes in the numbers of a step by TRL's names, and gives what there is to tell. Each kind of alarm is given once.
    pub(super) fn step(&mut self, step: u64, values: &BTreeMap<String, f64>) -> Option<Alarm> {
        let value = |name: &str| values.get(name).copied();
        let (loss, grad_norm) = (value("loss")?, value("grad_norm")?);
        let learning_rate = value("learning_rate").unwrap_or(0.);
        if !loss.is_finite() || !grad_norm.is_finite() {
            return None;
        }
        let count = |count: &mut u64, holds: bool| *count = if holds { *count + 1 } else { 0 };
        count(&mut self.zero_gradients, grad_norm == 0.);
        count(&mut self.zero_losses, loss == 0.);
        let limit = self.limit;
        count(
            &mut self.violations,
            limit.is_some_and(|limit| loss > limit.threshold),
        );
        let numbers = Numbers { loss, grad_norm };
        if self.first.len() < WINDOW {
            self.first.push(numbers);
        }
        self.last.push_back(numbers);
        if self.last.len() > STILL {
            self.last.pop_front();
        }
        let kind = self.judge(learning_rate)?;
        if !self.told.insert(kind) {
            return None;
        }
        let of = |numbers: &Numbers| match kind {
            Kind::NormExplodes => numbers.grad_norm,
            _ => numbers.loss,
        };
        let (first, last) = self.means(of);
        Some(Alarm {
            kind,
            step,
            loss,
            first,
            last,
            always: self.zero_gradients >= step,
            learning_rate,
        })
    }

    /// What is wrong now, the plainest first.
    fn judge(&self, learning_rate: f64) -> Option<Kind> {
        if self.zero_losses >= WINDOW as u64 {
            return Some(Kind::LossIsZero);
        }
        if self.zero_gradients >= WINDOW as u64 {
            return Some(Kind::GradientIsZero);
        }
        if self.first.len() < WINDOW || self.last.len() < STILL {
            return None;
        }
        let loss = |numbers: &Numbers| numbers.loss;
        let losses = || self.last.iter().map(loss);
        let (lowest, highest) = (
            losses().fold(f64::INFINITY, f64::min),
            losses().fold(f64::NEG_INFINITY, f64::max),
        );
        let moves = learning_rate > LEAST_RATE * self.highest_rate;
        if moves && highest - lowest <= 1e-6 * highest.abs() {
            return Some(Kind::LossIsStill);
        }
        let (first, last) = self.means(loss);
        if first > 0. && last > LOSS_GROWTH * first {
            return Some(Kind::LossExplodes);
        }
        let (first, last) = self.means(|numbers| numbers.grad_norm);
        (first > 0. && last > NORM_GROWTH * first).then_some(Kind::NormExplodes)
    }

    /// The mean of a number over the first steps, and over the last ones.
    fn means(&self, of: impl Fn(&Numbers) -> f64) -> (f64, f64) {
        let mean = |numbers: &mut dyn Iterator<Item = &Numbers>| {
            let (count, sum) = numbers.fold((0, 0.), |(count, sum), n| (count + 1, sum + of(n)));
            sum / f64::from(count.max(1))
        };
        (
            mean(&mut self.first.iter()),
            mean(&mut self.last.iter().rev().take(WINDOW)),
        )
    }

    /// Why the training has to stop now, if it has to.
    pub(super) fn stop(&self) -> Option<String> {
        let LossLimit {
            threshold,
            patience,
        } = self.limit?;
        (self.violations >= patience).then(|| {
            let loss = self.last.back().map_or(f64::NAN, |last| last.loss);
            format!(
                "the loss has been above `loss_watchdog_threshold` ({threshold}) for {patience} steps in a row (it is {loss:.4}); a \
                 checkpoint is kept; hint: try a lower `learning_rate`, or a higher threshold or `loss_watchdog_patience` to go on from \
                 there"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(loss: f64, grad_norm: f64) -> BTreeMap<String, f64> {
        BTreeMap::from([
            ("loss".to_owned(), loss),
            ("grad_norm".to_owned(), grad_norm),
            ("learning_rate".to_owned(), 1e-4),
        ])
    }

    /// The kinds of alarm in a training with these losses and norms, and the steps at which they were given.
    fn alarms(numbers: impl IntoIterator<Item = (f64, f64)>) -> Vec<(Kind, u64)> {
        let mut watchdog = Watchdog::new(None, 1e-4);
        let alarms = (1..).zip(numbers);
        let alarms = alarms.filter_map(|(step, (loss, norm))| {
            let alarm = watchdog.step(step, &values(loss, norm))?;
            assert!(alarm.to_string().contains("hint: "));
            Some((alarm.kind, alarm.step))
        });
        alarms.collect()
    }

    #[test]
    fn a_training_that_learns_is_left_alone() {
        let noise = |step: u64| 1. + 0.3 * (step as f64 * 1.7).sin();
        let falls = (0..500).map(|step| {
            let noise = noise(step);
            (3. * (-0.01 * step as f64).exp() * noise, noise)
        });
        assert_eq!(alarms(falls), []);
        // A loss that came near 0, and rises by much of that.
        let over_fitted = (0..200).map(|step| {
            let loss = if step < 150 { 0.69 } else { 0.003 };
            (
                (loss - 0.003 * step as f64).max(0.001) * noise(step),
                noise(step),
            )
        });
        assert_eq!(alarms(over_fitted), []);
        // A few micro-batches without a gradient.
        let masked = (0..100).map(|step| (2. * noise(step), if step % 10 < 9 { 0. } else { 1. }));
        assert_eq!(alarms(masked), []);
    }

    #[test]
    fn each_way_to_fall_apart_is_told_once_and_soon() {
        let learns = (0..30).map(|step| (2. - 0.01 * f64::from(step), 1.));
        let then = |loss: f64, norm: f64| {
            let moves = move |step: i32| (loss * (1. + 0.01 * f64::from(step % 3)), norm);
            learns.clone().chain((0..300).map(moves))
        };
        let both = alarms(then(11., 0.));
        let kinds: Vec<Kind> = both.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::LossExplodes, Kind::GradientIsZero]);
        assert!(
            both.iter().all(|(_, step)| (31..=40).contains(step)),
            "{both:?}"
        );
        assert_eq!(alarms(then(0., 0.)), [(Kind::LossIsZero, 40)]);
        assert_eq!(alarms(then(11., 1.))[0].0, Kind::LossExplodes);
        assert_eq!(alarms(then(1.7, 1e4))[0].0, Kind::NormExplodes);
        let still = learns.chain((0..100).map(|_| (1.7, 1.)));
        assert_eq!(alarms(still), [(Kind::LossIsStill, 50)]);
        let never = (0..100).map(|step| (2. + 0.01 * f64::from(step % 3), 0.));
        assert_eq!(alarms(never), [(Kind::GradientIsZero, 10)]);
    }

    #[test]
    fn a_limit_stops_after_its_patience_and_a_training_that_goes_on_has_it_anew() {
        let limit = LossLimit {
            threshold: 5.,
            patience: 3,
        };
        let mut watchdog = Watchdog::new(Some(limit), 1e-4);
        let losses = [6., 6., 4., 6., 6., 6.];
        let stops = (1..).zip(losses).map(|(step, loss)| {
            watchdog.step(step, &values(loss, 1.));
            watchdog.stop().is_some()
        });
        let stops: Vec<bool> = stops.collect();
        assert_eq!(stops, [false, false, false, false, false, true]);
        watchdog.forgive();
        assert_eq!(watchdog.stop(), None);
        watchdog.step(7, &values(6., 1.));
        assert_eq!(watchdog.stop(), None);
    }
}
