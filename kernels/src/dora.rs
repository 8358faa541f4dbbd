//! What `DoRA` (Liu et al. 2024, arXiv 2402.09353) adds to a product with a low-rank pair: the norms of the sum's rows, and a factor for each
//! of them.

use rayon::prelude::*;

use crate::dispatch::{Loop, fma, run};
use crate::matrix::Matrix;
use crate::panels::{self, LANES};

/// Writes the norm of each row of W + scaling B A to `out` (equation 5): `base` is W (rows, columns), `a` A (rank, columns) and `b` B (rows,
/// rank). Sums are in f32.
///
/// # Panics
/// If the sizes don't fit each other, or a matrix is transposed.
pub fn row_norms(
    base: Matrix<'_>,
    (a, b): (Matrix<'_>, Matrix<'_>),
    scaling: f32,
    out: &mut [f32],
) {
    let transposed = [base, a, b].iter().any(Matrix::is_transposed);
    assert!(!transposed, "a transposed matrix has no norms of rows here");
    let (rows, columns, rank) = (base.height(), base.depth(), a.height());
    assert_eq!(
        (a.depth(), b.height(), b.depth()),
        (columns, rows, rank),
        "the sizes of a pair beside a weight ({rows}, {columns})"
    );
    assert_eq!(out.len(), rows, "a norm for each row");
    out.par_iter_mut().enumerate().for_each_init(
        || (vec![0f32; columns], Vec::new()),
        |(sum, buffer), (row, norm)| {
            sum.copy_from_slice(base.row(row, 0..columns, buffer));
            for low in 0..rank {
                let mut factor = Vec::new();
                let factor = scaling * b.row(row, low..low + 1, &mut factor)[0];
                run(Add(factor, a.row(low, 0..columns, buffer), sum));
            }
            *norm = run(Squares(sum)).sqrt();
        },
    );
}

/// Adds a factor times a row to another.
struct Add<'a>(f32, &'a [f32], &'a mut [f32]);

impl Loop for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (sum, x) in self.2.iter_mut().zip(self.1) {
            *sum = fma::<FMA>(self.0, *x, *sum);
        }
    }
}

/// The sum of squares.
struct Squares<'a>(&'a [f32]);

impl Loop for Squares<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        let (rows, rest) = self.0.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for row in rows {
            for lane in 0..LANES {
                sums[lane] = fma::<FMA>(row[lane], row[lane], sums[lane]);
            }
        }
        let rest: f32 = rest.iter().map(|x| x * x).sum();
        sums.iter().sum::<f32>() + rest
    }
}

/// The number of panels of a feature for each of `factors`, of which all of `others` have as many.
fn check(x: &[f32], factors: &[f32], others: &[usize]) -> usize {
    let count = panels::count(x.len(), factors.len(), "what is scaled");
    for other in others {
        panels::check(
            *other,
            factors.len(),
            count,
            "what goes with what is scaled",
        );
    }
    count
}

/// `out = factors * x + bias`, with `onto` added: a factor and a number of `bias` for each feature of the panels `x`. `onto` are panels like
/// `x`, or what is in `out` already.
///
/// # Panics
/// If the sizes don't fit each other.
pub fn scale_features(
    x: &[f32],
    factors: &[f32],
    bias: Option<&[f32]>,
    onto: Onto<'_>,
    out: &mut [f32],
) {
    check(x, factors, &[out.len()]);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), factors.len(), "the size of the bias");
    }
    if let Onto::Values(values) = onto {
        assert_eq!(values.len(), x.len(), "the size of what is added to");
    }
    let features = factors.len();
    let rows = out.as_chunks_mut::<LANES>().0.par_iter_mut().enumerate();
    rows.with_min_len(64).for_each(|(row, out)| {
        let feature = row % features;
        let added = bias.map_or(0., |bias| bias[feature]);
        let first = row * LANES;
        let x = &x[first..first + LANES];
        for lane in 0..LANES {
            let before = match onto {
                Onto::Zero => 0.,
                Onto::Out => out[lane],
                Onto::Values(values) => values[first + lane],
            };
            out[lane] = before + (added + x[lane] * factors[feature]);
        }
    });
}

/// What [`scale_features`] adds to.
#[derive(Debug, Clone, Copy)]
pub enum Onto<'a> {
    /// Zeros.
    Zero,
    /// What is in the output.
    Out,
    /// Other panels.
    Values(&'a [f32]),
}

/// Adds to `out`, for each feature, the sum over tokens of `a * b`, times its factor. The lanes after the last token are zero in one of the two.
///
/// # Panics
/// If the sizes don't fit each other.
pub fn feature_dots(a: &[f32], b: &[f32], factors: &[f32], out: &mut [f32]) {
    let count = check(a, factors, &[b.len()]);
    assert_eq!(out.len(), factors.len(), "a sum for each feature");
    let features = factors.len();
    let each = out.par_iter_mut().zip(factors).enumerate();
    each.with_min_len(16).for_each(|(feature, (out, factor))| {
        let mut sums = [0f32; LANES];
        for panel in 0..count {
            let first = (panel * features + feature) * LANES;
            let (a, b) = (&a[first..][..LANES], &b[first..][..LANES]);
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
        *out += sums.iter().sum::<f32>() * factor;
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::panels::size;
    use crate::product::tests::numbers;

    /// Against sums in f64, for each instruction set.
    #[test]
    fn norms_are_those_of_the_sum() {
        with_each(|_| {
            for (rows, columns, rank) in [(1, 1, 1), (5, 33, 3), (40, 100, 8), (3, 64, 0)] {
                let [w, a, b] = [rows * columns, rank * columns, rows * rank]
                    .map(|count| numbers(count, count as u64));
                let matrix = |values, rows, columns| Matrix::f32(values, rows, columns).unwrap();
                let pair = (matrix(&a, rank, columns), matrix(&b, rows, rank));
                let mut out = vec![0.; rows];
                row_norms(matrix(&w, rows, columns), pair, 1.7, &mut out);
                for (row, norm) in out.iter().enumerate() {
                    let sum = |column: usize| {
                        let low = (0..rank).map(|r| {
                            f64::from(b[row * rank + r]) * f64::from(a[r * columns + column])
                        });
                        f64::from(w[row * columns + column]) + f64::from(1.7f32) * low.sum::<f64>()
                    };
                    let exact = (0..columns).map(|c| sum(c).powi(2)).sum::<f64>().sqrt();
                    assert!((f64::from(*norm) - exact).abs() < 1e-6 * (1. + exact));
                }
            }
        });
    }

    #[test]
    fn features_are_scaled_and_summed() {
        for (features, tokens) in [(1, 1), (7, 70), (33, 32)] {
            let x = numbers(size(features, tokens), 1);
            let y = numbers(x.len(), 2);
            let (factors, bias) = (numbers(features, 3), numbers(features, 4));
            for (onto, added) in [
                (Onto::Zero, false),
                (Onto::Out, true),
                (Onto::Values(&y), true),
            ] {
                let mut out = y.clone();
                scale_features(&x, &factors, Some(&bias), onto, &mut out);
                for (index, ours) in out.iter().enumerate() {
                    let feature = index / LANES % features;
                    let own = x[index] * factors[feature] + bias[feature];
                    let expected = if added { own + y[index] } else { own };
                    assert!((ours - expected).abs() < 1e-6, "{ours} {expected}");
                }
            }
            let mut out = bias.clone();
            feature_dots(&x, &y, &factors, &mut out);
            for (feature, ours) in out.iter().enumerate() {
                let own = (0..x.len()).filter(|index| index / LANES % features == feature);
                let sum: f64 = own.map(|i| f64::from(x[i]) * f64::from(y[i])).sum();
                let exact = f64::from(bias[feature]) + sum * f64::from(factors[feature]);
                assert!((f64::from(*ours) - exact).abs() < 1e-5, "{ours} {exact}");
            }
        }
    }

    #[test]
    fn wrong_sizes_are_told() {
        use std::panic::catch_unwind;

        fn matrix(values: &[f32], rows: usize, columns: usize) -> Matrix<'_> {
            Matrix::f32(values, rows, columns).unwrap()
        }

        let refused = |expected: &str, run: fn()| {
            let panic = catch_unwind(run).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains(expected), "{text}");
        };
        refused("the sizes of a pair", || {
            let pair = (matrix(&[0.; 6], 2, 3), matrix(&[0.; 4], 2, 2));
            row_norms(matrix(&[0.; 4], 2, 2), pair, 1., &mut [0.; 2]);
        });
        refused("a norm for each row", || {
            let pair = (matrix(&[0.; 4], 2, 2), matrix(&[0.; 4], 2, 2));
            row_norms(matrix(&[0.; 4], 2, 2), pair, 1., &mut [0.; 3]);
        });
        refused("what is scaled", || {
            scale_features(&[0.; 33], &[0.; 1], None, Onto::Zero, &mut [0.; 33]);
        });
        refused("the size of the bias", || {
            let bias = Some(&[0f32; 2][..]);
            scale_features(&[0.; 32], &[0.; 1], bias, Onto::Zero, &mut [0.; 32]);
        });
        refused("a sum for each feature", || {
            feature_dots(&[0.; 32], &[0.; 32], &[0.; 1], &mut [0.; 2]);
        });
    }
}
