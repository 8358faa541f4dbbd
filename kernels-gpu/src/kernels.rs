//! What the kernels share: the units of a cube as lanes and parts, their sums, and functions of numbers.

use cubecl::prelude::*;

/// The tokens of a panel, and the width of the cubes that treat panels.
pub(crate) const LANES: usize = pipeline_kernels::panels::LANES;
/// The units of such a cube that share a lane; each takes its part of the features.
pub(crate) const PARTS: usize = 8;

/// A cube of 32 lanes and 8 parts.
pub(crate) fn lanes_and_parts() -> CubeDim {
    CubeDim::new_2d(LANES as u32, PARTS as u32)
}

/// The sum of the parts' values of a lane, in the order of the parts, for each unit of a cube of lanes and parts. `shared` has 256 places.
#[cube]
pub(crate) fn sum_of_parts(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    sync_cube();
    shared[part * LANES + lane] = value;
    sync_cube();
    let mut sum = 0.0f32;
    for other in 0..PARTS {
        sum += shared[other * LANES + lane];
    }
    sum
}
