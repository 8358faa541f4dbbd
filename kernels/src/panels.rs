//! The layout of activations: `data[(panel * features + feature) * 32 + lane]`, token `panel * 32 + lane`.
//!
//! Lanes behind the last token hold zeros in what a caller makes, and finite numbers in what is computed from that.

use rayon::prelude::*;

use crate::dispatch::{Isa, Loop, run};
use crate::micro::pair_rows;

/// Tokens in a panel.
pub const LANES: usize = 32;

/// How many panels hold so many tokens.
pub fn panels(tokens: usize) -> usize {
    tokens.div_ceil(LANES)
}

/// How many floats hold `features` of so many tokens.
pub fn size(features: usize, tokens: usize) -> usize {
    panels(tokens) * features * LANES
}

/// Writes one row of floats a token, each of `features`, into panels. `row(token)` gives the row.
pub fn fill<'a>(
    out: &mut [f32],
    features: usize,
    tokens: usize,
    row: impl Fn(usize) -> &'a [f32] + Sync,
) {
    let chunks = out.par_chunks_mut(features.max(1) * LANES).enumerate();
    chunks.for_each(|(panel, out)| {
        let last = tokens.saturating_sub(panel * LANES).min(LANES);
        if last < LANES {
            out.fill(0.);
        }
        for lane in 0..last {
            let row = row(panel * LANES + lane);
            for (out, value) in out.iter_mut().skip(lane).step_by(LANES).zip(row) {
                *out = *value;
            }
        }
    });
}

/// The features of one token.
pub fn column(data: &[f32], features: usize, token: usize) -> impl Iterator<Item = f32> + '_ {
    let start = token / LANES * features * LANES + token % LANES;
    let values = data.get(start..).unwrap_or_default();
    values.iter().step_by(LANES).take(features).copied()
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
pub fn pairs(data: &[f32], features: usize, out: &mut [u32]) {
    let half = features.div_ceil(2);
    let wide = Isa::current() >= Isa::Avx512Bf16;
    out.par_chunks_mut(half.max(1) * LANES)
        .zip(data.par_chunks(features.max(1) * LANES))
        .for_each(|(out, data)| {
            if !wide {
                return run(Pairs { data, out });
            }
            let (out, _) = out.as_chunks_mut::<LANES>();
            let (rows, _) = data.as_chunks::<LANES>();
            for (out, rows) in out.iter_mut().zip(rows.chunks(2)) {
                let second = rows.get(1).unwrap_or(&[0.; LANES]);
                // SAFETY: the instruction set is there.
                unsafe { pair_rows(&rows[0], second, out) };
            }
        });
}

struct Pairs<'a> {
    data: &'a [f32],
    out: &'a mut [u32],
}

impl Loop for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let (rows, _) = self.data.as_chunks::<LANES>();
        for (out, rows) in out.iter_mut().zip(rows.chunks(2)) {
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
