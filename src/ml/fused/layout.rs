//! Where the tokens of a batch go: one behind the other, without padding, a prompt once for both its answers.

use pipeline_kernels::attention::{Span, Visible};

use crate::ml::batch::{Batch, Sequence};

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

/// The tokens of a batch.
#[derive(Debug)]
pub(super) struct Layout {
    /// The id of each token.
    pub(super) ids: Vec<u32>,
    /// Its position, from the start of its document.
    pub(super) positions: Vec<usize>,
    /// Tokens that may see each other.
    pub(super) spans: Vec<Span>,
    /// For each sequence, the token at each position.
    pub(super) places: Vec<Vec<usize>>,
    /// For each token, its place in the padded batch: the first, if it is in several.
    pub(super) flat: Vec<usize>,
}

impl Layout {
    pub(super) fn new(batch: &Batch, packing: Packing) -> Self {
        let mut layout = Self {
            ids: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            places: vec![Vec::new(); batch.sequences.len()],
            flat: Vec::new(),
        };
        let half = batch.sequences.len() / 2;
        if packing.padding_free && packing.share_prompts && batch.is_pairs() {
            for row in 0..half {
                layout.pair(batch, row, row + half);
            }
        } else {
            for row in 0..batch.sequences.len() {
                layout.single(batch, row, !packing.padding_free);
            }
        }
        layout
    }

    fn push(&mut self, row: usize, batch: &Batch, id: u32, position: usize) {
        let place = self.places[row].len();
        self.flat.push(row * batch.width + place);
        self.places[row].push(self.ids.len());
        self.ids.push(id);
        self.positions.push(position);
    }

    /// One sequence, with all its padding if wanted.
    fn single(&mut self, batch: &Batch, row: usize, padded: bool) {
        let sequence = &batch.sequences[row];
        let length = sequence.ids.len();
        let width = if padded { batch.width } else { length };
        let start = self.ids.len();
        let mut visible = Vec::with_capacity(width);
        for (at, from) in sequence.starts(width).into_iter().enumerate() {
            let id = sequence.ids.get(at).copied().unwrap_or(batch.pad());
            self.push(row, batch, id, at - from);
            visible.push(Visible {
                prefix: 0,
                from: from as u32,
                to: (at + 1).min(length) as u32,
            });
        }
        self.spans.push(Span { start, visible });
    }

    /// Two sequences that begin alike: what is common, the rest of the one, the rest of the other.
    fn pair(&mut self, batch: &Batch, one: usize, other: usize) {
        let ids = |row: usize| {
            batch
                .sequences
                .get(row)
                .map_or(&[][..], |s: &Sequence| &s.ids)
        };
        let (first, second) = (ids(one), ids(other));
        let common = first.iter().zip(second).take_while(|(a, b)| a == b).count();
        let start = self.ids.len();
        let mut visible = Vec::with_capacity(first.len() + second.len() - common);
        for (row, ids) in [(one, first), (other, second)] {
            if row == other {
                let shared = self.places[one][..common].to_vec();
                self.places[other].extend(shared);
            }
            let skipped = if row == other { common } else { 0 };
            let branch = if row == other { first.len() } else { 0 };
            for (at, &id) in ids.iter().enumerate().skip(skipped) {
                self.push(row, batch, id, at);
                // In the span, this token's own branch starts where the common part ends, or behind the first's rest.
                let place = (self.ids.len() - start) as u32;
                visible.push(Visible {
                    prefix: common as u32,
                    from: branch as u32,
                    to: place,
                });
            }
        }
        self.spans.push(Span { start, visible });
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
        let layout = Layout::new(&batch, Packing::default());
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
        assert_eq!(Layout::new(&batch, free).ids.len(), 4 + 2 + 5 + 2);
        let padded = Packing {
            padding_free: false,
            share_prompts: false,
        };
        let layout = Layout::new(&batch, padded);
        assert_eq!(layout.ids.len(), 4 * 5);
        assert_eq!(layout.flat, (0..20).collect::<Vec<_>>());
        let last = layout.spans[1].visible[4];
        assert_eq!((last.from, last.to), (0, 2), "padding sees the tokens only");
    }
}
