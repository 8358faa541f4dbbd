//! What `DoRA` adds to a product with a low-rank pair, see [`pipeline_kernels::dora`].

use cubecl::prelude::*;
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::elementwise::{check, count};
use crate::kernels::{LANES as WIDE, PARTS, lanes_and_parts, sum_of_lanes};
use crate::product::Onto;
use crate::weight::{Format, Matrix, weight_value};

/// The units of a cube.
const UNITS: usize = WIDE * PARTS;

/// A cube for each row of a part of the weight.
#[cube(launch)]
fn factors_kernel(
    words: &[u32],
    scales: &[f32],
    a: &[f32],
    b: &[f32],
    magnitude: &[f32],
    factors: &mut [f32],
    inverse: &mut [f32],
    first_row: u32,
    rows: u32,
    columns: u32,
    rank: u32,
    scaling: f32,
    #[comptime] format: u32,
) {
    let (columns, rank) = (columns as usize, rank as usize);
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    if CUBE_POS < rows as usize {
        let row = first_row as usize + CUBE_POS;
        let mut sum = 0.0f32;
        let mut column = unit;
        while column < columns {
            let mut low = 0.0f32;
            for r in 0..rank {
                low += b[row * rank + r] * a[r * columns + column];
            }
            let value = weight_value(words, scales, CUBE_POS * columns + column, format);
            let total = value + low * scaling;
            sum += total * total;
            column += UNITS;
        }
        shared[unit] = sum;
        sync_cube();
        if unit == 0 {
            let mut squares = 0.0f32;
            for other in 0..UNITS {
                squares += shared[other];
            }
            let own = 1.0f32 / squares.sqrt();
            inverse[row] = own;
            factors[row] = magnitude[row] * own;
        }
    }
}

/// A unit for each value.
#[cube(launch)]
fn scale_kernel(
    x: &[f32],
    factors: &[f32],
    bias: &[f32],
    onto: &[f32],
    out: &mut [f32],
    #[comptime] mode: u32,
    #[comptime] has_bias: bool,
) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let feature = (index / WIDE) % factors.len();
        let mut value = x[index] * factors[feature];
        if comptime!(has_bias) {
            value += bias[feature];
        }
        if comptime!(mode == 1) {
            value += out[index];
        }
        if comptime!(mode == 2) {
            value += onto[index];
        }
        out[index] = value;
    }
}

/// A cube for each 8 features: a part of the cube for each of them.
#[cube(launch)]
fn dots_kernel(a: &[f32], b: &[f32], factors: &[f32], out: &mut [f32]) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let features = factors.len();
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let feature = CUBE_POS * PARTS + part;
    let mut sum = 0.0f32;
    if feature < features {
        let panels = a.len() / WIDE / features;
        for panel in 0..panels {
            let index = (panel * features + feature) * WIDE + lane;
            sum += a[index] * b[index];
        }
    }
    let total = sum_of_lanes(&mut shared, sum);
    if feature < features && lane == 0 {
        out[feature] += total * factors[feature];
    }
}

impl Device {
    /// For each row of W + scaling B A, the factor from its norm to `magnitude` and the reciprocal of the norm: `base` is W (rows, columns), the
    /// pair A (rank, columns) and B (rows, rank).
    ///
    /// # Panics
    /// If the sizes don't fit each other, a matrix is transposed, or A or B is not in f32 or is in several buffers.
    pub fn row_factors(
        &self,
        base: &Matrix<'_>,
        (a, b): (&Matrix<'_>, &Matrix<'_>),
        scaling: f32,
        magnitude: &Buffer,
    ) -> [Buffer; 2] {
        let transposed = [base, a, b].iter().any(|matrix| matrix.transposed);
        assert!(!transposed, "a transposed matrix has no norms of rows here");
        let (rows, columns, rank) = (base.height(), base.depth(), a.height());
        assert_eq!(
            (a.depth(), b.height(), b.depth()),
            (columns, rows, rank),
            "the sizes of a pair beside a weight ({rows}, {columns})"
        );
        assert_eq!(magnitude.len(), rows, "a magnitude for each row");
        let whole = base.weight.matrix().rows == base.rows;
        assert!(whole, "the norms of all rows of a weight");
        let [a, b] = [a, b].map(|matrix| match matrix.weight.parts.as_slice() {
            [part] if matrix.weight.format == Format::F32 => &part.words,
            parts => panic!("{} buffers of a matrix of a pair in f32", parts.len()),
        });
        let made = [self.take(rows), self.take(rows)];
        let [factors, inverse] = &made;
        for part in &base.weight.parts {
            if self.idle(part.rows.len()) {
                break;
            }
            factors_kernel::launch(
                &self.client,
                self.cubes(part.rows.len()),
                lanes_and_parts(),
                part.words.arg(),
                part.scales.as_ref().unwrap_or(&self.nothing).arg(),
                a.arg(),
                b.arg(),
                magnitude.arg(),
                factors.arg(),
                inverse.arg(),
                part.rows.start as u32,
                part.rows.len() as u32,
                columns as u32,
                rank as u32,
                scaling,
                base.weight.format.number(),
            );
        }
        made
    }

    /// See [`pipeline_kernels::dora::scale_features`].
    ///
    /// # Panics
    /// As it does.
    pub fn scale_features(
        &self,
        x: &Buffer,
        factors: &Buffer,
        bias: Option<&Buffer>,
        onto: Onto<'_>,
        out: &mut Buffer,
    ) {
        let features = factors.len();
        let panels = count(x, features, "what is scaled");
        check(out, features, panels, "what goes with what is scaled");
        if let Some(bias) = bias {
            assert_eq!(bias.len(), features, "the size of the bias");
        }
        if let Onto::Values(values) = onto {
            assert_eq!(values.len(), x.len(), "the size of what is added to");
        }
        if self.idle(panels * LANES) {
            return;
        }
        let (mode, onto) = match onto {
            Onto::Zero => (0, None),
            Onto::Out => (1, None),
            Onto::Values(values) => (2, Some(values)),
        };
        let (cubes, units) = self.units(out.len());
        scale_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            factors.arg(),
            bias.unwrap_or(&self.nothing).arg(),
            onto.unwrap_or(&self.nothing).arg(),
            out.arg(),
            mode,
            bias.is_some(),
        );
    }

    /// See [`pipeline_kernels::dora::feature_dots`].
    ///
    /// # Panics
    /// As it does.
    pub fn feature_dots(&self, a: &Buffer, b: &Buffer, factors: &Buffer, out: &mut Buffer) {
        let features = factors.len();
        let panels = count(a, features, "what is scaled");
        check(b, features, panels, "what goes with what is scaled");
        assert_eq!(out.len(), features, "a sum for each feature");
        if self.idle(panels) {
            return;
        }
        dots_kernel::launch(
            &self.client,
            self.cubes(features.div_ceil(PARTS)),
            lanes_and_parts(),
            a.arg(),
            b.arg(),
            factors.arg(),
            out.arg(),
        );
    }
}
