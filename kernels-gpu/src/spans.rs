//! The tables by which attention finds the keys of each token.

use pipeline_kernels::attention::{Span, Visible};
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;

/// The words that describe a block of queries.
pub(crate) const QUERY_BLOCK: usize = 7;
/// The words that describe a block of keys.
pub(crate) const KEY_BLOCK: usize = 4;

/// Spans of tokens that may attend to each other, on the device.
#[derive(Debug)]
pub struct Spans {
    /// First [`QUERY_BLOCK`] words for each block of queries: its first token, its number of tokens, where its span's keys are listed and how
    /// many there are, where its blocks of keys are listed and how many there are, and where its tokens' limits are. Then [`KEY_BLOCK`] words
    /// for each block of keys: its first token, its number of tokens, and where the blocks of queries that see it are listed and how many there
    /// are. Then the lists: tokens of keys, numbers of blocks of 32 keys, limits (four for a token), and for a block of keys pairs of a block of
    /// queries and the number of the first key among those of that block's span.
    pub(crate) tables: Buffer,
    /// The number of blocks, of queries and of keys.
    pub(crate) blocks: usize,
    /// The end of the last token.
    pub(crate) end: usize,
}

/// Whether any token of `visible` attends to any of the keys from `start` to `end`.
fn sees(visible: &[Visible], start: u32, end: u32) -> bool {
    visible.iter().any(|each| {
        let (start, end) = (start.max(each.first), end.min(each.to));
        start < end.min(each.prefix) || start.max(each.from) < end
    })
}

/// A block of a span's tokens.
struct Block<'a> {
    span: usize,
    /// The number of its first token in the span.
    first: usize,
    visible: &'a [Visible],
}

/// Makes the tables of [`Spans`] and returns them with the number of blocks.
fn tables(spans: &[Span]) -> (Vec<u32>, usize) {
    let blocks: Vec<Block<'_>> = (spans.iter().enumerate())
        .flat_map(|(number, span)| {
            let chunks = span.visible.chunks(LANES).enumerate();
            chunks.map(move |(chunk, visible)| Block {
                span: number,
                first: chunk * LANES,
                visible,
            })
        })
        .collect();
    let tokens = |span: &Span| span.start as u32..(span.start + span.visible.len()) as u32;
    let lists = blocks.len() * (QUERY_BLOCK + KEY_BLOCK);
    let mut words = vec![0; lists];
    // The keys of each span, and where they are listed.
    let mut keys = Vec::new();
    // For each span, those in whose keys it is, with the number of its first token among these.
    let mut users = vec![Vec::new(); spans.len()];
    for (number, span) in spans.iter().enumerate() {
        let start = words.len();
        for &earlier in &span.context {
            users[earlier].push((number, words.len() - start));
            words.extend(tokens(&spans[earlier]));
        }
        users[number].push((number, words.len() - start));
        words.extend(tokens(span));
        keys.push((start, words.len() - start));
    }
    let mut blocks_of = vec![Vec::new(); spans.len()];
    for (number, block) in blocks.iter().enumerate() {
        blocks_of[block.span].push(number);
        let (first_key, key_count) = keys[block.span];
        let seen = words.len();
        for key in (0..key_count).step_by(LANES) {
            if sees(block.visible, key as u32, (key + LANES) as u32) {
                words.push((key / LANES) as u32);
            }
        }
        let limits = words.len();
        for each in block.visible {
            words.extend([each.first, each.prefix, each.from, each.to]);
        }
        let token = spans[block.span].start + block.first;
        let own = [
            token,
            block.visible.len(),
            first_key,
            key_count,
            seen,
            limits - seen,
            limits,
        ];
        words[number * QUERY_BLOCK..][..QUERY_BLOCK].copy_from_slice(&own.map(|x| x as u32));
    }
    for (number, block) in blocks.iter().enumerate() {
        let start = words.len();
        for &(user, first) in &users[block.span] {
            let (key, length) = ((first + block.first) as u32, block.visible.len() as u32);
            for &other in &blocks_of[user] {
                if sees(blocks[other].visible, key, key + length) {
                    words.extend([other as u32, key]);
                }
            }
        }
        let token = spans[block.span].start + block.first;
        let own = [token, block.visible.len(), start, (words.len() - start) / 2];
        let place = blocks.len() * QUERY_BLOCK + number * KEY_BLOCK;
        words[place..][..KEY_BLOCK].copy_from_slice(&own.map(|x| x as u32));
    }
    (words, blocks.len())
}

impl Device {
    /// Copies spans to the device.
    pub fn spans(&self, spans: &[Span]) -> Spans {
        let (words, blocks) = tables(spans);
        let end = spans
            .last()
            .map_or(0, |span| span.start + span.visible.len());
        Spans {
            tables: self.take_with_words(&words),
            blocks,
            end,
        }
    }
}
