//! Stochastic gradient descent without momentum, with decoupled weight decay. Without weight decay it is torch's `SGD`.

use super::{Rule, Slot, Step, Update};

/// Gradient descent without momentum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sgd;

impl Rule for Sgd {
    fn slots(&self) -> &'static [Slot] {
        &[]
    }

    fn update(&self, step: Step) -> Update {
        let keep = (1. - step.learning_rate * step.weight_decay) as f32;
        let rate = step.learning_rate as f32;
        Box::new(move |p, g, _| {
            for (p, g) in p.iter_mut().zip(g) {
                *p = *p * keep - rate * g;
            }
        })
    }
}
