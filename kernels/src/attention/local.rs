//! Copies between the panels of a batch and the panels of one span.

use std::ops::Range;

use crate::panels::LANES;

/// Panels that several tasks write, each for other tokens or features.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32, usize);

// SAFETY: tasks use disjoint elements. `super::tasks` and `super::add_context_grads` make one task for each span and key head. No two
// of `Spans` have a token in common, and a task uses its own span's tokens alone, and of these the features of its own key head, or
// of the query heads that share it, which no other task has because `super::check` saw that key heads divide them evenly.
unsafe impl Send for Shared {}
// SAFETY: the same.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len())
    }

    fn write(self, index: usize, values: &[f32], add: bool) {
        let end = index.checked_add(values.len());
        assert!(
            end.is_some_and(|end| end <= self.1),
            "a span outside the batch"
        );
        // SAFETY: inside, as asserted; nobody else uses these tokens' features (see above), and `values` are a task's own.
        unsafe {
            let out = self.0.add(index);
            if add {
                for (number, value) in values.iter().enumerate() {
                    *out.add(number) += value;
                }
            } else {
                std::ptr::copy_nonoverlapping(values.as_ptr(), out, values.len());
            }
        }
    }
}

/// Ranges of a batch's tokens, taken one after the other.
#[derive(Clone, Copy)]
pub(super) struct TokenRanges<'a> {
    pub(super) ranges: &'a [Range<usize>],
    /// The number of tokens at the beginning that are skipped.
    pub(super) skipped: usize,
}

impl<'a> TokenRanges<'a> {
    pub(super) fn all(ranges: &'a [Range<usize>]) -> Self {
        Self { ranges, skipped: 0 }
    }

    fn count(self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum()
    }

    /// Runs of a block's lanes that lie in one panel of the batch: `(panel, lane in that panel, lane in the block, count)`.
    fn runs(self, block: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> + 'a {
        let (first, end) = (block * LANES, (block + 1) * LANES);
        let mut before = 0;
        let pieces = self.ranges.iter().filter_map(move |range| {
            let start = before;
            before += range.len();
            let from = start.max(first).max(self.skipped);
            let to = before.min(end);
            (from < to).then(|| (range.start + (from - start), from - first, to - from))
        });
        pieces.flat_map(|(token, here, count)| {
            let fits = (LANES - token % LANES).min(count);
            [
                (token / LANES, token % LANES, here, fits),
                (token / LANES + 1, 0, here + fits, count - fits),
            ]
            .into_iter()
            .filter(|run| run.3 > 0)
        })
    }
}

/// Copies as many features as `out` has rows, from `first` on, for the tokens of a block of 32. Lanes after the last token become 0.
pub(super) fn gather(
    data: &[f32],
    features: usize,
    first: usize,
    tokens: TokenRanges<'_>,
    block: usize,
    out: &mut [f32],
) {
    let (rows, _) = out.as_chunks_mut::<LANES>();
    if tokens.count() < (block + 1) * LANES {
        rows.fill([0.; LANES]);
    }
    for (panel, there, here, count) in tokens.runs(block) {
        let data = &data[(panel * features + first) * LANES..];
        if count == LANES {
            for (row, data) in rows.iter_mut().zip(data.as_chunks::<LANES>().0) {
                *row = *data;
            }
        } else {
            for (row, data) in rows.iter_mut().zip(data.as_chunks::<LANES>().0) {
                row[here..here + count].copy_from_slice(&data[there..there + count]);
            }
        }
    }
}

/// The reverse of [`gather`]: writes rows of 32 tokens to the features from `first` on, or adds them.
pub(super) fn scatter(
    rows: &[f32],
    out: Shared,
    (features, first): (usize, usize),
    tokens: TokenRanges<'_>,
    block: usize,
    add: bool,
) {
    for (panel, there, here, count) in tokens.runs(block) {
        for (feature, row) in rows.as_chunks::<LANES>().0.iter().enumerate() {
            let index = (panel * features + first + feature) * LANES + there;
            out.write(index, &row[here..here + count], add);
        }
    }
}

/// Writes sums `[chunk of 32 features][token][32 features]` to `width` features from `first` on, or adds them. `sums` covers whole
/// blocks of 32 tokens.
pub(super) fn scatter_transposed(
    sums: &[f32],
    out: Shared,
    (features, first, width): (usize, usize, usize),
    tokens: TokenRanges<'_>,
    add: bool,
) {
    let blocks = tokens.count().div_ceil(LANES);
    let mut block_of = [0f32; LANES * LANES];
    for block in tokens.skipped / LANES..blocks {
        for chunk in 0..width.div_ceil(LANES) {
            let sums = &sums[(chunk * blocks + block) * LANES * LANES..][..LANES * LANES];
            for (token, row) in sums.as_chunks::<LANES>().0.iter().enumerate() {
                for (feature, value) in row.iter().enumerate() {
                    block_of[feature * LANES + token] = *value;
                }
            }
            let wanted = (width - chunk * LANES).min(LANES);
            let rows = &block_of[..wanted * LANES];
            let columns = (features, first + chunk * LANES);
            scatter(rows, out, columns, tokens, block, add);
        }
    }
}
