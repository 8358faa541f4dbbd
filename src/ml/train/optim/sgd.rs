//! Stochastic gradient descent with momentum (Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning"), with
//! the order of operations of torch's `SGD`, whose weight decay is added to the gradient.

use super::{Rule, Slot, Step, Update};

/// The momentum of gradient descent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Momentum {
    /// The decay rate of the sum of gradients; 0 for no momentum.
    pub momentum: f64,
    /// What is left out of each gradient but the first one, from 0 to 1.
    pub dampening: f64,
    /// Whether the step looks ahead (Nesterov).
    pub nesterov: bool,
}

/// Gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sgd(pub(super) Momentum);

impl Rule for Sgd {
    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        let slot = (self.0.momentum > 0.).then(|| Slot {
            name: "momentum",
            signed: true,
            count: shape.iter().product(),
        });
        slot.into_iter().collect()
    }

    fn update(&self, step: Step, _: &[usize]) -> Update {
        let rate = step.learning_rate as f32;
        if self.0.momentum <= 0. {
            let keep = (1. - step.learning_rate * step.weight_decay) as f32;
            return Update::Elementwise(Box::new(move |p, g, _| {
                for (p, g) in p.iter_mut().zip(g) {
                    *p = *p * keep - rate * g;
                }
            }));
        }
        let decay = step.weight_decay as f32;
        let momentum = self.0.momentum as f32;
        let (keep, take) = if step.number == 1 {
            (0., 1.)
        } else {
            (momentum, (1. - self.0.dampening) as f32)
        };
        let nesterov = self.0.nesterov;
        Update::Elementwise(Box::new(move |p, g, slots| {
            let [sum] = slots else {
                unreachable!("momentum has one slot, not {}", slots.len())
            };
            for ((p, g), sum) in p.iter_mut().zip(g).zip(sum.iter_mut()) {
                let g = g + decay * *p;
                *sum = *sum * keep + g * take;
                *p -= rate * if nesterov { g + momentum * *sum } else { *sum };
            }
        }))
    }
}
