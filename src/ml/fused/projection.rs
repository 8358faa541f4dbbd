//! Projections that share their input, `y_i = W_i x + b_i + s_i B_i A_i x`, and their backward pass.
//!
//! Some models have one projection for several results (queries, keys and values; gate and up), whose rows stand one after the other in
//! its weight. It is one projection here too, with one pair; its result is split into parts of their own, and the gradients of the parts
//! are joined.

use candle_core::Result;
use pipeline_kernels::elementwise::{self, scale};
use pipeline_kernels::matrix::Matrix;
use pipeline_kernels::panels::{LANES, size};
use pipeline_kernels::product::{Factor, Onto, Product, Term, product, products};
use pipeline_kernels::reduce::{Order, outer, sum_over_tokens};
use rayon::prelude::*;

use super::pool::Pool;
use super::shape::Shape;
use super::trainable::Trainable;
use super::weights::Projection;
use crate::ml::model::linear::{Base, Linear};

/// Several projections of the same input.
pub(super) struct ProjectionGroup<'a> {
    all: Vec<&'a Projection<'a>>,
    /// The number of features of the input.
    features: usize,
    shape: &'a Shape,
}

/// Copies values, on all threads.
fn copy(from: &[f32], to: &mut [f32]) {
    const SPAN: usize = 1 << 14;
    to.par_chunks_mut(SPAN)
        .zip(from.par_chunks(SPAN))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

/// A product of one term.
fn alone<'a>(out: &'a mut [f32], weight: Matrix<'a>, x: &'a Factor<'a>) -> Product<'a> {
    Product {
        out,
        terms: vec![Term { weight, x }],
        onto: Onto::Zero,
        bias: None,
    }
}

/// The results of a group, or the parts of its single projection's result, in panels.
type Parts<const N: usize> = [Vec<f32>; N];

/// The gradients with respect to the results of a group.
pub(super) enum GradOuts {
    /// One for each projection.
    Each(Vec<Vec<f32>>),
    /// That of a single projection, joined from those of its parts.
    Joined(Vec<f32>),
}

impl GradOuts {
    /// One for each projection.
    pub(super) fn all(&self) -> Vec<&[f32]> {
        match self {
            Self::Each(all) => all.iter().map(Vec::as_slice).collect(),
            Self::Joined(one) => vec![one],
        }
    }

    pub(super) fn give_back(self, pool: &Pool) {
        match self {
            Self::Each(all) => pool.give_all(all),
            Self::Joined(one) => pool.give(one),
        }
    }
}

impl<'a> ProjectionGroup<'a> {
    pub(super) fn new(
        all: impl IntoIterator<Item = &'a Projection<'a>>,
        features: usize,
        shape: &'a Shape,
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
        x: &[f32],
        widths: [usize; N],
        pool: &Pool,
    ) -> Result<(Parts<N>, Vec<Vec<f32>>)> {
        let mut parts = widths.map(|width| self.shape.take(pool, width));
        if self.all.len() == N {
            let outs = parts.iter_mut().collect();
            let lora_down = self.forward(x, outs, Onto::Zero, pool)?;
            return Ok((parts, lora_down));
        }
        let total = widths.iter().sum();
        let mut joined = self.shape.take(pool, total);
        let lora_down = self.forward(x, vec![&mut joined], Onto::Zero, pool)?;
        let mut first = 0;
        for (part, width) in parts.iter_mut().zip(widths) {
            let panels = part.par_chunks_mut(width * LANES);
            let joined = joined.par_chunks(total * LANES);
            panels.zip(joined).for_each(|(part, joined)| {
                part.copy_from_slice(&joined[first * LANES..][..width * LANES]);
            });
            first += width;
        }
        pool.give(joined);
        Ok((parts, lora_down))
    }

    /// The gradients with respect to the results of [`ProjectionGroup::forward_parts`] as those of the projections.
    pub(super) fn join<const N: usize>(&self, parts: [Vec<f32>; N], pool: &Pool) -> GradOuts {
        if self.all.len() == N {
            return GradOuts::Each(parts.into());
        }
        let widths = parts.each_ref().map(|part| self.shape.features(part));
        let total: usize = widths.iter().sum();
        let mut joined = self.shape.take(pool, total);
        let panels = joined.par_chunks_mut(total.max(1) * LANES).enumerate();
        panels.for_each(|(number, panel)| {
            let mut rest = panel;
            for (part, width) in parts.iter().zip(widths) {
                let (own, behind) = rest.split_at_mut(width * LANES);
                own.copy_from_slice(&part[number * own.len()..][..own.len()]);
                rest = behind;
            }
        });
        pool.give_all(parts);
        GradOuts::Joined(joined)
    }

    /// For each projection, a buffer of panels of its pair's rank; an empty one without a pair.
    fn ranks(&self, pool: &Pool) -> Vec<Vec<f32>> {
        let ranks = self.all.iter().map(|projection| projection.rank());
        ranks
            .map(|rank| pool.take(size(rank, self.shape.tokens)))
            .collect()
    }

    /// The input of a projection's pair after dropout, if there is dropout.
    fn dropped(&self, projection: &Projection<'_>, x: &[f32], pool: &Pool) -> Option<Vec<f32>> {
        let dropout = projection.dropout?;
        let mut dropped = pool.take(x.len());
        copy(x, &mut dropped);
        dropout.apply(&mut dropped, self.features, &self.shape.padded_index);
        Some(dropped)
    }

    /// `s_i A_i x` of each pair, in panels of its rank; empty without a pair. `x` is panels of the input's features.
    pub(super) fn lora_down(&self, x: &[f32], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let factor = pool.factor(self.shape.half, x, self.features);
        let lora_down = self.lora_down_of(x, &factor, pool)?;
        pool.give_factors([factor]);
        Ok(lora_down)
    }

    /// See [`ProjectionGroup::lora_down`]; `factor` is `x` as a factor.
    fn lora_down_of(&self, x: &[f32], factor: &Factor<'_>, pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let mut lora_down = self.ranks(pool);
        let dropped = self.all.iter().map(|p| self.dropped(p, x, pool));
        let dropped: Vec<Option<Vec<f32>>> = dropped.collect();
        let own = dropped.iter().map(|own| {
            let own = own.as_ref()?;
            Some(pool.factor(self.shape.half, own, self.features))
        });
        let own: Vec<Option<Factor<'_>>> = own.collect();
        let mut all = Vec::new();
        for ((projection, out), own) in self.all.iter().zip(&mut lora_down).zip(&own) {
            if let Some(pair) = &projection.lora {
                let (weight, x) = (pair.a()?, own.as_ref().unwrap_or(factor));
                all.push(alone(out, weight, x));
            }
        }
        products(all);
        pool.give_factors(own.into_iter().flatten());
        pool.give_all(dropped.into_iter().flatten());
        self.scale(&mut lora_down);
        Ok(lora_down)
    }

    fn scale(&self, lora_down: &mut [Vec<f32>]) {
        for (projection, lora_down) in self.all.iter().zip(lora_down) {
            if let Some(pair) = &projection.lora {
                scale(lora_down, pair.scaling);
                for token in self.shape.lora_tokens..self.shape.tokens {
                    let start = token / LANES * pair.rank * LANES + token % LANES;
                    let column = lora_down.iter_mut().skip(start).step_by(LANES);
                    column.take(pair.rank).for_each(|x| *x = 0.);
                }
            }
        }
    }

    /// The values of [`ProjectionGroup::lora_down`] as factors.
    fn factors<'v>(&self, lora_down: &'v [Vec<f32>], pool: &Pool) -> Vec<Factor<'v>> {
        let each = self.all.iter().zip(lora_down);
        each.map(|(projection, x)| pool.factor(self.shape.half, x, projection.rank()))
            .collect()
    }

    /// Writes `onto + y_i` to `outs`, panels of each projection's output features. Returns [`ProjectionGroup::lora_down`].
    pub(super) fn forward(
        &self,
        x: &[f32],
        outs: Vec<&mut Vec<f32>>,
        onto: Onto<'_>,
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let factor = pool.factor(self.shape.half, x, self.features);
        let lora_down = self.lora_down_of(x, &factor, pool)?;
        let factors = self.factors(&lora_down, pool);
        let mut all = Vec::new();
        for ((projection, out), low) in self.all.iter().zip(outs).zip(&factors) {
            let mut terms = vec![Term {
                weight: projection.matrix()?,
                x: &factor,
            }];
            if let Some(pair) = &projection.lora {
                terms.push(Term {
                    weight: pair.b()?,
                    x: low,
                });
            }
            all.push(Product {
                out,
                terms,
                onto,
                bias: projection.bias()?,
            });
        }
        products(all);
        pool.give_factors(factors);
        pool.give_factors([factor]);
        Ok(lora_down)
    }

    /// The gradients with respect to the outputs as factors.
    fn grad_factors<'v>(&self, grad_outs: &[&'v [f32]], pool: &Pool) -> Result<Vec<Factor<'v>>> {
        let each = self.all.iter().zip(grad_outs);
        each.map(|(projection, grad_out)| {
            Ok(pool.factor(self.shape.half, grad_out, projection.matrix()?.height()))
        })
        .collect()
    }

    /// `s_i B_i^T grad_y_i`, in panels of each pair's rank: the gradient with respect to `A_i x`.
    pub(super) fn grad_lora_down(
        &self,
        grad_outs: &[&[f32]],
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let factors = self.grad_factors(grad_outs, pool)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, pool)?;
        pool.give_factors(factors);
        Ok(grad_lora_down)
    }

    fn grad_lora_down_of(&self, factors: &[Factor<'_>], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let mut grad_lora_down = self.ranks(pool);
        let mut all = Vec::new();
        for ((projection, out), x) in self.all.iter().zip(&mut grad_lora_down).zip(factors) {
            if let Some(pair) = &projection.lora {
                all.push(alone(out, pair.b()?.transposed(), x));
            }
        }
        products(all);
        self.scale(&mut grad_lora_down);
        Ok(grad_lora_down)
    }

    /// Writes the gradient with respect to the input to `grad_x`, panels of its features. Returns [`ProjectionGroup::grad_lora_down`].
    pub(super) fn backward(
        &self,
        grad_outs: &[&[f32]],
        grad_x: &mut [f32],
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let factors = self.grad_factors(grad_outs, pool)?;
        let grad_lora_down = self.grad_lora_down_of(&factors, pool)?;
        let lora_down = self.factors(&grad_lora_down, pool);
        let mut terms = Vec::new();
        for ((projection, factor), lora_down) in self.all.iter().zip(&factors).zip(&lora_down) {
            terms.push(Term {
                weight: projection.matrix()?.transposed(),
                x: factor,
            });
            if let (Some(pair), None) = (&projection.lora, projection.dropout) {
                terms.push(Term {
                    weight: pair.a()?.transposed(),
                    x: lora_down,
                });
            }
        }
        product(grad_x, terms, Onto::Zero);
        for (projection, lora_down) in self.all.iter().zip(&lora_down) {
            if let (Some(pair), Some(dropout)) = (&projection.lora, projection.dropout) {
                let mut own = pool.take(grad_x.len());
                products(vec![alone(&mut own, pair.a()?.transposed(), lora_down)]);
                dropout.apply(&mut own, self.features, &self.shape.padded_index);
                elementwise::add(grad_x, &own, 1.);
                pool.give(own);
            }
        }
        pool.give_factors(lora_down);
        pool.give_factors(factors);
        Ok(grad_lora_down)
    }

    /// Adds the gradients with respect to trained tensors to `trainable`. `x` is the input; `lora_down` and `grad_lora_down` are what the
    /// forward and the backward pass returned.
    pub(super) fn gradients(
        &self,
        linears: &[&Linear],
        grad_outs: &[&[f32]],
        x: &[f32],
        lora_down: &[Vec<f32>],
        grad_lora_down: &[Vec<f32>],
        trainable: &mut Trainable<'_>,
    ) -> Result<()> {
        let pool = trainable.pool;
        for (number, (projection, linear)) in self.all.iter().zip(linears).enumerate() {
            let (Some(grad_out), Some(lora_down), Some(grad_low)) = (
                grad_outs.get(number),
                lora_down.get(number),
                grad_lora_down.get(number),
            ) else {
                continue;
            };
            let height = projection.matrix()?.height();
            if let Base::Dense(weight) = &linear.base {
                trainable.add(weight, |sum| {
                    outer((grad_out, height), (x, self.features), sum, Order::Straight);
                })?;
            }
            if let Some(bias) = &linear.bias {
                let tokens = self.shape.tokens;
                trainable.add(bias, |sum| sum_over_tokens(grad_out, tokens, sum))?;
            }
            if let (Some(pair), Some(lora)) = (&projection.lora, &linear.lora) {
                let dropped = self.dropped(projection, x, pool);
                let input = dropped.as_deref().unwrap_or(x);
                trainable.add(&lora.a, |sum| {
                    outer(
                        (input, self.features),
                        (grad_low, pair.rank),
                        sum,
                        Order::Transposed,
                    );
                })?;
                pool.give_all(dropped);
                trainable.add(&lora.b, |sum| {
                    outer(
                        (grad_out, height),
                        (lora_down, pair.rank),
                        sum,
                        Order::Straight,
                    );
                })?;
            }
        }
        Ok(())
    }
}
