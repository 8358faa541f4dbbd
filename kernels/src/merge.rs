//! The merge of a low-rank update into a weight: `W + s B A` for a part of `W` (Hu et al. 2021, arXiv 2106.09685, section 4.1).

use crate::dispatch::{self, Loop};

/// The values of a row that are summed at once; their sums stay in the first-level cache.
const WIDTH: usize = 512;

/// The low-rank update of a matrix (rows, columns).
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// The matrix A (rank, columns), row-major.
    pub a: &'a [f32],
    /// The matrix B (rows, rank), row-major.
    pub b: &'a [f32],
    /// The length of a row of `a` and of the matrix that is updated.
    pub columns: usize,
    /// The factor `s` of the product `B A`.
    pub scaling: f32,
}

/// Adds the update to `values`, which are the elements of the row-major matrix (rows, columns) from index `first` on. Each sum over
/// the rank runs from its first term to its last without fused multiply-adds, so the result depends neither on the processor nor on
/// how the matrix is split into parts.
///
/// # Panics
/// If `a` and `b` are not of one rank, or `values` reaches beyond the end of the matrix.
pub fn add(update: Update<'_>, first: usize, values: &mut [f32]) {
    let (columns, a, b) = (update.columns, update.a.len(), update.b.len());
    let rank = a.checked_div(columns).unwrap_or(0);
    assert_eq!(a, rank * columns, "the size of A");
    match b.checked_div(rank) {
        Some(rows) => {
            assert_eq!(b, rows * rank, "the size of B");
            let end = first.checked_add(values.len());
            let size = rows.saturating_mul(columns);
            assert!(end.is_some_and(|end| end <= size), "values of the matrix");
        }
        None => assert_eq!(b, 0, "the size of B of rank 0"),
    }
    dispatch::run(Add {
        update,
        first,
        values,
    });
}

struct Add<'a, 'v> {
    update: Update<'a>,
    first: usize,
    values: &'v mut [f32],
}

impl Loop for Add<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // Never fused, so that the result's bits don't depend on the machine.
        add_plain(self.update, self.first, self.values);
    }
}

#[inline(always)]
fn add_plain(update: Update<'_>, mut first: usize, mut values: &mut [f32]) {
    let Update {
        a,
        b,
        columns,
        scaling,
    } = update;
    if columns == 0 || a.is_empty() {
        return;
    }
    let rank = a.len() / columns;
    while !values.is_empty() {
        let (row, column) = (first / columns, first % columns);
        let count = (columns - column).min(values.len()).min(WIDTH);
        let (now, rest) = values.split_at_mut(count);
        let mut sums = [0f32; WIDTH];
        let sums = &mut sums[..count];
        let factors = &b[row * rank..][..rank];
        let part = |index: usize| &a[index * columns + column..][..count];
        let (fours, ones) = factors.as_chunks::<4>();
        for (four, [f0, f1, f2, f3]) in fours.iter().enumerate() {
            let (a0, a1) = (part(4 * four), part(4 * four + 1));
            let (a2, a3) = (part(4 * four + 2), part(4 * four + 3));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = *sum + f0 * a0[i] + f1 * a1[i] + f2 * a2[i] + f3 * a3[i];
            }
        }
        for (one, factor) in ones.iter().enumerate() {
            for (sum, a) in sums.iter_mut().zip(part(4 * fours.len() + one)) {
                *sum += factor * a;
            }
        }
        for (value, sum) in now.iter_mut().zip(sums) {
            *value += *sum * scaling;
        }
        first += count;
        values = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;

    #[test]
    fn the_sum_is_that_of_a_plain_loop_however_it_is_cut() {
        let (rows, columns) = (7, 1301);
        let number = |i: usize| ((i * 7919 % 1009) as f32 - 500.) / 300.;
        for rank in [0, 1, 4, 6, 9] {
            let a: Vec<f32> = (0..rank * columns).map(number).collect();
            let b: Vec<f32> = (0..rows * rank).map(|i| number(i + 13)).collect();
            let weight: Vec<f32> = (0..rows * columns).map(|i| number(i + 29)).collect();
            let update = Update {
                a: &a,
                b: &b,
                columns,
                scaling: 0.3,
            };
            let exact = |i: usize| {
                let (row, column) = (i / columns, i % columns);
                let term =
                    |k: usize| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]);
                f64::from(weight[i]) + (0..rank).map(term).sum::<f64>() * f64::from(0.3f32)
            };
            let mut whole = weight.clone();
            add(update, 0, &mut whole);
            for (i, value) in whole.iter().enumerate() {
                assert!((f64::from(*value) - exact(i)).abs() < 1e-4, "{rank} {i}");
            }
            with_each(|isa| {
                let mut again = weight.clone();
                add(update, 0, &mut again);
                assert!(again == whole, "{rank} {isa:?}");
            });
            for cut in [1, 64, 1000, 1301, 4096] {
                let mut parts = weight.clone();
                for (number, part) in parts.chunks_mut(cut).enumerate() {
                    add(update, number * cut, part);
                }
                assert!(parts == whole, "{rank} {cut}");
            }
        }
    }
}
