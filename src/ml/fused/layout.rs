//! Where the tokens of some batches go: one behind the other, without padding, a prompt once for both its answers.

use pipeline_kernels::attention::{Span, Spans, Visible};

use crate::ml::batch::{Batch, Sequence};
use crate::ml::linear::BATCH_STRIDE;

/// What of a batch need not be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Padding is left out. Only `logits/*` differ: TRL's mean goes over the padding too.
    pub padding_free: bool,
    /// What the two sequences of a pair begin with is computed once for both. Needs `padding_free`.
    pub share_prompts: bool,
}

impl Default for Packing {
    fn default() -> Self {
        Self {
            padding_free: true,
            share_prompts: true,
        }
    }
}

/// The tokens of some batches.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// The id of each token.
    pub(super) ids: Vec<u32>,
    /// Its position, from the start of its document.
    pub(super) positions: Vec<usize>,
    /// Tokens that may see each other.
    pub(super) spans: Spans,
    /// For each sequence, all batches' one behind the other, the token at each position.
    pub(super) places: Vec<Vec<usize>>,
    /// For each token, its place in its padded batch (the first, if it is in several), with [`BATCH_STRIDE`] from one batch to
    /// the next.
    pub(super) flat: Vec<u64>,
}

/// How many ids two sequences begin with alike.
fn common(one: &Sequence, other: &Sequence) -> usize {
    let both = one.ids.iter().zip(&other.ids);
    both.take_while(|(a, b)| a == b).count()
}

impl Packing {
    /// Whether the pairs of a batch share what they begin with.
    fn shares(self, batch: &Batch) -> bool {
        self.padding_free && self.share_prompts && batch.is_pairs()
    }

    /// How many tokens of a batch are computed.
    pub(super) fn tokens(self, batch: &Batch) -> usize {
        if !self.padding_free {
            return batch.sequences.len() * batch.width;
        }
        let all = batch.tokens();
        if self.shares(batch) {
            let (chosen, rejected) = batch.sequences.split_at(batch.sequences.len() / 2);
            let pairs = chosen.iter().zip(rejected);
            all - pairs.map(|(a, b)| common(a, b)).sum::<usize>()
        } else {
            all
        }
    }
}

impl Layout {
    pub(super) fn new(batches: &[&Batch], packing: Packing) -> Self {
        let mut layout = Self::default();
        for (batch, number) in batches.iter().zip(0u64..) {
            let from = layout.places.len();
            let count = batch.sequences.len();
            layout.places.resize_with(from + count, Vec::new);
            let mut of = OfBatch {
                layout: &mut layout,
                batch,
                from,
                first: number * BATCH_STRIDE,
            };
            if packing.shares(batch) {
                (0..count / 2).for_each(|row| of.pair(row, row + count / 2));
            } else {
                (0..count).for_each(|row| of.single(row, !packing.padding_free));
            }
        }
        layout
    }
}

/// The part of a layout that one batch fills.
struct OfBatch<'a> {
    layout: &'a mut Layout,
    batch: &'a Batch,
    /// The layout's number of the batch's first sequence.
    from: usize,
    /// The place of its first token.
    first: u64,
}

impl OfBatch<'_> {
    fn places(&mut self, row: usize) -> &mut Vec<usize> {
        &mut self.layout.places[self.from + row]
    }

    fn push(&mut self, row: usize, id: u32, position: usize) {
        let token = self.layout.ids.len();
        let place = row * self.batch.width + self.places(row).len();
        self.places(row).push(token);
        self.layout.flat.push(self.first + place as u64);
        self.layout.ids.push(id);
        self.layout.positions.push(position);
    }

    /// One sequence, with all its padding if wanted.
    fn single(&mut self, row: usize, padded: bool) {
        let batch = self.batch;
        let sequence = &batch.sequences[row];
        let length = sequence.ids.len();
        let width = if padded { batch.width } else { length };
        let start = self.layout.ids.len();
        let mut visible = Vec::with_capacity(width);
        for (at, from) in sequence.starts(width).into_iter().enumerate() {
            let id = sequence.ids.get(at).copied().unwrap_or(batch.pad());
            self.push(row, id, at - from);
            visible.push(Visible {
                prefix: 0,
                from: from as u32,
                to: (at + 1).min(length) as u32,
            });
        }
        self.layout.spans.push(Span { start, visible });
    }

    /// Two sequences that begin alike: what is common, the rest of the one, the rest of the other.
    fn pair(&mut self, one: usize, other: usize) {
        let batch = self.batch;
        let (first, second) = (&batch.sequences[one], &batch.sequences[other]);
        let common = common(first, second);
        let (first, second) = (&first.ids, &second.ids);
        let start = self.layout.ids.len();
        let mut visible = Vec::with_capacity(first.len() + second.len() - common);
        for (row, ids) in [(one, first), (other, second)] {
            if row == other {
                let shared = self.places(one)[..common].to_vec();
                self.places(other).extend(shared);
            }
            let skipped = if row == other { common } else { 0 };
            let branch = if row == other { first.len() } else { 0 };
            for (at, &id) in ids.iter().enumerate().skip(skipped) {
                self.push(row, id, at);
                // In the span, this token's own branch starts where the common part ends, or behind the first's rest.
                let place = (self.layout.ids.len() - start) as u32;
                visible.push(Visible {
                    prefix: common as u32,
                    from: branch as u32,
                    to: place,
                });
            }
        }
        self.layout.spans.push(Span { start, visible });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::batch::Row;

    #[test]
    fn prompts_are_shared_and_padding_is_left_out() {
        let row = |prompt: &[u32], chosen: &[u32], rejected: &[u32]| Row {
            prompt: prompt.to_vec(),
            chosen: chosen.to_vec(),
            rejected: Some(rejected.to_vec()),
            ..Row::default()
        };
        let rows = [row(&[1, 2], &[3, 4], &[3, 5, 6]), row(&[7], &[8], &[9])];
        let batch = Batch::pairs(&[&rows[0], &rows[1]], 0).unwrap();
        let layout = Layout::new(&[&batch], Packing::default());
        assert_eq!(Packing::default().tokens(&batch), 9);
        assert_eq!(layout.ids, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(layout.positions, [0, 1, 2, 3, 3, 4, 0, 1, 1]);
        assert_eq!(layout.places[0], [0, 1, 2, 3]);
        assert_eq!(layout.places[2], [0, 1, 2, 4, 5]);
        assert_eq!(layout.places[3], [6, 8]);
        let seen = |span: usize, token: usize| -> Vec<u32> {
            let v = layout.spans[span].visible[token];
            (0..v.to)
                .filter(|key| *key < v.prefix || *key >= v.from)
                .collect()
        };
        assert_eq!(seen(0, 3), [0, 1, 2, 3]);
        assert_eq!(seen(0, 5), [0, 1, 2, 4, 5]);
        assert_eq!(seen(1, 2), [0, 2]);
        assert_eq!((layout.spans[1].start, layout.spans.len()), (6, 2));

        let free = Packing {
            padding_free: true,
            share_prompts: false,
        };
        assert_eq!(Layout::new(&[&batch], free).ids.len(), 4 + 2 + 5 + 2);
        assert_eq!(free.tokens(&batch), 4 + 2 + 5 + 2);
        let padded = Packing {
            padding_free: false,
            share_prompts: false,
        };
        let layout = Layout::new(&[&batch], padded);
        assert_eq!(padded.tokens(&batch), 4 * 5);
        assert_eq!(layout.ids.len(), 4 * 5);
        assert_eq!(layout.flat, (0..20).collect::<Vec<u64>>());
        let last = layout.spans[1].visible[4];
        assert_eq!((last.from, last.to), (0, 2), "padding sees the tokens only");

        // A second batch stands behind the first, and looks the same from its own start.
        let both = Layout::new(&[&batch, &batch], Packing::default());
        assert_eq!(both.ids[9..], both.ids[..9]);
        assert_eq!(both.positions[9..], both.positions[..9]);
        assert_eq!(both.places[4 + 3], [9 + 6, 9 + 8]);
        assert_eq!(both.spans[3].start, 9 + 6);
        assert_eq!(both.flat[9 + 4], both.flat[4] + BATCH_STRIDE);
    }
}
