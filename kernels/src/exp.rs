//! The exponential function and the logistic function, in a form that the compiler vectorises.

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
}
