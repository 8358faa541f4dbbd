//! Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with the order of operations of bitsandbytes on the CPU: weight decay, step, mean.

use super::{Rule, Slot, Step, Update};

/// The constants of Lion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lion {
    /// The decay rate of the mean by whose sign a step goes, in [0, 1).
    pub(super) beta1: f64,
    /// The decay rate of the mean that is kept, in [0, 1).
    pub(super) beta2: f64,
}

impl Rule for Lion {
    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        vec![Slot {
            name: "m",
            signed: true,
            count: shape.iter().product(),
        }]
    }

    fn update(&self, step: Step, _: &[usize]) -> Update {
        let rate = step.learning_rate as f32;
        let keep = (1. - step.learning_rate * step.weight_decay) as f32;
        let (beta1, rest1) = (self.beta1 as f32, (1. - self.beta1) as f32);
        let (beta2, rest2) = (self.beta2 as f32, (1. - self.beta2) as f32);
        Update::Elementwise(Box::new(move |p, g, slots| {
            let [m] = slots else {
                unreachable!("Lion has one slot, not {}", slots.len())
            };
            for ((p, g), m) in p.iter_mut().zip(g).zip(m.iter_mut()) {
                let direction = *m * beta1 + g * rest1;
                // Unlike `signum`, 0 for 0; a NaN stays one, so that it is found.
                let sign = if direction == 0. {
                    0.
                } else {
                    direction.signum()
                };
                *p = *p * keep - rate * sign;
                *m = *m * beta2 + g * rest2;
            }
        }))
    }
}
