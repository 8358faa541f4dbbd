//! Products of weights and activations: `out = W1 x1 + W2 x2 + ..`, over all cores.
//!
//! The rows of all products of a call are dealt out in tasks. A task makes a block of a weight ready, as deep as fits into
//! the cache, and goes with it over all panels.

use rayon::prelude::*;

use crate::dispatch::Isa;
use crate::matrix::Matrix;
use crate::micro::{TILE, Tile, multiply, multiply_pairs};
use crate::panels::{LANES, pairs, round_to_bf16};

/// The depth of a block, in features: its 32 tokens and its rows both stay in the second cache.
const DEPTH: usize = 512;
/// The most tiles of one task.
const TILES: usize = 12;

/// Activations as one factor of a product.
#[derive(Debug, Clone)]
pub enum Factor<'a> {
    /// Panels in f32.
    F32(&'a [f32]),
    /// Panels of pairs of bf16, see [`pairs`]: the other factor is rounded to bf16 too.
    Pairs(Pairs),
}

/// Activations rounded to bf16.
#[derive(Debug, Clone)]
pub enum Pairs {
    /// For processors that multiply them.
    Bits(Vec<u32>),
    /// For others: the rounded values in f32.
    Rounded(Vec<f32>),
}

impl Pairs {
    /// Rounds panels of so many features, into a buffer of the right kind.
    pub fn of(data: &[f32], features: usize) -> Self {
        if Isa::current() >= Isa::Avx512Bf16 {
            let panels = data.len() / (features.max(1) * LANES);
            let mut out = vec![0; panels * features.div_ceil(2) * LANES];
            pairs(data, features, &mut out);
            Self::Bits(out)
        } else {
            let mut rounded = data.to_vec();
            round_to_bf16(&mut rounded);
            Self::Rounded(rounded)
        }
    }
}

/// One summand: a weight and what it is multiplied by.
#[derive(Debug, Clone)]
pub struct Term<'a> {
    /// The weight.
    pub weight: Matrix<'a>,
    /// Panels with as many features as the weight is deep.
    pub x: &'a Factor<'a>,
}

/// One product: `out (+)= sum of terms`.
pub struct Product<'a> {
    /// Panels with as many features as each weight is high.
    pub out: &'a mut [f32],
    /// The summands.
    pub terms: Vec<Term<'a>>,
    /// Whether the sum is added to what is there.
    pub add: bool,
}

#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write disjoint rows.
unsafe impl Send for Shared {}
// SAFETY: the same.
unsafe impl Sync for Shared {}

struct Task {
    product: usize,
    rows: std::ops::Range<usize>,
}

/// Computes some products that don't depend on each other.
///
/// # Panics
/// If a factor has not as many features as its weight is deep, or a weight not the height of its output.
pub fn products(mut all: Vec<Product<'_>>) {
    let mut tasks = Vec::new();
    let threads = rayon::current_num_threads().max(1);
    for (product, each) in all.iter().enumerate() {
        let Some(height) = each.terms.first().map(|term| term.weight.height()) else {
            continue;
        };
        check(each, height);
        let tiles = height.div_ceil(TILE);
        let count = tiles.div_ceil(TILES).next_multiple_of(threads).min(tiles);
        for task in 0..count {
            let from = tiles * task / count * TILE;
            let to = (tiles * (task + 1) / count * TILE).min(height);
            tasks.push(Task {
                product,
                rows: from..to,
            });
        }
    }
    let outs: Vec<Shared> = all
        .iter_mut()
        .map(|each| Shared(each.out.as_mut_ptr()))
        .collect();
    let all = &all;
    tasks
        .into_par_iter()
        .for_each_init(Buffers::default, |buffers, task| {
            let each = &all[task.product];
            // SAFETY: `check` saw that the output has room; no two tasks have a row in common.
            unsafe { rows_of(each, outs[task.product], task.rows, buffers) };
        });
}

/// Computes one product.
pub fn product(out: &mut [f32], terms: Vec<Term<'_>>, add: bool) {
    products(vec![Product { out, terms, add }]);
}

fn check(product: &Product<'_>, height: usize) {
    let panels = product.out.len() / (height.max(1) * LANES);
    assert_eq!(
        product.out.len(),
        panels * height * LANES,
        "the output's size"
    );
    for term in &product.terms {
        assert_eq!(term.weight.height(), height, "heights of the weights");
        let depth = term.weight.depth();
        let (found, wanted) = match term.x {
            Factor::F32(x) => (x.len(), panels * depth * LANES),
            Factor::Pairs(Pairs::Rounded(x)) => (x.len(), panels * depth * LANES),
            Factor::Pairs(Pairs::Bits(x)) => (x.len(), panels * depth.div_ceil(2) * LANES),
        };
        assert_eq!(found, wanted, "the factor's size");
    }
}

#[derive(Default)]
struct Buffers {
    floats: Vec<f32>,
    pairs: Vec<u32>,
}

/// # Safety
/// Nobody else may use `rows` of the output, which must be as large as [`check`] wants it.
unsafe fn rows_of(
    product: &Product<'_>,
    out: Shared,
    rows: std::ops::Range<usize>,
    buffers: &mut Buffers,
) {
    let mut add = product.add;
    for term in &product.terms {
        let (height, all) = (term.weight.height(), term.weight.depth());
        let panels = product.out.len() / (height * LANES);
        for start in (0..all).step_by(DEPTH) {
            let depths = start..(start + DEPTH).min(all);
            let depth = depths.len();
            // SAFETY: row `row` of panel `panel` is inside the output.
            let place =
                |panel: usize, row: usize| unsafe { out.0.add((panel * height + row) * LANES) };
            match term.x {
                Factor::Pairs(Pairs::Bits(x)) => {
                    let block = &mut buffers.pairs;
                    term.weight.pack_pairs(rows.clone(), depths, block);
                    let (depth, all) = (depth.div_ceil(2), all.div_ceil(2));
                    let x = x.chunks_exact(all * LANES);
                    let x = x.map(|x| &x[start / 2 * LANES..][..depth * LANES]);
                    // SAFETY: the rows are this task's; bits are made only where the processor has the instruction.
                    let multiply = |tile| unsafe { packed_pairs(tile) };
                    over_panels(block, x, &rows, place, add, multiply);
                }
                Factor::F32(_) | Factor::Pairs(Pairs::Rounded(_)) => {
                    let x = match term.x {
                        Factor::F32(x) => x,
                        Factor::Pairs(Pairs::Rounded(x)) => x.as_slice(),
                        Factor::Pairs(Pairs::Bits(_)) => &[],
                    };
                    let block = &mut buffers.floats;
                    term.weight.pack(rows.clone(), depths, block);
                    if matches!(term.x, Factor::Pairs(_)) && !term.weight.is_bf16() {
                        for x in block.iter_mut() {
                            *x = f32::from_bits(crate::panels::bf16_bits(*x) << 16);
                        }
                    }
                    debug_assert_eq!(x.len(), panels * all * LANES);
                    let x = x.chunks_exact(all * LANES);
                    let x = x.map(|x| &x[start * LANES..][..depth * LANES]);
                    // SAFETY: the rows are this task's.
                    let multiply = |tile| unsafe { packed(tile) };
                    over_panels(block, x, &rows, place, add, multiply);
                }
            }
            add = true;
        }
    }
}

/// Goes with a block of packed rows over the panels of `x`, each cut to the block's depth; `place(panel, row)` is where a row
/// of the result is.
#[inline(always)]
fn over_panels<'x, T: 'x>(
    block: &[T],
    x: impl Iterator<Item = &'x [T]>,
    rows: &std::ops::Range<usize>,
    place: impl Fn(usize, usize) -> *mut f32,
    add: bool,
    multiply: impl Fn(Tile<T, T>),
) {
    for (panel, b) in x.enumerate() {
        let depth = b.len() / LANES;
        let tiles = block.chunks_exact(depth * TILE);
        for (a, row) in tiles.zip(rows.clone().step_by(TILE)) {
            multiply(Tile {
                a: a.as_ptr(),
                b: b.as_ptr(),
                depth,
                c: place(panel, row),
                rows: TILE.min(rows.end - row),
                add,
            });
        }
    }
}

/// A tile of packed rows, no more of them than needed.
///
/// # Safety
/// See [`Tile`].
#[inline]
unsafe fn packed(tile: Tile<f32, f32>) {
    // SAFETY: the caller's promise; the rows of a packed tile are all there.
    unsafe {
        match tile.rows {
            0..=4 => multiply::<4, 2, 1, TILE>(tile),
            5..=8 => multiply::<8, 2, 1, TILE>(tile),
            _ => multiply::<TILE, 2, 1, TILE>(tile),
        }
    }
}

/// The same for pairs.
///
/// # Safety
/// See [`multiply_pairs`].
#[inline]
unsafe fn packed_pairs(tile: Tile<u32, u32>) {
    // SAFETY: as above.
    unsafe {
        match tile.rows {
            0..=4 => multiply_pairs::<4>(tile),
            5..=8 => multiply_pairs::<8>(tile),
            _ => multiply_pairs::<TILE>(tile),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
