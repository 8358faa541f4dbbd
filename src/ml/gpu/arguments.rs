//! The arguments of crate `kernels-gpu`, made of those of [`crate::ml::fused`].

use std::sync::Arc;

use candle_core::Result;
use pipeline_kernels::FloatType;
use pipeline_kernels_gpu as gpu;

use super::Gpu;
use super::copies::{Key, failed};
use crate::ml::fused::device::{Attention, Onto};
use crate::ml::fused::weights::TensorView;

/// Floats on the device; none before they are taken.
#[derive(Default)]
pub(in crate::ml) struct Floats(pub(super) Option<gpu::Buffer>);

/// Numbers of tokens and rows as the device has them.
pub(super) fn words<'a>(all: impl Iterator<Item = &'a usize>) -> Vec<u32> {
    all.map(|number| *number as u32).collect()
}

impl Gpu {
    /// The buffer of floats.
    pub(super) fn of<'b>(&'b self, x: &'b Floats) -> &'b gpu::Buffer {
        x.0.as_ref().unwrap_or(&self.none)
    }

    /// The same to be written.
    pub(super) fn of_mut<'b>(&self, x: &'b mut Floats) -> &'b mut gpu::Buffer {
        x.0.get_or_insert_with(|| self.device.take(0))
    }

    /// The dot product of each token of `x`, panels of as many features as there are weights, with these.
    pub(super) fn dots(&self, x: &gpu::Buffer, weights: &[f64]) -> Result<Vec<f32>> {
        let row: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
        let weight = gpu::Device::weight_in(self.device.take_with(&row), 1, row.len());
        let mut out = self.device.take(x.len() / row.len().max(1));
        self.device.product(gpu::Product {
            terms: vec![gpu::Term {
                weight: weight.matrix(),
                x,
            }],
            onto: gpu::Onto::Zero,
            bias: None,
            rounding: FloatType::F32,
            out: &mut out,
        });
        self.device.read(&out).map_err(failed)
    }

    /// The copy of a dense weight.
    pub(super) fn dense(&self, view: &TensorView<'_>) -> Result<Arc<gpu::Weight>> {
        let (key, shape) = (Key::Tensor(view.id), view.shape()?);
        let values = || view.values();
        self.copies().weight(&self.device, key, values, shape)
    }

    /// What factors of products are rounded to, if they are.
    pub(super) fn rounding(&self, rounds: bool) -> FloatType {
        if rounds { self.compute } else { FloatType::F32 }
    }

    /// What a product is added to.
    pub(super) fn onto<'b>(&'b self, onto: &Onto<'b, Self>) -> gpu::Onto<'b> {
        match onto {
            Onto::Zero => gpu::Onto::Zero,
            Onto::Out => gpu::Onto::Out,
            Onto::Values(values) => gpu::Onto::Values(self.of(values)),
        }
    }

    /// What an attention computes with.
    pub(super) fn inputs<'b>(&'b self, inputs: &Attention<'b, Self>) -> gpu::Attention<'b> {
        gpu::Attention {
            q: self.of(inputs.q),
            k: self.of(inputs.k),
            v: self.of(inputs.v),
            heads: inputs.heads,
            scores: inputs.scores,
            spans: inputs.spans,
        }
    }
}
