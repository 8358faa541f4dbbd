//! Products of weights and activations: `out = W1 x1 + W2 x2 + ..`, over all cores.
//!
//! The rows of all products of a call are dealt out in tasks. A task makes a block of a weight ready, as deep as fits into
//! the cache, and goes with it over all panels. Where there are few rows, as in LoRA's first product, panels are dealt out.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::bf16::{bf16_bits, pairs, round_to_bf16};
use crate::dispatch::Isa;
use crate::matrix::Matrix;
use crate::micro::{TILE, Tile, arrange, done, multiply, multiply_arranged, multiply_pairs};
use crate::panels::{self, LANES, count};

/// The depth of a block, in features: its 32 tokens and its rows both stay in the second cache.
const DEPTH: usize = 512;
/// The most of a term's last block, and of a block with shallow ones of other terms behind it.
const DEEPEST: usize = 640;
/// The most tiles made ready at once.
const TILES: usize = 12;
/// Tiles that are too few to be dealt out.
const NARROW: usize = 4;

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
pub struct Pairs(Kind);

#[derive(Debug, Clone)]
enum Kind {
    /// For processors that multiply them.
    Bits(Vec<u32>),
    /// For others: the rounded values in f32.
    Rounded(Vec<f32>),
}

impl Pairs {
    /// Rounds panels of so many features, into a buffer of the right kind. `take` gives one of a length, with anything in it.
    ///
    /// # Panics
    /// If `data` are no such panels, or `take` gives another length.
    pub fn of(data: &[f32], features: usize, take: impl FnOnce(usize) -> Vec<u32>) -> Self {
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

    /// The buffer that was taken, if one was.
    pub fn into_buffer(self) -> Option<Vec<u32>> {
        match self.0 {
            Kind::Bits(buffer) => Some(buffer),
            Kind::Rounded(_) => None,
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

/// What the sum of a product's terms is added to.
#[derive(Debug, Clone, Copy)]
pub enum Onto<'a> {
    /// Nothing.
    Zero,
    /// What is in the output.
    Out,
    /// Other panels of the output's size.
    Values(&'a [f32]),
}

/// One product: `out = onto + bias + sum of terms`.
pub struct Product<'a> {
    /// Panels with as many features as each weight is high.
    pub out: &'a mut [f32],
    /// The summands.
    pub terms: Vec<Term<'a>>,
    /// What the sum is added to.
    pub onto: Onto<'a>,
    /// What is added to each feature of all tokens: as many numbers as each weight is high.
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

/// The tasks of a product: rows dealt out, or, where there are few, panels.
fn deal(product: usize, height: usize, panels: usize, tasks: &mut Vec<Task>) {
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

/// Computes some products that don't depend on each other.
///
/// # Panics
/// If a factor has not as many features as its weight is deep, or a weight not the height of its output.
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
            deal(product, height, panels, &mut tasks);
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
            // has as many; `deal` gave no two tasks a row of a panel in common.
            unsafe { part_of(each, outs[task.product], task.rows, task.panels, blocks) };
        });
    });
}

/// Computes one product.
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

/// Gives the number of panels.
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

/// Some of the depth of a term.
struct Piece<'a> {
    term: &'a Term<'a>,
    depths: Range<usize>,
}

/// The depths of all terms in pieces, and these in groups that go over the panels together: a shallow piece (of a LoRA pair)
/// finds the sums of the deep one before it in the first cache.
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

/// A piece of some rows, ready for the innermost loop.
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
unsafe fn part_of(
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
                let place = (panel * height + row) * LANES;
                // SAFETY: row `row` of panel `panel` is inside the output.
                let c = unsafe { out.0.add(place) };
                let mut from = match product.onto {
                    Onto::Zero if number == 0 => None,
                    Onto::Values(values) if number == 0 => Some(values[place..].as_ptr()),
                    _ => Some(c.cast_const()),
                };
                let count = TILE.min(rows.end - row);
                if let Some(bias) = product.bias.filter(|_| number == 0) {
                    // SAFETY: these rows are the caller's, and what they are added to has as many as the output.
                    unsafe { begin(&bias[row..row + count], (c, from)) };
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

/// Puts a bias, and what else a sum begins with, into rows of 32 floats from `c` on.
///
/// # Safety
/// As many rows as `bias` has numbers are nobody else's, and may be read from `from` on.
unsafe fn begin(bias: &[f32], (c, from): (*mut f32, Option<*const f32>)) {
    for (row, bias) in bias.iter().enumerate() {
        for place in row * LANES..(row + 1) * LANES {
            // SAFETY: one of the rows. `from` may be `c` itself, so both are only read and written by pointers.
            unsafe {
                let before = from.map_or(0., |from| *from.add(place));
                *c.add(place) = before + bias;
            }
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
