//! Normal random numbers by the polar method (Marsaglia and Bray 1964, SIAM Review 6(3), "A Convenient Method for Generating Normal
//! Variables"). Each pair of numbers has a random stream of its own and so depends on nothing but a key and the pair's index. Only
//! integer arithmetic, additions, multiplications, divisions and square roots are used, which every machine rounds alike.

use crate::dispatch::{self, Loop};
use crate::random::splitmix64;

/// The number of pairs whose logarithms are computed together.
const PAIRS: usize = 128;

/// Fills `values` with normal numbers of mean 0 and standard deviation `scale`, two for each pair from index `first` on. With an
/// odd number of values the second number of the last pair is left out.
pub fn fill(key: u64, mut first: u64, scale: f64, values: &mut [f32]) {
    for values in values.chunks_mut(2 * PAIRS) {
        let mut points = [[0f64; PAIRS]; 2];
        let mut squares = [1f64; PAIRS];
        let count = values.len().div_ceil(2);
        for index in 0..count {
            let (point, square) = point(key, first.wrapping_add(index as u64));
            [points[0][index], points[1][index]] = point;
            squares[index] = square;
        }
        to_normal(&mut points, &squares);
        for (index, pair) in values.chunks_mut(2).enumerate() {
            for (value, points) in pair.iter_mut().zip(&points) {
                *value = (points[index] * scale) as f32;
            }
        }
        first = first.wrapping_add(count as u64);
    }
}

/// A random point inside the unit circle, and the square of its distance from the centre, which is not 0.
fn point(key: u64, pair: u64) -> ([f64; 2], f64) {
    let mut counter = pair;
    let mut state = key ^ splitmix64(&mut counter);
    let mut uniform = || {
        let bits = splitmix64(&mut state) >> 11;
        bits as f64 * (2. / (1u64 << 53) as f64) - 1.
    };
    loop {
        let (x, y) = (uniform(), uniform());
        let square = x * x + y * y;
        if square > 0. && square < 1. {
            return ([x, y], square);
        }
    }
}

/// Turns points inside the unit circle into pairs of independent standard normal numbers.
fn to_normal(points: &mut [[f64; PAIRS]; 2], squares: &[f64; PAIRS]) {
    dispatch::run(ToNormal { points, squares });
}

struct ToNormal<'a> {
    points: &'a mut [[f64; PAIRS]; 2],
    squares: &'a [f64; PAIRS],
}

impl Loop for ToNormal<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        // Never fused, so that the result's bits don't depend on the machine.
        to_normal_plain(self.points, self.squares);
    }
}

#[inline(always)]
fn to_normal_plain(points: &mut [[f64; PAIRS]; 2], squares: &[f64; PAIRS]) {
    let [x, y] = points;
    for ((x, y), square) in x.iter_mut().zip(y).zip(squares) {
        let factor = (-2. * ln(*square) / square).sqrt();
        *x *= factor;
        *y *= factor;
    }
}

/// The natural logarithm of a positive, not subnormal number, to about 1e-13. The standard library calls the platform's own, whose
/// last bits differ from one platform to the next.
#[inline(always)]
fn ln(x: f64) -> f64 {
    // x = m 2^e with m between sqrt(1/2) and sqrt(2), and ln m = 2 atanh((m - 1) / (m + 1)) by its power series.
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    let m = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    let large = m > std::f64::consts::SQRT_2;
    let exponent = exponent + i32::from(large);
    let m = if large { m * 0.5 } else { m };
    let z = (m - 1.) / (m + 1.);
    let square = z * z;
    let mut series = 0.;
    let mut power = 9;
    while power > 0 {
        power -= 1;
        series = series * square + 1. / f64::from(2 * power + 1);
    }
    2. * z * series + f64::from(exponent) * std::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;

    /// Made by another implementation of the same formulas, with the standard logarithm.
    const PINNED: [f32; 4] = [-0.263_139_96, 2.046_340_5, -0.153_952_1, -0.420_198_83];
    /// The key of the tensor `x` with the seed 7.
    const KEY: u64 = 0x2bf6_3774_41cb_c71f;

    #[test]
    fn numbers_are_those_of_the_formulas() {
        let mut values = [0f32; 4];
        fill(KEY, 0, 1., &mut values);
        assert_eq!(values.map(f32::to_bits), PINNED.map(f32::to_bits));
    }

    #[test]
    fn a_number_depends_on_its_place_alone() {
        let mut whole = vec![0f32; 1001];
        fill(KEY, 5, 0.02, &mut whole);
        for cut in [2, 100, 256, 300] {
            let mut parts = vec![0f32; 1001];
            for (number, part) in parts.chunks_mut(cut).enumerate() {
                fill(KEY, 5 + (number * cut / 2) as u64, 0.02, part);
            }
            assert!(parts == whole, "{cut}");
        }
    }

    #[test]
    fn the_wide_way_has_the_bits_of_the_plain_one() {
        let mut points = [[0f64; PAIRS]; 2];
        let mut squares = [0f64; PAIRS];
        for index in 0..PAIRS {
            let (point, square) = point(KEY, 1000 + index as u64);
            [points[0][index], points[1][index]] = point;
            squares[index] = square;
        }
        squares[0] = f64::MIN_POSITIVE;
        let mut plain = points;
        to_normal_plain(&mut plain, &squares);
        with_each(|isa| {
            let mut again = points;
            to_normal(&mut again, &squares);
            assert!(plain == again, "{isa:?}");
        });
    }

    #[test]
    fn the_logarithm_is_right() {
        for x in [1e-300, 1e-9, 0.1, 0.5, 0.707, 0.708, 1., 1.5, 2., 1e5] {
            assert!(
                (ln(x) - f64::ln(x)).abs() < 1e-12 * f64::ln(x).abs().max(1.),
                "{x}"
            );
        }
    }
}
