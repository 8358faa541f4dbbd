//! The largest singular values of a matrix and their vectors, by Golub and Kahan's bidiagonalisation from a random start (Golub and
//! Van Loan, Matrix Computations, 4th edition, section 10.4) with full reorthogonalisation.
//!
//! The singular values of a quantisation error are close to each other. Lanczos steps separate them much sooner than power iteration
//! would, and each costs two matrix-vector products, where a full decomposition would cost far more.

use anyhow::ensure;
use pipeline_kernels::random::splitmix64;
use rayon::prelude::*;

/// The largest residual of a pair of singular vectors, relative to the largest singular value.
const TOLERANCE: f64 = 1e-7;
/// The columns that a thread sums at once.
const COLUMNS: usize = 256;

/// Singular values in descending order, and their vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Svd {
    /// The singular values (rank).
    pub values: Vec<f64>,
    /// The left singular vectors (rank, rows), each of length 1.
    pub left: Vec<Vec<f64>>,
    /// The right singular vectors (rank, columns), each of length 1.
    pub right: Vec<Vec<f64>>,
}

/// A matrix in row-major order.
struct Matrix<'a> {
    values: &'a [f32],
    columns: usize,
}

impl Matrix<'_> {
    /// The product A v.
    fn times(&self, v: &[f64]) -> Vec<f64> {
        let rows = self.values.par_chunks(self.columns);
        rows.map(|row| row.iter().zip(v).map(|(a, v)| f64::from(*a) * v).sum())
            .collect()
    }

    /// The product u A.
    fn left_times(&self, u: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.; self.columns];
        let parts = sums.par_chunks_mut(COLUMNS).enumerate();
        parts.for_each(|(part, sums)| {
            for (row, u) in self.values.chunks(self.columns).zip(u) {
                for (sum, a) in sums.iter_mut().zip(&row[part * COLUMNS..]) {
                    *sum += f64::from(*a) * u;
                }
            }
        });
        sums
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Subtracts from `x` its components along `others`, twice because of rounding errors, and returns the length that remains.
fn orthogonalise(x: &mut [f64], others: &[Vec<f64>]) -> f64 {
    for _ in 0..2 {
        for other in others {
            let along = dot(x, other);
            x.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
        }
    }
    dot(x, x).sqrt()
}

/// Makes `x` orthogonal to `others`, normalises it, appends it to them, and returns its length before the normalisation. If less than
/// `small` remains of it, `another` vector is used instead, unless `others` span the whole space already.
fn append(
    others: &mut Vec<Vec<f64>>,
    mut x: Vec<f64>,
    small: f64,
    another: impl FnOnce() -> Vec<f64>,
) -> f64 {
    let length = orthogonalise(&mut x, others);
    let found = if length > small {
        length
    } else {
        x = another();
        orthogonalise(&mut x, others)
    };
    let scale = if found > small { 1. / found } else { 0. };
    for x in &mut x {
        *x *= scale;
    }
    others.push(x);
    if length > small { length } else { 0. }
}

fn noise(length: usize, random: &mut u64) -> Vec<f64> {
    let number = |_| (splitmix64(random) >> 11) as f64 / 2f64.powi(52) - 1.;
    (0..length).map(number).collect()
}

/// The `rank` largest singular values of a matrix (rows, columns), row-major, and their vectors. The same matrix always gives the same
/// numbers.
///
/// # Errors
/// A value is not finite, `values` is not of this size, `rank` is 0 or above the smaller dimension, or the iteration does not converge.
pub fn largest_singular_values(
    values: &[f32],
    (rows, columns): (usize, usize),
    rank: usize,
) -> anyhow::Result<Svd> {
    let most = rows.min(columns);
    ensure!(
        values.len() == rows * columns && (1..=most).contains(&rank),
        "{rank} singular values of a matrix of {rows} x {columns}: expected at most {most}"
    );
    ensure!(
        values.iter().all(|x| x.is_finite()),
        "the matrix has a NaN or infinity, so it has no singular values"
    );
    let matrix = Matrix { values, columns };
    let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let small = norm.sqrt() * 1e-14;
    let mut random = 0;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    // The first right vector is a sum of rows, and so are all others, so there are never more of them than rows.
    let start = matrix.left_times(&noise(rows, &mut random));
    append(&mut right, start, small, || noise(columns, &mut random));
    // In the basis of these vectors A is bidiagonal: a diagonal and a superdiagonal.
    let (mut diagonal, mut superdiagonal) = (Vec::new(), Vec::new());
    let mut check = (2 * rank + 16).min(most);
    loop {
        let next = right.last().map(|v| matrix.times(v)).unwrap_or_default();
        diagonal.push(append(&mut left, next, small, || noise(rows, &mut random)));
        let next = left
            .last()
            .map(|u| matrix.left_times(u))
            .unwrap_or_default();
        let another = || matrix.left_times(&noise(rows, &mut random));
        superdiagonal.push(append(&mut right, next, small, another));
        let steps = diagonal.len();
        if steps < check {
            continue;
        }
        let small = Bidiagonal::solve(&diagonal, &superdiagonal)?;
        let open = superdiagonal.last().copied().unwrap_or_default();
        let near = |index: usize| {
            let last = small.left.get(index).and_then(|p| p.last());
            (open * last.copied().unwrap_or_default()).abs() <= TOLERANCE * small.values[0]
        };
        if steps == most || (0..rank).all(near) {
            return Ok(small.expand(&left, &right, rank));
        }
        check = (2 * check).min(most);
    }
}

/// The singular values of the bidiagonal matrix, and their vectors in the basis of the Lanczos vectors.
struct Bidiagonal {
    values: Vec<f64>,
    left: Vec<Vec<f64>>,
    right: Vec<Vec<f64>>,
}

impl Bidiagonal {
    /// Computes them as the eigenvalues and eigenvectors of the matrix times its transpose, which is tridiagonal.
    fn solve(diagonal: &[f64], superdiagonal: &[f64]) -> anyhow::Result<Self> {
        let size = diagonal.len();
        let squares = (0..size).map(|i| {
            let superdiagonal = if i + 1 < size { superdiagonal[i] } else { 0. };
            diagonal[i].powi(2) + superdiagonal.powi(2)
        });
        let products = (1..size).map(|i| diagonal[i] * superdiagonal[i - 1]);
        let (squares, left) = tridiagonal_eigen(squares.collect(), products.collect())?;
        let values: Vec<f64> = squares.iter().map(|x| x.max(0.).sqrt()).collect();
        let right = left.iter().zip(&values).map(|(p, value)| {
            let inverse = if *value > 0. { 1. / value } else { 0. };
            let entry = |j: usize| {
                let above = if j > 0 {
                    superdiagonal[j - 1] * p[j - 1]
                } else {
                    0.
                };
                (diagonal[j] * p[j] + above) * inverse
            };
            (0..size).map(entry).collect()
        });
        Ok(Self {
            right: right.collect(),
            values,
            left,
        })
    }

    fn expand(&self, left: &[Vec<f64>], right: &[Vec<f64>], rank: usize) -> Svd {
        let combine = |weights: &[f64], vectors: &[Vec<f64>]| {
            let mut sum = vec![0.; vectors.first().map_or(0, Vec::len)];
            for (weight, vector) in weights.iter().zip(vectors) {
                sum.iter_mut()
                    .zip(vector)
                    .for_each(|(s, x)| *s += weight * x);
            }
            sum
        };
        let all = |small: &[Vec<f64>], large: &[Vec<f64>]| {
            let small = small[..rank].par_iter();
            small.map(|weights| combine(weights, large)).collect()
        };
        Svd {
            values: self.values[..rank].to_vec(),
            left: all(&self.left, left),
            right: all(&self.right, right),
        }
    }
}

/// The eigenvalues of a symmetric tridiagonal matrix in descending order, and their vectors, by the implicit QR algorithm with
/// Wilkinson's shift (Golub and Van Loan, Matrix Computations, 4th edition, algorithm 8.3.3).
fn tridiagonal_eigen(
    mut diagonal: Vec<f64>,
    mut superdiagonal: Vec<f64>,
) -> anyhow::Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let size = diagonal.len();
    // Row i will be the eigenvector of eigenvalue i.
    let mut vectors: Vec<Vec<f64>> = (0..size)
        .map(|i| (0..size).map(|j| f64::from(u8::from(i == j))).collect())
        .collect();
    let mut end = size.saturating_sub(1);
    let mut rounds = 0;
    while end > 0 {
        let negligible = |i: usize, diagonal: &[f64], superdiagonal: &[f64]| {
            superdiagonal[i].abs() <= f64::EPSILON * (diagonal[i].abs() + diagonal[i + 1].abs())
        };
        if negligible(end - 1, &diagonal, &superdiagonal) {
            end -= 1;
            continue;
        }
        let mut begin = end - 1;
        while begin > 0 && !negligible(begin - 1, &diagonal, &superdiagonal) {
            begin -= 1;
        }
        rounds += 1;
        ensure!(
            rounds <= 60 * size,
            "the singular values did not settle down in {rounds} rounds"
        );
        // Wilkinson's shift: the eigenvalue of the trailing 2 x 2 matrix that is nearer to its last entry.
        let half = (diagonal[end - 1] - diagonal[end]) / 2.;
        let square = superdiagonal[end - 1].powi(2);
        let shift =
            diagonal[end] - square / (half + half.hypot(superdiagonal[end - 1]).copysign(half));
        let (mut x, mut z) = (diagonal[begin] - shift, superdiagonal[begin]);
        for i in begin..end {
            let length = x.hypot(z);
            let (c, s) = if length > 0. {
                (x / length, z / length)
            } else {
                (1., 0.)
            };
            if i > begin {
                superdiagonal[i - 1] = length;
            }
            let (a, b, d) = (diagonal[i], superdiagonal[i], diagonal[i + 1]);
            diagonal[i] = c * c * a + 2. * c * s * b + s * s * d;
            diagonal[i + 1] = s * s * a - 2. * c * s * b + c * c * d;
            superdiagonal[i] = c * s * (d - a) + (c * c - s * s) * b;
            x = superdiagonal[i];
            if i + 1 < end {
                z = s * superdiagonal[i + 1];
                superdiagonal[i + 1] *= c;
            }
            let (first, second) = vectors.split_at_mut(i + 1);
            for (p, q) in first[i].iter_mut().zip(&mut second[0]) {
                (*p, *q) = (c * *p + s * *q, c * *q - s * *p);
            }
        }
    }
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    let values = order.iter().map(|i| diagonal[*i]).collect();
    let sorted = order.iter().map(|i| std::mem::take(&mut vectors[*i]));
    let sorted = sorted.collect();
    Ok((values, sorted))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix of rank 3 at most of which the singular vectors are known, and noise below.
    fn known(rows: usize, columns: usize, noise_size: f64) -> (Vec<f32>, [f64; 3]) {
        let mut random = 7;
        let mut frame = |length| {
            let mut vectors = Vec::new();
            for _ in 0..3 {
                let x = noise(length, &mut random);
                append(&mut vectors, x, 0., Vec::new);
            }
            vectors
        };
        let (left, right) = (frame(rows), frame(columns));
        let values = [5., 4.9, 1.];
        let mut random = 11;
        let rest = noise(rows * columns, &mut random);
        let entry = |index: usize| {
            let (i, j) = (index / columns, index % columns);
            let sum: f64 = (0..3).map(|k| values[k] * left[k][i] * right[k][j]).sum();
            (sum + noise_size * rest[index]) as f32
        };
        ((0..rows * columns).map(entry).collect(), values)
    }

    fn check(values: &[f32], (rows, columns): (usize, usize), svd: &Svd) {
        let matrix = Matrix { values, columns };
        for (k, value) in svd.values.iter().enumerate() {
            let (u, v) = (&svd.left[k], &svd.right[k]);
            assert_eq!((u.len(), v.len()), (rows, columns));
            let far = |a: Vec<f64>, b: &[f64]| {
                let far = a.iter().zip(b).map(|(a, b)| (a - value * b).powi(2));
                far.sum::<f64>().sqrt()
            };
            let limit = 1e-6 * svd.values[0].max(1e-30);
            assert!(far(matrix.times(v), u) <= limit, "{k}");
            assert!(far(matrix.left_times(u), v) <= limit, "{k}");
            if *value > limit {
                for other in 0..=k {
                    let expected = f64::from(u8::from(other == k));
                    assert!((dot(u, &svd.left[other]) - expected).abs() < 1e-6);
                    assert!((dot(v, &svd.right[other]) - expected).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn known_values_are_found_in_any_shape() {
        for shape in [(40, 90), (90, 40), (30, 30), (3, 200), (200, 3)] {
            let (values, expected) = known(shape.0, shape.1, 0.);
            let svd = largest_singular_values(&values, shape, 3).unwrap();
            for (ours, known) in svd.values.iter().zip(expected) {
                assert!((ours - known).abs() < 1e-5, "{shape:?} {ours} {known}");
            }
            check(&values, shape, &svd);
        }
    }

    #[test]
    fn close_values_are_told_apart() {
        // Noise alone: the spectrum of an error of quantisation.
        let shape = (300, 260);
        let (values, _) = known(shape.0, shape.1, 10.);
        let all = largest_singular_values(&values, shape, 260).unwrap();
        check(&values, shape, &all);
        let squares: f64 = all.values.iter().map(|x| x * x).sum();
        let norm: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!(
            (squares / norm - 1.).abs() < 1e-9,
            "all of the norm is found"
        );
        let some = largest_singular_values(&values, shape, 8).unwrap();
        check(&values, shape, &some);
        for (some, all) in some.values.iter().zip(&all.values) {
            assert!((some - all).abs() < 1e-9 * all, "{some} {all}");
        }
        assert_eq!(largest_singular_values(&values, shape, 8).unwrap(), some);
    }

    #[test]
    fn what_has_no_rank_and_no_number_is_borne() {
        let zero = largest_singular_values(&[0.; 12], (3, 4), 2).unwrap();
        assert!(zero.values.iter().all(|x| x.abs() < 1e-30));
        let (values, _) = known(20, 30, 0.);
        let more = largest_singular_values(&values, (20, 30), 6).unwrap();
        assert!(
            more.values[3..].iter().all(|x| *x < 1e-5),
            "{:?}",
            more.values
        );
        assert!(largest_singular_values(&[f32::NAN; 4], (2, 2), 1).is_err());
        assert!(largest_singular_values(&[1.; 4], (2, 2), 3).is_err());
        // Two equal values, which one start can't tell apart without help.
        let same = largest_singular_values(&[2., 0., 0., 2.], (2, 2), 2).unwrap();
        assert!(same.values.iter().all(|x| (x - 2.).abs() < 1e-12));
        check(&[2., 0., 0., 2.], (2, 2), &same);
    }
}
