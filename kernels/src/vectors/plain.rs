//! Rows of weights times a few vectors, by loops that the compiler vectorises.

use half::bf16;

use super::{Outputs, Part, ROWS};
use crate::dispatch::{self, Loop, fma};
use crate::matrix::Values;

/// The number of partial sums of a sum.
pub(super) const LANES: usize = 16;

/// Computes some rows of a product.
pub(super) fn run(part: Part<'_>) {
    let vectors = part.x.len().checked_div(part.weight.depth()).unwrap_or(0);
    assert!(
        part.rows.end <= part.weight.height() && vectors <= part.out.vectors,
        "rows and vectors of the product"
    );
    dispatch::run(Plain(part));
}

struct Plain<'a>(Part<'a>);

impl Loop for Plain<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Part {
            weight,
            x,
            rows,
            out,
        } = self.0;
        let depth = weight.depth();
        // The converted values of a row.
        let mut buffer = Vec::new();
        let mut row = rows.start;
        while row < rows.end {
            let left = rows.end - row;
            row += match weight.values() {
                Values::F32(values) => {
                    block::<f32, FMA>(&values[row * depth..], x, depth, left, out, row)
                }
                Values::Bf16(values) => {
                    block::<bf16, FMA>(&values[row * depth..], x, depth, left, out, row)
                }
                Values::F16(_) | Values::Nf4(_) => {
                    let values = weight.row(row, 0..depth, &mut buffer);
                    block::<f32, FMA>(values, x, depth, 1, out, row)
                }
            };
        }
    }
}

/// A type of stored values.
pub(super) trait StoredFloat: Copy {
    fn get(self) -> f32;
}

impl StoredFloat for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

impl StoredFloat for bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Multiplies the next rows by all vectors: [`ROWS`] of them, or one where fewer are left. Returns the number of rows.
#[inline(always)]
fn block<T: StoredFloat, const FMA: bool>(
    weight: &[T],
    x: &[f32],
    depth: usize,
    left: usize,
    out: Outputs,
    row: usize,
) -> usize {
    let vectors = x.len() / depth.max(1);
    let rows = if left >= ROWS { ROWS } else { 1 };
    for vector in 0..vectors {
        let x = &x[vector * depth..][..depth];
        if rows == ROWS {
            sums::<T, ROWS, FMA>(weight, x, vector, out, row);
        } else {
            sums::<T, 1, FMA>(weight, x, vector, out, row);
        }
    }
    rows
}

/// Multiplies `R` rows from `row` on by one vector.
#[inline(always)]
fn sums<T: StoredFloat, const R: usize, const FMA: bool>(
    weight: &[T],
    x: &[f32],
    vector: usize,
    out: Outputs,
    row: usize,
) {
    let depth = x.len();
    let rows: [&[T]; R] = std::array::from_fn(|row| &weight[row * depth..][..depth]);
    let mut sums = [[0f32; LANES]; R];
    let whole = depth / LANES * LANES;
    for from in (0..whole).step_by(LANES) {
        let x: [f32; LANES] = lanes(x, from);
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = lanes(row, from).map(StoredFloat::get);
            for (sum, (w, x)) in sums.iter_mut().zip(w.into_iter().zip(x)) {
                *sum = fma::<FMA>(w, x, *sum);
            }
        }
    }
    for (r, (sums, values)) in sums.iter().zip(rows).enumerate() {
        let rest = values[whole..].iter().zip(&x[whole..]);
        let sum = rest.fold(total(sums), |sum, (w, x)| fma::<FMA>(w.get(), *x, sum));
        // SAFETY: the rows are this task's alone, and `run` saw that the rows and the vectors are there.
        unsafe { out.put(vector, row + r, sum) };
    }
}

/// The [`LANES`] values from index `from` on.
#[inline(always)]
pub(super) fn lanes<T: Copy>(values: &[T], from: usize) -> [T; LANES] {
    match values[from..].first_chunk() {
        Some(chunk) => *chunk,
        None => unreachable!("whole lanes were counted"),
    }
}

/// The sum of the lanes, by adding halves to each other.
#[inline(always)]
pub(super) fn total(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}
