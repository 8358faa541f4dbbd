//! Blocks of 32 values with a scale in f16, and for one type a minimum.

use half::f16;

/// The number of values in a block.
pub(super) const VALUES: usize = 32;

/// 1 / x, or 0 for 0.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x == 0. { 0. } else { 1. / x }
}

/// The value of the largest magnitude, the first of equals.
#[inline(always)]
fn extreme(x: &[f32; VALUES]) -> f32 {
    let (mut largest, mut value) = (0f32, 0f32);
    for x in x {
        if x.abs() > largest {
            (largest, value) = (x.abs(), *x);
        }
    }
    value
}

/// Writes 4 bits of each level: the first half of the block in the low halves of the bytes, the second in the high ones.
#[inline(always)]
fn pack(levels: &[u8; VALUES], out: &mut [u8]) {
    for (index, out) in out.iter_mut().enumerate() {
        *out = (levels[index] & 15) | (levels[index + VALUES / 2] << 4);
    }
}

/// The fifth bits of the levels, that of the first value lowest.
#[inline(always)]
fn fifth_bits(levels: &[u8; VALUES]) -> [u8; 4] {
    let mut bits = 0u32;
    for index in 0..VALUES {
        bits |= u32::from(levels[index] >> 4) << index;
    }
    bits.to_le_bytes()
}

/// Levels around `half`: `x / d + half`, rounded, where the value of the largest magnitude becomes 0 and what would be above
/// `2 half - 1` becomes that.
#[inline(always)]
fn symmetric(x: &[f32; VALUES], half: f32) -> (f32, [u8; VALUES]) {
    let scale = extreme(x) / -half;
    let inverse = inverse(scale);
    let mut levels = [0; VALUES];
    for index in 0..VALUES {
        let level = x[index] * inverse + (half + 0.5);
        levels[index] = level.min(2. * half - 1.) as u8;
    }
    (scale, levels)
}

#[inline(always)]
pub(super) fn q4_0(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<VALUES>().0;
    for (x, out) in blocks.iter().zip(out.as_chunks_mut::<18>().0) {
        let (scale, levels) = symmetric(x, 8.);
        out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        pack(&levels, &mut out[2..]);
    }
}

#[inline(always)]
pub(super) fn q5_0(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<VALUES>().0;
    for (x, out) in blocks.iter().zip(out.as_chunks_mut::<22>().0) {
        let (scale, levels) = symmetric(x, 16.);
        out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        out[2..6].copy_from_slice(&fifth_bits(&levels));
        pack(&levels, &mut out[6..]);
    }
}

#[inline(always)]
pub(super) fn q5_1(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<VALUES>().0;
    for (x, out) in blocks.iter().zip(out.as_chunks_mut::<24>().0) {
        let (mut least, mut most) = (f32::MAX, f32::MIN);
        for x in x {
            least = least.min(*x);
            most = most.max(*x);
        }
        let scale = (most - least) / 31.;
        let inverse = inverse(scale);
        let mut levels = [0; VALUES];
        for index in 0..VALUES {
            levels[index] = ((x[index] - least) * inverse + 0.5).min(31.) as u8;
        }
        out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        out[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
        out[4..8].copy_from_slice(&fifth_bits(&levels));
        pack(&levels, &mut out[8..]);
    }
}

#[inline(always)]
pub(super) fn q8_0(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<VALUES>().0;
    for (x, out) in blocks.iter().zip(out.as_chunks_mut::<34>().0) {
        let mut largest = 0f32;
        for x in x {
            largest = largest.max(x.abs());
        }
        let scale = largest / 127.;
        let inverse = inverse(scale);
        out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        for index in 0..VALUES {
            // Halves are rounded away from 0, as C's `roundf` does.
            let level = (x[index] * inverse).round() as i8;
            out[2 + index] = level.cast_unsigned();
        }
    }
}
