//! The layout of activations: feature `feature` of token `panel * 32 + lane` is `data[(panel * features + feature) * 32 + lane]`.
//!
//! The lanes after the last token hold zeros in panels that a caller makes, and finite numbers in what is computed from those.

use rayon::prelude::*;

/// The number of tokens in a panel.
pub const LANES: usize = 32;

/// The number of panels that hold `tokens` tokens.
pub fn panels(tokens: usize) -> usize {
    tokens.div_ceil(LANES)
}

/// The number of floats in the panels of `features` features for `tokens` tokens; `usize::MAX` if it overflows.
pub fn size(features: usize, tokens: usize) -> usize {
    let rows = panels(tokens).saturating_mul(features);
    rows.saturating_mul(LANES)
}

/// The number of panels of `features` features that `length` floats make up.
///
/// # Panics
/// If `length` is not a whole number of panels; `what` names the argument in the message.
pub(crate) fn count(length: usize, features: usize, what: &str) -> usize {
    let panel = features.saturating_mul(LANES);
    let whole = length.checked_rem(panel).unwrap_or(length) == 0;
    assert!(
        whole,
        "{what}: {length} floats are no panels of {features} features"
    );
    length.checked_div(panel).unwrap_or(0)
}

/// Checks that `length` floats (or pairs) make up `panels` panels of `features` features.
///
/// # Panics
/// If they don't; `what` names the argument in the message.
pub(crate) fn check(length: usize, features: usize, panels: usize, what: &str) {
    let wanted = panels.saturating_mul(features).saturating_mul(LANES);
    assert_eq!(
        length, wanted,
        "{what}: the size of {panels} panels of {features} features"
    );
}

/// Transposes rows into panels: `row(token)` gives the `features` values of each of `tokens` tokens. The lanes after the last
/// token become zeros.
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

/// The `features` values of one token of panels `data`.
///
/// # Panics
/// If `data` does not hold token number `token`.
pub fn column(data: &[f32], features: usize, token: usize) -> impl Iterator<Item = f32> + '_ {
    let panel = features * LANES;
    let data = &data[token / LANES * panel..][..panel];
    data.iter().skip(token % LANES).step_by(LANES).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
