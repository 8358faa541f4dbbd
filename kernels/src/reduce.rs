//! Sums over tokens, which are the gradients of weights and biases, and over the rows of a weight.

use rayon::prelude::*;

use crate::FloatType;
use crate::dispatch::{Loop, run};
use crate::matrix::Matrix;
use crate::micro::{Tile, multiply};
use crate::panels::{LANES, check, count, panels};

/// Rows of a tile.
const ROWS: usize = 8;
/// Rows of one task, a multiple of any tile's.
const PART: usize = 32;

/// How [`outer`] stores its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As (rows, columns): the sum for features `i` and `j` is `out[i][j]`.
    Straight,
    /// As (columns, rows): the sum for features `i` and `j` is `out[j][i]`.
    Transposed,
}

/// Adds the outer products of all tokens, `sum over tokens of a[i] * b[j]`, to `out`, a row-major matrix (rows, columns) or, with
/// [`Order::Transposed`], (columns, rows). That is the gradient of a linear layer's weight, where one factor is the gradient of the
/// layer's output and the other one its input.
///
/// Each factor comes with its number of features: `a` are panels of `rows` features, `b` are as many panels of `columns` features.
/// `columns` should be the smaller number, because `b` is transposed on the way. The lanes after the last token must be zero in one
/// of the two factors.
///
/// # Panics
/// If `out` has not `rows * columns` numbers, `a` is not a whole number of panels, or `b` has not as many panels as `a`.
pub fn outer(a: (&[f32], usize), b: (&[f32], usize), out: &mut [f32], order: Order) {
    if b.1 <= 16 {
        outer_by::<1, 16>(a, b, out, order);
    } else {
        outer_by::<2, ROWS>(a, b, out, order);
    }
}

/// [`outer`] with `V` times 16 columns at a time, in tiles of `M` rows.
fn outer_by<const V: usize, const M: usize>(
    (a, rows): (&[f32], usize),
    (b, columns): (&[f32], usize),
    out: &mut [f32],
    order: Order,
) {
    assert_eq!(
        Some(out.len()),
        rows.checked_mul(columns),
        "the size of the result"
    );
    if rows == 0 || columns == 0 {
        return;
    }
    let count = count(a.len(), rows, "the left factor");
    check(b.len(), columns, count, "the right factor");
    // [chunk of columns][panel][token][lane]
    let width = V * 16;
    let chunks = columns.div_ceil(width);
    let mut transposed = vec![0f32; chunks * count * LANES * width];
    let blocks = transposed.par_chunks_mut(LANES * width).enumerate();
    blocks.for_each(|(block, out)| {
        let (chunk, panel) = (block / count, block % count);
        let first = chunk * width;
        for (column, feature) in (first..columns.min(first + width)).enumerate() {
            let row = &b[(panel * columns + feature) * LANES..][..LANES];
            for (token, value) in row.iter().enumerate() {
                out[token * width + column] = *value;
            }
        }
    });
    // [chunk][row][lane]
    let part = |chunk: usize, first: usize, sums: &mut [f32]| {
        let transposed = &transposed[chunk * count * LANES * width..];
        sum_rows::<V, M>((a, rows), first, transposed, sums);
    };
    let mut sums = vec![0f32; chunks * rows * width];
    let at_once = PART * width;
    if rows % PART == 0 || chunks == 1 {
        let per_chunk = rows.div_ceil(PART);
        let parts = sums.par_chunks_mut(at_once).enumerate();
        parts.for_each(|(number, sums)| part(number / per_chunk, number % per_chunk * PART, sums));
    } else {
        let chunked = sums.par_chunks_mut(rows * width).enumerate();
        chunked.for_each(|(chunk, sums)| part(chunk, 0, sums));
    }
    match order {
        Order::Straight => {
            let each = out.par_chunks_mut(columns).enumerate();
            each.for_each(|(i, out)| {
                for (chunk, out) in out.chunks_mut(width).enumerate() {
                    let sums = &sums[(chunk * rows + i) * width..];
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out += sum;
                    }
                }
            });
        }
        Order::Transposed => {
            let each = out.par_chunks_mut(rows).enumerate();
            each.for_each(|(j, out)| {
                let sums = &sums[j / width * rows * width + j % width..];
                for (out, sum) in out.iter_mut().zip(sums.iter().step_by(width)) {
                    *out += sum;
                }
            });
        }
    }
}

/// Computes the sums of as many rows as `sums` holds, from row `first` on, for one chunk of columns.
fn sum_rows<const V: usize, const M: usize>(
    (a, rows): (&[f32], usize),
    first: usize,
    transposed: &[f32],
    sums: &mut [f32],
) {
    let width = V * 16;
    for (tile, sums) in sums.chunks_mut(M * width).enumerate() {
        let row = first + tile * M;
        let wanted = sums.len() / width;
        let panels = a.chunks_exact(rows * LANES);
        for (panel, (a, b)) in panels
            .zip(transposed.chunks_exact(LANES * width))
            .enumerate()
        {
            let c = sums.as_mut_ptr();
            // SAFETY: `wanted` rows from `row` on are in this panel of `a`, as `outer` cut `sums` to that; `b` has 32
            // rows; `sums` has `wanted`.
            unsafe {
                multiply::<M, V, LANES, 1>(Tile {
                    a: a[row * LANES..].as_ptr(),
                    b: b.as_ptr(),
                    depth: LANES,
                    c,
                    from: (panel > 0).then_some(c.cast_const()),
                    rows: wanted,
                });
            }
        }
    }
}

/// Adds the sum over tokens of each feature of `data` to `out`, which has one number for each feature: the gradient of a bias when
/// `data` is the gradient of the layer's output. The lanes after the last token must be zero.
///
/// # Panics
/// If `data` has not [`size`](crate::panels::size)`(out.len(), tokens)` floats.
pub fn sum_over_tokens(data: &[f32], tokens: usize, out: &mut [f32]) {
    let features = out.len();
    let count = panels(tokens);
    check(data.len(), features, count, "what is summed");
    out.par_iter_mut().enumerate().for_each(|(feature, out)| {
        let mut sum = 0f64;
        for panel in 0..count {
            let row = &data[(panel * features + feature) * LANES..][..LANES];
            sum += row.iter().map(|x| f64::from(*x)).sum::<f64>();
        }
        *out += sum as f32;
    });
}

/// The rows that are summed one after the other by [`column_sums`].
const ROWS_IN_ORDER: usize = 1 << 12;

/// The sums (columns) of a matrix's columns in f64, each value rounded to `rounding` before: those of 4,096 rows after the other, which are
/// then added up.
///
/// # Panics
/// If the matrix is transposed.
pub fn column_sums(matrix: &Matrix<'_>, rounding: FloatType) -> Vec<f64> {
    assert!(!matrix.is_transposed(), "the matrix is transposed");
    let (rows, columns) = (matrix.height(), matrix.depth());
    let parts: Vec<Vec<f64>> = (0..rows.div_ceil(ROWS_IN_ORDER))
        .into_par_iter()
        .map(|part| {
            let first = part * ROWS_IN_ORDER;
            let mut sums = vec![0.; columns];
            let mut buffer = Vec::new();
            for row in first..rows.min(first + ROWS_IN_ORDER) {
                run(AddRow {
                    row: matrix.row(row, 0..columns, &mut buffer),
                    rounding,
                    sums: &mut sums,
                });
            }
            sums
        })
        .collect();
    let mut totals = vec![0.; columns];
    for part in parts {
        for (total, sum) in totals.iter_mut().zip(part) {
            *total += sum;
        }
    }
    totals
}

struct AddRow<'a> {
    row: &'a [f32],
    rounding: FloatType,
    sums: &'a mut [f64],
}

impl Loop for AddRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let pairs = self.sums.iter_mut().zip(self.row);
        match self.rounding {
            FloatType::F32 => pairs.for_each(|(sum, x)| *sum += f64::from(*x)),
            rounding => pairs.for_each(|(sum, x)| *sum += f64::from(rounding.round(*x))),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::matrix::Values;
    use crate::panels::{column, size};
    use crate::product::tests::numbers;

    #[test]
    fn sums_are_those_of_a_plain_loop() {
        with_each(|_| {
            for (rows, columns, tokens) in [(1, 1, 1), (13, 16, 70), (64, 40, 33), (40, 70, 64)] {
                let mut a = numbers(size(rows, tokens), 1);
                let b = numbers(size(columns, tokens), 2);
                // Behind the last token `a` is zero.
                for (index, x) in a.iter_mut().enumerate() {
                    let token = index / (rows * LANES) * LANES + index % LANES;
                    if token >= tokens {
                        *x = 0.;
                    }
                }
                let mut straight = vec![1.; rows * columns];
                let mut transposed = vec![1.; rows * columns];
                outer((&a, rows), (&b, columns), &mut straight, Order::Straight);
                outer(
                    (&a, rows),
                    (&b, columns),
                    &mut transposed,
                    Order::Transposed,
                );
                let mut exact = vec![1f64; rows * columns];
                for token in 0..tokens {
                    let b: Vec<f32> = column(&b, columns, token).collect();
                    for (i, x) in column(&a, rows, token).enumerate() {
                        for (j, y) in b.iter().enumerate() {
                            exact[i * columns + j] += f64::from(x) * f64::from(*y);
                        }
                    }
                }
                for i in 0..rows {
                    for j in 0..columns {
                        let exact = exact[i * columns + j];
                        for ours in [straight[i * columns + j], transposed[j * rows + i]] {
                            assert!((f64::from(ours) - exact).abs() < 1e-5, "{rows} {i} {j}");
                        }
                    }
                }
                let mut sums = vec![0.; rows];
                sum_over_tokens(&a, tokens, &mut sums);
                for (i, sum) in sums.iter().enumerate() {
                    let exact: f32 = (0..tokens).filter_map(|t| column(&a, rows, t).nth(i)).sum();
                    assert!((sum - exact).abs() < 1e-5);
                }
            }
        });
    }

    #[test]
    fn columns_are_summed_as_they_are_rounded() {
        type Round = fn(f32) -> f32;
        with_each(|isa| {
            for (rows, columns) in [(1, 1), (7, 100), (2 * ROWS_IN_ORDER + 3, 5)] {
                let values = numbers(rows * columns, 3);
                let halves: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                let singles = Matrix::f32(&values, rows, columns).unwrap();
                let stored = Matrix::new(Values::Bf16(&halves), rows, columns).unwrap();
                let rounded: [(_, _, Round); 4] = [
                    (singles, FloatType::F32, |x| x),
                    (singles, FloatType::Bf16, |x| bf16::from_f32(x).to_f32()),
                    (singles, FloatType::F16, |x| f16::from_f32(x).to_f32()),
                    (stored, FloatType::F32, |x| bf16::from_f32(x).to_f32()),
                ];
                for (matrix, rounding, round) in rounded {
                    let sums = column_sums(&matrix, rounding);
                    for (column, sum) in sums.iter().enumerate() {
                        let exact = values.iter().skip(column).step_by(columns);
                        let exact: f64 = exact.map(|x| f64::from(round(*x))).sum();
                        assert!(
                            (sum - exact).abs() < 1e-9,
                            "{isa:?} {rows} {column} {rounding:?}"
                        );
                    }
                }
            }
        });
    }
}
