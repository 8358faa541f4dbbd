//! From panels of a batch to panels of one span, and back.

use super::Span;
use crate::panels::LANES;

/// Panels that several tasks write, each other tokens or features.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32, usize);

// SAFETY: tasks write disjoint places. `super::tasks` makes one for each span and key head; no two of `Spans` have a token in
// common, and a task writes the features of its own key head, or of the query heads that share it, which no other has because
// `super::check` saw that key heads divide them evenly.
unsafe impl Send for Shared {}
// SAFETY: the same.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr(), data.len())
    }

    fn write(self, place: usize, values: &[f32]) {
        let end = place.checked_add(values.len());
        assert!(
            end.is_some_and(|end| end <= self.1),
            "a span outside the batch"
        );
        // SAFETY: inside, as asserted; nobody else writes these tokens' features (see above), and `values` are a task's own.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.0.add(place), values.len()) };
    }
}

/// Runs of a block's lanes that lie in one panel of the batch: `(panel, lane there, lane here, count)`.
fn runs(span: &Span, block: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let first = span.start + block * LANES;
    let count = (span.visible.len() - block * LANES).min(LANES);
    let here = (LANES - first % LANES).min(count);
    [
        (first / LANES, first % LANES, 0, here),
        (first / LANES + 1, 0, here, count - here),
    ]
    .into_iter()
    .filter(|run| run.3 > 0)
}

/// Copies features from `first` on of 32 tokens of a span, as many as `out` has rows. Lanes behind the last are zero.
pub(super) fn gather(
    data: &[f32],
    features: usize,
    first: usize,
    span: &Span,
    block: usize,
    out: &mut [f32],
) {
    let (rows, _) = out.as_chunks_mut::<LANES>();
    if span.visible.len() - block * LANES < LANES {
        rows.fill([0.; LANES]);
    }
    for (panel, there, here, count) in runs(span, block) {
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

/// The other way: puts rows of 32 tokens into the features from `first` on.
pub(super) fn scatter(
    rows: &[f32],
    out: Shared,
    features: usize,
    first: usize,
    span: &Span,
    block: usize,
) {
    for (panel, there, here, count) in runs(span, block) {
        for (feature, row) in rows.as_chunks::<LANES>().0.iter().enumerate() {
            let place = (panel * features + first + feature) * LANES + there;
            out.write(place, &row[here..here + count]);
        }
    }
}

/// Puts sums `[chunk of 32 features][token][32 features]` into `width` features from `first` on.
pub(super) fn scatter_turned(
    sums: &[f32],
    out: Shared,
    (features, first, width): (usize, usize, usize),
    span: &Span,
) {
    let tokens = span.visible.len().div_ceil(LANES) * LANES;
    let mut block_of = [0f32; LANES * LANES];
    for block in 0..span.visible.len().div_ceil(LANES) {
        for chunk in 0..width.div_ceil(LANES) {
            let sums = &sums[(chunk * tokens + block * LANES) * LANES..][..LANES * LANES];
            for (token, row) in sums.as_chunks::<LANES>().0.iter().enumerate() {
                for (feature, value) in row.iter().enumerate() {
                    block_of[feature * LANES + token] = *value;
                }
            }
            let wanted = (width - chunk * LANES).min(LANES);
            let rows = &block_of[..wanted * LANES];
            scatter(rows, out, features, first + chunk * LANES, span, block);
        }
    }
}
