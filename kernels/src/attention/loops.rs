//! The loops of attention over the scores of 32 queries: mask, softmax and its backward pass.

use super::{Row, Visible};
use crate::dispatch::Loop;
use crate::exp::{exp, tanh};
use crate::panels::LANES;

/// The limits of [`Visible`] of 32 queries, each in its lane.
pub(super) struct Limits {
    first: [i32; LANES],
    prefix: [i32; LANES],
    from: [i32; LANES],
    to: [i32; LANES],
}

impl Limits {
    pub(super) fn new(visible: &[Visible; LANES]) -> Self {
        Self {
            first: visible.map(|v| v.first.cast_signed()),
            prefix: visible.map(|v| v.prefix.cast_signed()),
            from: visible.map(|v| v.from.cast_signed()),
            to: visible.map(|v| v.to.cast_signed()),
        }
    }

    fn lanes(&self) -> impl Iterator<Item = [i32; 4]> + '_ {
        let lane = |lane| {
            [
                self.first[lane],
                self.prefix[lane],
                self.from[lane],
                self.to[lane],
            ]
        };
        (0..LANES).map(lane)
    }

    /// Whether any query attends to any of the 32 keys from `key` on.
    pub(super) fn sees(&self, key: usize) -> bool {
        let (start, end) = (key as i32, (key + LANES) as i32);
        self.lanes().any(|[first, prefix, from, to]| {
            let (start, end) = (start.max(first), end.min(to));
            start < end.min(prefix) || start.max(from) < end
        })
    }

    /// Whether all queries attend to all of the 32 keys from `key` on.
    pub(super) fn sees_all(&self, key: usize) -> bool {
        let (start, end) = (key as i32, (key + LANES) as i32);
        self.lanes().all(|[first, prefix, from, to]| {
            start >= first && end <= to && (end <= prefix || start >= from || prefix >= from)
        })
    }
}

pub(super) struct Mask<'a>(
    pub(super) &'a mut [f32],
    pub(super) &'a Limits,
    pub(super) usize,
);

impl Loop for Mask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let limits = self.1;
        let rows = self.0.as_chunks_mut::<LANES>().0.iter_mut();
        for (key, row) in (self.2 as i32..).zip(rows) {
            for lane in 0..LANES {
                let ours = (key < limits.prefix[lane]) | (key >= limits.from[lane]);
                let seen = ours & (key >= limits.first[lane]) & (key < limits.to[lane]);
                row[lane] = if seen { row[lane] } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Replaces scores by `cap * tanh(score / cap)`.
pub(super) struct SoftCap<'a>(pub(super) &'a mut [f32], pub(super) f32);

impl Loop for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let inverse = 1. / self.1;
        for row in self.0.as_chunks_mut::<LANES>().0 {
            for lane in 0..LANES {
                row[lane] = self.1 * tanh::<FMA>(row[lane] * inverse);
            }
        }
    }
}

/// Replaces scores by `e^(score - largest)`. Returns the logarithm of each query's sum of `e^score`, and the reciprocal of its sum of
/// the new values.
pub(super) struct Softmax<'a>(pub(super) &'a mut [f32]);

impl Loop for Softmax<'_> {
    type Output = (Row, Row);

    #[inline(always)]
    fn run<const FMA: bool>(self) -> (Row, Row) {
        let (rows, _) = self.0.as_chunks_mut::<LANES>();
        let mut largest: Row = [f32::NEG_INFINITY; LANES];
        for row in rows.iter() {
            for lane in 0..LANES {
                largest[lane] = largest[lane].max(row[lane]);
            }
        }
        let mut sum: Row = [0.; LANES];
        for row in rows {
            for lane in 0..LANES {
                row[lane] = exp::<FMA>(row[lane] - largest[lane]);
                sum[lane] += row[lane];
            }
        }
        let log_sum = std::array::from_fn(|lane| largest[lane] + sum[lane].ln());
        (log_sum, sum.map(f32::recip))
    }
}

pub(super) struct ScaleLanes<'a>(pub(super) &'a mut [f32], pub(super) &'a Row);

impl Loop for ScaleLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.0.as_chunks_mut::<LANES>().0 {
            for lane in 0..LANES {
                row[lane] *= self.1[lane];
            }
        }
    }
}

/// The dot products over features, one for each lane.
pub(super) struct Dot<'a>(pub(super) &'a [f32], pub(super) &'a [f32]);

impl Loop for Dot<'_> {
    type Output = Row;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Row {
        let mut sum: Row = [0.; LANES];
        let rows = self.0.as_chunks::<LANES>().0.iter();
        for (a, b) in rows.zip(self.1.as_chunks::<LANES>().0) {
            for lane in 0..LANES {
                sum[lane] += a[lane] * b[lane];
            }
        }
        sum
    }
}

/// Replaces scores by probabilities and the gradients of the probabilities by those of the scores, both in place (Dao et al. 2022,
/// arXiv 2205.14135, algorithm 4).
pub(super) struct ScoresBackward<'a> {
    pub(super) p: &'a mut [f32],
    pub(super) values: &'a mut [f32],
    pub(super) log_sum: &'a [f32],
    pub(super) delta: &'a Row,
    pub(super) lanes: usize,
}

impl Loop for ScoresBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        self.each::<FMA>(|_| 1.);
    }
}

impl ScoresBackward<'_> {
    /// `slope` is the derivative of a score with respect to the product that it was computed from.
    #[inline(always)]
    fn each<const FMA: bool>(self, slope: impl Fn(f32) -> f32) {
        let Some(log_sum) = self.log_sum.as_chunks::<LANES>().0.first() else {
            return;
        };
        let kept: Row = std::array::from_fn(|lane| f32::from(u8::from(lane < self.lanes)));
        let rows = self.p.as_chunks_mut::<LANES>().0.iter_mut();
        for (p, grad_score) in rows.zip(self.values.as_chunks_mut::<LANES>().0) {
            for lane in 0..LANES {
                let score = p[lane];
                let value = exp::<FMA>(score - log_sum[lane]) * kept[lane];
                p[lane] = value;
                grad_score[lane] = value * (grad_score[lane] - self.delta[lane]) * slope(score);
            }
        }
    }
}

/// [`ScoresBackward`] of scores with a soft-cap, whose derivative is `1 - tanh^2 = 1 - (score / cap)^2`.
pub(super) struct CappedScoresBackward<'a>(pub(super) ScoresBackward<'a>, pub(super) f32);

impl Loop for CappedScoresBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let inverse = 1. / self.1;
        self.0.each::<FMA>(|score| {
            // The limit keeps a masked score of -inf, whose probability is 0, from making a NaN.
            let t = (score * inverse).max(-1.);
            1. - t * t
        });
    }
}
