//! Rows of a weight that were converted for many vectors.

use std::marker::PhantomData;

use super::weights::{Arithmetic, Weight};

/// Some rows of a weight, converted.
pub(super) struct Converted<A: Arithmetic, W> {
    /// The address of their values: by rows, by blocks, by pairs.
    pub(super) values: *const [A::Factors; 2],
    /// The first of the rows.
    pub(super) first: usize,
    /// Blocks of a row.
    pub(super) blocks: usize,
    pub(super) of: PhantomData<W>,
}

impl<A: Arithmetic, W> Copy for Converted<A, W> {}
impl<A: Arithmetic, W> Clone for Converted<A, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Arithmetic, W: Weight<A>> Weight<A> for Converted<A, W> {
    type Block = *const [A::Factors; 2];
    type Room = ();
    const PAIRS: usize = W::PAIRS;
    const IS_CONVERTED: bool = false;

    #[inline(always)]
    unsafe fn block(self, row: usize, block: usize) -> Self::Block {
        let index = (row - self.first) * self.blocks + block;
        // SAFETY: see the trait.
        unsafe { self.values.add(index * W::PAIRS) }
    }

    #[inline(always)]
    unsafe fn rest(self, row: usize, (): &mut ()) -> Self::Block {
        // SAFETY: see the trait; rows are whole blocks, so that this is never called.
        unsafe { self.block(row, 0) }
    }

    #[inline(always)]
    fn prefetch(_: &Self::Block) {}

    #[inline(always)]
    unsafe fn pair(block: &Self::Block, pair: usize) -> [A::Factors; 2] {
        // SAFETY: see the trait.
        unsafe { *block.add(pair) }
    }
}
