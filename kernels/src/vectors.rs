//! Products of weights with a few vectors, and the other operations of text generation, which computes single tokens.
//!
//! A weight is read from memory once for all vectors, which takes most of the time; its stored values become floats in registers.
//! Each sum has a fixed order, so a result depends neither on the number of threads nor on the other vectors of a call.

mod attention;
mod plain;
mod rows;
#[cfg(target_arch = "x86_64")]
mod wide;

use std::ops::Range;

pub use attention::{Attention, Cached};
pub use rows::{argmax, gated_unit, rms_norm, rope, round_to_bf16, scale, soft_cap};

use crate::matrix::Matrix;
use crate::team::Team;

/// The number of rows that are summed side by side.
const ROWS: usize = 4;
/// The number of a weight's values in one task.
const TASK: usize = 1 << 15;

/// The product of a weight with several vectors.
pub struct VectorProduct<'a> {
    /// The weight (height, depth), not transposed.
    pub weight: Matrix<'a>,
    /// The vectors (vectors, depth), row-major.
    pub x: &'a [f32],
    /// Whether all elements of `x` are exact in bf16, so that products may be computed in bf16 (with sums in f32).
    pub rounded: bool,
    /// The results (vectors, height), row-major; overwritten.
    pub out: &'a mut [f32],
}

/// Computes `out = W x` for each vector of several products that don't depend on each other, on all threads of a team.
///
/// # Panics
/// If a weight is transposed, `x` is not a whole number of vectors of the weight's depth, or `out` has another size than
/// (vectors, height).
pub fn vector_products(team: &Team<'_>, mut all: Vec<VectorProduct<'_>>) {
    let mut tasks = Vec::new();
    for (product, each) in all.iter().enumerate() {
        let (height, depth) = (each.weight.height(), each.weight.depth());
        let vectors = each.x.len() / depth.max(1);
        assert!(!each.weight.is_transposed(), "the weight is transposed");
        assert_eq!(each.x.len(), vectors * depth, "the size of x");
        let size = vectors.checked_mul(height);
        assert_eq!(Some(each.out.len()), size, "the output's size");
        let rows = (TASK / depth.max(1)).next_multiple_of(ROWS).max(ROWS);
        let starts = (0..height).step_by(rows);
        tasks.extend(starts.map(|from| (product, from..(from + rows).min(height))));
    }
    let outs: Vec<Outputs> = all.iter_mut().map(Outputs::new).collect();
    #[cfg(target_arch = "x86_64")]
    let layouts = VectorLayouts::all(&all);
    let all = &all;
    team.share(tasks.len(), &|task| {
        let (product, rows) = &tasks[task];
        let part = Part {
            weight: all[*product].weight,
            x: all[*product].x,
            rows: rows.clone(),
            out: outs[*product],
        };
        #[cfg(target_arch = "x86_64")]
        if let Some((layout, lines)) = layouts.for_product(*product) {
            wide::run(&part, layout, lines);
            return;
        }
        plain::run(part);
    });
}

/// The products' vectors in the layouts that the loops of [`wide`] read.
#[cfg(target_arch = "x86_64")]
struct VectorLayouts {
    /// For each product, an index into `layouts`.
    products: Vec<Option<usize>>,
    layouts: Vec<(wide::Layout, Vec<wide::Line>)>,
}

#[cfg(target_arch = "x86_64")]
impl VectorLayouts {
    fn all(all: &[VectorProduct<'_>]) -> Self {
        let mut sources: Vec<(&[f32], wide::Layout, usize)> = Vec::new();
        let mut products = Vec::with_capacity(all.len());
        for each in all {
            let depth = each.weight.depth();
            let layout = wide::Layout::for_weight(&each.weight, each.rounded).filter(|_| depth > 0);
            products.push(layout.map(|layout| {
                let same = |(x, other, other_depth): &(&[f32], wide::Layout, usize)| {
                    std::ptr::eq(*x, each.x) && *other == layout && *other_depth == depth
                };
                sources.iter().position(same).unwrap_or_else(|| {
                    sources.push((each.x, layout, depth));
                    sources.len() - 1
                })
            }));
        }
        let lay_out = |(x, layout, depth)| (layout, wide::lay_out(layout, x, depth));
        Self {
            products,
            layouts: sources.into_iter().map(lay_out).collect(),
        }
    }

    /// The layout of a product's vectors and their words by lines, if [`wide`] has a loop for it.
    fn for_product(&self, product: usize) -> Option<(wide::Layout, &[wide::Line])> {
        let (layout, lines) = &self.layouts[self.products[product]?];
        Some((*layout, lines))
    }
}

/// Some rows of a product.
struct Part<'a> {
    weight: Matrix<'a>,
    x: &'a [f32],
    /// The rows; no other task writes their results.
    rows: Range<usize>,
    out: Outputs,
}

/// The results (vectors, height) of a product, which several tasks write.
#[derive(Clone, Copy)]
struct Outputs {
    first: *mut f32,
    vectors: usize,
    height: usize,
}

// SAFETY: tasks write the results of disjoint rows.
unsafe impl Send for Outputs {}
// SAFETY: the same.
unsafe impl Sync for Outputs {}

impl Outputs {
    fn new(product: &mut VectorProduct<'_>) -> Self {
        let height = product.weight.height();
        Self {
            first: product.out.as_mut_ptr(),
            vectors: product.out.len().checked_div(height).unwrap_or(0),
            height,
        }
    }

    /// # Safety
    /// Nobody else writes the row's results at the time, and the vectors they came from are still borrowed.
    #[inline(always)]
    unsafe fn put(self, vector: usize, row: usize, sum: f32) {
        debug_assert!(vector < self.vectors && row < self.height);
        // SAFETY: one of (vectors, height) results; the rest is the caller's promise.
        unsafe { *self.first.add(vector * self.height + row) = sum };
    }
}

#[cfg(test)]
mod tests;
