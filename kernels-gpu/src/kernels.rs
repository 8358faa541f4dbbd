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

/// The sum of the lanes' values of a part, in the order of the lanes, for the units of lane 0; for others it is unspecified. `shared` has
/// 256 places.
#[cube]
pub(crate) fn sum_of_lanes(shared: &mut Shared<[f32]>, value: f32) -> f32 {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    sync_cube();
    shared[part * LANES + lane] = value;
    sync_cube();
    let mut sum = 0.0f32;
    if lane == 0 {
        for other in 0..LANES {
            sum += shared[part * LANES + other];
        }
    }
    sum
}

/// `e^x` for `x` of at most 0; 0 below -87.
#[cube]
pub(crate) fn exp_down(x: f32) -> f32 {
    let mut out = 0.0f32;
    if x >= -87.0f32 {
        out = x.exp();
    }
    out
}

/// `1 / (1 + e^-x)`; 0 and 1 far from 0.
#[cube]
pub(crate) fn sigmoid(x: f32) -> f32 {
    let e = exp_down(-x.abs());
    let mut out = 1.0f32 / (1.0f32 + e);
    if x < 0.0f32 {
        out = e / (1.0f32 + e);
    }
    out
}

/// The hyperbolic tangent, without the cancellation of `(e^2x - 1) / (e^2x + 1)` near 0, where five terms of its series are exact.
#[cube]
pub(crate) fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let mut out = x
        * (1.0f32
            - square
                * (0.333_333_34f32
                    - square
                        * (0.133_333_34f32
                            - square * (0.053_968_255f32 - square * 0.021_869_488f32))));
    if size > 0.25f32 {
        let e = exp_down(-2.0f32 * size);
        out = (1.0f32 - e) / (1.0f32 + e);
        if x < 0.0f32 {
            out = -out;
        }
    }
    out
}
