//! The collection of gradients during a backward pass.

use candle_core::Result;

use super::pool::Pool;
use crate::ml::model::linear::Weight;
use crate::ml::model::{CausalLm, Gradients};

/// Collects the gradients of a backward pass.
pub(super) struct Trainable<'a> {
    pub(super) model: &'a CausalLm,
    pub(super) pool: &'a Pool,
    pub(super) gradients: &'a mut Gradients,
}

impl Trainable<'_> {
    /// Adds a gradient if `weight` is trained. `make` is given zeros, as many as the weight has elements, and adds the gradient to them.
    pub(super) fn add(&mut self, weight: &Weight, make: impl FnOnce(&mut [f32])) -> Result<()> {
        if let Some(var) = weight.trained() {
            let mut values = vec![0.; var.elem_count()];
            make(&mut values);
            self.gradients.add_values(self.model, var, values)?;
        }
        Ok(())
    }
}
