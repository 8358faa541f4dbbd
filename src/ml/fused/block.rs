//! The two ends of a block, which attention and feed-forward block share: the norm of its input, and the way in which its result joins the
//! hidden states.

use candle_core::Result;
use pipeline_kernels::elementwise::{
    add, rms_norm, rms_norm_backward, rms_norm_grad_weight, rms_norm_onto, rms_norm_recompute,
    scale, scale_and_add,
};
use pipeline_kernels::product::Onto;

use super::pool::Pool;
use super::projection::ProjectionGroup;
use super::shape::PassContext;
use super::trainable::Trainable;
use super::weights::NormView;
use crate::ml::model::Norm;

/// What a norm was applied to.
pub(super) struct NormedValues {
    pub(super) values: Vec<f32>,
    /// The norm's factors, panels with a feature for each head that is normed by itself, or one.
    pub(super) inverse: Vec<f32>,
}

impl NormedValues {
    pub(super) fn give_back(self, pool: &Pool) {
        pool.give_all([self.values, self.inverse]);
    }

    /// From the gradient `grad` with respect to the norm's result to that with respect to its argument, in a buffer of its own. The gradient
    /// with respect to the norm's weight goes to `trainable`.
    pub(super) fn backward(
        &self,
        grad: &[f32],
        norm: &NormView<'_>,
        trained: Option<&Norm>,
        trainable: &mut Trainable<'_>,
    ) -> Result<Vec<f32>> {
        let weight = norm.weight()?;
        if let Some(trained) = trained {
            trainable.add(&trained.weight, |sum| {
                rms_norm_grad_weight(&self.values, &self.inverse, grad, sum);
            })?;
        }
        let mut grad_values = trainable.pool.take(self.values.len());
        grad_values.fill(0.);
        rms_norm_backward(&self.values, weight, &self.inverse, grad, &mut grad_values);
        Ok(grad_values)
    }
}

/// Whether a factor changes nothing.
fn is_one(factor: f32) -> bool {
    factor.to_bits() == 1f32.to_bits()
}

/// The input of a block: `x` after the norm, if there is one. Then the result is in a buffer, and the norm's factors are returned too.
pub(super) fn norm_before(
    x: &[f32],
    norm: Option<&NormView<'_>>,
    PassContext { shape, pool, .. }: PassContext<'_>,
) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
    let Some(norm) = norm else {
        return Ok(None);
    };
    let mut normed = pool.take(x.len());
    let mut inverse = shape.take(pool, 1);
    rms_norm(x, norm.weight()?, norm.eps, &mut normed, &mut inverse);
    Ok(Some((normed, inverse)))
}

/// A block's last projection, and the norm and the factor of its result before it is added to the hidden states.
pub(super) struct BlockEnd<'a> {
    pub(super) group: ProjectionGroup<'a>,
    pub(super) norm: Option<&'a NormView<'a>>,
    /// The norm of the model, to which the gradient belongs.
    pub(super) trained: Option<&'a Norm>,
    pub(super) scale: f32,
}

/// What [`BlockEnd::forward`] gives.
pub(super) struct BlockResult {
    /// The hidden states after the block; empty if they were not wanted.
    pub(super) out: Vec<f32>,
    /// What the norm was applied to, if there is one.
    pub(super) normed: Option<NormedValues>,
    /// `s A x` of the projection's pair.
    pub(super) lora_down: Vec<Vec<f32>>,
}

impl BlockEnd<'_> {
    /// Computes `residual + scale * norm(W x + b)`. If not `whole`, only what the backward pass needs.
    pub(super) fn forward(
        &self,
        x: &[f32],
        residual: &[f32],
        whole: bool,
        PassContext { shape, pool, .. }: PassContext<'_>,
    ) -> Result<BlockResult> {
        let group = &self.group;
        let Some(norm) = self.norm else {
            if !whole {
                return Ok(BlockResult {
                    out: Vec::new(),
                    normed: None,
                    lora_down: group.lora_down(x, pool)?,
                });
            }
            let mut out = pool.take(residual.len());
            let lora_down = if is_one(self.scale) {
                group.forward(x, vec![&mut out], Onto::Values(residual), pool)?
            } else {
                let lora_down = group.forward(x, vec![&mut out], Onto::Zero, pool)?;
                scale_and_add(&mut out, self.scale, residual);
                lora_down
            };
            return Ok(BlockResult {
                out,
                normed: None,
                lora_down,
            });
        };
        let mut values = pool.take(residual.len());
        let lora_down = group.forward(x, vec![&mut values], Onto::Zero, pool)?;
        let (mut out, mut inverse) = (pool.take(residual.len()), shape.take(pool, 1));
        let onto = (residual, self.scale);
        rms_norm_onto(
            &values,
            norm.weight()?,
            norm.eps,
            onto,
            &mut out,
            &mut inverse,
        );
        if !whole {
            pool.give(std::mem::take(&mut out));
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
        grad_out: &[f32],
        normed: Option<NormedValues>,
        trainable: &mut Trainable<'_>,
    ) -> Result<Option<Vec<f32>>> {
        let pool = trainable.pool;
        let scaled = (!is_one(self.scale)).then(|| {
            let mut scaled = pool.take(grad_out.len());
            scaled.copy_from_slice(grad_out);
            scale(&mut scaled, self.scale);
            scaled
        });
        let (Some(norm), Some(normed)) = (self.norm, normed) else {
            return Ok(scaled);
        };
        let grad_normed = scaled.as_deref().unwrap_or(grad_out);
        let grad_values = normed.backward(grad_normed, norm, self.trained, trainable)?;
        normed.give_back(pool);
        pool.give_all(scaled);
        Ok(Some(grad_values))
    }
}

/// Adds to `grad_x` what the gradient `grad_input` with respect to a block's input gives for the hidden states `x` before it: through the
/// norm before the block, if there is one.
pub(super) fn norm_before_backward(
    x: &[f32],
    inverse: &[f32],
    (norm, trained): (Option<&NormView<'_>>, Option<&Norm>),
    grad_input: &[f32],
    grad_x: &mut [f32],
    trainable: &mut Trainable<'_>,
) -> Result<()> {
    let Some(norm) = norm else {
        add(grad_x, grad_input, 1.);
        return Ok(());
    };
    if let Some(trained) = trained {
        trainable.add(&trained.weight, |sum| {
            rms_norm_grad_weight(x, inverse, grad_input, sum);
        })?;
    }
    rms_norm_backward(x, norm.weight()?, inverse, grad_input, grad_x);
    Ok(())
}

/// `x` after the norm before a block, recomputed; `None` without a norm.
pub(super) fn recompute_norm(
    x: &[f32],
    norm: Option<&NormView<'_>>,
    inverse: &[f32],
    pool: &Pool,
) -> Result<Option<Vec<f32>>> {
    let recompute = |norm: &NormView<'_>| {
        let mut normed = pool.take(x.len());
        rms_norm_recompute(x, norm.weight()?, inverse, &mut normed);
        Ok(normed)
    };
    norm.map(recompute).transpose()
}
