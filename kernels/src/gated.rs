//! The gated unit of the feed-forward block, `activation(gate) * up`, forward and backward, element by element.

use rayon::prelude::*;

use crate::dispatch::{Loop, run};
use crate::exp::sigmoid;

/// The function of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU, Shazeer 2020, arXiv 2002.05202, equation 6).
    Silu,
    /// The tanh approximation of GELU, `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016, arXiv
    /// 1606.08415, section 2; `gelu_pytorch_tanh` in transformers). It is computed as `x * sigmoid(2 sqrt(2 / pi) ..)`, the same
    /// function without the cancellation of `1 + tanh` at negative numbers.
    GeluTanh,
}

/// A function of the gate, to be compiled into the loops.
pub(crate) trait Function: Copy {
    /// `f(gate) * up`.
    fn gated<const FMA: bool>(self, gate: f32, up: f32) -> f32;
    /// From `gate`, `up` and the gradient of the result: the gradients with respect to `gate` and `up`, and the result.
    fn backward<const FMA: bool>(self, gate: f32, up: f32, grad: f32) -> [f32; 3];
}

/// See [`Activation::Silu`].
#[derive(Clone, Copy)]
pub(crate) struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn gated<const FMA: bool>(self, gate: f32, up: f32) -> f32 {
        gate * sigmoid::<FMA>(gate) * up
    }

    #[inline(always)]
    fn backward<const FMA: bool>(self, gate: f32, up: f32, grad: f32) -> [f32; 3] {
        let s = sigmoid::<FMA>(gate);
        let silu = gate * s;
        let slope = 1. + gate * (1. - s);
        [grad * up * s * slope, grad * silu, silu * up]
    }
}

/// See [`Activation::GeluTanh`].
#[derive(Clone, Copy)]
pub(crate) struct GeluTanh;

/// `2 sqrt(2 / pi)`.
const FACTOR: f32 = 1.595_769_2;
/// The coefficient of the cube.
const CUBE: f32 = 0.044_715;
/// Beyond this the function is `x` or 0 in f32; the limit keeps an infinite cube from making a NaN.
const LIMIT: f32 = 10.5;

impl Function for GeluTanh {
    #[inline(always)]
    fn gated<const FMA: bool>(self, gate: f32, up: f32) -> f32 {
        let x = gate.clamp(-LIMIT, LIMIT);
        gate * sigmoid::<FMA>(FACTOR * x * (1. + CUBE * x * x)) * up
    }

    #[inline(always)]
    fn backward<const FMA: bool>(self, gate: f32, up: f32, grad: f32) -> [f32; 3] {
        let x = gate.clamp(-LIMIT, LIMIT);
        let s = sigmoid::<FMA>(FACTOR * x * (1. + CUBE * x * x));
        let gelu = gate * s;
        let slope = 1. + x * (1. - s) * FACTOR * (1. + 3. * CUBE * x * x);
        [grad * up * s * slope, grad * gelu, gelu * up]
    }
}

/// The number of values in one task.
const SPAN: usize = 1 << 13;

struct Gated<'a, F> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
    function: F,
}

impl<F: Function> Loop for Gated<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (gate, last_gate) = self.gate.as_chunks::<16>();
        let (up, last_up) = self.up.as_chunks::<16>();
        let (out, last) = self.out.as_chunks_mut::<16>();
        for ((gate, up), out) in gate.iter().zip(up).zip(out) {
            for lane in 0..16 {
                out[lane] = self.function.gated::<FMA>(gate[lane], up[lane]);
            }
        }
        for ((gate, up), out) in last_gate.iter().zip(last_up).zip(last) {
            *out = self.function.gated::<FMA>(*gate, *up);
        }
    }
}

/// The gated unit `out = activation(gate) * up`, element by element, for slices of any layout and equal length.
///
/// # Panics
/// If the lengths of the three differ.
pub fn gated_unit(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(
        gate.len(),
        up.len(),
        "lengths of the gate and what it gates"
    );
    assert_eq!(gate.len(), out.len(), "lengths of the gate and the result");
    let parts = gate.par_chunks(SPAN).zip(up.par_chunks(SPAN));
    let parts = parts.zip(out.par_chunks_mut(SPAN));
    parts.for_each(|((gate, up), out)| match activation {
        Activation::Silu => run(Gated {
            gate,
            up,
            out,
            function: Silu,
        }),
        Activation::GeluTanh => run(Gated {
            gate,
            up,
            out,
            function: GeluTanh,
        }),
    });
}

struct GatedBackward<'a, F> {
    gate: &'a mut [f32],
    up: &'a mut [f32],
    grad_out: &'a mut [f32],
    function: F,
}

impl<F: Function> Loop for GatedBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (gate, last_gate) = self.gate.as_chunks_mut::<16>();
        let (up, last_up) = self.up.as_chunks_mut::<16>();
        let (grad_out, last) = self.grad_out.as_chunks_mut::<16>();
        for ((gate, up), grad_out) in gate.iter_mut().zip(up).zip(grad_out) {
            for lane in 0..16 {
                [gate[lane], up[lane], grad_out[lane]] =
                    self.function
                        .backward::<FMA>(gate[lane], up[lane], grad_out[lane]);
            }
        }
        for ((gate, up), grad_out) in last_gate.iter_mut().zip(last_up).zip(last) {
            [*gate, *up, *grad_out] = self.function.backward::<FMA>(*gate, *up, *grad_out);
        }
    }
}

/// The backward pass of [`gated_unit`], in place. `grad_out` is the gradient with respect to its result. Afterwards the slice `gate`
/// holds the gradient with respect to the gate, `up` that with respect to `up`, and `grad_out` the result, recomputed.
///
/// # Panics
/// If the lengths of the three differ.
pub fn gated_unit_backward(
    activation: Activation,
    gate: &mut [f32],
    up: &mut [f32],
    grad_out: &mut [f32],
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
    let parts = gate.par_chunks_mut(SPAN).zip(up.par_chunks_mut(SPAN));
    let parts = parts.zip(grad_out.par_chunks_mut(SPAN));
    parts.for_each(|((gate, up), grad_out)| match activation {
        Activation::Silu => run(GatedBackward {
            gate,
            up,
            grad_out,
            function: Silu,
        }),
        Activation::GeluTanh => run(GatedBackward {
            gate,
            up,
            grad_out,
            function: GeluTanh,
        }),
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::elementwise::tests::{near, slopes};
    use crate::product::tests::numbers;

    impl Activation {
        /// All of them.
        pub(crate) const ALL: [Self; 2] = [Self::Silu, Self::GeluTanh];

        /// The function and its derivative, in f64.
        pub(crate) fn exact(self, x: f64) -> (f64, f64) {
            match self {
                Self::Silu => {
                    let s = (1. + (-x).exp()).recip();
                    (x * s, s * (1. + x * (1. - s)))
                }
                Self::GeluTanh => {
                    let root = (2. / std::f64::consts::PI).sqrt();
                    let t = (root * (x + 0.044_715 * x.powi(3))).tanh();
                    let slope = root * (1. + 3. * 0.044_715 * x * x);
                    let value = x / 2. * (1. + t);
                    (value, f64::midpoint(1., t) + x / 2. * (1. - t * t) * slope)
                }
            }
        }
    }

    #[test]
    fn gates_and_their_gradients() {
        with_each(|_| {
            for activation in Activation::ALL {
                let (gate, up, g) = (numbers(70, 1), numbers(70, 2), numbers(70, 3));
                let gate: Vec<f32> = gate.iter().map(|x| 4. * x).collect();
                let plain = |gate: &[f64], up: &[f64]| -> Vec<f64> {
                    let both = gate.iter().zip(up);
                    both.map(|(g, u)| activation.exact(*g).0 * u).collect()
                };
                let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
                let mut out = vec![0.; 70];
                gated_unit(activation, &gate, &up, &mut out);
                near(&out, &plain(&wide(&gate), &wide(&up)), 1e-6);
                let grad_gate = slopes(&gate, &g, |gate| plain(gate, &wide(&up)));
                let grad_up = slopes(&up, &g, |up| plain(&wide(&gate), up));
                let (mut a, mut b, mut c) = (gate.clone(), up.clone(), g.clone());
                gated_unit_backward(activation, &mut a, &mut b, &mut c);
                near(&a, &grad_gate, 1e-6);
                near(&b, &grad_up, 1e-6);
                near(&c, &wide(&out), 1e-6);
            }
        });
    }

    /// Far from 0 the functions are the gate itself, or 0, with the slopes 1 and 0, and never NaN.
    #[test]
    fn gates_far_from_zero() {
        with_each(|_| {
            for activation in Activation::ALL {
                for size in [20f32, 110., 1e13, 1e30, f32::MAX] {
                    for (gate, value, slope) in [(size, size, 1.), (-size, 0., 0.)] {
                        let (mut a, mut b, mut c) = ([gate; 17], [1.; 17], [1.; 17]);
                        let mut out = [f32::NAN; 17];
                        gated_unit(activation, &a, &b, &mut out);
                        gated_unit_backward(activation, &mut a, &mut b, &mut c);
                        for (ours, exact) in [(out, value), (c, value), (b, value), (a, slope)] {
                            for ours in ours {
                                let far = (ours - exact).abs();
                                assert!(far <= 1e-6 * exact.max(1.), "{gate}: {ours} {exact}");
                            }
                        }
                    }
                }
            }
        });
    }
}
