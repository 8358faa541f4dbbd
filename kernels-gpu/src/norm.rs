//! RMS norm with its backward pass, see [`pipeline_kernels::elementwise`].

use cubecl::prelude::*;
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::kernels::{LANES as WIDE, PARTS, lanes_and_parts, sum_of_parts};

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
        if panels == 0 {
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
        if panels == 0 {
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
}
