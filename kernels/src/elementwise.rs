//! The operations between the matrix products of a layer, over panels: norms, rotary embeddings, the gated unit and sums, each with
//! its backward pass.

use rayon::prelude::*;

use crate::dispatch::{Loop, fma, run};
use crate::exp::sigmoid;
use crate::panels::{LANES, check, count};

/// One feature of a panel's tokens.
type Row = [f32; LANES];

/// The number of features that are summed before their sum joins the total, so that rounding errors don't grow with their number.
const SUMMED: usize = 64;

/// Checks the sizes of a norm: `x` is panels of as many features as the weight has, `inverse` as many panels of one feature.
fn check_norm(x: &[f32], weight: &[f32], inverse: &[f32], like_x: &[&[f32]]) {
    let panels = count(x.len(), weight.len(), "what is normed");
    check(inverse.len(), 1, panels, "the norm's factors");
    for like in like_x {
        assert_eq!(like.len(), x.len(), "sizes of panels of a norm");
    }
}

/// RMS norm, `out = x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), over the features
/// of each token.
///
/// `x` and `out` are panels of `weight.len()` features. `inverse`, as many panels of one feature, receives
/// `1 / sqrt(mean(x^2) + eps)`, which the backward pass needs.
///
/// The panels may also be of several heads, each of `weight.len()` features. Then each head is normed by itself, and `inverse` has a
/// feature for each head. All `rms_norm` functions work in this way.
///
/// # Panics
/// If `x` is not a whole number of panels, `out` has another size than `x`, or `inverse` has not one feature for each of them.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32], inverse: &mut [f32]) {
    check_norm(x, weight, inverse, &[out]);
    let size = weight.len().max(1) * LANES;
    let panels = x.par_chunks(size).zip(out.par_chunks_mut(size));
    panels
        .zip(inverse.par_chunks_mut(LANES))
        .for_each(|((x, out), inverse)| {
            run(Norm {
                x,
                weight,
                eps,
                out,
                inverse,
            });
        });
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
    inverse: &'a mut [f32],
}

impl Loop for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (x, _) = self.x.as_chunks::<LANES>();
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let Some(inverse) = self.inverse.as_chunks_mut::<LANES>().0.first_mut() else {
            return;
        };
        let mut total: Row = [0.; LANES];
        for rows in x.chunks(SUMMED) {
            let mut sum: Row = [0.; LANES];
            for row in rows {
                for lane in 0..LANES {
                    sum[lane] = fma::<FMA>(row[lane], row[lane], sum[lane]);
                }
            }
            for lane in 0..LANES {
                total[lane] += sum[lane];
            }
        }
        let count = self.weight.len() as f32;
        for lane in 0..LANES {
            inverse[lane] = 1. / (total[lane] / count + self.eps).sqrt();
        }
        for ((x, out), weight) in x.iter().zip(out).zip(self.weight) {
            for lane in 0..LANES {
                out[lane] = x[lane] * inverse[lane] * weight;
            }
        }
    }
}

/// Recomputes the result of [`rms_norm`] from the `inverse` that it wrote: `out = x * inverse * weight`, all of the same sizes.
///
/// # Panics
/// As [`rms_norm`] does.
pub fn rms_norm_recompute(x: &[f32], weight: &[f32], inverse: &[f32], out: &mut [f32]) {
    struct Again<'a>(&'a [f32], &'a [f32], &'a [f32], &'a mut [f32]);
    impl Loop for Again<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (x, _) = self.0.as_chunks::<LANES>();
            let (out, _) = self.3.as_chunks_mut::<LANES>();
            let Some(inverse) = self.2.as_chunks::<LANES>().0.first() else {
                return;
            };
            for ((x, out), weight) in x.iter().zip(out).zip(self.1) {
                for lane in 0..LANES {
                    out[lane] = x[lane] * inverse[lane] * weight;
                }
            }
        }
    }
    check_norm(x, weight, inverse, &[out]);
    let size = weight.len().max(1) * LANES;
    let panels = x.par_chunks(size).zip(out.par_chunks_mut(size));
    panels
        .zip(inverse.par_chunks(LANES))
        .for_each(|((x, out), inverse)| run(Again(x, weight, inverse, out)));
}

/// The backward pass of [`rms_norm`]: adds the gradient with respect to `x` to `grad_x`, where `grad_out` is the gradient with respect
/// to the norm's result; both are panels like `x`. With `g = grad_out * weight` and `i = inverse`, the derivative of the norm's
/// formula gives `i g - x i^3 mean(x g)`.
///
/// # Panics
/// As [`rms_norm`] does.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    inverse: &[f32],
    grad_out: &[f32],
    grad_x: &mut [f32],
) {
    check_norm(x, weight, inverse, &[grad_out, grad_x]);
    let size = weight.len().max(1) * LANES;
    let panels = x.par_chunks(size).zip(grad_out.par_chunks(size));
    panels
        .zip(inverse.par_chunks(LANES))
        .zip(grad_x.par_chunks_mut(size))
        .for_each(|(((x, grad_out), inverse), grad_x)| {
            run(NormBack {
                x,
                weight,
                inverse,
                grad_out,
                grad_x,
            });
        });
}

struct NormBack<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    inverse: &'a [f32],
    grad_out: &'a [f32],
    grad_x: &'a mut [f32],
}

impl Loop for NormBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (x, _) = self.x.as_chunks::<LANES>();
        let (grad_out, _) = self.grad_out.as_chunks::<LANES>();
        let (grad_x, _) = self.grad_x.as_chunks_mut::<LANES>();
        let Some(inverse) = self.inverse.as_chunks::<LANES>().0.first() else {
            return;
        };
        let mut dot: Row = [0.; LANES];
        for ((x, g), w) in x.iter().zip(grad_out).zip(self.weight) {
            for lane in 0..LANES {
                dot[lane] = fma::<FMA>(x[lane] * g[lane], *w, dot[lane]);
            }
        }
        let count = self.weight.len() as f32;
        let mut back: Row = [0.; LANES];
        for lane in 0..LANES {
            let i = inverse[lane];
            back[lane] = dot[lane] * i * i * i / count;
        }
        for (((x, g), w), grad_x) in x.iter().zip(grad_out).zip(self.weight).zip(grad_x) {
            for lane in 0..LANES {
                grad_x[lane] += g[lane] * w * inverse[lane] - x[lane] * back[lane];
            }
        }
    }
}

/// Adds the gradient with respect to the norm's weight, the sum over tokens (and heads) of `grad_out * x * inverse`, to `grad_weight`,
/// which has one number for each feature. The lanes after the last token must be zero in `grad_out`.
///
/// # Panics
/// As [`rms_norm`] does.
pub fn rms_norm_grad_weight(x: &[f32], inverse: &[f32], grad_out: &[f32], grad_weight: &mut [f32]) {
    check_norm(x, grad_weight, inverse, &[grad_out]);
    let features = grad_weight.len();
    grad_weight
        .par_iter_mut()
        .enumerate()
        .for_each(|(feature, sum)| {
            let mut total = 0f64;
            for (panel, inverse) in inverse.as_chunks::<LANES>().0.iter().enumerate() {
                let index = (panel * features + feature) * LANES;
                let rows = x[index..index + LANES].iter().zip(&grad_out[index..]);
                let part = rows.zip(inverse).map(|((x, g), i)| x * g * i);
                total += f64::from(part.sum::<f32>());
            }
            *sum += total as f32;
        });
}

/// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864, equation 34, with features `i` and `i + half` of a head as
/// a pair where the paper has neighbours, as transformers' Llama does): rotates each head of `x` by the angles of its token.
///
/// `x` is panels of `features`, a multiple of the head's width `2 * half`; `cos` and `sin` are as many panels of `half` features.
/// `back` rotates by the negative angles, which is the backward pass.
///
/// # Panics
/// If `features` is not a multiple of `2 * half`, `half` is 0, or the three slices have not the same number of panels.
pub fn rope(x: &mut [f32], features: usize, cos: &[f32], sin: &[f32], half: usize, back: bool) {
    struct Rope<'a>(&'a mut [f32], &'a [f32], &'a [f32], usize, f32);
    impl Loop for Rope<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (x, _) = self.0.as_chunks_mut::<LANES>();
            let (cos, _) = self.1.as_chunks::<LANES>();
            let (sin, _) = self.2.as_chunks::<LANES>();
            for head in x.chunks_exact_mut(2 * self.3) {
                let (low, high) = head.split_at_mut(self.3);
                for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    for lane in 0..LANES {
                        let (x, y) = (a[lane], b[lane]);
                        let s = sin[lane] * self.4;
                        a[lane] = x * cos[lane] - y * s;
                        b[lane] = y * cos[lane] + x * s;
                    }
                }
            }
        }
    }
    assert!(
        half > 0 && features.is_multiple_of(half.saturating_mul(2)),
        "{features} features are no heads of twice {half}"
    );
    let panels = count(x.len(), features, "what is rotated");
    check(cos.len(), half, panels, "the cosines");
    check(sin.len(), half, panels, "the sines");
    let sign = if back { -1. } else { 1. };
    let angles = cos
        .par_chunks(half.max(1) * LANES)
        .zip(sin.par_chunks(half.max(1) * LANES));
    x.par_chunks_mut(features.max(1) * LANES)
        .zip(angles)
        .for_each(|(x, (cos, sin))| run(Rope(x, cos, sin, half, sign)));
}

/// The number of values in one task of a loop that treats each value by itself.
const SPAN: usize = 1 << 13;

/// SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6, without its products): `out = silu(gate) * up`, element by element, for
/// slices of any layout and equal length.
///
/// # Panics
/// If the lengths of the three differ.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    struct Gated<'a>(&'a [f32], &'a [f32], &'a mut [f32]);
    impl Loop for Gated<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (gate, last_gate) = self.0.as_chunks::<16>();
            let (up, last_up) = self.1.as_chunks::<16>();
            let (out, last) = self.2.as_chunks_mut::<16>();
            for ((g, u), out) in gate.iter().zip(up).zip(out) {
                for lane in 0..16 {
                    out[lane] = g[lane] * sigmoid::<FMA>(g[lane]) * u[lane];
                }
            }
            for ((g, u), out) in last_gate.iter().zip(last_up).zip(last) {
                *out = g * sigmoid::<FMA>(*g) * u;
            }
        }
    }
    assert_eq!(
        gate.len(),
        up.len(),
        "lengths of the gate and what it gates"
    );
    assert_eq!(gate.len(), out.len(), "lengths of the gate and the result");
    let parts = gate.par_chunks(SPAN).zip(up.par_chunks(SPAN));
    parts
        .zip(out.par_chunks_mut(SPAN))
        .for_each(|((gate, up), out)| run(Gated(gate, up, out)));
}

/// The backward pass of [`swiglu`], in place. `grad_out` is the gradient with respect to its result. Afterwards the slice `gate`
/// holds the gradient with respect to the gate, `up` that with respect to `up`, and `grad_out` the result `silu(gate) * up`, recomputed.
///
/// # Panics
/// If the lengths of the three differ.
pub fn swiglu_backward(gate: &mut [f32], up: &mut [f32], grad_out: &mut [f32]) {
    struct Back<'a>(&'a mut [f32], &'a mut [f32], &'a mut [f32]);
    impl Loop for Back<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (gate, last_gate) = self.0.as_chunks_mut::<16>();
            let (up, last_up) = self.1.as_chunks_mut::<16>();
            let (grad_out, last) = self.2.as_chunks_mut::<16>();
            for ((gate, up), grad_out) in gate.iter_mut().zip(up).zip(grad_out) {
                for lane in 0..16 {
                    let all = (&mut gate[lane], &mut up[lane], &mut grad_out[lane]);
                    swiglu_backward_one::<FMA>(all);
                }
            }
            for ((gate, up), grad_out) in last_gate.iter_mut().zip(last_up).zip(last) {
                swiglu_backward_one::<FMA>((gate, up, grad_out));
            }
        }
    }
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
    parts
        .zip(grad_out.par_chunks_mut(SPAN))
        .for_each(|((gate, up), grad_out)| run(Back(gate, up, grad_out)));
}

#[inline(always)]
fn swiglu_backward_one<const FMA: bool>((gate, up, grad_out): (&mut f32, &mut f32, &mut f32)) {
    let (g, u, d) = (*gate, *up, *grad_out);
    let s = sigmoid::<FMA>(g);
    let silu = g * s;
    *gate = d * u * s * (1. + g * (1. - s));
    *up = d * silu;
    *grad_out = silu * u;
}

/// `x += y * factor`, element by element.
///
/// # Panics
/// If the lengths of `x` and `y` differ.
pub fn add(x: &mut [f32], y: &[f32], factor: f32) {
    struct Add<'a>(&'a mut [f32], &'a [f32], f32);
    impl Loop for Add<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for (x, y) in self.0.iter_mut().zip(self.1) {
                *x = fma::<FMA>(*y, self.2, *x);
            }
        }
    }
    assert_eq!(x.len(), y.len(), "lengths of the summands");
    x.par_chunks_mut(SPAN)
        .zip(y.par_chunks(SPAN))
        .for_each(|(x, y)| run(Add(x, y, factor)));
}

/// `x *= factor`, element by element.
pub fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(SPAN).for_each(|x| {
        for x in x {
            *x *= factor;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::panels::size;
    use crate::product::tests::numbers;

    /// The slope of `sum(f(x) * g)` in each direction of `x`, by differences in f64.
    fn slopes(x: &[f32], g: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let at = |index: usize, by: f64| {
            let mut x = x.clone();
            x[index] += by;
            let y = f(&x);
            y.iter().zip(g).map(|(y, g)| y * f64::from(*g)).sum::<f64>()
        };
        (0..x.len())
            .map(|index| (at(index, 1e-5) - at(index, -1e-5)) / 2e-5)
            .collect()
    }

    fn near(ours: &[f32], exact: &[f64], bound: f64) {
        assert_eq!(ours.len(), exact.len());
        for (index, (a, b)) in ours.iter().zip(exact).enumerate() {
            assert!((f64::from(*a) - b).abs() < bound, "{index}: {a} {b}");
        }
    }

    fn plain_norm(x: &[f64], w: &[f32]) -> Vec<f64> {
        let features = w.len();
        let mut out = vec![0.; x.len()];
        for lane in 0..LANES {
            let at = |f: usize| x[f * LANES + lane];
            let mean = (0..features).map(|f| at(f) * at(f)).sum::<f64>() / features as f64;
            for f in 0..features {
                out[f * LANES + lane] = at(f) / (mean + 1e-5).sqrt() * f64::from(w[f]);
            }
        }
        out
    }

    #[test]
    fn norms_and_their_gradients() {
        with_each(|_| {
            let (x, w) = (numbers(size(5, 20), 1), numbers(5, 2));
            let g = numbers(x.len(), 3);
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mut out = vec![0.; x.len()];
            let mut inverse = vec![0.; LANES];
            rms_norm(&x, &w, 1e-5, &mut out, &mut inverse);
            near(&out, &plain_norm(&wide, &w), 1e-6);
            let mut again = vec![0.; x.len()];
            rms_norm_recompute(&x, &w, &inverse, &mut again);
            assert_eq!(out, again);
            let mut grad_x = vec![0.; x.len()];
            rms_norm_backward(&x, &w, &inverse, &g, &mut grad_x);
            near(&grad_x, &slopes(&x, &g, |x| plain_norm(x, &w)), 1e-4);
            let mut of_w = vec![0.; 5];
            rms_norm_grad_weight(&x, &inverse, &g, &mut of_w);
            for (f, of_w) in of_w.iter().enumerate() {
                let exact: f32 = (0..LANES)
                    .map(|lane| x[f * LANES + lane] * inverse[lane] * g[f * LANES + lane])
                    .sum();
                assert!((of_w - exact).abs() < 1e-5);
            }
        });
    }

    #[test]
    fn gates_and_their_gradients() {
        with_each(|_| {
            let (gate, up, g) = (numbers(64, 1), numbers(64, 2), numbers(64, 3));
            let plain = |gate: &[f64], up: &[f64]| -> Vec<f64> {
                let both = gate.iter().zip(up);
                both.map(|(g, u)| g / (1. + (-g).exp()) * u).collect()
            };
            let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
            let mut out = vec![0.; 64];
            swiglu(&gate, &up, &mut out);
            near(&out, &plain(&wide(&gate), &wide(&up)), 1e-6);
            let grad_gate = slopes(&gate, &g, |gate| plain(gate, &wide(&up)));
            let grad_up = slopes(&up, &g, |up| plain(&wide(&gate), up));
            let (mut a, mut b, mut c) = (gate.clone(), up.clone(), g.clone());
            swiglu_backward(&mut a, &mut b, &mut c);
            near(&a, &grad_gate, 1e-6);
            near(&b, &grad_up, 1e-6);
            near(&c, &wide(&out), 1e-6);
        });
    }

    #[test]
    fn rotations_turn_and_turn_back() {
        with_each(|_| {
            let x = numbers(size(12, 40), 1);
            let angles = numbers(size(3, 40), 2);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let mut y = x.clone();
            rope(&mut y, 12, &cos, &sin, 3, false);
            // Token 35, second head, first pair of features.
            let at = |data: &[f32], f: usize| data[(12 + f) * LANES + 3];
            let index = 3 * LANES + 3;
            let expected = at(&x, 6) * cos[index] - at(&x, 9) * sin[index];
            assert!((at(&y, 6) - expected).abs() < 1e-6);
            let expected = at(&x, 9) * cos[index] + at(&x, 6) * sin[index];
            assert!((at(&y, 9) - expected).abs() < 1e-6);
            rope(&mut y, 12, &cos, &sin, 3, true);
            for (x, y) in x.iter().zip(&y) {
                assert!((x - y).abs() < 1e-6);
            }
        });
    }

    #[test]
    fn sums() {
        let mut x = vec![1., 2.];
        add(&mut x, &[10., 20.], 0.5);
        scale(&mut x, 2.);
        assert_eq!(x, [12., 24.]);
    }
}
