//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), with the order of operations of torch's `AdamW` and of
//! bitsandbytes' on the CPU: weight decay, moments, step.

use super::{Rule, Slot, Step, Update};
use crate::ml::resident::AdamWStep;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct AdamW {
    /// The decay rate of the first moment, in [0, 1).
    pub(super) beta1: f64,
    /// The decay rate of the second moment, in [0, 1).
    pub(super) beta2: f64,
    /// The number that is added to the square root of the second moment, so that the quotient stays finite.
    pub(super) epsilon: f64,
}

/// Changes a value and its moments by its gradient.
fn apply(step: AdamWStep, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
    *p *= step.keep;
    *m += (g - *m) * (1. - step.beta1);
    *v = *v * step.beta2 + g * g * (1. - step.beta2);
    *p -= step.step_size * *m / (v.sqrt() / step.root + step.epsilon);
}

impl AdamW {
    fn numbers(self, step: Step) -> AdamWStep {
        let number = step.number as f64;
        let correction1 = 1. - self.beta1.powf(number);
        let correction2 = 1. - self.beta2.powf(number);
        AdamWStep {
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            keep: (1. - step.learning_rate * step.weight_decay) as f32,
            step_size: (step.learning_rate / correction1) as f32,
            root: correction2.sqrt() as f32,
            epsilon: self.epsilon as f32,
        }
    }
}

impl Rule for AdamW {
    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        let count = shape.iter().product();
        let slot = |name, signed| Slot {
            name,
            signed,
            count,
        };
        vec![slot("m", true), slot("v", false)]
    }

    fn update(&self, step: Step, _: &[usize]) -> Update {
        let numbers = self.numbers(step);
        Update::Elementwise(Box::new(move |p, g, slots| {
            let [m, v] = slots else {
                unreachable!("AdamW has two slots, not {}", slots.len())
            };
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
                apply(numbers, p, *g, m, v);
            }
        }))
    }

    fn adamw(&self, step: Step) -> Option<AdamWStep> {
        Some(self.numbers(step))
    }
}
