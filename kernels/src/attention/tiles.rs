//! Products of tiles of 32 queries and 32 keys.

use crate::micro::{Tile, multiply};
use crate::panels::LANES;

/// The rows of a tile of a product.
const ROWS: usize = 8;

/// `out[i][lane] = sum over k < 32 of a[i][k] * b[k][lane]`, added to `out` if `add`. All rows have 32 elements.
pub(super) fn product(a: &[f32], rows: usize, b: &[f32], out: &mut [f32], add: bool) {
    assert!(a.len() >= rows * LANES && b.len() >= LANES * LANES && out.len() >= rows * LANES);
    for row in (0..rows).step_by(ROWS) {
        let c = out[row * LANES..].as_mut_ptr();
        // SAFETY: as asserted; rows that are wanted are there.
        unsafe {
            multiply::<ROWS, 2, LANES, 1>(Tile {
                a: a[row * LANES..].as_ptr(),
                b: b.as_ptr(),
                depth: LANES,
                c,
                from: add.then_some(c.cast_const()),
                rows: ROWS.min(rows - row),
            });
        }
    }
}

/// `out[i][lane] = sum over k of a[k][i] * b[k][lane]` for `i < 32`. All rows have 32 elements.
pub(super) fn product_transposed(a: &[f32], b: &[f32], out: &mut [f32]) {
    let depth = a.len() / LANES;
    assert!(b.len() >= depth * LANES && out.len() >= LANES * LANES);
    for row in (0..LANES).step_by(ROWS) {
        // SAFETY: as asserted; `a` has `depth` rows of 32, and `row + ROWS <= 32`.
        unsafe {
            multiply::<ROWS, 2, 1, LANES>(Tile {
                a: a[row..].as_ptr(),
                b: b.as_ptr(),
                depth,
                c: out[row * LANES..].as_mut_ptr(),
                from: None,
                rows: ROWS,
            });
        }
    }
}

/// Transposes `[width][32]` to `[chunk of 32 features][32][32 features]`, with zeros after the last feature.
pub(super) fn transpose(data: &[f32], width: usize, out: &mut Vec<f32>) {
    out.resize(width.div_ceil(LANES) * LANES * LANES, 0.);
    if !width.is_multiple_of(LANES) {
        out.fill(0.);
    }
    for (feature, row) in data.as_chunks::<LANES>().0.iter().take(width).enumerate() {
        let out = &mut out[feature / LANES * LANES * LANES..][..LANES * LANES];
        for (lane, value) in row.iter().enumerate() {
            out[lane * LANES + feature % LANES] = *value;
        }
    }
}
