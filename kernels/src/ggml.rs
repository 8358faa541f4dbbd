//! The quantisation of weights to the block types of GGUF files: 32 values that share a scale, or 256 values whose eight or sixteen
//! parts have scales that are quantised themselves ("k-quants").
//!
//! The layouts of the blocks and the choice of their scales are those of llama.cpp's reference quantisers without an importance matrix
//! (`ggml/src/ggml-quants.c`, `quantize_row_*_ref`, and `ggml-common.h` for the layouts). Sums have the reference's order and no
//! operations are fused, so every processor makes the same bytes. They are the reference's, but for levels whose scale is 0 in f16: these are
//! zeros, where the reference leaves what its search had.

mod blocks;
mod super_blocks;

use rayon::prelude::*;

use crate::dispatch::{self, Loop};

/// The bytes of input that a task quantises at once; a multiple of what the loops take together.
const TASK: usize = 1 << 14;

/// A type of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32 values of 4 bits: a scale.
    Q4_0,
    /// 32 values of 5 bits: a scale.
    Q5_0,
    /// 32 values of 5 bits: a scale and a minimum.
    Q5_1,
    /// 32 values of 8 bits: a scale.
    Q8_0,
    /// 256 values of 4 bits: a scale and a minimum of 6 bits each for every 32 of them.
    Q4K,
    /// 256 values of 5 bits: a scale and a minimum of 6 bits each for every 32 of them.
    Q5K,
    /// 256 values of 6 bits: a scale of 8 bits for every 16 of them.
    Q6K,
}

impl BlockType {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Q4_0,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The number of values in a block.
    pub const fn values(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => blocks::VALUES,
            Self::Q4K | Self::Q5K | Self::Q6K => super_blocks::VALUES,
        }
    }

    /// The size of a block in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
        }
    }
}

/// Quantises `values` to blocks, one after the other in `out`. Values must be finite; the bytes of a block with others are unspecified.
///
/// # Panics
/// If the values don't fill whole blocks, or `out` is not as long as their blocks.
pub fn quantize(kind: BlockType, values: &[f32], out: &mut [u8]) {
    let (per_block, bytes) = (kind.values(), kind.bytes());
    assert!(
        values.len().is_multiple_of(per_block),
        "{} values are not whole blocks of {per_block}",
        values.len()
    );
    let expected = values.len() / per_block * bytes;
    assert_eq!(out.len(), expected, "bytes for the blocks");
    let tasks = values.par_chunks(TASK);
    let outs = out.par_chunks_mut(TASK / per_block * bytes);
    tasks
        .zip(outs)
        .for_each(|(values, out)| dispatch::run(Quantize { kind, values, out }));
}

struct Quantize<'a> {
    kind: BlockType,
    values: &'a [f32],
    out: &'a mut [u8],
}

impl Loop for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (values, out) = (self.values, self.out);
        match self.kind {
            BlockType::Q4_0 => blocks::q4_0(values, out),
            BlockType::Q5_0 => blocks::q5_0(values, out),
            BlockType::Q5_1 => blocks::q5_1(values, out),
            BlockType::Q8_0 => blocks::q8_0(values, out),
            BlockType::Q4K => super_blocks::q4_k(values, out),
            BlockType::Q5K => super_blocks::q5_k(values, out),
            BlockType::Q6K => super_blocks::q6_k(values, out),
        }
    }
}

#[cfg(test)]
mod tests;
