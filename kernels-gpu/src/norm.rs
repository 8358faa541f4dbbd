//! RMS norm with its backward pass, see [`pipeline_kernels::elementwise`].

use cubecl::prelude::*;
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::kernels::{LANES as WIDE, PARTS, lanes_and_parts, sum_of_lanes, sum_of_parts};

/// One cube for each panel, or each head of a panel.
#[cube(launch)]
fn rms_norm_kernel(
    x: &[f32],
    weight: &[f32],
    residual: &[f32],
    out: &mut [f32],
    inverse: &mut [f32],
    eps: f32,
    factor: f32,
    #[comptime] onto: bool,
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let features = weight.len();
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    if CUBE_POS < inverse.len() / WIDE {
        let start = CUBE_POS * features * WIDE + lane;
        let mut sum = 0.0f32;
        let mut feature = part;
        while feature < features {
            let value = x[start + feature * WIDE];
            sum += value * value;
            feature += PARTS;
        }
        let total = sum_of_parts(&mut shared, sum);
        let scale = 1.0f32 / (total / f32::cast_from(features) + eps).sqrt();
        if part == 0 {
            inverse[CUBE_POS * WIDE + lane] = scale;
        }
        let mut feature = part;
        while feature < features {
            let index = start + feature * WIDE;
            if onto {
                out[index] = residual[index] + x[index] * scale * (weight[feature] * factor);
            } else {
                out[index] = x[index] * scale * weight[feature];
            }
            feature += PARTS;
        }
    }
}

/// A unit for each value.
#[cube(launch)]
fn recompute_kernel(x: &[f32], weight: &[f32], inverse: &[f32], out: &mut [f32]) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let feature = (index / WIDE) % weight.len();
        let panel = index / WIDE / weight.len();
        out[index] = x[index] * inverse[panel * WIDE + index % WIDE] * weight[feature];
    }
}

/// One cube for each panel, or each head of a panel.
#[cube(launch)]
fn backward_kernel(
    x: &[f32],
    weight: &[f32],
    inverse: &[f32],
    grad_out: &[f32],
    grad_x: &mut [f32],
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let features = weight.len();
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    if CUBE_POS < inverse.len() / WIDE {
        let start = CUBE_POS * features * WIDE + lane;
        let mut sum = 0.0f32;
        let mut feature = part;
        while feature < features {
            let index = start + feature * WIDE;
            sum += x[index] * grad_out[index] * weight[feature];
            feature += PARTS;
        }
        let dot = sum_of_parts(&mut shared, sum);
        let scale = inverse[CUBE_POS * WIDE + lane];
        let back = dot * scale * scale * scale / f32::cast_from(features);
        let mut feature = part;
        while feature < features {
            let index = start + feature * WIDE;
            grad_x[index] += grad_out[index] * weight[feature] * scale - x[index] * back;
            feature += PARTS;
        }
    }
}

/// One cube for each 8 features: a part of the cube for each of them.
#[cube(launch)]
fn grad_weight_kernel(x: &[f32], inverse: &[f32], grad_out: &[f32], grad_weight: &mut [f32]) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let features = grad_weight.len();
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    let feature = CUBE_POS * PARTS + part;
    let mut sum = 0.0f32;
    if feature < features {
        let panels = inverse.len() / WIDE;
        for panel in 0..panels {
            let index = (panel * features + feature) * WIDE + lane;
            sum += x[index] * grad_out[index] * inverse[panel * WIDE + lane];
        }
    }
    let total = sum_of_lanes(&mut shared, sum);
    if feature < features && lane == 0 {
        grad_weight[feature] += total;
    }
}

/// Checks the sizes of a norm and returns the number of panels (of heads).
fn check(x: &Buffer, weight: &Buffer, inverse: &Buffer, like_x: &[&Buffer]) -> usize {
    let panel = weight.len() * LANES;
    let panels = x.len().checked_div(panel).unwrap_or(0);
    let (length, features) = (x.len(), weight.len());
    assert!(
        panels * panel == length,
        "what is normed: {length} floats are no panels of {features} features"
    );
    assert_eq!(
        inverse.len(),
        panels * LANES,
        "the norm's factors: the size of {panels} panels of 1 features"
    );
    for like in like_x {
        assert_eq!(like.len(), x.len(), "sizes of panels of a norm");
    }
    panels
}

impl Device {
    /// See [`pipeline_kernels::elementwise::rms_norm`].
    ///
    /// # Panics
    /// As it does.
    pub fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        out: &mut Buffer,
        inverse: &mut Buffer,
    ) {
        let panels = check(x, weight, inverse, &[out]);
        if self.idle(panels) {
            return;
        }
        rms_norm_kernel::launch(
            &self.client,
            self.cubes(panels),
            lanes_and_parts(),
            x.arg(),
            weight.arg(),
            self.nothing.arg(),
            out.arg(),
            inverse.arg(),
            eps,
            1.,
            false,
        );
    }

    /// See [`pipeline_kernels::elementwise::rms_norm_onto`].
    ///
    /// # Panics
    /// As it does.
    pub fn rms_norm_onto(
        &self,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        (residual, factor): (&Buffer, f32),
        out: &mut Buffer,
        inverse: &mut Buffer,
    ) {
        let panels = check(x, weight, inverse, &[residual, out]);
        if self.idle(panels) {
            return;
        }
        rms_norm_kernel::launch(
            &self.client,
            self.cubes(panels),
            lanes_and_parts(),
            x.arg(),
            weight.arg(),
            residual.arg(),
            out.arg(),
            inverse.arg(),
            eps,
            factor,
            true,
        );
    }

    /// See [`pipeline_kernels::elementwise::rms_norm_recompute`].
    ///
    /// # Panics
    /// As it does.
    pub fn rms_norm_recompute(
        &self,
        x: &Buffer,
        weight: &Buffer,
        inverse: &Buffer,
        out: &mut Buffer,
    ) {
        check(x, weight, inverse, &[out]);
        if self.idle(out.len()) {
            return;
        }
        let (cubes, units) = self.units(out.len());
        recompute_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            weight.arg(),
            inverse.arg(),
            out.arg(),
        );
    }

    /// See [`pipeline_kernels::elementwise::rms_norm_backward`].
    ///
    /// # Panics
    /// As it does.
    pub fn rms_norm_backward(
        &self,
        x: &Buffer,
        weight: &Buffer,
        inverse: &Buffer,
        grad_out: &Buffer,
        grad_x: &mut Buffer,
    ) {
        let panels = check(x, weight, inverse, &[grad_out, grad_x]);
        if self.idle(panels) {
            return;
        }
        backward_kernel::launch(
            &self.client,
            self.cubes(panels),
            lanes_and_parts(),
            x.arg(),
            weight.arg(),
            inverse.arg(),
            grad_out.arg(),
            grad_x.arg(),
        );
    }

    /// See [`pipeline_kernels::elementwise::rms_norm_grad_weight`].
    ///
    /// # Panics
    /// As it does.
    pub fn rms_norm_grad_weight(
        &self,
        x: &Buffer,
        inverse: &Buffer,
        grad_out: &Buffer,
        grad_weight: &mut Buffer,
    ) {
        let panels = check(x, grad_weight, inverse, &[grad_out]);
        if self.idle(panels) {
            return;
        }
        grad_weight_kernel::launch(
            &self.client,
            self.cubes(grad_weight.len().div_ceil(PARTS)),
            lanes_and_parts(),
            x.arg(),
            inverse.arg(),
            grad_out.arg(),
            grad_weight.arg(),
        );
    }
}
