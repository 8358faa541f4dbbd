//! A training's state in the memory of a device: trained tensors, the sums of their gradients and `AdamW`'s moments, which stay there from
//! step to step.
//!
//! [`super::backend::Backend::hold`] makes one, [`super::train`] steps it, and what needs the values on the host (a checkpoint, the result of
//! the training) has them copied back.

use candle_core::{Result, Var};

/// The numbers of a step of `AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// The decay rate of the first moment.
    pub beta1: f32,
    /// The decay rate of the second moment.
    pub beta2: f32,
    /// The factor by which weight decay multiplies a parameter.
    pub keep: f32,
    /// The learning rate divided by the bias correction of the first moment.
    pub step_size: f32,
    /// The square root of the bias correction of the second moment.
    pub root: f32,
    /// The number that is added to the square root of the second moment.
    pub epsilon: f32,
}

/// A moment of a trained tensor: a value for each of its elements, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Moment<F, C> {
    /// The values, in f32.
    Full(F),
    /// In 8 bits: the codes of the values, and the largest magnitude of each 256 of them.
    Eight(C, F),
}

/// A moment that is borrowed.
pub type MomentRef<'a> = Moment<&'a [f32], &'a [u8]>;

/// A moment that was copied.
pub type MomentValues = Moment<Vec<f32>, Vec<u8>>;

/// A trained tensor and its moments.
#[derive(Debug, Clone)]
pub struct TrainedTensor<'a> {
    /// The tensor, in f32.
    pub var: &'a Var,
    /// The number of the tensors that are stepped with the same [`AdamWStep`].
    pub group: usize,
    /// The first moment, whose codes are those of the signed table of [`super::quant::dynamic_map`].
    pub first: MomentRef<'a>,
    /// The second moment, whose codes are those of the unsigned table.
    pub second: MomentRef<'a>,
}

/// What is copied back of a trained tensor: its values and its moments, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainedValues {
    /// The values.
    pub values: Vec<f32>,
    /// The first moment, in the form in which it was given.
    pub first: MomentValues,
    /// The second moment.
    pub second: MomentValues,
}

/// A training's state in the memory of a device. Backward passes add to the gradients there.
pub trait Resident: Send + Sync {
    /// The sum of the squares of all gradients.
    ///
    /// # Errors
    /// The device failed since it was last asked for something.
    fn squared_norm(&self) -> Result<f64>;

    /// One step of all tensors: gradients are multiplied by `grad_factor`, and set to zero afterwards. `steps` has the numbers of each group.
    fn step(&mut self, grad_factor: f32, steps: &[AdamWStep]);

    /// Sets all gradients to zero.
    fn clear_gradients(&mut self);

    /// Copies all tensors and moments to the host, in the order in which they were given.
    ///
    /// # Errors
    /// The device failed since it was last asked for something.
    fn read(&self) -> Result<Vec<TrainedValues>>;
}
