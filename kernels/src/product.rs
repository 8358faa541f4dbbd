//! Products of weights and activations, `out = W1 x1 + W2 x2 + ..`, over all cores.
//!
//! The rows of all products of a call are split into tasks. A task packs a block of a weight, as deep as fits into the cache, and
//! multiplies all panels by it. Where there are few rows, as in LoRA's down projection, the panels are split instead.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::bf16::{bf16_bits, pairs, round_to_bf16};
use crate::dispatch::Isa;
use crate::matrix::Matrix;
use crate::micro::{TILE, Tile, arrange, done, multiply, multiply_arranged, multiply_pairs};
use crate::panels::{self, LANES, count};

/// The depth of a block, in features: the block's rows and a panel's 32 tokens both stay in the second-level cache.
const DEPTH: usize = 512;
/// The largest depth of a term's last block, and of a block together with shallow blocks of the terms after it.
const DEEPEST: usize = 640;
/// The largest number of tiles that are packed at once.
const TILES: usize = 12;
/// The largest number of tiles with which panels are split instead of rows.
const NARROW: usize = 4;

/// Activations as the right factor of a product, panels of as many features as the weight is deep.
#[derive(Debug, Clone)]
pub enum Factor<'a> {
    /// Panels in f32: the product is computed in f32.
    F32(&'a [f32]),
    /// Panels rounded to bf16: the weight is rounded to bf16 too, and sums are in f32.
    Pairs(Pairs),
}

/// Activations rounded to bf16, in the form that the processor multiplies best.
#[derive(Debug, Clone)]
pub struct Pairs(Kind);

#[derive(Debug, Clone)]
enum Kind {
    /// Panels of [`pairs`], for processors with instructions for them.
    Bits(Vec<u32>),
    /// The rounded values in f32, for other processors.
    Rounded(Vec<f32>),
}

impl Pairs {
    /// Rounds panels of `features` features. `take` provides a buffer of the length that it is given, contents unspecified; it is
    /// not called on processors that don't multiply pairs.
    ///
    /// # Panics
    /// If `data` is not a whole number of panels of `features`, or `take` returns a buffer of another length.
    pub fn round(data: &[f32], features: usize, take: impl FnOnce(usize) -> Vec<u32>) -> Self {
        let panels = count(data.len(), features, "the numbers to pair");
        Self(if Isa::current().multiplies_pairs() {
            let mut out = take(panels * features.div_ceil(2) * LANES);
            pairs(data, features, &mut out);
            Kind::Bits(out)
        } else {
            let mut rounded = data.to_vec();
            round_to_bf16(&mut rounded);
            Kind::Rounded(rounded)
        })
    }

    /// Returns the buffer that [`Pairs::round`] took, if it took one.
    pub fn into_buffer(self) -> Option<Vec<u32>> {
        match self.0 {
            Kind::Bits(buffer) => Some(buffer),
            Kind::Rounded(_) => None,
        }
    }
}

/// One term of a sum of products, `weight * x`.
#[derive(Debug, Clone)]
pub struct Term<'a> {
    /// The weight (height, depth).
    pub weight: Matrix<'a>,
    /// Panels of `depth` features.
    pub x: &'a Factor<'a>,
}

/// The values to which the sum of a product's terms is added.
#[derive(Debug, Clone, Copy)]
pub enum Onto<'a> {
    /// Zeros: the output is overwritten.
    Zero,
    /// The values in the output.
    Out,
    /// Other panels, of the output's size.
    Values(&'a [f32]),
}

/// One product: `out = onto + bias + sum over terms of weight * x`.
pub struct Product<'a> {
    /// Panels of as many features as each weight has rows.
    pub out: &'a mut [f32],
    /// The terms, whose weights all have the same number of rows.
    pub terms: Vec<Term<'a>>,
    /// The values to which the sum is added.
    pub onto: Onto<'a>,
    /// A number for each feature of the output, which is added to that feature of all tokens.
    pub bias: Option<&'a [f32]>,
}

#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write disjoint rows or panels.
unsafe impl Send for Shared {}
// SAFETY: the same.
unsafe impl Sync for Shared {}

/// A part of a product's output: some rows of some panels.
struct Task {
    product: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Splits a product into tasks, by rows or, where there are few of them, by panels.
fn split_into_tasks(product: usize, height: usize, panels: usize, tasks: &mut Vec<Task>) {
    let threads = rayon::current_num_threads().max(1);
    let tiles = height.div_ceil(TILE);
    let few = tiles <= NARROW;
    let (parts, count) = if few {
        (panels, (2 * threads).min(panels))
    } else {
        let count = tiles.div_ceil(TILES).next_multiple_of(threads);
        (tiles, count.min(tiles))
    };
    for task in 0..count {
        let part = parts * task / count..parts * (task + 1) / count;
        let (rows, panels) = if few {
            (0..height, part)
        } else {
            (part.start * TILE..(part.end * TILE).min(height), 0..panels)
        };
        tasks.push(Task {
            product,
            rows,
            panels,
        });
    }
}

/// Computes several products that don't depend on each other.
///
/// # Panics
/// If, in one of them, the weights differ in their number of rows, the output is not a whole number of panels of so many features,
/// a factor has not as many panels of its weight's depth, or `onto` or the bias has another size than the output needs.
pub fn products(mut all: Vec<Product<'_>>) {
    let mut tasks = Vec::new();
    for (product, each) in all.iter_mut().enumerate() {
        check_onto(each);
        let height = each.terms.first().map_or(0, |term| term.weight.height());
        let panels = check(each, height);
        if let Some(bias) = each.bias {
            assert_eq!(bias.len(), height, "the size of the bias");
        }
        if each.terms.iter().any(|term| term.weight.depth() > 0) {
            split_into_tasks(product, height, panels, &mut tasks);
        } else {
            // A sum of nothing.
            match each.onto {
                Onto::Zero => each.out.fill(0.),
                Onto::Out => {}
                Onto::Values(values) => each.out.copy_from_slice(values),
            }
            if let Some(bias) = each.bias {
                let rows = each.out.as_chunks_mut::<LANES>().0.iter_mut();
                for (row, bias) in rows.zip(bias.iter().cycle()) {
                    for x in row {
                        *x += bias;
                    }
                }
            }
        }
    }
    let outs: Vec<Shared> = all
        .iter_mut()
        .map(|each| Shared(each.out.as_mut_ptr()))
        .collect();
    let all = &all;
    tasks.into_par_iter().for_each(|task| {
        let each = &all[task.product];
        BLOCKS.with_borrow_mut(|blocks| {
            // SAFETY: `check` saw that the output has `panels` panels of `height` rows, and `check_onto` that what is added to
            // has as many; `split_into_tasks` gave no two tasks a row of a panel in common.
            unsafe { run_task(each, outs[task.product], task.rows, task.panels, blocks) };
        });
    });
}

/// Computes one product without a bias, see [`Product`].
///
/// # Panics
/// As [`products`] does.
pub fn product(out: &mut [f32], terms: Vec<Term<'_>>, onto: Onto<'_>) {
    products(vec![Product {
        out,
        terms,
        onto,
        bias: None,
    }]);
}

fn check_onto(product: &Product<'_>) {
    if let Onto::Values(values) = product.onto {
        let size = product.out.len();
        assert_eq!(values.len(), size, "the size of what is added to");
    }
}

/// Checks a product's sizes and returns the number of panels.
fn check(product: &Product<'_>, height: usize) -> usize {
    if product.terms.is_empty() {
        return 0;
    }
    if height == 0 {
        assert!(product.out.is_empty(), "the output of weights without rows");
        return 0;
    }
    let panels = count(product.out.len(), height, "the output");
    for term in &product.terms {
        assert_eq!(term.weight.height(), height, "heights of the weights");
        let depth = term.weight.depth();
        let (found, rows) = match term.x {
            Factor::F32(x) => (x.len(), depth),
            Factor::Pairs(Pairs(Kind::Rounded(x))) => (x.len(), depth),
            Factor::Pairs(Pairs(Kind::Bits(x))) => (x.len(), depth.div_ceil(2)),
        };
        panels::check(found, rows, panels, "the factor");
    }
    panels
}

/// A part of a term's depth.
struct Piece<'a> {
    term: &'a Term<'a>,
    depths: Range<usize>,
}

/// Splits the depths of all terms into pieces, and these into groups that are multiplied panel by panel together: a shallow piece
/// (of a LoRA pair) then finds the sums of the deep one before it in the first-level cache.
fn groups<'a>(terms: &'a [Term<'a>]) -> Vec<Vec<Piece<'a>>> {
    let mut groups: Vec<Vec<Piece<'a>>> = Vec::new();
    let mut room = 0;
    for term in terms {
        let all = term.weight.depth();
        let mut start = 0;
        while start < all {
            let deep = if all - start <= DEEPEST {
                DEEPEST
            } else {
                DEPTH
            };
            let depths = start..(start + deep).min(all);
            start = depths.end;
            let depth = depths.len();
            let piece = Piece { term, depths };
            match groups.last_mut() {
                Some(group) if depth <= room => {
                    room -= depth;
                    group.push(piece);
                }
                _ => {
                    room = DEEPEST.saturating_sub(depth);
                    groups.push(vec![piece]);
                }
            }
        }
    }
    groups
}

/// The weights of a piece for some rows, packed for the innermost loop.
#[derive(Default)]
struct Block {
    floats: Vec<f32>,
    pairs: Vec<u32>,
    /// Whether [`arrange`] put the pairs in another order.
    arranged: bool,
    spare: Vec<u32>,
}

thread_local! {
    static BLOCKS: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

impl Piece<'_> {
    fn pack(&self, rows: &Range<usize>, block: &mut Block) {
        let (rows, depths, weight) = (rows.clone(), self.depths.clone(), &self.term.weight);
        match self.term.x {
            Factor::Pairs(Pairs(Kind::Bits(_))) => {
                let depth = depths.len().div_ceil(2);
                weight.pack_pairs(rows, depths, &mut block.pairs);
                block.arranged = arrange(&mut block.pairs, &mut block.spare, depth);
            }
            Factor::F32(_) => weight.pack(rows, depths, &mut block.floats),
            Factor::Pairs(Pairs(Kind::Rounded(_))) => {
                weight.pack(rows, depths, &mut block.floats);
                if !weight.is_bf16() {
                    for x in &mut block.floats {
                        *x = f32::from_bits(bf16_bits(*x) << 16);
                    }
                }
            }
        }
    }

    /// Multiplies tile number `tile` of the packed rows by a panel.
    ///
    /// # Safety
    /// `rows` rows of 32 floats from `c` on are nobody else's, and may be read from `from` on.
    unsafe fn multiply(
        &self,
        block: &Block,
        (tile, panel): (usize, usize),
        (c, from): (*mut f32, Option<*const f32>),
        rows: usize,
    ) {
        let all = self.term.weight.depth();
        let x = match self.term.x {
            Factor::Pairs(Pairs(Kind::Bits(x))) => {
                let (first, depth) = (self.depths.start / 2, self.depths.len().div_ceil(2));
                let a = &block.pairs[tile * depth * TILE..][..depth * TILE];
                let b = &x[(panel * all.div_ceil(2) + first) * LANES..][..depth * LANES];
                let (a, b) = (a.as_ptr(), b.as_ptr());
                // SAFETY: the slices are as long as the tile reads; the rest is the caller's promise.
                unsafe {
                    let tile = Tile {
                        a,
                        b,
                        depth,
                        c,
                        rows,
                        from,
                    };
                    if block.arranged {
                        multiply_arranged(tile);
                    } else {
                        packed_pairs(tile);
                    }
                }
                return;
            }
            Factor::F32(x) => *x,
            Factor::Pairs(Pairs(Kind::Rounded(x))) => x,
        };
        let (first, depth) = (self.depths.start, self.depths.len());
        let a = &block.floats[tile * depth * TILE..][..depth * TILE];
        let b = &x[(panel * all + first) * LANES..][..depth * LANES];
        let (a, b) = (a.as_ptr(), b.as_ptr());
        // SAFETY: the slices are as long as the tile reads; the rest is the caller's promise.
        unsafe {
            packed(Tile {
                a,
                b,
                depth,
                c,
                rows,
                from,
            });
        }
    }
}

/// # Safety
/// Nobody else may use `rows` of the output's `panels`, which must be as large as [`check`] wants it.
unsafe fn run_task(
    product: &Product<'_>,
    out: Shared,
    rows: Range<usize>,
    panels: Range<usize>,
    blocks: &mut Vec<Block>,
) {
    let height = product.terms.first().map_or(0, |term| term.weight.height());
    for (number, pieces) in groups(&product.terms).iter().enumerate() {
        if blocks.len() < pieces.len() {
            blocks.resize_with(pieces.len(), Block::default);
        }
        for (piece, block) in pieces.iter().zip(blocks.iter_mut()) {
            piece.pack(&rows, block);
        }
        for panel in panels.clone() {
            for (tile, row) in rows.clone().step_by(TILE).enumerate() {
                let index = (panel * height + row) * LANES;
                // SAFETY: row `row` of panel `panel` is inside the output.
                let c = unsafe { out.0.add(index) };
                let mut from = match product.onto {
                    Onto::Zero if number == 0 => None,
                    Onto::Values(values) if number == 0 => Some(values[index..].as_ptr()),
                    _ => Some(c.cast_const()),
                };
                let count = TILE.min(rows.end - row);
                if let Some(bias) = product.bias.filter(|_| number == 0) {
                    // SAFETY: these rows are the caller's, and what they are added to has as many as the output.
                    unsafe { write_bias(&bias[row..row + count], (c, from)) };
                    from = Some(c.cast_const());
                }
                for (piece, block) in pieces.iter().zip(blocks.iter()) {
                    // SAFETY: the rows are the caller's, and `Values` are as many as the output's.
                    unsafe { piece.multiply(block, (tile, panel), (c, from), count) };
                    from = Some(c.cast_const());
                }
            }
        }
    }
    done();
}

/// Writes a bias, added to the values that the sum starts with, into rows of 32 floats from `c` on.
///
/// # Safety
/// As many rows as `bias` has numbers are nobody else's, and may be read from `from` on.
unsafe fn write_bias(bias: &[f32], (c, from): (*mut f32, Option<*const f32>)) {
    for (row, bias) in bias.iter().enumerate() {
        for index in row * LANES..(row + 1) * LANES {
            // SAFETY: one of the rows. `from` may be `c` itself, so both are only read and written by pointers.
            unsafe {
                let before = from.map_or(0., |from| *from.add(index));
                *c.add(index) = before + bias;
            }
        }
    }
}

/// Multiplies a tile of packed rows, with the smallest kernel that covers the wanted ones.
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

/// Like [`packed`], for pairs of bf16.
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
