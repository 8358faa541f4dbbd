//! The collection of gradients during a backward pass.

use candle_core::{Result, Var};

use super::device::Device;
use crate::ml::model::linear::Weight;
use crate::ml::model::{CausalLm, Gradients};

/// Collects the gradients of a backward pass.
pub(super) struct Trainable<'a, D: Device> {
    model: &'a CausalLm,
    pub(super) device: &'a D,
    gradients: &'a mut Gradients,
    /// Gradients that are still in the device's memory, where that is not the host's.
    pending: Vec<(Var, D::Buffer)>,
}

impl<'a, D: Device> Trainable<'a, D> {
    pub(super) fn new(model: &'a CausalLm, device: &'a D, gradients: &'a mut Gradients) -> Self {
        Self {
            model,
            device,
            gradients,
            pending: Vec::new(),
        }
    }

    /// Adds a gradient if `weight` is trained. `make` is given as many floats as the weight has elements, and adds the gradient to them: zeros,
    /// or the sum that the device holds.
    pub(super) fn add(
        &mut self,
        weight: &Weight,
        make: impl FnOnce(&D, &mut D::Buffer) -> Result<()>,
    ) -> Result<()> {
        if let Some(var) = weight.trained() {
            if let Some(mut sum) = self.device.held_gradient(var) {
                return make(self.device, &mut sum);
            }
            let mut sum = self.device.zeros(var.elem_count());
            make(self.device, &mut sum)?;
            self.pending.push((var.clone(), sum));
            if D::ON_HOST {
                self.finish()?;
            }
        }
        Ok(())
    }

    /// Adds what is still on the device. To be called once more at the end of the pass.
    pub(super) fn finish(&mut self) -> Result<()> {
        let (vars, sums): (Vec<Var>, Vec<D::Buffer>) = self.pending.drain(..).unzip();
        let all = self.device.take_values(sums)?;
        for (var, values) in vars.iter().zip(all) {
            self.gradients.add_values(self.model, var, values)?;
        }
        Ok(())
    }
}
