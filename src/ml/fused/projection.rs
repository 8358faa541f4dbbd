//! Projections that share their input, `y_i = W_i x + b_i + s_i B_i A_i x`, and their backward pass.
//!
//! Some models have one projection for several results (queries, keys and values; gate and up), whose rows stand one after the other in
//! its weight. It is one projection here too, with one pair; its result is split into parts of their own, and the gradients of the parts
//! are joined.

use candle_core::Result;
use pipeline_kernels::panels::size;
use pipeline_kernels::reduce::Order;

use super::device::{Device, Factor, Onto, Part, Product, Term, Transpose as _};
use super::shape::Shape;
use super::trainable::Trainable;
use super::weights::Projection;
use crate::ml::model::linear::{Base, Linear};

/// Several projections of the same input.
pub(super) struct ProjectionGroup<'a, D: Device> {
    all: Vec<&'a Projection<'a>>,
    /// The number of features of the input.
    features: usize,
    shape: &'a Shape<D>,
}

/// A product of one term.
fn alone<'p, 'w, D: Device>(
    out: &'p mut D::Buffer,
    weight: D::Matrix<'w>,
    x: &'p Factor<'p, D>,
) -> Product<'p, 'w, D> {
    Product {
        out,
        terms: vec![Term { weight, x }],
        onto: Onto::Zero,
        bias: None,
    }
}

/// The results of a group, or the parts of its single projection's result, in panels.
type Parts<D, const N: usize> = [<D as Device>::Buffer; N];

/// The gradients with respect to the results of a group.
pub(super) enum GradOuts<D: Device> {
    /// One for each projection.
    Each(Vec<D::Buffer>),
    /// That of a single projection, joined from those of its parts.
    Joined(D::Buffer),
}

impl<D: Device> GradOuts<D> {
    /// One for each projection.
    pub(super) fn all(&self) -> Vec<&D::Buffer> {
        match self {
            Self::Each(all) => all.iter().collect(),
            Self::Joined(one) => vec![one],
        }
    }

    pub(super) fn give_back(self, device: &D) {
        match self {
            Self::Each(all) => device.give_all(all),
            Self::Joined(one) => device.give(one),
        }
    }
}

impl<'a, D: Device> ProjectionGroup<'a, D> {
    pub(super) fn new(
        all: impl IntoIterator<Item = &'a Projection<'a>>,
        features: usize,
        shape: &'a Shape<D>,
    ) -> Self {
        Self {
            all: all.into_iter().collect(),
            features,
            shape,
        }
    }

    /// The results in panels of `widths` features, of one projection each or parts of a single one's. Returns
    /// [`ProjectionGroup::lora_down`] too.
    pub(super) fn forward_parts<const N: usize>(
        &self,
        x: &D::Buffer,
        widths: [usize; N],
        device: &D,
    ) -> Result<(Parts<D, N>, Vec<D::Buffer>)> {
        let mut parts = widths.map(|width| self.shape.take(device, width));
        if self.all.len() == N {
            let outs = parts.iter_mut().collect();
            let lora_down = self.forward(x, outs, &Onto::Zero, device)?;
            return Ok((parts, lora_down));
        }
        let features = widths.iter().sum();
        let mut joined = self.shape.take(device, features);
        let lora_down = self.forward(x, vec![&mut joined], &Onto::Zero, device)?;
        let mut first = 0;
        for (part, width) in parts.iter_mut().zip(widths) {
            let from = Part { features, first };
            let to = Part {
                features: width,
                first: 0,
            };
            device.copy_features((&joined, from), (part, to), width);
            first += width;
        }
        device.give(joined);
        Ok((parts, lora_down))
    }

    /// The gradients with respect to the results of [`ProjectionGroup::forward_parts`] as those of the projections.
    pub(super) fn join<const N: usize>(&self, parts: Parts<D, N>, device: &D) -> GradOuts<D> {
        if self.all.len() == N {
            return GradOuts::Each(parts.into());
        }
        let widths = parts
            .each_ref()
            .map(|part| self.shape.features(device, part));
        let features: usize = widths.iter().sum();
        let mut joined = self.shape.take(device, features);
        let mut first = 0;
        for (part, width) in parts.iter().zip(widths) {
            let from = Part {
                features: width,
                first: 0,
            };
            let to = Part { features, first };
            device.copy_features((part, from), (&mut joined, to), width);
            first += width;
        }
        device.give_all(parts);
        GradOuts::Joined(joined)
    }

    /// For each projection, a buffer of panels of its pair's rank; an empty one without a pair.
    fn ranks(&self, device: &D) -> Vec<D::Buffer> {
        let ranks = self.all.iter().map(|projection| projection.rank());
        ranks
            .map(|rank| device.take(size(rank, self.shape.tokens)))
            .collect()
    }

    /// The input of a projection's pair after dropout, if there is dropout.
    fn dropped(&self, projection: &Projection<'_>, x: &D::Buffer, device: &D) -> Option<D::Buffer> {
        let dropout = projection.dropout?;
        let mut dropped = device.take(device.length(x));
        device.copy(x, &mut dropped);
        device.dropout(
            dropout,
            &mut dropped,
            self.features,
            &self.shape.padded_index,
        );
        Some(dropped)
    }

    /// `s_i A_i x` of each pair, in panels of its rank; empty without a pair. `x` is panels of the input's features.
    pub(super) fn lora_down(&self, x: &D::Buffer, device: &D) -> Result<Vec<D::Buffer>> {
        let factor = device.factor(self.shape.half, x, self.features);
        let lora_down = self.lora_down_of(x, &factor, device)?;
        device.give_factors([factor]);
        Ok(lora_down)
    }

    /// See [`ProjectionGroup::lora_down`]; `factor` is `x` as a factor.
    fn lora_down_of(
        &self,
        x: &D::Buffer,
        factor: &Factor<'_, D>,
        device: &D,
    ) -> Result<Vec<D::Buffer>> {
        let mut lora_down = self.ranks(device);
        let dropped = self.all.iter().map(|p| self.dropped(p, x, device));
        let dropped: Vec<Option<D::Buffer>> = dropped.collect();
        let own = dropped.iter().map(|own| {
            let own = own.as_ref()?;
            Some(device.factor(self.shape.half, own, self.features))
        });
        let own: Vec<Option<Factor<'_, D>>> = own.collect();
        let mut all = Vec::new();
        for ((projection, out), own) in self.all.iter().zip(&mut lora_down).zip(&own) {
            if let Some(pair) = &projection.lora {
                let (weight, x) = (device.matrix(&pair.a)?, own.as_ref().unwrap_or(factor));
                all.push(alone(out, weight, x));
            }
        }
        device.products(all);
        device.give_factors(own.into_iter().flatten());
        device.give_all(dropped.into_iter().flatten());
        self.scale(&mut lora_down, device);
        Ok(lora_down)
    }

    fn scale(&self, lora_down: &mut [D::Buffer], device: &D) {
        for (projection, lora_down) in self.all.iter().zip(lora_down) {
            if let Some(pair) = &projection.lora {
                device.scale(lora_down, pair.scaling);
                let without = self.shape.lora_tokens..self.shape.tokens;
                device.clear_tokens(lora_down, pair.rank, without);
            }
        }
    }

    /// The values of [`ProjectionGroup::lora_down`] as factors.
    fn factors<'v>(&self, lora_down: &'v [D::Buffer], device: &D) -> Vec<Factor<'v, D>> {
        let each = self.all.iter().zip(lora_down);
        each.map(|(projection, x)| device.factor(self.shape.half, x, projection.rank()))
            .collect()
    }

    /// Writes `onto + y_i` to `outs`, panels of each projection's output features. Returns [`ProjectionGroup::lora_down`].
    pub(super) fn forward(
        &self,
        x: &D::Buffer,
        outs: Vec<&mut D::Buffer>,
        onto: &Onto<'_, D>,
        device: &D,
    ) -> Result<Vec<D::Buffer>> {
        let factor = device.factor(self.shape.half, x, self.features);
        let lora_down = self.lora_down_of(x, &factor, device)?;
        let factors = self.factors(&lora_down, device);
        let mut all = Vec::new();
        for ((projection, out), low) in self.all.iter().zip(outs).zip(&factors) {
            let mut terms = vec![Term {
                weight: device.matrix(&projection.base)?,
                x: &factor,
            }];
            if let Some(pair) = &projection.lora {
                terms.push(Term {
                    weight: device.matrix(&pair.b)?,
                    x: low,
                });
            }
            let bias = projection.bias.as_ref();
            all.push(Product {
                out,
                terms,
                onto: onto.same(),
                bias: bias.map(|bias| device.vector(bias)).transpose()?,
            });
        }
        device.products(all);
        device.give_factors(factors);
        device.give_factors([factor]);
        Ok(lora_down)
    }

    /// The gradients with respect to the outputs as factors.
    fn grad_factors<'v>(
        &self,
        grad_outs: &[&'v D::Buffer],
        device: &D,
    ) -> Result<Vec<Factor<'v, D>>> {
        let each = self.all.iter().zip(grad_outs);
        each.map(|(projection, grad_out)| {
            Ok(device.factor(self.shape.half, grad_out, projection.height()?))
        })
        .collect()
    }

    /// `s_i B_i^T grad_y_i`, in panels of each pair's rank: the gradient with respect to `A_i x`.
    pub(super) fn grad_lora_down(
        &self,
        grad_outs: &[&D::Buffer],
        device: &D,
    ) -> Result<Vec<D::Buffer>> {
        let factors = self.grad_factors(grad_outs, device)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, device)?;
        device.give_factors(factors);
        Ok(grad_lora_down)
    }

    fn grad_lora_down_of(&self, factors: &[Factor<'_, D>], device: &D) -> Result<Vec<D::Buffer>> {
        let mut grad_lora_down = self.ranks(device);
        let mut all = Vec::new();
        for ((projection, out), x) in self.all.iter().zip(&mut grad_lora_down).zip(factors) {
            if let Some(pair) = &projection.lora {
                all.push(alone(out, device.matrix(&pair.b)?.transposed(), x));
            }
        }
        device.products(all);
        self.scale(&mut grad_lora_down, device);
        Ok(grad_lora_down)
    }

    /// Writes the gradient with respect to the input to `grad_x`, panels of its features. Returns [`ProjectionGroup::grad_lora_down`].
    pub(super) fn backward(
        &self,
        grad_outs: &[&D::Buffer],
        grad_x: &mut D::Buffer,
        device: &D,
    ) -> Result<Vec<D::Buffer>> {
        let factors = self.grad_factors(grad_outs, device)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, device)?;
        let lora_down = self.factors(&grad_lora_down, device);
        let mut terms = Vec::new();
        for ((projection, factor), lora_down) in self.all.iter().zip(&factors).zip(&lora_down) {
            terms.push(Term {
                weight: device.matrix(&projection.base)?.transposed(),
                x: factor,
            });
            if let (Some(pair), None) = (&projection.lora, projection.dropout) {
                terms.push(Term {
                    weight: device.matrix(&pair.a)?.transposed(),
                    x: lora_down,
                });
            }
        }
        device.products(vec![Product {
            out: grad_x,
            terms,
            onto: Onto::Zero,
            bias: None,
        }]);
        for (projection, lora_down) in self.all.iter().zip(&lora_down) {
            if let (Some(pair), Some(dropout)) = (&projection.lora, projection.dropout) {
                let mut own = device.take(device.length(grad_x));
                let weight = device.matrix(&pair.a)?.transposed();
                device.products(vec![alone(&mut own, weight, lora_down)]);
                device.dropout(dropout, &mut own, self.features, &self.shape.padded_index);
                device.add(grad_x, &own, 1.);
                device.give(own);
            }
        }
        device.give_factors(lora_down);
        device.give_factors(factors);
        Ok(grad_lora_down)
    }

    /// Adds the gradients with respect to trained tensors to `trainable`. `x` is the input; `lora_down` and `grad_lora_down` are what the
    /// forward and the backward pass returned.
    pub(super) fn gradients(
        &self,
        linears: &[&Linear],
        grad_outs: &[&D::Buffer],
        x: &D::Buffer,
        lora_down: &[D::Buffer],
        grad_lora_down: &[D::Buffer],
        trainable: &mut Trainable<'_, D>,
    ) -> Result<()> {
        let device = trainable.device;
        for (number, (projection, linear)) in self.all.iter().zip(linears).enumerate() {
            let (Some(grad_out), Some(lora_down), Some(grad_low)) = (
                grad_outs.get(number),
                lora_down.get(number),
                grad_lora_down.get(number),
            ) else {
                continue;
            };
            let height = projection.height()?;
            if let Base::Dense(weight) = &linear.base {
                trainable.add(weight, |device, sum| {
                    let x = (x, self.features);
                    device.outer((*grad_out, height), x, sum, 0, Order::Straight);
                    Ok(())
                })?;
            }
            if let Some(bias) = &linear.bias {
                let tokens = self.shape.tokens;
                trainable.add(bias, |device, sum| {
                    device.sum_over_tokens(grad_out, tokens, sum);
                    Ok(())
                })?;
            }
            if let (Some(pair), Some(lora)) = (&projection.lora, &linear.lora) {
                let dropped = self.dropped(projection, x, device);
                let input = dropped.as_ref().unwrap_or(x);
                trainable.add(&lora.a, |device, sum| {
                    let (input, low) = ((input, self.features), (grad_low, pair.rank));
                    device.outer(input, low, sum, 0, Order::Transposed);
                    Ok(())
                })?;
                device.give_all(dropped);
                trainable.add(&lora.b, |device, sum| {
                    let (grad, low) = ((*grad_out, height), (lora_down, pair.rank));
                    device.outer(grad, low, sum, 0, Order::Straight);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}
