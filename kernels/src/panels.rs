//! The layout of activations: `data[(panel * features + feature) * 32 + lane]`, token `panel * 32 + lane`.
//!
//! Lanes behind the last token hold zeros in what a caller makes, and finite numbers in what is computed from that.

use rayon::prelude::*;

use crate::dispatch::{Loop, run};
use crate::micro::pair_rows;

/// Tokens in a panel.
pub const LANES: usize = 32;

/// How many panels hold so many tokens.
pub fn panels(tokens: usize) -> usize {
    tokens.div_ceil(LANES)
}

/// How many floats hold `features` of so many tokens; `usize::MAX`, which no memory has, if they can't be counted.
pub fn size(features: usize, tokens: usize) -> usize {
    let rows = panels(tokens).saturating_mul(features);
    rows.saturating_mul(LANES)
}

/// How many panels of so many features `length` floats are.
///
/// # Panics
/// If they are no whole number of panels; `what` says of what.
pub(crate) fn count(length: usize, features: usize, what: &str) -> usize {
    let panel = features.saturating_mul(LANES);
    let whole = length.checked_rem(panel).unwrap_or(length) == 0;
    assert!(
        whole,
        "{what}: {length} floats are no panels of {features} features"
    );
    length.checked_div(panel).unwrap_or(0)
}

/// Checks that `length` floats (or pairs) are so many panels of so many features.
///
/// # Panics
/// If they are not; `what` says of what.
pub(crate) fn check(length: usize, features: usize, panels: usize, what: &str) {
    let wanted = panels.saturating_mul(features).saturating_mul(LANES);
    assert_eq!(
        length, wanted,
        "{what}: the size of {panels} panels of {features} features"
    );
}

/// Writes one row of floats a token, each of `features`, into panels. `row(token)` gives the row.
///
/// # Panics
/// If `out` has not [`size`]`(features, tokens)` floats, or a row not `features`.
pub fn fill<'a>(
    out: &mut [f32],
    features: usize,
    tokens: usize,
    row: impl Fn(usize) -> &'a [f32] + Sync,
) {
    check(out.len(), features, panels(tokens), "the rows' panels");
    if out.is_empty() {
        return;
    }
    let chunks = out.par_chunks_mut(features * LANES).enumerate();
    chunks.for_each(|(panel, out)| {
        let last = tokens.saturating_sub(panel * LANES).min(LANES);
        if last < LANES {
            out.fill(0.);
        }
        for lane in 0..last {
            let row = row(panel * LANES + lane);
            assert_eq!(row.len(), features, "a row's features");
            for (out, value) in out.iter_mut().skip(lane).step_by(LANES).zip(row) {
                *out = *value;
            }
        }
    });
}

/// The features of one token.
///
/// # Panics
/// If the panels don't hold the token.
pub fn column(data: &[f32], features: usize, token: usize) -> impl Iterator<Item = f32> + '_ {
    let panel = features * LANES;
    let data = &data[token / LANES * panel..][..panel];
    data.iter().skip(token % LANES).step_by(LANES).copied()
}

/// Rounds to bf16, ties to even. A number that is none stays none.
#[inline(always)]
pub fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        nan
    } else {
        rounded
    }
}

/// Two neighbouring features of each token as a pair of bf16: `[panel][feature / 2][lane]`, the first in the low half.
/// With an odd number of features the last pair's second is 0.
///
/// # Panics
/// If `data` are no panels of `features`, or `out` has not as many for half of them.
pub fn pairs(data: &[f32], features: usize, out: &mut [u32]) {
    let half = features.div_ceil(2);
    let panels = count(data.len(), features, "the numbers to pair");
    check(out.len(), half, panels, "the pairs");
    out.par_chunks_mut(half.max(1) * LANES)
        .zip(data.par_chunks(features.max(1) * LANES))
        .for_each(|(out, data)| {
            let (out, _) = out.as_chunks_mut::<LANES>();
            let (rows, _) = data.as_chunks::<LANES>();
            if !pair_rows(rows, out) {
                run(Pairs { rows, out });
            }
        });
}

struct Pairs<'a> {
    rows: &'a [[f32; LANES]],
    out: &'a mut [[u32; LANES]],
}

impl Loop for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, rows) in self.out.iter_mut().zip(self.rows.chunks(2)) {
            let first = &rows[0];
            if let Some(second) = rows.get(1) {
                for lane in 0..LANES {
                    out[lane] = bf16_bits(first[lane]) | (bf16_bits(second[lane]) << 16);
                }
            } else {
                for lane in 0..LANES {
                    out[lane] = bf16_bits(first[lane]);
                }
            }
        }
    }
}

/// Rounds every value to bf16, in place.
pub fn round_to_bf16(data: &mut [f32]) {
    struct Round<'a>(&'a mut [f32]);
    impl Loop for Round<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for x in self.0 {
                *x = f32::from_bits(bf16_bits(*x) << 16);
            }
        }
    }
    data.par_chunks_mut(1 << 14)
        .for_each(|data| run(Round(data)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;

    #[test]
    fn rows_go_in_and_come_out() {
        let rows: Vec<Vec<f32>> = (0..70)
            .map(|t| (0..5).map(|f| (t * 10 + f) as f32).collect())
            .collect();
        let mut data = vec![9.; size(5, 70)];
        fill(&mut data, 5, 70, |t| &rows[t]);
        for (t, row) in rows.iter().enumerate() {
            assert_eq!(&column(&data, 5, t).collect::<Vec<_>>(), row);
        }
        assert!(column(&data, 5, 71).all(|x| x == 0.));
    }

    #[test]
    fn pairs_are_rounded_as_half_does() {
        with_each(|_| {
            let values = (0..3 * LANES).map(|i| (i as f32 - 40.) * 1.234_567e-3);
            let mut data: Vec<f32> = values.collect();
            data[5] = f32::NAN;
            data[6] = f32::INFINITY;
            data[7] = f32::from_bits(0x3f80_8000);
            let mut out = vec![0; 2 * LANES];
            pairs(&data, 3, &mut out);
            for (place, pair) in out.iter().enumerate() {
                let (row, lane) = (place / LANES * 2, place % LANES);
                let expected = |row: usize| {
                    data.get(row * LANES + lane)
                        .map_or(0, |x| u32::from(half::bf16::from_f32(*x).to_bits()))
                };
                assert_eq!(*pair, expected(row) | (expected(row + 1) << 16), "{place}");
            }
        });
    }
}
