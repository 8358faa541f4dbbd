//! The gated unit of the feed-forward block and its backward pass, see [`pipeline_kernels::gated`].

use cubecl::prelude::*;
use pipeline_kernels::gated::Activation;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::kernels::sigmoid;

/// The gate's share of its function, `function(gate) / gate`, and the function's slope.
#[cube]
fn share_and_slope(gate: f32, #[comptime] gelu: bool) -> (f32, f32) {
    if comptime!(gelu) {
        // See `pipeline_kernels::gated`: GELU's approximation as `x * sigmoid(2 sqrt(2 / pi) ..)`, within limits.
        let x = gate.clamp(-10.5f32, 10.5f32);
        let factor = 1.595_769_2f32;
        let share = sigmoid(factor * x * (1.0f32 + 0.044_715f32 * x * x));
        let inner = factor * (1.0f32 + 3.0f32 * 0.044_715f32 * x * x);
        (share, share * (1.0f32 + x * (1.0f32 - share) * inner))
    } else {
        let share = sigmoid(gate);
        (share, share * (1.0f32 + gate * (1.0f32 - share)))
    }
}

#[cube(launch)]
fn gated_kernel(gate: &[f32], up: &[f32], out: &mut [f32], #[comptime] gelu: bool) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let (share, _slope) = share_and_slope(gate[index], gelu);
        out[index] = gate[index] * share * up[index];
    }
}

#[cube(launch)]
fn gated_backward_kernel(
    gate: &mut [f32],
    up: &mut [f32],
    grad_out: &mut [f32],
    #[comptime] gelu: bool,
) {
    let index = ABSOLUTE_POS;
    if index < gate.len() {
        let g = gate[index];
        let u = up[index];
        let grad = grad_out[index];
        let (share, slope) = share_and_slope(g, gelu);
        let value = g * share;
        gate[index] = grad * u * slope;
        up[index] = grad * value;
        grad_out[index] = value * u;
    }
}

impl Device {
    /// See [`pipeline_kernels::gated::gated_unit`].
    ///
    /// # Panics
    /// As it does.
    pub fn gated_unit(&self, activation: Activation, gate: &Buffer, up: &Buffer, out: &mut Buffer) {
        assert_eq!(
            gate.len(),
            up.len(),
            "lengths of the gate and what it gates"
        );
        assert_eq!(gate.len(), out.len(), "lengths of the gate and the result");
        if self.idle(out.len()) {
            return;
        }
        let (cubes, units) = self.units(out.len());
        let gelu = activation == Activation::GeluTanh;
        gated_kernel::launch(
            &self.client,
            cubes,
            units,
            gate.arg(),
            up.arg(),
            out.arg(),
            gelu,
        );
    }

    /// See [`pipeline_kernels::gated::gated_unit_backward`].
    ///
    /// # Panics
    /// As it does.
    pub fn gated_unit_backward(
        &self,
        activation: Activation,
        gate: &mut Buffer,
        up: &mut Buffer,
        grad_out: &mut Buffer,
    ) {
        assert_eq!(
            gate.len(),
            up.len(),
            "lengths of the gate and what it gates"
        );
        assert_eq!(
            gate.len(),
            grad_out.len(),
            "lengths of the gate and the gradient"
        );
        if self.idle(gate.len()) {
            return;
        }
        let (cubes, units) = self.units(gate.len());
        let gelu = activation == Activation::GeluTanh;
        gated_backward_kernel::launch(
            &self.client,
            cubes,
            units,
            gate.arg(),
            up.arg(),
            grad_out.arg(),
            gelu,
        );
    }
}
