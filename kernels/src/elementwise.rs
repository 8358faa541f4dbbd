//! The operations between the matrix products of a layer, over panels: norms, rotary embeddings and sums, each with its backward
//! pass. The gated unit is in [`crate::gated`].

use rayon::prelude::*;

use crate::dispatch::{Loop, fma, run};
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
        *inverse = inverse_root_mean_square::<FMA>(x, self.eps);
        for ((x, out), weight) in x.iter().zip(out).zip(self.weight) {
            for lane in 0..LANES {
                out[lane] = x[lane] * inverse[lane] * weight;
            }
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)` over the features of each token of a panel.
#[inline(always)]
fn inverse_root_mean_square<const FMA: bool>(x: &[Row], eps: f32) -> Row {
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
    let count = x.len() as f32;
    total.map(|total| 1. / (total / count + eps).sqrt())
}

/// RMS norm of a branch that is then added to its residual, `out = residual + factor * x / sqrt(mean(x^2) + eps) * weight`: as
/// [`rms_norm`], with `residual` of the size of `x`. Its backward pass is [`rms_norm_backward`] of `factor` times the gradient.
///
/// # Panics
/// As [`rms_norm`] does, and if `residual` has another size than `x`.
pub fn rms_norm_onto(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    (residual, factor): (&[f32], f32),
    out: &mut [f32],
    inverse: &mut [f32],
) {
    check_norm(x, weight, inverse, &[residual, out]);
    let size = weight.len().max(1) * LANES;
    let panels = x.par_chunks(size).zip(residual.par_chunks(size));
    panels
        .zip(out.par_chunks_mut(size))
        .zip(inverse.par_chunks_mut(LANES))
        .for_each(|(((x, residual), out), inverse)| {
            run(NormOnto {
                x,
                weight,
                eps,
                residual,
                factor,
                out,
                inverse,
            });
        });
}

struct NormOnto<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    residual: &'a [f32],
    factor: f32,
    out: &'a mut [f32],
    inverse: &'a mut [f32],
}

impl Loop for NormOnto<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (x, _) = self.x.as_chunks::<LANES>();
        let (residual, _) = self.residual.as_chunks::<LANES>();
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        let Some(inverse) = self.inverse.as_chunks_mut::<LANES>().0.first_mut() else {
            return;
        };
        *inverse = inverse_root_mean_square::<FMA>(x, self.eps);
        for (((x, residual), out), weight) in x.iter().zip(residual).zip(out).zip(self.weight) {
            let weight = weight * self.factor;
            for lane in 0..LANES {
                out[lane] = fma::<FMA>(x[lane] * inverse[lane], weight, residual[lane]);
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

/// The angles of rotary position embeddings of a pass, and the heads that they rotate.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// The cosines of the angles, panels of `pairs` features.
    pub cos: &'a [f32],
    /// The sines, of the same shape.
    pub sin: &'a [f32],
    /// The number of rotated pairs of features of a head.
    pub pairs: usize,
    /// The number of features of a head, at least `2 * pairs`; those after the first `2 * pairs` stay as they are.
    pub width: usize,
}

/// Rotary position embedding in place (Su et al. 2021, arXiv 2104.09864, equation 34, with features `i` and `i + pairs` of a head as
/// a pair where the paper has neighbours, as transformers' Llama does): rotates each head of `x` by the angles of its token.
///
/// `x` is panels of `features`, a multiple of the head's width, as many as the angles are. `back` rotates by the negative angles,
/// which is the backward pass.
///
/// # Panics
/// If `features` is not a multiple of the head's width, a head has fewer features than are rotated, `pairs` is 0, or `x` and the
/// angles have not the same number of panels.
pub fn rope(x: &mut [f32], features: usize, rotary: Rotary<'_>, back: bool) {
    struct Rope<'a>(&'a mut [f32], Rotary<'a>, f32);
    impl Loop for Rope<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (x, _) = self.0.as_chunks_mut::<LANES>();
            let (cos, _) = self.1.cos.as_chunks::<LANES>();
            let (sin, _) = self.1.sin.as_chunks::<LANES>();
            for head in x.chunks_exact_mut(self.1.width) {
                let (low, high) = head.split_at_mut(self.1.pairs);
                for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    for lane in 0..LANES {
                        let (x, y) = (a[lane], b[lane]);
                        let s = sin[lane] * self.2;
                        a[lane] = x * cos[lane] - y * s;
                        b[lane] = y * cos[lane] + x * s;
                    }
                }
            }
        }
    }
    let Rotary {
        cos,
        sin,
        pairs,
        width,
    } = rotary;
    assert!(
        pairs > 0 && pairs.saturating_mul(2) <= width && features.is_multiple_of(width),
        "{features} features are no heads of {width} with {pairs} rotated pairs"
    );
    let panels = count(x.len(), features, "what is rotated");
    check(cos.len(), pairs, panels, "the cosines");
    check(sin.len(), pairs, panels, "the sines");
    let sign = if back { -1. } else { 1. };
    let angles = cos
        .par_chunks(pairs * LANES)
        .zip(sin.par_chunks(pairs * LANES));
    x.par_chunks_mut(features.max(1) * LANES)
        .zip(angles)
        .for_each(|(x, (cos, sin))| run(Rope(x, Rotary { cos, sin, ..rotary }, sign)));
}

/// The number of values in one task of a loop that treats each value by itself.
const SPAN: usize = 1 << 13;

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

/// `x = x * factor + y`, element by element: a branch that becomes the sum of a residual and the scaled branch.
///
/// # Panics
/// If the lengths of `x` and `y` differ.
pub fn scale_and_add(x: &mut [f32], factor: f32, y: &[f32]) {
    struct ScaleAndAdd<'a>(&'a mut [f32], f32, &'a [f32]);
    impl Loop for ScaleAndAdd<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for (x, y) in self.0.iter_mut().zip(self.2) {
                *x = fma::<FMA>(*x, self.1, *y);
            }
        }
    }
    assert_eq!(x.len(), y.len(), "lengths of the summands");
    x.par_chunks_mut(SPAN)
        .zip(y.par_chunks(SPAN))
        .for_each(|(x, y)| run(ScaleAndAdd(x, factor, y)));
}

/// `x *= factor`, element by element. A factor of 1 costs nothing.
pub fn scale(x: &mut [f32], factor: f32) {
    if factor.to_bits() == 1f32.to_bits() {
        return;
    }
    x.par_chunks_mut(SPAN).for_each(|x| {
        for x in x {
            *x *= factor;
        }
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::panels::size;
    use crate::product::tests::numbers;

    /// The slope of `sum(f(x) * g)` in each direction of `x`, by differences in f64.
    pub(crate) fn slopes(x: &[f32], g: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
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

    pub(crate) fn near(ours: &[f32], exact: &[f64], bound: f64) {
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
            let (residual, mut sum) = (numbers(x.len(), 4), vec![0.; x.len()]);
            let mut same = vec![0.; LANES];
            rms_norm_onto(&x, &w, 1e-5, (&residual, 0.3), &mut sum, &mut same);
            assert_eq!(inverse, same);
            let exact = out.iter().zip(&residual);
            let exact: Vec<f64> = exact
                .map(|(y, r)| f64::from(*r) + 0.3 * f64::from(*y))
                .collect();
            near(&sum, &exact, 1e-6);
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
    fn rotations_turn_and_turn_back() {
        with_each(|_| {
            let x = numbers(size(12, 40), 1);
            let angles = numbers(size(3, 40), 2);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let mut y = x.clone();
            let rotary = Rotary {
                cos: &cos,
                sin: &sin,
                pairs: 3,
                width: 6,
            };
            rope(&mut y, 12, rotary, false);
            // Token 35, second head, first pair of features.
            let at = |data: &[f32], f: usize| data[(12 + f) * LANES + 3];
            let index = 3 * LANES + 3;
            let expected = at(&x, 6) * cos[index] - at(&x, 9) * sin[index];
            assert!((at(&y, 6) - expected).abs() < 1e-6);
            let expected = at(&x, 9) * cos[index] + at(&x, 6) * sin[index];
            assert!((at(&y, 9) - expected).abs() < 1e-6);
            rope(&mut y, 12, rotary, true);
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
        scale_and_add(&mut x, 0.5, &[1., 2.]);
        assert_eq!(x, [7., 14.]);
    }
}
