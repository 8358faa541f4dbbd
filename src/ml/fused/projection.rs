//! Projections that share their input, `y_i = W_i x + b_i + s_i B_i A_i x`, and their backward pass.
//!
//! Some models have one projection for several results (queries, keys and values; gate and up), whose rows stand one after the other in
//! its weight. It is one projection here too, with one pair; its result is split into parts of their own, and the gradients of the parts
//! are joined.

mod dora;

use std::cell::OnceCell;

use candle_core::Result;
use pipeline_kernels::panels::size;
use pipeline_kernels::reduce::Order;

use super::device::{Device, Factor, Onto, Part, Product, Term, Transpose as _};
use super::shape::Shape;
use super::trainable::Trainable;
use super::weights::Projection;
use crate::ml::model::linear::{Base, Linear};
use dora::{RowFactors, dora};

/// Several projections of the same input.
pub(super) struct ProjectionGroup<'a, D: Device> {
    all: Vec<&'a Projection<'a>>,
    /// The number of features of the input.
    features: usize,
    shape: &'a Shape<D>,
    row_factors: OnceCell<RowFactors<D>>,
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
            row_factors: OnceCell::new(),
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
        let (mut all, mut scaled) = (Vec::new(), Vec::new());
        let each = self.all.iter().zip(outs).zip(&factors).enumerate();
        for (number, ((projection, out), low)) in each {
            if dora(projection).is_some() {
                scaled.push((number, out, low));
                continue;
            }
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
        for (number, out, low) in scaled {
            self.forward_dora(number, (x, &factor), low, (onto, out), device)?;
        }
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
        let scaled = self.scaled_grads(grad_outs, device)?;
        let inner = scaled_or(&scaled, grad_outs);
        let factors = self.grad_factors(&inner, device)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, device)?;
        device.give_factors(factors);
        device.give_all(scaled.into_iter().flatten());
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
        let scaled = self.scaled_grads(grad_outs, device)?;
        let inner = scaled_or(&scaled, grad_outs);
        let factors = self.grad_factors(&inner, device)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, device)?;
        let lora_down = self.factors(&grad_lora_down, device);
        // With dropout, all of the gradient goes through the weight as it is, and the rest through the dropout.
        let whole = if self.has_dora() && self.all.iter().any(|own| own.dropout.is_some()) {
            self.grad_factors(grad_outs, device)?
        } else {
            Vec::new()
        };
        let mut terms = Vec::new();
        let each = self.all.iter().zip(&factors).zip(&lora_down).enumerate();
        for (number, ((projection, factor), lora_down)) in each {
            let undropped = whole.get(number).filter(|_| projection.dropout.is_some());
            terms.push(Term {
                weight: device.matrix(&projection.base)?.transposed(),
                x: undropped.unwrap_or(factor),
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
        for (number, (projection, low)) in self.all.iter().zip(&lora_down).enumerate() {
            let scaled = scaled.get(number).and_then(Option::as_ref);
            if let Some(grad_out) = grad_outs.get(number) {
                let grads = (*grad_out, scaled);
                self.back_through_dropout(projection, grads, low, grad_x, device)?;
            }
        }
        device.give_factors(whole);
        device.give_factors(lora_down);
        device.give_factors(factors);
        device.give_all(scaled.into_iter().flatten());
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
        let scaled = self.scaled_grads(grad_outs, device)?;
        let inner = scaled_or(&scaled, grad_outs);
        for (number, (projection, linear)) in self.all.iter().zip(linears).enumerate() {
            let (Some(grad_out), Some(grad_inner), Some(lora_down), Some(grad_low)) = (
                grad_outs.get(number),
                inner.get(number),
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
                if let Some(magnitude) = &lora.magnitude {
                    trainable.add(magnitude, |device, sum| {
                        self.grad_magnitude(number, input, lora_down, grad_out, sum, device)
                    })?;
                }
                device.give_all(dropped);
                trainable.add(&lora.b, |device, sum| {
                    let (grad, low) = ((*grad_inner, height), (lora_down, pair.rank));
                    device.outer(grad, low, sum, 0, Order::Straight);
                    Ok(())
                })?;
            }
        }
        device.give_all(scaled.into_iter().flatten());
        Ok(())
    }
}

/// The gradients as `DoRA` scales them, where it does.
fn scaled_or<'s, B>(scaled: &'s [Option<B>], plain: &[&'s B]) -> Vec<&'s B> {
    let each = scaled.iter().zip(plain);
    each.map(|(scaled, plain)| scaled.as_ref().unwrap_or(plain))
        .collect()
}
