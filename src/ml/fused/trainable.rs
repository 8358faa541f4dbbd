//! Where gradients go.

use candle_core::Result;

use super::pool::Pool;
use crate::ml::model::linear::Weight;
use crate::ml::model::{Gradients, Llama};

/// Where gradients go.
pub(super) struct Trainable<'a> {
    pub(super) model: &'a Llama,
    pub(super) pool: &'a Pool,
    pub(super) gradients: &'a mut Gradients,
}

impl Trainable<'_> {
    /// Adds a gradient if the weight is trained; `make` adds it to zeros of the weight's size.
    pub(super) fn add(&mut self, weight: &Weight, make: impl FnOnce(&mut [f32])) -> Result<()> {
        if let Some(var) = weight.trained() {
            let mut values = vec![0.; var.elem_count()];
            make(&mut values);
            self.gradients.add_values(self.model, var, values)?;
        }
        Ok(())
    }
}
