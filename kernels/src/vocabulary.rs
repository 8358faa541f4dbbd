//! Softmax over a vocabulary, in panels of logits: 32 tokens side by side for each id.

use rayon::prelude::*;

use crate::dispatch::{Loop, run};
use crate::exp::exp;
use crate::panels::{LANES, count};

type Row = [f32; LANES];

/// What a panel's logits come to, each token's number in its lane.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// The largest logit.
    pub largest: Row,
    /// Its id, the first if there are several.
    pub first: [u32; LANES],
    /// The sum of `e^(logit - largest)`.
    pub sum: Row,
    /// The sum of `e^(logit - largest) * (logit - largest)`: with `sum` it gives the entropy.
    pub weighted: Row,
}

/// Ids summed up before their sum joins the total.
const SUMMED: usize = 256;

/// Turns logits into `e^(logit - largest)` in place, panel by panel over all cores.
///
/// # Panics
/// If `logits` are no panels of so many ids, or ids have no room in 32 bits.
pub fn exponentials(logits: &mut [f32], vocabulary: usize) -> Vec<Summary> {
    count(logits.len(), vocabulary, "the logits");
    assert!(
        u32::try_from(vocabulary).is_ok(),
        "a vocabulary of {vocabulary}"
    );
    let panels = logits.par_chunks_mut(vocabulary.max(1) * LANES);
    panels.map(|logits| run(Exponentials(logits))).collect()
}

struct Exponentials<'a>(&'a mut [f32]);

impl Loop for Exponentials<'_> {
    type Output = Summary;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Summary {
        let (rows, _) = self.0.as_chunks_mut::<LANES>();
        let mut largest: Row = [f32::NEG_INFINITY; LANES];
        let mut first = [0u32; LANES];
        for (id, row) in (0u32..).zip(rows.iter()) {
            for lane in 0..LANES {
                let more = row[lane] > largest[lane];
                largest[lane] = if more { row[lane] } else { largest[lane] };
                first[lane] = if more { id } else { first[lane] };
            }
        }
        let (mut sum, mut weighted): (Row, Row) = ([0.; LANES], [0.; LANES]);
        for rows in rows.chunks_mut(SUMMED) {
            let (mut part, mut weighted_part): (Row, Row) = ([0.; LANES], [0.; LANES]);
            for row in rows {
                for lane in 0..LANES {
                    let below = row[lane] - largest[lane];
                    let e = exp::<FMA>(below);
                    row[lane] = e;
                    part[lane] += e;
                    // Below -88 the factor 0 wins over an infinite distance.
                    weighted_part[lane] += e * below.max(-100.);
                }
            }
            for lane in 0..LANES {
                sum[lane] += part[lane];
                weighted[lane] += weighted_part[lane];
            }
        }
        Summary {
            largest,
            first,
            sum,
            weighted,
        }
    }
}

impl Summary {
    /// `log sum e^logit` of the token in a lane.
    pub fn log_sum(&self, lane: usize) -> f64 {
        f64::from(self.largest[lane]) + f64::from(self.sum[lane]).ln()
    }

    /// The entropy of the token in a lane, in nats.
    pub fn entropy(&self, lane: usize) -> f64 {
        let sum = f64::from(self.sum[lane]);
        sum.ln() - f64::from(self.weighted[lane]) / sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::product::tests::numbers;

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
                    assert_eq!(summary.first[lane] as usize, best.unwrap());
                    let e = logits[(panel * vocabulary + 3) * LANES + lane] / summary.sum[lane];
                    assert!((f64::from(e) - p(3)).abs() < 1e-6);
                }
            }
        });
    }
}
