//! The operations on single rows between the products of text generation.

use super::plain::{LANES, lanes, total};
use crate::bf16::bf16_bits;
use crate::dispatch::{Loop, fma, run};
use crate::exp::tanh;
use crate::gated::{Activation, Function, GeluTanh, Silu};

/// Rounds every value to bf16, ties to even, in place, on the calling thread.
pub fn round_to_bf16(values: &mut [f32]) {
    run(Round(values));
}

struct Round<'a>(&'a mut [f32]);

impl Loop for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for value in self.0 {
            *value = f32::from_bits(bf16_bits(*value) << 16);
        }
    }
}

/// RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4): writes `x / sqrt(mean(x^2) + eps) * weight` of each row of
/// `x` (rows, `weight.len()`) to `out`, of the same shape.
///
/// # Panics
/// If `x` is not a whole number of rows of `weight.len()` values, or `out` has another size than `x`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "the output's size");
    let row = weight.len().max(1);
    assert!(x.len().is_multiple_of(row), "rows as long as the weight");
    run(Norm {
        x,
        weight,
        eps,
        out,
    });
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Loop for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let length = self.weight.len().max(1);
        let rows = self.x.chunks_exact(length);
        for (x, out) in rows.zip(self.out.chunks_exact_mut(length)) {
            let mut sums = [0f32; LANES];
            let whole = length / LANES * LANES;
            for from in (0..whole).step_by(LANES) {
                for (sum, x) in sums.iter_mut().zip(lanes(x, from)) {
                    *sum = fma::<FMA>(x, x, *sum);
                }
            }
            let rest = x[whole..].iter();
            let squares = rest.fold(total(&sums), |sum, x| fma::<FMA>(*x, *x, sum));
            let inverse = 1. / (squares / length as f32 + self.eps).sqrt();
            for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(self.weight)) {
                *out = x * inverse * weight;
            }
        }
    }
}

/// The gated unit `gate = activation(gate) * up`, element by element, on the calling thread.
///
/// # Panics
/// If the lengths of the two differ.
pub fn gated_unit(activation: Activation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "the sizes of gate and up");
    match activation {
        Activation::Silu => run(Gated {
            gate,
            up,
            function: Silu,
        }),
        Activation::GeluTanh => run(Gated {
            gate,
            up,
            function: GeluTanh,
        }),
    }
}

struct Gated<'a, F> {
    gate: &'a mut [f32],
    up: &'a [f32],
    function: F,
}

impl<F: Function> Loop for Gated<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            *gate = self.function.gated::<FMA>(*gate, *up);
        }
    }
}

/// The soft-cap `x = cap * tanh(x / cap)` of each number (Gemma 2, arXiv 2408.00118, section 2), on the calling thread.
pub fn soft_cap(values: &mut [f32], cap: f32) {
    run(SoftCap { values, cap });
}

struct SoftCap<'a> {
    values: &'a mut [f32],
    cap: f32,
}

impl Loop for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let inverse = 1. / self.cap;
        for value in self.values {
            *value = self.cap * tanh::<FMA>(*value * inverse);
        }
    }
}

/// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864, equation 34, with features `i` and `i + cos.len()` of a head
/// as a pair, as transformers' Llama does): rotates the first `2 * cos.len()` features of each head of `row` by the angles of its
/// token. `cos` and `sin` have one element for each pair; a head has `width` features, and those after the rotated ones stay.
///
/// # Panics
/// If `row` is not a whole number of heads, a head has fewer features than are rotated, or the lengths of `cos` and `sin` differ.
pub fn rope(row: &mut [f32], width: usize, cos: &[f32], sin: &[f32]) {
    assert_eq!(cos.len(), sin.len(), "the sizes of cos and sin");
    assert!(
        width >= 2 * cos.len() && row.len().is_multiple_of(width.max(1)),
        "whole heads"
    );
    run(Rotate {
        row,
        width,
        cos,
        sin,
    });
}

struct Rotate<'a> {
    row: &'a mut [f32],
    width: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Loop for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for head in self.row.chunks_exact_mut(self.width.max(1)) {
            let (first, second) = head.split_at_mut(self.cos.len());
            let angles = self.cos.iter().zip(self.sin);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// `values *= factor`, on the calling thread. A factor of 1 costs nothing.
pub fn scale(values: &mut [f32], factor: f32) {
    if factor.to_bits() == 1f32.to_bits() {
        return;
    }
    for value in values {
        *value *= factor;
    }
}

/// The index of the largest value, the first one of equals; `None` if there is no value, or one is a NaN or infinite.
#[expect(
    clippy::float_cmp,
    reason = "the largest is one of the numbers, as it is"
)]
pub fn argmax(values: &[f32]) -> Option<usize> {
    let largest = run(Largest(values))?;
    values.iter().position(|value| *value == largest)
}

struct Largest<'a>(&'a [f32]);

impl Loop for Largest<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Option<f32> {
        let mut most = [f32::NEG_INFINITY; LANES];
        // Without their sign, the bits of a NaN or an infinity are above those of all finite numbers.
        let mut size = [0u32; LANES];
        let (whole, rest) = self.0.as_chunks::<LANES>();
        for values in whole {
            for lane in 0..LANES {
                let value = values[lane];
                most[lane] = if value > most[lane] {
                    value
                } else {
                    most[lane]
                };
                size[lane] = size[lane].max(value.to_bits() & 0x7fff_ffff);
            }
        }
        for (lane, value) in rest.iter().enumerate() {
            most[lane] = most[lane].max(*value);
            size[lane] = size[lane].max(value.to_bits() & 0x7fff_ffff);
        }
        let finite = size.iter().all(|size| *size < f32::INFINITY.to_bits());
        let most = most.into_iter().reduce(f32::max)?;
        (finite && most > f32::NEG_INFINITY).then_some(most)
    }
}
