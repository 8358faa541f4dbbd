//! The sum of a weight's rows.

use cubecl::prelude::*;
use pipeline_kernels::FloatType;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::product::rounding_number;
use crate::weight::{Format, Weight, round_factor_to_f16, round_to_bf16};

/// The rows that a unit sums.
const ROWS: usize = 256;

/// A unit for each column of each 256 rows.
#[cube(launch)]
fn column_sums_kernel(
    x: &[f32],
    out: &mut [f32],
    rows: u32,
    columns: u32,
    #[comptime] rounding: u32,
) {
    let (rows, columns) = (rows as usize, columns as usize);
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let first = index / columns * ROWS;
        let column = index % columns;
        let mut sum = 0.0f32;
        for step in 0..ROWS {
            let row = first + step;
            if row < rows {
                let value = x[row * columns + column];
                if comptime!(rounding == 1) {
                    sum += round_to_bf16(value);
                } else if comptime!(rounding == 2) {
                    sum += round_factor_to_f16(value);
                } else {
                    sum += value;
                }
            }
        }
        out[index] = sum;
    }
}

impl Device {
    /// The sum of a weight's rows (columns), in f32, of its values rounded to a type.
    ///
    /// # Panics
    /// If the weight is not in f32 or is in several buffers.
    pub fn column_sums(&self, weight: &Weight, rounding: FloatType) -> Buffer {
        let [part] = weight.parts.as_slice() else {
            panic!(
                "{} buffers of a weight whose rows are summed",
                weight.buffers()
            );
        };
        let format = weight.format;
        assert!(format == Format::F32, "a weight in f32, not {format:?}");
        let (mut rows, columns) = (part.rows.len(), weight.columns());
        let mut sums = self.sum_of_rows(&part.words, rows, columns, rounding);
        rows = rows.div_ceil(ROWS);
        while rows > 1 {
            sums = self.sum_of_rows(&sums, rows, columns, FloatType::F32);
            rows = rows.div_ceil(ROWS);
        }
        sums
    }

    /// The sum of each 256 rows.
    fn sum_of_rows(&self, x: &Buffer, rows: usize, columns: usize, rounding: FloatType) -> Buffer {
        let sums = self.take(rows.div_ceil(ROWS) * columns);
        if !self.idle(sums.len()) {
            let (cubes, units) = self.units(sums.len());
            column_sums_kernel::launch(
                &self.client,
                cubes,
                units,
                x.arg(),
                sums.arg(),
                rows as u32,
                columns as u32,
                rounding_number(rounding),
            );
        }
        sums
    }
}
