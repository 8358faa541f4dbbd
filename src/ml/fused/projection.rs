//! Projections that share their input: `y_i = W_i x + s_i B_i A_i x`, and back.

use candle_core::Result;
use pipeline_kernels::elementwise::{self, scale};
use pipeline_kernels::matrix::Matrix;
use pipeline_kernels::panels::{LANES, size};
use pipeline_kernels::product::{Factor, Onto, Product, Term, product, products};
use pipeline_kernels::reduce::{Order, outer};
use rayon::prelude::*;

use super::layer::{Shape, Trainable};
use super::pool::Pool;
use super::weights::Projection;
use crate::ml::model::linear::{Base, Linear};

/// Some projections of the same values.
pub(super) struct Set<'a> {
    all: Vec<&'a Projection<'a>>,
    /// Features of the input.
    features: usize,
    shape: &'a Shape,
}

/// Copies over all cores.
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
    }
}

impl<'a> Set<'a> {
    pub(super) fn new(all: &[&'a Projection<'a>], features: usize, shape: &'a Shape) -> Self {
        Self {
            all: all.to_vec(),
            features,
            shape,
        }
    }

    /// Buffers of each pair's rank; empty without a pair.
    fn ranks(&self, pool: &Pool) -> Vec<Vec<f32>> {
        let ranks = self.all.iter().map(|projection| projection.rank());
        ranks
            .map(|rank| pool.take(size(rank, self.shape.tokens)))
            .collect()
    }

    /// The input of a projection's pair, where dropout makes it another one.
    fn dropped(&self, projection: &Projection<'_>, x: &[f32], pool: &Pool) -> Option<Vec<f32>> {
        let dropout = projection.dropout?;
        let mut dropped = pool.take(x.len());
        copy(x, &mut dropped);
        dropout.apply(&mut dropped, self.features, &self.shape.places);
        Some(dropped)
    }

    /// `s_i A_i x` of each pair.
    pub(super) fn narrow(&self, x: &[f32], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let wide = pool.factor(self.shape.half, x, self.features);
        let narrow = self.narrow_of(x, &wide, pool)?;
        pool.give_factors([wide]);
        Ok(narrow)
    }

    /// The same; `wide` is `x` as a factor.
    fn narrow_of(&self, x: &[f32], wide: &Factor<'_>, pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let mut narrow = self.ranks(pool);
        let dropped = self.all.iter().map(|p| self.dropped(p, x, pool));
        let dropped: Vec<Option<Vec<f32>>> = dropped.collect();
        let own = dropped.iter().map(|own| {
            let own = own.as_ref()?;
            Some(pool.factor(self.shape.half, own, self.features))
        });
        let own: Vec<Option<Factor<'_>>> = own.collect();
        let mut all = Vec::new();
        for ((projection, out), own) in self.all.iter().zip(&mut narrow).zip(&own) {
            if let Some(pair) = &projection.lora {
                let (weight, x) = (pair.a()?, own.as_ref().unwrap_or(wide));
                all.push(alone(out, weight, x));
            }
        }
        products(all);
        pool.give_factors(own.into_iter().flatten());
        pool.give_all(dropped.into_iter().flatten());
        self.scale(&mut narrow);
        Ok(narrow)
    }

    fn scale(&self, narrow: &mut [Vec<f32>]) {
        for (projection, narrow) in self.all.iter().zip(narrow) {
            if let Some(pair) = &projection.lora {
                scale(narrow, pair.scaling);
                for token in self.shape.adapted..self.shape.tokens {
                    let start = token / LANES * pair.rank * LANES + token % LANES;
                    let column = narrow.iter_mut().skip(start).step_by(LANES);
                    column.take(pair.rank).for_each(|x| *x = 0.);
                }
            }
        }
    }

    /// The narrow values as factors.
    fn factors<'v>(&self, narrow: &'v [Vec<f32>], pool: &Pool) -> Vec<Factor<'v>> {
        let each = self.all.iter().zip(narrow);
        each.map(|(projection, x)| pool.factor(self.shape.half, x, projection.rank()))
            .collect()
    }

    /// Puts `y_i` into `outs`, added to `onto`. Gives each pair's narrow values.
    pub(super) fn forward(
        &self,
        x: &[f32],
        outs: Vec<&mut Vec<f32>>,
        onto: Onto<'_>,
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let wide = pool.factor(self.shape.half, x, self.features);
        let narrow = self.narrow_of(x, &wide, pool)?;
        let factors = self.factors(&narrow, pool);
        let mut all = Vec::new();
        for ((projection, out), low) in self.all.iter().zip(outs).zip(&factors) {
            let mut terms = vec![Term {
                weight: projection.matrix()?,
                x: &wide,
            }];
            if let Some(pair) = &projection.lora {
                terms.push(Term {
                    weight: pair.b()?,
                    x: low,
                });
            }
            all.push(Product { out, terms, onto });
        }
        products(all);
        pool.give_factors(factors);
        pool.give_factors([wide]);
        Ok(narrow)
    }

    /// The gradients of what comes out, as factors.
    fn wide<'v>(&self, of_outs: &[&'v [f32]], pool: &Pool) -> Result<Vec<Factor<'v>>> {
        let each = self.all.iter().zip(of_outs);
        each.map(|(projection, of_out)| {
            Ok(pool.factor(self.shape.half, of_out, projection.matrix()?.height()))
        })
        .collect()
    }

    /// `s_i B_i^T of_y_i`: the gradients of the narrow values before they were scaled.
    pub(super) fn slopes(&self, of_outs: &[&[f32]], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let wide = self.wide(of_outs, pool)?;
        let slopes = self.slopes_of(&wide, pool)?;
        pool.give_factors(wide);
        Ok(slopes)
    }

    fn slopes_of(&self, wide: &[Factor<'_>], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let mut slopes = self.ranks(pool);
        let mut all = Vec::new();
        for ((projection, out), x) in self.all.iter().zip(&mut slopes).zip(wide) {
            if let Some(pair) = &projection.lora {
                all.push(alone(out, pair.b()?.turned(), x));
            }
        }
        products(all);
        self.scale(&mut slopes);
        Ok(slopes)
    }

    /// Puts the gradient of the input into `of_x`. Gives [`Set::slopes`].
    pub(super) fn backward(
        &self,
        of_outs: &[&[f32]],
        of_x: &mut [f32],
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let wide = self.wide(of_outs, pool)?;
        let slopes = self.slopes_of(&wide, pool)?;
        let narrow = self.factors(&slopes, pool);
        let mut terms = Vec::new();
        for ((projection, wide), narrow) in self.all.iter().zip(&wide).zip(&narrow) {
            terms.push(Term {
                weight: projection.matrix()?.turned(),
                x: wide,
            });
            if let (Some(pair), None) = (&projection.lora, projection.dropout) {
                terms.push(Term {
                    weight: pair.a()?.turned(),
                    x: narrow,
                });
            }
        }
        product(of_x, terms, Onto::Zero);
        for (projection, narrow) in self.all.iter().zip(&narrow) {
            if let (Some(pair), Some(dropout)) = (&projection.lora, projection.dropout) {
                let mut own = pool.take(of_x.len());
                products(vec![alone(&mut own, pair.a()?.turned(), narrow)]);
                dropout.apply(&mut own, self.features, &self.shape.places);
                elementwise::add(of_x, &own, 1.);
                pool.give(own);
            }
        }
        pool.give_factors(narrow);
        pool.give_factors(wide);
        Ok(slopes)
    }

    /// Adds the gradients of what is trained. `x` is the input, `narrow` and `slopes` what the passes gave.
    pub(super) fn gradients(
        &self,
        linears: &[&Linear],
        of_outs: &[&[f32]],
        x: &[f32],
        narrow: &[Vec<f32>],
        slopes: &[Vec<f32>],
        trainable: &mut Trainable<'_>,
    ) -> Result<()> {
        let pool = trainable.pool;
        for (number, (projection, linear)) in self.all.iter().zip(linears).enumerate() {
            let (Some(of_out), Some(narrow), Some(slope)) =
                (of_outs.get(number), narrow.get(number), slopes.get(number))
            else {
                continue;
            };
            let height = projection.matrix()?.height();
            if let Base::Dense(weight) = &linear.base {
                trainable.add(weight, |sum| {
                    outer((of_out, height), (x, self.features), sum, Order::Straight);
                })?;
            }
            if let (Some(pair), Some(lora)) = (&projection.lora, &linear.lora) {
                let dropped = self.dropped(projection, x, pool);
                let input = dropped.as_deref().unwrap_or(x);
                trainable.add(&lora.a, |sum| {
                    outer(
                        (input, self.features),
                        (slope, pair.rank),
                        sum,
                        Order::Turned,
                    );
                })?;
                pool.give_all(dropped);
                trainable.add(&lora.b, |sum| {
                    outer((of_out, height), (narrow, pair.rank), sum, Order::Straight);
                })?;
            }
        }
        Ok(())
    }
}
