//! Softmax over a vocabulary, in panels of logits: 32 tokens side by side for each token id of the vocabulary.

use std::ops::Range;

use rayon::prelude::*;

use crate::dispatch::{Loop, run};
use crate::exp::{exp, tanh};
use crate::panels::{self, LANES};

type Row = [f32; LANES];

/// Statistics of the logits of one panel's 32 tokens, each token's in its lane.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// The largest logit of each token.
    pub largest: Row,
    /// The token id of the largest logit; the lowest one of equals.
    pub argmax: [u32; LANES],
    /// The sum over ids of `e^(logit - largest)`.
    pub sum: Row,
    /// The sum over ids of `e^(logit - largest) * (logit - largest)`; with `sum` it gives the entropy.
    pub weighted: Row,
    /// The sum over ids of `e^(2 (logit - largest))`; with `sum` it gives the sum of squared probabilities.
    pub squares: Row,
}

/// The number of ids that are summed before their sum joins the total, which keeps rounding errors small.
const SUMMED: usize = 256;

/// Replaces the logits of a part of the vocabulary by their exponentials, panel by panel over all cores: online softmax (Milakov
/// and Gimelshein 2018, arXiv 1805.02867, algorithm 3).
///
/// `logits` are `summaries.len()` panels with a feature for each of `ids`. `summaries` holds what the ids before these came to, at
/// first [`Summary::EMPTY`], and is updated to include these. Each logit becomes `e^(logit - largest)` with the largest logit so far.
/// With a `softcap` the logits first become `cap * tanh(logit / cap)` (Gemma 2, arXiv 2408.00118, section 2), and the summaries are
/// those of the capped ones. What is left in the place of a logit is then the exponential of the capped logit times the derivative
/// of the cap, `1 - tanh^2`: divided by the sum of the exponentials it is what a logit contributes to the gradient of the sum's
/// logarithm, with or without a soft-cap.
///
/// Returns (panels, 32) factors: everything that was computed from the exponentials of earlier ids has to be multiplied by its
/// token's factor, because the largest logit may have grown.
///
/// # Panics
/// If `logits` has not `summaries.len()` panels of `ids.len()` features, or the ids don't fit into 32 bits.
pub fn online_softmax(
    logits: &mut [f32],
    ids: Range<usize>,
    softcap: Option<f32>,
    summaries: &mut [Summary],
) -> Vec<[f32; LANES]> {
    panels::check(logits.len(), ids.len(), summaries.len(), "the logits");
    assert!(
        u32::try_from(ids.end).is_ok(),
        "a vocabulary of {}",
        ids.end
    );
    let panels = logits.par_chunks_mut(ids.len().max(1) * LANES);
    let first = ids.start as u32;
    let each = panels.zip(summaries);
    each.map(|(logits, summary)| {
        let exponentials = Exponentials {
            logits,
            first,
            summary,
        };
        match softcap {
            None => run(exponentials),
            Some(cap) => run(Capped(exponentials, cap)),
        }
    })
    .collect()
}

/// Adds, for each token, its logits of a part of the vocabulary to its sum, with a `softcap` as in [`online_softmax`]. `logits` are
/// `sums.len()` panels, all of the same number of features.
///
/// # Panics
/// If `logits` is not a multiple of so many panels.
pub fn sum_capped(logits: &[f32], softcap: f32, sums: &mut [[f64; LANES]]) {
    let ids = logits.len() / (sums.len() * LANES).max(1);
    panels::check(logits.len(), ids, sums.len(), "the logits");
    let panels = logits.par_chunks(ids.max(1) * LANES).zip(sums);
    panels.for_each(|(logits, sums)| run(SumCapped(logits, softcap, sums)));
}

struct SumCapped<'a>(&'a [f32], f32, &'a mut [f64; LANES]);

impl Loop for SumCapped<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let inverse = 1. / self.1;
        for rows in self.0.as_chunks::<LANES>().0.chunks(SUMMED) {
            let mut part: Row = [0.; LANES];
            for row in rows {
                for lane in 0..LANES {
                    part[lane] += tanh::<FMA>(row[lane] * inverse);
                }
            }
            for lane in 0..LANES {
                self.2[lane] += f64::from(part[lane] * self.1);
            }
        }
    }
}

/// Replaces products of the head by the derivatives of the logits that a `softcap` makes of them, `1 - tanh^2(product / cap)`. The values are
/// in any order.
pub fn soft_cap_slopes(products: &mut [f32], softcap: f32) {
    let parts = products.par_chunks_mut(SUMMED * LANES);
    parts.for_each(|part| run(Slopes(part, softcap)));
}

struct Slopes<'a>(&'a mut [f32], f32);

impl Loop for Slopes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let inverse = 1. / self.1;
        let slope = |x: &mut f32| {
            let t = tanh::<FMA>(*x * inverse);
            *x = 1. - t * t;
        };
        let (rows, rest) = self.0.as_chunks_mut::<LANES>();
        rows.iter_mut().flatten().for_each(slope);
        rest.iter_mut().for_each(slope);
    }
}

struct Exponentials<'a> {
    logits: &'a mut [f32],
    /// The id of the first logit.
    first: u32,
    summary: &'a mut Summary,
}

impl Loop for Exponentials<'_> {
    type Output = Row;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Row {
        self.each::<FMA>(|_| 1.)
    }
}

/// The same for logits with a soft-cap.
struct Capped<'a>(Exponentials<'a>, f32);

impl Loop for Capped<'_> {
    type Output = Row;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Row {
        let (cap, inverse) = (self.1, 1. / self.1);
        for row in self.0.logits.as_chunks_mut::<LANES>().0 {
            for lane in 0..LANES {
                row[lane] = cap * tanh::<FMA>(row[lane] * inverse);
            }
        }
        self.0.each::<FMA>(|logit| {
            let t = logit * inverse;
            1. - t * t
        })
    }
}

impl Exponentials<'_> {
    /// `slope` is the derivative of a logit with respect to what it was computed from.
    #[inline(always)]
    fn each<const FMA: bool>(self, slope: impl Fn(f32) -> f32) -> Row {
        let (rows, _) = self.logits.as_chunks_mut::<LANES>();
        let before = *self.summary;
        let (mut largest, mut first) = (before.largest, before.argmax);
        for (id, row) in (self.first..).zip(rows.iter()) {
            for lane in 0..LANES {
                let more = row[lane] > largest[lane];
                largest[lane] = if more { row[lane] } else { largest[lane] };
                first[lane] = if more { id } else { first[lane] };
            }
        }
        // Where all logits were -inf so far, the exponentials are 0.
        let base = largest.map(|x| if x == f32::NEG_INFINITY { 0. } else { x });
        let (mut factors, mut sum, mut weighted) = ([0.; LANES], before.sum, before.weighted);
        let mut squares = before.squares;
        for lane in 0..LANES {
            let below = before.largest[lane] - base[lane];
            factors[lane] = exp::<FMA>(below);
            weighted[lane] = (weighted[lane] + sum[lane] * below.max(-100.)) * factors[lane];
            sum[lane] *= factors[lane];
            squares[lane] *= factors[lane] * factors[lane];
        }
        for rows in rows.chunks_mut(SUMMED) {
            let (mut part, mut weighted_part): (Row, Row) = ([0.; LANES], [0.; LANES]);
            let mut squares_part: Row = [0.; LANES];
            for row in rows {
                for lane in 0..LANES {
                    let below = row[lane] - base[lane];
                    let e = exp::<FMA>(below);
                    row[lane] = e * slope(row[lane]);
                    part[lane] += e;
                    squares_part[lane] += e * e;
                    // Below -88 the exponential is 0; the limit keeps 0 times infinity from making a NaN.
                    weighted_part[lane] += e * below.max(-100.);
                }
            }
            for lane in 0..LANES {
                sum[lane] += part[lane];
                squares[lane] += squares_part[lane];
                weighted[lane] += weighted_part[lane];
            }
        }
        *self.summary = Summary {
            largest,
            argmax: first,
            sum,
            weighted,
            squares,
        };
        factors
    }
}

impl Summary {
    /// The summary of no ids at all.
    pub const EMPTY: Self = Self {
        largest: [f32::NEG_INFINITY; LANES],
        argmax: [0; LANES],
        sum: [0.; LANES],
        weighted: [0.; LANES],
        squares: [0.; LANES],
    };

    /// `log sum e^logit` over the ids so far, for the token in lane `lane`.
    ///
    /// # Panics
    /// If `lane` is not below [`LANES`].
    pub fn log_sum(&self, lane: usize) -> f64 {
        f64::from(self.largest[lane]) + f64::from(self.sum[lane]).ln()
    }

    /// The entropy, in nats, of the softmax over the ids so far, for the token in lane `lane`: `ln sum - weighted / sum`.
    ///
    /// # Panics
    /// If `lane` is not below [`LANES`].
    pub fn entropy(&self, lane: usize) -> f64 {
        let sum = f64::from(self.sum[lane]);
        sum.ln() - f64::from(self.weighted[lane]) / sum
    }

    /// `ln sum p^2` of the softmax p over the ids so far, for the token in lane `lane`: `ln squares - 2 ln sum`.
    ///
    /// # Panics
    /// If `lane` is not below [`LANES`].
    pub fn log_sum_sq_probs(&self, lane: usize) -> f64 {
        f64::from(self.squares[lane]).ln() - 2. * f64::from(self.sum[lane]).ln()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::product::tests::numbers;

    /// The exponentials of a whole vocabulary.
    pub(crate) fn exponentials(logits: &mut [f32], vocabulary: usize) -> Vec<Summary> {
        let panels = panels::count(logits.len(), vocabulary, "the logits");
        let mut summaries = vec![Summary::EMPTY; panels];
        online_softmax(logits, 0..vocabulary, None, &mut summaries);
        summaries
    }

    #[test]
    fn summaries_are_those_of_plain_sums() {
        with_each(|_| {
            let vocabulary = 700;
            let mut logits = numbers(vocabulary * LANES * 2, 5);
            for logit in &mut logits {
                *logit *= 30.;
            }
            let before = logits.clone();
            let summaries = exponentials(&mut logits, vocabulary);
            assert_eq!(summaries.len(), 2);
            for (panel, summary) in summaries.iter().enumerate() {
                for lane in 0..LANES {
                    let at =
                        |id: usize| f64::from(before[(panel * vocabulary + id) * LANES + lane]);
                    let sum: f64 = (0..vocabulary).map(|id| at(id).exp()).sum();
                    assert!((summary.log_sum(lane) - sum.ln()).abs() < 1e-5);
                    let p = |id: usize| at(id).exp() / sum;
                    let entropy: f64 = (0..vocabulary).map(|id| -p(id) * p(id).ln()).sum();
                    assert!((summary.entropy(lane) - entropy).abs() < 1e-5);
                    let best = (0..vocabulary).max_by(|a, b| at(*a).total_cmp(&at(*b)));
                    assert_eq!(summary.argmax[lane] as usize, best.unwrap());
                    let e = logits[(panel * vocabulary + 3) * LANES + lane] / summary.sum[lane];
                    assert!((f64::from(e) - p(3)).abs() < 1e-6);
                }
            }
        });
    }

    /// In parts of any size, with rising and falling logits, all that is -inf at first, and far ones that count for nothing.
    #[test]
    fn parts_come_to_the_same_as_the_whole() {
        with_each(|_| {
            let vocabulary = 700;
            for (case, rise) in [(0, 0.), (1, 0.1), (2, -0.1), (3, 1.), (4, -1.)] {
                let mut logits = numbers(vocabulary * LANES * 2, 7 + case);
                for (index, logit) in logits.iter_mut().enumerate() {
                    let id = index / LANES % vocabulary;
                    *logit = *logit * 20. + id as f32 * rise;
                    if id < 130 && index % LANES == 3 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
                let mut whole = logits.clone();
                let expected = exponentials(&mut whole, vocabulary);
                let mut summaries = vec![Summary::EMPTY; 2];
                let mut parts = vec![0f32; logits.len()];
                let mut start = 0;
                for size in [1, 64, 63, 300, 256, 16] {
                    let ids = start..start + size;
                    let of = |panel: usize, id: usize| (panel * vocabulary + id) * LANES;
                    let mut part: Vec<f32> = (0..2)
                        .flat_map(|panel| logits[of(panel, ids.start)..of(panel, ids.end)].to_vec())
                        .collect();
                    let factors = online_softmax(&mut part, ids.clone(), None, &mut summaries);
                    for (panel, factors) in factors.iter().enumerate() {
                        let done = &mut parts[of(panel, 0)..of(panel, ids.end)];
                        for (index, x) in done.iter_mut().enumerate() {
                            *x *= factors[index % LANES];
                        }
                        let new = &part[panel * size * LANES..][..size * LANES];
                        parts[of(panel, ids.start)..of(panel, ids.end)].copy_from_slice(new);
                    }
                    start = ids.end;
                }
                assert_eq!(start, vocabulary);
                // Exponents are rounded on the way, the larger ones by more.
                for (index, (a, b)) in parts.iter().zip(&whole).enumerate() {
                    let bound = b * f32::EPSILON * (4. - 2. * b.max(1e-30).ln());
                    assert!((a - b).abs() <= bound + 1e-30, "{index}: {a} {b}");
                }
                for (ours, all) in summaries.iter().zip(&expected) {
                    assert_eq!((ours.argmax, ours.largest), (all.argmax, all.largest));
                    for lane in 0..LANES {
                        assert!((ours.log_sum(lane) - all.log_sum(lane)).abs() < 1e-6);
                        let far = (ours.entropy(lane) - all.entropy(lane)).abs();
                        assert!(far < 1e-5, "{case} {lane}: {far}");
                    }
                }
            }
        });
    }

    /// In parts, against plain sums in f64: the capped logits' statistics, and what each logit contributes to the gradient.
    #[test]
    fn soft_caps_are_those_of_plain_formulas() {
        with_each(|_| {
            let vocabulary = 600;
            for (cap, size) in [(2f32, 6f32), (30., 40.)] {
                let mut logits = numbers(vocabulary * LANES * 2, 9);
                for logit in &mut logits {
                    *logit *= size;
                }
                let mut summaries = vec![Summary::EMPTY; 2];
                let mut sums = [[1f64; LANES]; 2];
                let mut left = vec![0f32; logits.len()];
                for ids in [0..512, 512..vocabulary] {
                    let of = |panel: usize, id: usize| (panel * vocabulary + id) * LANES;
                    let mut part: Vec<f32> = (0..2)
                        .flat_map(|panel| logits[of(panel, ids.start)..of(panel, ids.end)].to_vec())
                        .collect();
                    sum_capped(&part, cap, &mut sums);
                    let factors = online_softmax(&mut part, ids.clone(), Some(cap), &mut summaries);
                    for (panel, factors) in factors.iter().enumerate() {
                        for (index, x) in left[of(panel, 0)..of(panel, ids.start)]
                            .iter_mut()
                            .enumerate()
                        {
                            *x *= factors[index % LANES];
                        }
                        let new = &part[panel * ids.len() * LANES..][..ids.len() * LANES];
                        left[of(panel, ids.start)..of(panel, ids.end)].copy_from_slice(new);
                    }
                }
                let mut slopes = logits.clone();
                soft_cap_slopes(&mut slopes[5..], cap);
                for (panel, summary) in summaries.iter().enumerate() {
                    for lane in 0..LANES {
                        let index = |id: usize| (panel * vocabulary + id) * LANES + lane;
                        let t = |id: usize| (f64::from(logits[index(id)]) / f64::from(cap)).tanh();
                        let at = |id: usize| f64::from(cap) * t(id);
                        let sum: f64 = (0..vocabulary).map(|id| at(id).exp()).sum();
                        assert!((summary.log_sum(lane) - sum.ln()).abs() < 1e-5);
                        let p = |id: usize| at(id).exp() / sum;
                        let entropy: f64 = (0..vocabulary).map(|id| -p(id) * p(id).ln()).sum();
                        assert!((summary.entropy(lane) - entropy).abs() < 1e-5);
                        let total = 1. + (0..vocabulary).map(at).sum::<f64>();
                        assert!((sums[panel][lane] - total).abs() < 1e-3, "{total}");
                        for id in 0..vocabulary {
                            let ours = f64::from(left[index(id)] / summary.sum[lane]);
                            let exact = p(id) * (1. - t(id) * t(id));
                            assert!((ours - exact).abs() < 1e-6, "{id}: {ours} {exact}");
                            let slope = f64::from(slopes[index(id)]);
                            let far = (slope - (1. - t(id) * t(id))).abs();
                            assert!(index(id) < 5 || far < 1e-6, "{id}: {slope}");
                        }
                    }
                }
            }
        });
    }
}
