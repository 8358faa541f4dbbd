//! The exponential function, the logistic function and the hyperbolic tangent, in a form that the compiler vectorises.

use crate::dispatch::fma;

/// `e^x`, within two units in the last place; 0 below -87.3 (no subnormal numbers), infinite above 88.7, and NaN for a NaN.
/// `FMA` says whether a fused multiply-add is one instruction, see [`crate::dispatch::Loop`].
///
/// The argument is split into `n ln 2 + r` with `|r| <= ln 2 / 2` (Cody and Waite 1980, "Software Manual for the Elementary
/// Functions", chapter 6), and `e^r` is a polynomial of degree 6.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const HIGH: f32 = 0.693_359_4; // the first bits of ln 2, so few that their product with n is exact
    const LOW: f32 = -2.121_944_4e-4;
    let cut = x.clamp(-87.4, 88.8);
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    let magic = 12_582_912.0_f32;
    let n = fma::<FMA>(cut, std::f32::consts::LOG2_E, magic) - magic;
    let r = fma::<FMA>(n, -HIGH, cut);
    let r = fma::<FMA>(n, -LOW, r);
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_5e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p * r, r, r) + 1.;
    // In two steps, because 2^128 is not a float.
    let half = n * 0.5;
    let half = fma::<FMA>(half, 1., magic) - magic;
    let value = p * power(half) * power(n - half);
    // Both comparisons are false for a NaN, so it is kept.
    let value = if x < -87.336 { 0. } else { value };
    let value = if x > 88.722_84 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// `2^n` for an integer `n` from -126 to 127.
#[inline(always)]
fn power(n: f32) -> f32 {
    // `n as i32` saturates, which no vector instruction does. Adding 2^23 + 127 leaves n + 127 in the low bits instead.
    f32::from_bits((n + 8_388_735.).to_bits() << 23)
}

/// The logistic function `1 / (1 + e^-x)`; see [`exp`] for its accuracy and `FMA`.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1. / (1. + exp::<FMA>(-x))
}

/// The hyperbolic tangent, within four units in the last place; NaN for a NaN. See [`exp`] for `FMA`.
///
/// Near 0, where `1 - 2 / (1 + e^(2 |x|))` cancels, it is `x + x^3 p(x^2)` with the polynomial `p` of degree 4 that has the least
/// largest relative error up to 0.65.
#[inline(always)]
pub fn tanh<const FMA: bool>(x: f32) -> f32 {
    let size = x.abs();
    let square = size * size;
    let mut p = -5.515_164e-3;
    for c in [2.046_942e-2, -5.368_802_3e-2, 1.333_083e-1, -3.333_326e-1] {
        p = fma::<FMA>(p, square, c);
    }
    let near = fma::<FMA>(p * square, size, size);
    let far = 1. - 2. / (1. + exp::<FMA>(2. * size));
    // The comparison is false for a NaN, which `far` keeps.
    let value = if size < 0.65 { near } else { far };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_f64() {
        let far = |x: f32, value: f32| {
            let exact = f64::from(x).exp();
            (f64::from(value) - exact).abs() / exact
        };
        let mut x = -87.3f32;
        while x < 88.7 {
            for value in [exp::<true>(x), exp::<false>(x)] {
                assert!(far(x, value) < 2.5e-7, "{x}: {value}");
            }
            x += 0.001_37;
        }
        for (x, y) in [
            (0., 1.),
            (-0., 1.),
            (f32::NEG_INFINITY, 0.),
            (-1e30, 0.),
            (f32::INFINITY, f32::INFINITY),
            (89., f32::INFINITY),
        ] {
            assert_eq!(exp::<true>(x).to_bits(), f32::to_bits(y), "{x}");
            assert_eq!(exp::<false>(x).to_bits(), f32::to_bits(y), "{x}");
        }
        assert!(exp::<true>(f32::NAN).is_nan());
        assert!(
            (sigmoid::<true>(-100.)).abs() < 1e-30 && (sigmoid::<true>(100.) - 1.).abs() < 1e-7
        );
    }

    #[test]
    fn tanh_is_that_of_f64() {
        for exponent in -60..60 {
            for step in 0..400u16 {
                let x = 1.13f32.powi(exponent) * (1. + f32::from(step) / 400.);
                let exact = f64::from(x).tanh();
                for value in [tanh::<true>(x), tanh::<false>(x)] {
                    let far = (f64::from(value) - exact).abs() / exact;
                    assert!(far < 2.4e-7, "{x}: {value} {exact}");
                }
                assert_eq!(tanh::<true>(-x).to_bits(), (-tanh::<true>(x)).to_bits());
            }
        }
        for (x, y) in [
            (0., 0.),
            (-0., -0.),
            (1e-30, 1e-30),
            (20., 1.),
            (-1e30, -1.),
            (f32::INFINITY, 1.),
            (f32::NEG_INFINITY, -1.),
        ] {
            assert_eq!(tanh::<true>(x).to_bits(), f32::to_bits(y), "{x}");
            assert_eq!(tanh::<false>(x).to_bits(), f32::to_bits(y), "{x}");
        }
        assert!(tanh::<true>(f32::NAN).is_nan() && tanh::<false>(f32::NAN).is_nan());
    }
}
