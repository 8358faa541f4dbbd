//! Products of weights with a few vectors, and what else text generation computes of single tokens.
//!
//! A weight is read from memory once for all vectors, which is what takes the time; what it is stored as becomes floats in
//! registers. Each sum has an order of its own, so a result depends neither on the number of threads nor on the vectors beside it.

mod attention;
mod plain;
mod rows;
#[cfg(target_arch = "x86_64")]
mod wide;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

pub use attention::{Attention, Cached};
pub use rows::{gate, largest, norm, rotate, round};

use crate::matrix::Matrix;

/// Rows that are summed up side by side.
const ROWS: usize = 4;
/// Values of a weight that are worth a task of their own.
const TASK: usize = 1 << 15;

/// A weight and vectors, one after the other, each as long as the weight is deep.
pub struct VectorProduct<'a> {
    /// The weight, not transposed.
    pub weight: Matrix<'a>,
    /// (vectors, depth).
    pub x: &'a [f32],
    /// Whether the vectors hold numbers that bf16 has, so that their products may be made in bf16.
    pub rounded: bool,
    /// (vectors, height); what is there is lost.
    pub out: &'a mut [f32],
}

/// Computes `out = W x` for each vector of some products that don't depend on each other, over all cores.
///
/// # Panics
/// If sizes don't fit or a weight is transposed.
pub fn vector_products(mut all: Vec<VectorProduct<'_>>) {
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
    let outs: Vec<Outputs> = all.iter_mut().map(Outputs::of).collect();
    #[cfg(target_arch = "x86_64")]
    let laid = Laid::all(&all);
    let all = &all;
    let work = |buffer: &mut Vec<f32>, product: usize, rows: Range<usize>| {
        let part = Part {
            weight: all[product].weight,
            x: all[product].x,
            rows,
            out: outs[product],
        };
        #[cfg(target_arch = "x86_64")]
        if let Some((layout, words)) = laid.of(product) {
            wide::run(&part, layout, words);
            return;
        }
        plain::run(part, buffer);
    };
    let next = AtomicUsize::new(0);
    let deal = |_| {
        let mut buffer = Vec::new();
        while let Some((product, rows)) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut buffer, *product, rows.clone());
        }
    };
    match rayon::current_num_threads().min(tasks.len()) {
        0 | 1 => deal(0),
        threads => (0..threads).into_par_iter().with_max_len(1).for_each(deal),
    }
}

/// The products' vectors as the loops of [`wide`] read them.
#[cfg(target_arch = "x86_64")]
struct Laid {
    /// By product, which of the layouts.
    products: Vec<Option<usize>>,
    layouts: Vec<(wide::Layout, Vec<u32>)>,
}

#[cfg(target_arch = "x86_64")]
impl Laid {
    fn all(all: &[VectorProduct<'_>]) -> Self {
        let mut sources: Vec<(&[f32], wide::Layout, usize)> = Vec::new();
        let mut products = Vec::with_capacity(all.len());
        for each in all {
            let depth = each.weight.depth();
            let layout = wide::Layout::of(&each.weight, each.rounded).filter(|_| depth > 0);
            products.push(layout.map(|layout| {
                let same = |(x, other, of): &(&[f32], wide::Layout, usize)| {
                    std::ptr::eq(*x, each.x) && *other == layout && *of == depth
                };
                sources.iter().position(same).unwrap_or_else(|| {
                    sources.push((each.x, layout, depth));
                    sources.len() - 1
                })
            }));
        }
        let lay = |(x, layout, depth)| (layout, wide::lay(layout, x, depth));
        Self {
            products,
            layouts: sources.into_iter().map(lay).collect(),
        }
    }

    /// The layout of a product's vectors and their words, if its loop is there.
    fn of(&self, product: usize) -> Option<(wide::Layout, &[u32])> {
        let (layout, words) = &self.layouts[self.products[product]?];
        Some((*layout, words))
    }
}

/// Some rows of a product.
struct Part<'a> {
    weight: Matrix<'a>,
    x: &'a [f32],
    /// Nobody else uses the results of these.
    rows: Range<usize>,
    out: Outputs,
}

/// The results of a product (vectors, height), which several tasks write.
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
    fn of(product: &mut VectorProduct<'_>) -> Self {
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
