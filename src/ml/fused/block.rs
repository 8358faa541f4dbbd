//! The two ends of a block, which attention and feed-forward block share: the norm of its input, and the way in which its result joins the
//! hidden states.

use candle_core::Result;

use super::device::{Device, Onto};
use super::projection::ProjectionGroup;
use super::shape::PassContext;
use super::trainable::Trainable;
use super::weights::NormView;
use crate::ml::model::Norm;

/// What a norm was applied to.
pub(super) struct NormedValues<D: Device> {
    pub(super) values: D::Buffer,
    /// The norm's factors, panels with a feature for each head that is normed by itself, or one.
    pub(super) inverse: D::Buffer,
}

impl<D: Device> NormedValues<D> {
    pub(super) fn give_back(self, device: &D) {
        device.give_all([self.values, self.inverse]);
    }

    /// From the gradient `grad` with respect to the norm's result to that with respect to its argument, in a buffer of its own. The gradient
    /// with respect to the norm's weight goes to `trainable`.
    pub(super) fn backward(
        &self,
        grad: &D::Buffer,
        norm: &NormView<'_>,
        trained: Option<&Norm>,
        trainable: &mut Trainable<'_, D>,
    ) -> Result<D::Buffer> {
        if let Some(trained) = trained {
            trainable.add(&trained.weight, |device, sum| {
                device.rms_norm_grad_weight(&self.values, &self.inverse, grad, sum);
                Ok(())
            })?;
        }
        let device = trainable.device;
        let mut grad_values = device.take(device.length(&self.values));
        device.clear(&mut grad_values);
        let weight = device.vector(&norm.weight)?;
        device.rms_norm_backward(&self.values, weight, &self.inverse, grad, &mut grad_values);
        Ok(grad_values)
    }
}

/// Whether a factor changes nothing.
fn is_one(factor: f32) -> bool {
    factor.to_bits() == 1f32.to_bits()
}

/// The input of a block: `x` after the norm, if there is one. Then the result is in a buffer, and the norm's factors are returned too.
pub(super) fn norm_before<D: Device>(
    x: &D::Buffer,
    norm: Option<&NormView<'_>>,
    PassContext { shape, device, .. }: PassContext<'_, D>,
) -> Result<Option<(D::Buffer, D::Buffer)>> {
    let Some(norm) = norm else {
        return Ok(None);
    };
    let mut normed = device.take(device.length(x));
    let mut inverse = shape.take(device, 1);
    let weight = device.vector(&norm.weight)?;
    device.rms_norm(x, weight, norm.eps, &mut normed, &mut inverse);
    Ok(Some((normed, inverse)))
}

/// A block's last projection, and the norm and the factor of its result before it is added to the hidden states.
pub(super) struct BlockEnd<'a, D: Device> {
    pub(super) group: ProjectionGroup<'a, D>,
    pub(super) norm: Option<&'a NormView<'a>>,
    /// The norm of the model, to which the gradient belongs.
    pub(super) trained: Option<&'a Norm>,
    pub(super) scale: f32,
}

/// What [`BlockEnd::forward`] gives.
pub(super) struct BlockResult<D: Device> {
    /// The hidden states after the block; empty if they were not wanted.
    pub(super) out: D::Buffer,
    /// What the norm was applied to, if there is one.
    pub(super) normed: Option<NormedValues<D>>,
    /// `s A x` of the projection's pair.
    pub(super) lora_down: Vec<D::Buffer>,
}

impl<D: Device> BlockEnd<'_, D> {
    /// Computes `residual + scale * norm(W x + b)`. If not `whole`, only what the backward pass needs.
    pub(super) fn forward(
        &self,
        x: &D::Buffer,
        residual: &D::Buffer,
        whole: bool,
        PassContext { shape, device, .. }: PassContext<'_, D>,
    ) -> Result<BlockResult<D>> {
        let group = &self.group;
        let Some(norm) = self.norm else {
            if !whole {
                return Ok(BlockResult {
                    out: D::Buffer::default(),
                    normed: None,
                    lora_down: group.lora_down(x, device)?,
                });
            }
            let mut out = device.take(device.length(residual));
            let lora_down = if is_one(self.scale) {
                group.forward(x, vec![&mut out], &Onto::Values(residual), device)?
            } else {
                let lora_down = group.forward(x, vec![&mut out], &Onto::Zero, device)?;
                device.scale_and_add(&mut out, self.scale, residual);
                lora_down
            };
            return Ok(BlockResult {
                out,
                normed: None,
                lora_down,
            });
        };
        let mut values = device.take(device.length(residual));
        let lora_down = group.forward(x, vec![&mut values], &Onto::Zero, device)?;
        let (mut out, mut inverse) = (device.take(device.length(residual)), shape.take(device, 1));
        let onto = (residual, self.scale);
        device.rms_norm_onto(
            &values,
            device.vector(&norm.weight)?,
            norm.eps,
            onto,
            &mut out,
            &mut inverse,
        );
        if !whole {
            device.give(std::mem::take(&mut out));
        }
        Ok(BlockResult {
            out,
            normed: Some(NormedValues { values, inverse }),
            lora_down,
        })
    }

    /// From the gradient `grad_out` with respect to the hidden states after the block to that with respect to the projection's result. It is
    /// the same, and `None`, without a norm and a factor.
    pub(super) fn backward(
        &self,
        grad_out: &D::Buffer,
        normed: Option<NormedValues<D>>,
        trainable: &mut Trainable<'_, D>,
    ) -> Result<Option<D::Buffer>> {
        let device = trainable.device;
        let scaled = (!is_one(self.scale)).then(|| {
            let mut scaled = device.take(device.length(grad_out));
            device.copy(grad_out, &mut scaled);
            device.scale(&mut scaled, self.scale);
            scaled
        });
        let (Some(norm), Some(normed)) = (self.norm, normed) else {
            return Ok(scaled);
        };
        let grad_normed = scaled.as_ref().unwrap_or(grad_out);
        let grad_values = normed.backward(grad_normed, norm, self.trained, trainable)?;
        normed.give_back(device);
        device.give_all(scaled);
        Ok(Some(grad_values))
    }
}

/// Adds to `grad_x` what the gradient `grad_input` with respect to a block's input gives for the hidden states `x` before it: through the
/// norm before the block, if there is one.
pub(super) fn norm_before_backward<D: Device>(
    x: &D::Buffer,
    inverse: &D::Buffer,
    (norm, trained): (Option<&NormView<'_>>, Option<&Norm>),
    grad_input: &D::Buffer,
    grad_x: &mut D::Buffer,
    trainable: &mut Trainable<'_, D>,
) -> Result<()> {
    let device = trainable.device;
    let Some(norm) = norm else {
        device.add(grad_x, grad_input, 1.);
        return Ok(());
    };
    if let Some(trained) = trained {
        trainable.add(&trained.weight, |device, sum| {
            device.rms_norm_grad_weight(x, inverse, grad_input, sum);
            Ok(())
        })?;
    }
    let weight = device.vector(&norm.weight)?;
    device.rms_norm_backward(x, weight, inverse, grad_input, grad_x);
    Ok(())
}

/// `x` after the norm before a block, recomputed; `None` without a norm.
pub(super) fn recompute_norm<D: Device>(
    x: &D::Buffer,
    norm: Option<&NormView<'_>>,
    inverse: &D::Buffer,
    device: &D,
) -> Result<Option<D::Buffer>> {
    let recompute = |norm: &NormView<'_>| {
        let mut normed = device.take(device.length(x));
        device.rms_norm_recompute(x, device.vector(&norm.weight)?, inverse, &mut normed);
        Ok(normed)
    };
    norm.map(recompute).transpose()
}
