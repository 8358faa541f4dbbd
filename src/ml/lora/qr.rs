//! The first columns of a QR decomposition by Householder reflections (Golub and Van Loan, Matrix Computations, 4th edition, algorithm 5.2.1), with
//! LAPACK's signs (`dgeqrf`): a diagonal element of R has the opposite sign of the element that it takes the place of.

use anyhow::ensure;
use rayon::prelude::*;

/// The columns that a thread reflects at once.
const COLUMNS: usize = 256;

/// The first columns of Q and the first rows of R.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Qr {
    /// The first columns of Q (rows, rank), row-major. They are orthonormal.
    pub(super) q: Vec<f64>,
    /// The first rows of R (rank, columns), row-major. Below the diagonal they are 0.
    pub(super) r: Vec<f64>,
}

/// The first `rank` columns of Q and rows of R of the matrix `values` (rows, columns), row-major. Bits don't depend on the number of threads.
///
/// # Errors
/// A value is not finite, `values` is not of this size, or `rank` is 0 or above the smaller dimension.
pub(super) fn leading(
    values: &[f32],
    (rows, columns): (usize, usize),
    rank: usize,
) -> anyhow::Result<Qr> {
    let most = rows.min(columns);
    ensure!(
        values.len() == rows * columns && (1..=most).contains(&rank),
        "a rank of {rank} is asked of a matrix of {rows} x {columns}, expected at most {most}"
    );
    ensure!(
        values.iter().all(|x| x.is_finite()),
        "the matrix has a NaN or infinity"
    );
    let mut matrix: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
    let mut reflections = Vec::with_capacity(rank);
    for step in 0..rank {
        let mut column: Vec<f64> = (step..rows)
            .map(|row| matrix[row * columns + step])
            .collect();
        let first = column[0];
        let below: f64 = column[1..].iter().map(|x| x * x).sum();
        let factor = if below > 0. {
            let length = first.hypot(below.sqrt());
            let diagonal = if first < 0. { length } else { -length };
            for x in &mut column {
                *x /= first - diagonal;
            }
            (diagonal - first) / diagonal
        } else {
            0.
        };
        column[0] = 1.;
        let reflection = Reflection { column, factor };
        reflection.apply(&mut matrix[step * columns..], columns);
        reflections.push(reflection);
    }
    let mut r = matrix[..rank * columns].to_vec();
    for row in 1..rank {
        r[row * columns..row * columns + row].fill(0.);
    }
    let mut q = vec![0f64; rows * rank];
    for at in 0..rank {
        q[at * rank + at] = 1.;
    }
    for (step, reflection) in reflections.iter().enumerate().rev() {
        reflection.apply(&mut q[step * rank..], rank);
    }
    Ok(Qr { q, r })
}

/// The reflection `I - factor v v^T`.
struct Reflection {
    /// The vector v.
    column: Vec<f64>,
    factor: f64,
}

impl Reflection {
    /// Reflects the columns of a matrix of as many rows as v has elements.
    fn apply(&self, matrix: &mut [f64], columns: usize) {
        if self.factor == 0. {
            return;
        }
        let mut along = vec![0f64; columns];
        let parts = along.par_chunks_mut(COLUMNS).enumerate();
        parts.for_each(|(part, along)| {
            for (row, v) in matrix.chunks(columns).zip(&self.column) {
                for (sum, x) in along.iter_mut().zip(&row[part * COLUMNS..]) {
                    *sum += v * x;
                }
            }
        });
        let rows = matrix.par_chunks_mut(columns).zip(&self.column);
        rows.for_each(|(row, v)| {
            for (x, along) in row.iter_mut().zip(&along) {
                *x -= self.factor * v * along;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + 13) % 1013) as f32 / 500. - 1.;
        (0..rows * columns).map(value).collect()
    }

    #[test]
    fn the_product_is_the_matrix_and_q_is_orthonormal() {
        for (rows, columns) in [(40, 30), (30, 300), (5, 5), (1, 3)] {
            let values = matrix(rows, columns);
            let rank = rows.min(columns);
            let Qr { q, r } = leading(&values, (rows, columns), rank).unwrap();
            for (i, row) in q.chunks(rank).enumerate() {
                for column in 0..columns {
                    let sum: f64 = (0..rank).map(|k| row[k] * r[k * columns + column]).sum();
                    let value = f64::from(values[i * columns + column]);
                    assert!((sum - value).abs() < 1e-12, "{rows} {columns}");
                }
            }
            for a in 0..rank {
                for b in 0..rank {
                    let dot: f64 = q.chunks(rank).map(|row| row[a] * row[b]).sum();
                    let expected = f64::from(u8::from(a == b));
                    assert!((dot - expected).abs() < 1e-12, "{dot}");
                }
            }
            // The first columns are the same with a lower rank.
            if rank > 2 {
                let fewer = leading(&values, (rows, columns), 2).unwrap();
                assert_eq!(fewer.r, r[..2 * columns]);
                for (few, all) in fewer.q.chunks(2).zip(q.chunks(rank)) {
                    assert!((few[0] - all[0]).abs() < 1e-14 && (few[1] - all[1]).abs() < 1e-14);
                }
            }
        }
    }

    #[test]
    fn what_can_t_be_decomposed_is_an_error() {
        assert!(leading(&[1.; 6], (2, 3), 3).is_err());
        assert!(leading(&[1.; 6], (2, 3), 0).is_err());
        assert!(leading(&[1.; 5], (2, 3), 1).is_err());
        assert!(leading(&[f32::NAN; 4], (2, 2), 1).is_err());
        let zero = leading(&[0.; 6], (3, 2), 2).unwrap();
        assert!(zero.r.iter().all(|x| *x == 0.));
    }
}
