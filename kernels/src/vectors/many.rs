//! Products of weights with many vectors, such as the tokens of a prompt, by panels of 32 of them.

use rayon::prelude::*;

use super::VectorProduct;
use crate::FloatType;
use crate::matrix::Values;
use crate::panels::{self, LANES};
use crate::product::{Factor, Onto, Pairs, Product, Term, products};

/// [`super::vector_products`] for many vectors, on all threads of the pool. A weight is made ready once for all of them, by the loops of
/// [`crate::product`]. Sums have another order than there; a result depends neither on the number of threads nor on the other vectors
/// of a call.
///
/// # Panics
/// As [`super::vector_products`] does.
pub fn many_vector_products(mut all: Vec<VectorProduct<'_>>) {
    // The vectors, each once, and whether they are multiplied in bf16.
    let mut sources: Vec<(&[f32], usize, bool)> = Vec::new();
    let mut numbers = Vec::with_capacity(all.len());
    let mut outs = Vec::with_capacity(all.len());
    for each in &all {
        let vectors = each.check();
        let rounded = each.rounded && is_exact_in_bf16(each.weight.values());
        let source = (each.x, each.weight.depth(), rounded);
        let same = |other: &(&[f32], usize, bool)| {
            std::ptr::eq(other.0, source.0) && (other.1, other.2) == (source.1, source.2)
        };
        let number = sources.iter().position(same);
        numbers.push(number.unwrap_or(sources.len()));
        if number.is_none() {
            sources.push(source);
        }
        outs.push(vec![0.; panels::size(each.weight.height(), vectors)]);
    }
    let filled: Vec<Vec<f32>> = sources
        .iter()
        .map(|(x, depth, _)| fill(x, *depth))
        .collect();
    let factors = sources.iter().zip(&filled);
    let factors: Vec<Factor<'_>> = factors
        .map(|((_, depth, rounded), filled)| {
            if *rounded {
                Factor::Pairs(Pairs::round(filled, *depth, |length| vec![0; length]))
            } else {
                Factor::F32(filled)
            }
        })
        .collect();
    let each = all.iter().zip(&mut outs).zip(&numbers);
    let each = each.map(|((each, out), number)| Product {
        out,
        terms: vec![Term {
            weight: each.weight,
            x: &factors[*number],
        }],
        onto: Onto::Zero,
        bias: None,
    });
    products(each.collect());
    for (each, out) in all.iter_mut().zip(&outs) {
        to_rows(out, each.weight.height(), each.out);
    }
}

/// Whether products in bf16 don't round the weight.
fn is_exact_in_bf16(weight: Values<'_>) -> bool {
    match weight {
        Values::Bf16(_) => true,
        Values::Nf4(nf4) => nf4.rounding == FloatType::Bf16,
        Values::F32(_) | Values::F16(_) => false,
    }
}

/// Vectors (vectors, depth) as panels.
fn fill(x: &[f32], depth: usize) -> Vec<f32> {
    let vectors = x.len().checked_div(depth).unwrap_or(0);
    let mut filled = vec![0.; panels::size(depth, vectors)];
    panels::fill(&mut filled, depth, vectors, |vector| {
        &x[vector * depth..][..depth]
    });
    filled
}

/// The features that are transposed at a time: a cache line of a row.
const FEATURES: usize = 16;

/// Panels of `height` features as rows of them.
fn to_rows(data: &[f32], height: usize, out: &mut [f32]) {
    if height == 0 {
        return;
    }
    let panels = data.par_chunks(height * LANES);
    let rows = out.par_chunks_mut(height * LANES).zip(panels);
    rows.for_each(|(rows, panel)| {
        for (number, features) in panel.chunks(FEATURES * LANES).enumerate() {
            for (lane, row) in rows.chunks_exact_mut(height).enumerate() {
                let values = features.iter().skip(lane).step_by(LANES);
                for (out, value) in row[number * FEATURES..].iter_mut().zip(values) {
                    *out = *value;
                }
            }
        }
    });
}
