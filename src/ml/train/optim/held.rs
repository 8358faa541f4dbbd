//! An optimiser whose state is in the memory of a device ([`Resident`]).

use crate::ml::model::Parameter;
use crate::ml::resident::{AdamWStep, Resident, TrainedTensor, TrainedValues};

use super::slots::{State, Values};
use super::{Optimizer, Step};
use candle_core::{Result, Tensor, bail};

/// The state on the device, and what the host knows of it.
pub(super) struct Held {
    resident: Box<dyn Resident>,
    /// The group of each parameter; a group has one learning rate and one weight decay.
    groups: Vec<usize>,
    /// The factor of the gradients of this step.
    grad_factor: f64,
    /// Whether the device has made steps since its values were copied back.
    is_ahead: bool,
}

impl Optimizer {
    /// Numbers the parameters that have the same learning rate and weight decay.
    fn groups(&self, parameters: &[Parameter]) -> Vec<usize> {
        let mut known = Vec::new();
        let group = |parameter: &Parameter| {
            let step = self.step_of(parameter, 1.);
            let key = (step.learning_rate.to_bits(), step.weight_decay.to_bits());
            known
                .iter()
                .position(|other| *other == key)
                .unwrap_or_else(|| {
                    known.push(key);
                    known.len() - 1
                })
        };
        parameters.iter().map(group).collect()
    }

    /// Has `hold` take parameters and moments to a device, if it has kernels for this optimiser: from then on steps are made there, by the
    /// gradients that are there, until [`Optimizer::release`]. Nothing changes where `hold` does not take them.
    ///
    /// # Errors
    /// Those of `hold`.
    pub fn hold(
        &mut self,
        parameters: &[Parameter],
        hold: impl FnOnce(&[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>>,
    ) -> Result<()> {
        let groups = self.groups(parameters);
        let own = parameters.iter().zip(&self.states).zip(&groups);
        let tensors = own.map(|((parameter, state), &group)| {
            self.rule.adamw(self.step_of(parameter, 1.))?;
            let [first, second] = state.0.as_slice() else {
                return None;
            };
            Some(TrainedTensor {
                var: &parameter.var,
                group,
                first: first.moment(),
                second: second.moment(),
            })
        });
        if let Some(tensors) = tensors.collect::<Option<Vec<_>>>()
            && !tensors.is_empty()
            && let Some(resident) = hold(&tensors)?
        {
            self.held = Some(Held {
                resident,
                groups,
                grad_factor: 1.,
                is_ahead: false,
            });
        }
        Ok(())
    }

    /// Whether parameters and moments are on a device, and gradients with them.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// The norm of the gradients on the device times `factor`. The next step multiplies them by it, and by what makes their norm at most
    /// `limit`, as [`super::clip`] does. 0 if nothing is on a device.
    ///
    /// # Errors
    /// The device failed.
    pub fn held_norm(&mut self, factor: f64, limit: f64) -> Result<f64> {
        let Some(held) = &mut self.held else {
            return Ok(0.);
        };
        let norm = held.resident.squared_norm()?.sqrt() * factor;
        let clip = limit / (norm + 1e-6);
        let is_clipped = limit > 0. && clip < 1.;
        held.grad_factor = if is_clipped { factor * clip } else { factor };
        Ok(norm)
    }

    /// Forgets the gradients on the device without a step.
    pub fn clear_held_gradients(&mut self) {
        if let Some(held) = &mut self.held {
            held.resident.clear_gradients();
        }
    }

    /// A step on the device, if the state is there.
    pub(super) fn step_held(&mut self, parameters: &[Parameter], learning_rate: f64) -> bool {
        let Some(mut held) = self.held.take() else {
            return false;
        };
        let groups = held.groups.iter().max().map_or(0, |last| last + 1);
        let step = |group: usize| -> Option<AdamWStep> {
            let member = held.groups.iter().position(|of| *of == group)?;
            let parameter = parameters.get(member)?;
            self.rule.adamw(Step {
                number: self.steps,
                ..self.step_of(parameter, learning_rate)
            })
        };
        let steps: Vec<AdamWStep> = (0..groups).filter_map(step).collect();
        held.resident.step(held.grad_factor as f32, &steps);
        held.is_ahead = true;
        self.held = Some(held);
        true
    }

    /// Copies parameters and moments back from the device, if they are there and have changed.
    ///
    /// # Errors
    /// The device failed; then nothing is changed.
    pub fn copy_back(&mut self, parameters: &[Parameter]) -> Result<()> {
        let Some(held) = self.held.as_mut().filter(|held| held.is_ahead) else {
            return Ok(());
        };
        let all = held.resident.read()?;
        if all.len() != parameters.len() {
            bail!(
                "a device gave {} of {} tensors",
                all.len(),
                parameters.len()
            )
        }
        held.is_ahead = false;
        let own = parameters.iter().zip(&mut self.states);
        for ((parameter, state), read) in own.zip(all) {
            let TrainedValues {
                values,
                first,
                second,
            } = read;
            let var = &parameter.var;
            var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
            *state = State(vec![
                Values::of_moment(first, true),
                Values::of_moment(second, false),
            ]);
        }
        Ok(())
    }

    /// The same, after which the host makes the steps again.
    ///
    /// # Errors
    /// Those of [`Optimizer::copy_back`].
    pub fn release(&mut self, parameters: &[Parameter]) -> Result<()> {
        self.copy_back(parameters)?;
        self.held = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
