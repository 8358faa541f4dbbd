//! Sums over tokens and over all values, see [`pipeline_kernels::reduce`].

use cubecl::prelude::*;
use pipeline_kernels::panels;
use pipeline_kernels::reduce::Order;

use crate::buffer::Buffer;
use crate::device::{Device, UNITS};
use crate::elementwise::{check, count};
use crate::error::Error;
use crate::kernels::{LANES as WIDE, PARTS, lanes_and_parts, sum_of_lanes};

/// The rows and columns of a cube's block of outer products.
const ROWS: usize = 64;
const COLUMNS: usize = 16;

/// A cube for each block of 64 rows and 16 columns. Its units copy a panel's rows of both factors to shared memory, and each sums the
/// products of four rows and one column over the panel's tokens.
#[cube(launch)]
fn outer_kernel(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    rows: u32,
    columns: u32,
    first: u32,
    panels: u32,
    #[comptime] transposed: bool,
) {
    let unit = UNIT_POS as usize;
    let (rows, columns) = (rows as usize, columns as usize);
    let mut shared_a = Shared::<[f32]>::new_slice(comptime!(ROWS * 33));
    let mut shared_b = Shared::<[f32]>::new_slice(comptime!(COLUMNS * 33));
    let mut sums = Array::<f32>::new(4usize);
    let blocks = columns.div_ceil(COLUMNS);
    let first_row = CUBE_POS / blocks * ROWS;
    let first_column = CUBE_POS % blocks * COLUMNS;
    let column = unit % COLUMNS;
    let row = unit / COLUMNS * 4;
    if first_row < rows {
        for panel in 0..panels as usize {
            sync_cube();
            #[unroll]
            for step in 0..comptime!(ROWS * 32 / 256) {
                let place = step * 256 + unit;
                let feature = first_row + place / WIDE;
                let mut value = 0.0f32;
                if feature < rows {
                    value = a[(panel * rows + feature) * WIDE + place % WIDE];
                }
                shared_a[place / WIDE * 33 + place % WIDE] = value;
            }
            #[unroll]
            for step in 0..comptime!(COLUMNS * 32 / 256) {
                let place = step * 256 + unit;
                let feature = first_column + place / WIDE;
                let mut value = 0.0f32;
                if feature < columns {
                    value = b[(panel * columns + feature) * WIDE + place % WIDE];
                }
                shared_b[place / WIDE * 33 + place % WIDE] = value;
            }
            sync_cube();
            for lane in 0..WIDE {
                let value = shared_b[column * 33 + lane];
                #[unroll]
                for r in 0..4usize {
                    sums[r] += shared_a[(row + r) * 33 + lane] * value;
                }
            }
        }
        let j = first_column + column;
        #[unroll]
        for r in 0..4usize {
            let i = first_row + row + r;
            if i < rows && j < columns {
                let mut place = first as usize + i * columns + j;
                if comptime!(transposed) {
                    place = first as usize + j * rows + i;
                }
                out[place] += sums[r];
            }
        }
    }
}

/// One cube for each 8 features.
#[cube(launch)]
fn sum_over_tokens_kernel(data: &[f32], out: &mut [f32], panels: u32) {
    let lane = UNIT_POS_X as usize;
    let features = out.len();
    let feature = CUBE_POS * PARTS + UNIT_POS_Y as usize;
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    let mut sum = 0.0f32;
    if feature < features {
        for panel in 0..panels as usize {
            sum += data[(panel * features + feature) * WIDE + lane];
        }
    }
    let total = sum_of_lanes(&mut shared, sum);
    if feature < features && lane == 0 {
        out[feature] += total;
    }
}

/// The values that a unit sums.
const SUMMED: usize = 64;
/// The sums that a cube leaves.
const LEFT: usize = 16;

/// Each unit sums 64 values or their squares, and a cube's units their sums.
#[cube(launch)]
fn sums_kernel(x: &[f32], out: &mut [f32], first_out: u32, cubes: u32, #[comptime] squares: bool) {
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(UNITS as usize);
    if CUBE_POS < cubes as usize {
        let mut sum = 0.0f32;
        for step in 0..SUMMED {
            let index = (CUBE_POS * SUMMED + step) * 256 + unit;
            if index < x.len() {
                let mut value = x[index];
                if comptime!(squares) {
                    value *= value;
                }
                sum += value;
            }
        }
        shared[unit] = sum;
        sync_cube();
        if unit < LEFT {
            let mut part = 0.0f32;
            for other in 0..comptime!(256 / LEFT) {
                part += shared[unit * comptime!(256 / LEFT) + other];
            }
            out[first_out as usize + CUBE_POS * LEFT + unit] = part;
        }
    }
}

impl Device {
    /// See [`pipeline_kernels::reduce::outer`]. The matrix is the part of `out` that begins at index `first`.
    ///
    /// # Panics
    /// As it does.
    pub fn outer(
        &self,
        (a, rows): (&Buffer, usize),
        (b, columns): (&Buffer, usize),
        out: &mut Buffer,
        first: usize,
        order: Order,
    ) {
        let size = rows.saturating_mul(columns);
        let end = first.saturating_add(size);
        let all = out.len();
        assert!(
            end <= all,
            "the size of the result: {rows} * {columns} from {first} on in {all} floats"
        );
        if size == 0 {
            return;
        }
        let panels = count(a, rows, "the left factor");
        check(b, columns, panels, "the right factor");
        if self.idle(panels) {
            return;
        }
        outer_kernel::launch(
            &self.client,
            self.cubes(rows.div_ceil(ROWS) * columns.div_ceil(COLUMNS)),
            CubeDim::new_1d(UNITS),
            a.arg(),
            b.arg(),
            out.arg(),
            rows as u32,
            columns as u32,
            first as u32,
            panels as u32,
            order == Order::Transposed,
        );
    }

    /// See [`pipeline_kernels::reduce::sum_over_tokens`].
    ///
    /// # Panics
    /// As it does.
    pub fn sum_over_tokens(&self, data: &Buffer, tokens: usize, out: &mut Buffer) {
        let panels = panels::panels(tokens);
        check(data, out.len(), panels, "what is summed");
        if self.idle(data.len()) {
            return;
        }
        sum_over_tokens_kernel::launch(
            &self.client,
            self.cubes(out.len().div_ceil(PARTS)),
            lanes_and_parts(),
            data.arg(),
            out.arg(),
            panels as u32,
        );
    }

    /// The sum of the squares of all values of some buffers, which is the square of a gradient's norm. Parts are summed until a few are left,
    /// which one copy brings to the host, where they are added in f64.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn sum_of_squares(&self, all: &[&Buffer]) -> Result<f64, Error> {
        /// The parts that are copied.
        const COPIED: usize = 256;
        let mut sums = self.partial_sums(all, true);
        while sums.len() > COPIED {
            sums = self.partial_sums(&[&sums], false);
        }
        let sums = self.read(&sums)?;
        Ok(sums.into_iter().map(f64::from).sum())
    }

    /// The sums of parts of some buffers, or of the squares there.
    fn partial_sums(&self, all: &[&Buffer], squares: bool) -> Buffer {
        let cubes = |buffer: &Buffer| buffer.len().div_ceil(SUMMED * UNITS as usize);
        let total: usize = all.iter().map(|buffer| cubes(buffer)).sum();
        let sums = self.take(LEFT * total);
        let mut first = 0;
        for buffer in all {
            let count = cubes(buffer);
            if self.idle(count) {
                continue;
            }
            sums_kernel::launch(
                &self.client,
                self.cubes(count),
                CubeDim::new_1d(UNITS),
                buffer.arg(),
                sums.arg(),
                (LEFT * first) as u32,
                count as u32,
                squares,
            );
            first += count;
        }
        sums
    }
}
