//! Projections that share their input: `y_i = W_i x + s_i B_i A_i x`, and back.

use candle_core::Result;
use pipeline_kernels::elementwise::{self, scale};
use pipeline_kernels::panels::size;
use pipeline_kernels::product::{Factor, Pairs, Product, Term, product, products};
use pipeline_kernels::reduce::{Order, outer};
use rayon::prelude::*;

use super::layer::{Shape, Trainable};
use super::pool::Pool;
use super::weights::Projection;
use crate::ml::linear::{Base, Linear};

/// Some projections of the same values.
pub(super) struct Set<'a> {
    all: Vec<&'a Projection<'a>>,
    /// Features of the input.
    features: usize,
    shape: &'a Shape,
}

/// Copies over all cores.
pub(super) fn copy(from: &[f32], to: &mut [f32]) {
    const SPAN: usize = 1 << 14;
    to.par_chunks_mut(SPAN)
        .zip(from.par_chunks(SPAN))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

/// Values as a factor of a product with the base's weights, which is in bf16 if `half`.
pub(super) fn factor(half: bool, x: &[f32], features: usize) -> Factor<'_> {
    if half {
        Factor::Pairs(Pairs::of(x, features))
    } else {
        Factor::F32(x)
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
        let mut narrow = self.ranks(pool);
        let dropped = self.all.iter().map(|p| self.dropped(p, x, pool));
        let dropped: Vec<Option<Vec<f32>>> = dropped.collect();
        let inputs = dropped
            .iter()
            .map(|own| Factor::F32(own.as_deref().unwrap_or(x)));
        let inputs: Vec<Factor<'_>> = inputs.collect();
        let mut all = Vec::new();
        for ((projection, out), x) in self.all.iter().zip(&mut narrow).zip(&inputs) {
            if let Some(pair) = &projection.lora {
                all.push(Product {
                    out,
                    terms: vec![Term {
                        weight: pair.a()?,
                        x,
                    }],
                    add: false,
                });
            }
        }
        products(all);
        drop(inputs);
        pool.give_all(dropped.into_iter().flatten());
        self.scale(&mut narrow);
        Ok(narrow)
    }

    fn scale(&self, narrow: &mut [Vec<f32>]) {
        for (projection, narrow) in self.all.iter().zip(narrow) {
            if let Some(pair) = &projection.lora {
                scale(narrow, pair.scaling);
            }
        }
    }

    /// Puts `y_i` into `outs`, or adds it to what is there. Gives each pair's narrow values.
    pub(super) fn forward(
        &self,
        x: &[f32],
        outs: Vec<&mut Vec<f32>>,
        add: bool,
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let narrow = self.narrow(x, pool)?;
        let wide = factor(self.shape.half, x, self.features);
        let factors: Vec<Factor<'_>> = narrow.iter().map(|x| Factor::F32(x)).collect();
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
            all.push(Product { out, terms, add });
        }
        products(all);
        drop(factors);
        Ok(narrow)
    }

    /// `s_i B_i^T of_y_i`: the gradients of the narrow values before they were scaled.
    pub(super) fn slopes(&self, of_outs: &[&[f32]], pool: &Pool) -> Result<Vec<Vec<f32>>> {
        let mut slopes = self.ranks(pool);
        let plain: Vec<Factor<'_>> = of_outs.iter().map(|x| Factor::F32(x)).collect();
        let mut all = Vec::new();
        for ((projection, out), x) in self.all.iter().zip(&mut slopes).zip(&plain) {
            if let Some(pair) = &projection.lora {
                all.push(Product {
                    out,
                    terms: vec![Term {
                        weight: pair.b()?.turned(),
                        x,
                    }],
                    add: false,
                });
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
        add: bool,
        pool: &Pool,
    ) -> Result<Vec<Vec<f32>>> {
        let slopes = self.slopes(of_outs, pool)?;
        let mut wide = Vec::new();
        for (projection, of_out) in self.all.iter().zip(of_outs) {
            wide.push(factor(
                self.shape.half,
                of_out,
                projection.matrix()?.height(),
            ));
        }
        let narrow: Vec<Factor<'_>> = slopes.iter().map(|x| Factor::F32(x)).collect();
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
        products(vec![Product {
            out: of_x,
            terms,
            add,
        }]);
        for (projection, narrow) in self.all.iter().zip(&narrow) {
            if let (Some(pair), Some(dropout)) = (&projection.lora, projection.dropout) {
                let mut own = pool.take(of_x.len());
                let term = Term {
                    weight: pair.a()?.turned(),
                    x: narrow,
                };
                product(&mut own, vec![term], false);
                dropout.apply(&mut own, self.features, &self.shape.places);
                elementwise::add(of_x, &own, 1.);
                pool.give(own);
            }
        }
        drop(narrow);
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
        let model = trainable.model;
        let pool = &model.pool;
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
