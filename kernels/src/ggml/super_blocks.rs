//! The "k-quants": blocks of 256 values in parts of 32 or 16, each with a scale of its own.
//!
//! A part's scale is the one, among some twenty, with the least weighted error. [`PARTS`] parts are searched side by side, one in each
//! lane, so that sums need not be reduced across lanes and have the reference's order.

use half::f16;

/// The number of values in a block.
pub(super) const VALUES: usize = 256;
/// The number of parts that are searched side by side.
const PARTS: usize = 16;
/// Parts whose values are all below this are zeros.
const NOTHING: f32 = 1e-15;
/// 1.5 * 2^23: adding and subtracting it rounds numbers of up to 22 bits to whole ones, halves to even.
const TO_WHOLE: f32 = 12_582_912.;

/// A number for each of the parts that are searched together.
type Lanes = [f32; PARTS];

/// The nearest whole number, halves to even.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    (x + TO_WHOLE) - TO_WHOLE
}

/// The nearest whole number within bounds. A NaN becomes `least`.
#[inline(always)]
fn level(x: f32, least: f32, most: f32) -> f32 {
    nearest(x).max(least).min(most)
}

/// `f` for each lane.
#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> Lanes {
    let mut out = [0.; PARTS];
    for lane in 0..PARTS {
        out[lane] = f(lane);
    }
    out
}

/// Up to 16 parts of N values each, value after value, with zeros in the place of parts that are not there.
#[inline(always)]
fn side_by_side<const N: usize>(values: &[f32]) -> [Lanes; N] {
    let mut out = [[0.; PARTS]; N];
    for (lane, part) in values.as_chunks::<N>().0.iter().enumerate().take(PARTS) {
        for index in 0..N {
            out[index][lane] = part[index];
        }
    }
    out
}

/// For each of 16 parts of 32 values the scale `d` and the minimum `m`, both at least 0, with which `d l - m` for levels `l` from 0 to `most`
/// comes nearest to the values. Candidates are `(most + offset + i / 10) / (max - min)` for the inverse scale, i = 0 to `steps`, each
/// followed by a weighted least-squares fit; a value's weight is its magnitude plus the root mean square of its part.
#[inline(always)]
fn scale_and_minimum(x: &[Lanes; 32], most: f32, offset: f32, steps: usize) -> (Lanes, Lanes) {
    let mut squares = [0.; PARTS];
    for x in x {
        squares = lanes(|i| squares[i] + x[i] * x[i]);
    }
    let mean = lanes(|i| (squares[i] / 32.).sqrt());
    let mut weight = [[0.; PARTS]; 32];
    for (weight, x) in weight.iter_mut().zip(x) {
        *weight = lanes(|i| mean[i] + x[i].abs());
    }
    let (mut least, mut largest) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weight[0], lanes(|i| weight[0][i] * x[0][i]));
    for (x, w) in x.iter().zip(&weight).skip(1) {
        least = lanes(|i| if x[i] < least[i] { x[i] } else { least[i] });
        largest = lanes(|i| if x[i] > largest[i] { x[i] } else { largest[i] });
        sum_w = lanes(|i| sum_w[i] + w[i]);
        sum_x = lanes(|i| sum_x[i] + w[i] * x[i]);
    }
    let mut minimum = lanes(|i| if least[i] > 0. { 0. } else { least[i] });
    let constant = lanes(|i| f32::from(u8::from(largest[i] - minimum[i] == 0.)));
    let first = minimum;

    let inverse = lanes(|i| most / (largest[i] - minimum[i]));
    let mut scale = lanes(|i| 1. / inverse[i]);
    let mut best = [0.; PARTS];
    for (x, w) in x.iter().zip(&weight) {
        best = lanes(|i| {
            let l = level(inverse[i] * (x[i] - minimum[i]), 0., most);
            let apart = scale[i] * l + minimum[i] - x[i];
            best[i] + w[i] * (apart * apart)
        });
    }
    let mut levels = [[0.; PARTS]; 32];
    for step in 0..=steps {
        let wanted = offset + 0.1 * step as f32 + most;
        let inverse = lanes(|i| wanted / (largest[i] - minimum[i]));
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.; PARTS], [0.; PARTS], [0.; PARTS]);
        for ((x, w), levels) in x.iter().zip(&weight).zip(&mut levels) {
            let l = lanes(|i| level(inverse[i] * (x[i] - minimum[i]), 0., most));
            let wl = lanes(|i| w[i] * l[i]);
            sum_l = lanes(|i| sum_l[i] + wl[i]);
            sum_l2 = lanes(|i| sum_l2[i] + wl[i] * l[i]);
            sum_xl = lanes(|i| sum_xl[i] + wl[i] * x[i]);
            *levels = l;
        }
        let determinant = lanes(|i| sum_w[i] * sum_l2[i] - sum_l[i] * sum_l[i]);
        let own_scale = lanes(|i| (sum_w[i] * sum_xl[i] - sum_x[i] * sum_l[i]) / determinant[i]);
        let own_minimum = lanes(|i| (sum_l2[i] * sum_x[i] - sum_l[i] * sum_xl[i]) / determinant[i]);
        let own_scale = lanes(|i| {
            if own_minimum[i] > 0. {
                sum_xl[i] / sum_l2[i]
            } else {
                own_scale[i]
            }
        });
        let own_minimum = lanes(|i| {
            if own_minimum[i] > 0. {
                0.
            } else {
                own_minimum[i]
            }
        });
        let mut error = [0.; PARTS];
        for ((x, w), levels) in x.iter().zip(&weight).zip(&levels) {
            error = lanes(|i| {
                let apart = own_scale[i] * levels[i] + own_minimum[i] - x[i];
                error[i] + w[i] * (apart * apart)
            });
        }
        for i in 0..PARTS {
            let better = (determinant[i] > 0.) & (error[i] < best[i]);
            best[i] = if better { error[i] } else { best[i] };
            scale[i] = if better { own_scale[i] } else { scale[i] };
            minimum[i] = if better { own_minimum[i] } else { minimum[i] };
        }
    }
    let is_constant = |i: usize| constant[i] > 0.;
    let scale = lanes(|i| if is_constant(i) { 0. } else { scale[i] });
    let minimum = lanes(|i| {
        if is_constant(i) {
            -first[i]
        } else {
            -minimum[i]
        }
    });
    (scale, minimum)
}

/// For each of 16 parts of 16 values the scale with which levels from -`half` to `half - 1` come nearest to the values. Candidates for the
/// inverse scale are `-(half + i / 10) / extreme`, i = -9 to 9, each followed by a least-squares fit in which a value's weight is its square.
#[inline(always)]
fn signed_scale(x: &[Lanes; 16], half: f32) -> Lanes {
    let (mut largest, mut extreme) = ([0.; PARTS], [0.; PARTS]);
    for x in x {
        extreme = lanes(|i| {
            if x[i].abs() > largest[i] {
                x[i]
            } else {
                extreme[i]
            }
        });
        largest = lanes(|i| {
            if x[i].abs() > largest[i] {
                x[i].abs()
            } else {
                largest[i]
            }
        });
    }
    let fit = |wanted: f32| {
        let inverse = lanes(|i| -wanted / extreme[i]);
        let (mut sum_xl, mut sum_l2) = ([0.; PARTS], [0.; PARTS]);
        for x in x {
            let l = lanes(|i| level(inverse[i] * x[i], -half, half - 1.));
            let w = lanes(|i| x[i] * x[i]);
            sum_xl = lanes(|i| sum_xl[i] + w[i] * x[i] * l[i]);
            sum_l2 = lanes(|i| sum_l2[i] + w[i] * l[i] * l[i]);
        }
        (sum_xl, sum_l2)
    };
    let (sum_xl, sum_l2) = fit(half);
    let mut scale = lanes(|i| {
        if sum_l2[i] == 0. {
            0.
        } else {
            sum_xl[i] / sum_l2[i]
        }
    });
    let mut best = lanes(|i| scale[i] * sum_xl[i]);
    for step in (-9..=9i8).filter(|step| *step != 0) {
        let (sum_xl, sum_l2) = fit(half + 0.1 * f32::from(step));
        for i in 0..PARTS {
            let better = (sum_l2[i] > 0.) & (sum_xl[i] * sum_xl[i] > best[i] * sum_l2[i]);
            let own = sum_xl[i] / sum_l2[i];
            scale[i] = if better { own } else { scale[i] };
            best[i] = if better { own * sum_xl[i] } else { best[i] };
        }
    }
    lanes(|i| if largest[i] < NOTHING { 0. } else { scale[i] })
}

/// The eight scales and the eight minima of a block as whole numbers of 6 bits, and what one of them is worth.
#[inline(always)]
fn six_bits(values: &[f32]) -> (f32, [u8; 8]) {
    let mut largest = 0f32;
    for value in values {
        // Not `max`, which may take the -0 of a part of zeros.
        largest = if *value > largest { *value } else { largest };
    }
    let inverse = if largest > 0. { 63. / largest } else { 0. };
    let mut codes = [0; 8];
    for (code, value) in codes.iter_mut().zip(values) {
        *code = nearest(inverse * value).min(63.) as u8;
    }
    (largest / 63., codes)
}

/// Twice eight numbers of 6 bits in 12 bytes: the first four of each in the low bits of eight bytes, whose high bits complete the others.
#[inline(always)]
fn pack_six_bits(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for j in 0..4 {
        out[j] = scales[j] | ((scales[j + 4] >> 4) << 6);
        out[j + 4] = minima[j] | ((minima[j + 4] >> 4) << 6);
        out[j + 8] = (scales[j + 4] & 15) | ((minima[j + 4] & 15) << 4);
    }
    out
}

/// The head (`d`, `dmin`, scales) and the levels of the blocks with minima; a group is two of them.
#[inline(always)]
fn with_minima(
    values: &[f32],
    most: f32,
    offset: f32,
    steps: usize,
    mut write: impl FnMut(usize, [u8; 16], &[u8; VALUES]),
) {
    for (group, values) in values.chunks(2 * VALUES).enumerate() {
        let (scales, minima) = scale_and_minimum(&side_by_side(values), most, offset, steps);
        for (block, x) in values.as_chunks::<VALUES>().0.iter().enumerate() {
            let (scale, codes) = six_bits(&scales[8 * block..8 * block + 8]);
            let (minimum, minimum_codes) = six_bits(&minima[8 * block..8 * block + 8]);
            let (scale, minimum) = (f16::from_f32(scale), f16::from_f32(minimum));
            let mut head = [0; 16];
            head[..2].copy_from_slice(&scale.to_le_bytes());
            head[2..4].copy_from_slice(&minimum.to_le_bytes());
            head[4..].copy_from_slice(&pack_six_bits(&codes, &minimum_codes));
            let mut levels = [0; VALUES];
            let parts = x.as_chunks::<32>().0.iter().enumerate();
            for ((part, x), levels) in parts.zip(levels.as_chunks_mut::<32>().0) {
                let d = scale.to_f32() * f32::from(codes[part]);
                let m = minimum.to_f32() * f32::from(minimum_codes[part]);
                if d != 0. {
                    for index in 0..32 {
                        levels[index] = level((x[index] + m) / d, 0., most) as u8;
                    }
                }
            }
            write(2 * group + block, head, &levels);
        }
    }
}

#[inline(always)]
pub(super) fn q4_k(values: &[f32], out: &mut [u8]) {
    let out = out.as_chunks_mut::<144>().0;
    with_minima(values, 15., -1., 20, |block, head, levels| {
        let out = &mut out[block];
        out[..16].copy_from_slice(&head);
        low_bits(levels, &mut out[16..]);
    });
}

#[inline(always)]
pub(super) fn q5_k(values: &[f32], out: &mut [u8]) {
    let out = out.as_chunks_mut::<176>().0;
    with_minima(values, 31., -0.5, 15, |block, head, levels| {
        let out = &mut out[block];
        out[..16].copy_from_slice(&head);
        for index in 0..32 {
            let mut bits = 0;
            for part in 0..8 {
                bits |= (levels[32 * part + index] >> 4) << part;
            }
            out[16 + index] = bits;
        }
        low_bits(levels, &mut out[48..]);
    });
}

/// The low four bits of 256 levels: of each 64, the first half in the low halves of the bytes and the second in the high ones.
#[inline(always)]
fn low_bits(levels: &[u8; VALUES], out: &mut [u8]) {
    let pairs = levels.as_chunks::<64>().0.iter();
    for (levels, out) in pairs.zip(out.as_chunks_mut::<32>().0) {
        for index in 0..32 {
            out[index] = (levels[index] & 15) | (levels[index + 32] << 4);
        }
    }
}

#[inline(always)]
pub(super) fn q6_k(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<VALUES>().0.iter();
    for (x, out) in blocks.zip(out.as_chunks_mut::<210>().0) {
        let scales = signed_scale(&side_by_side(x), 32.);
        let (mut largest, mut extreme) = (0f32, 0f32);
        for scale in scales {
            if scale.abs() > largest {
                (largest, extreme) = (scale.abs(), scale);
            }
        }
        if largest < NOTHING {
            out.fill(0);
            continue;
        }
        let inverse = -128. / extreme;
        let d = f16::from_f32(1. / inverse);
        let mut levels = [32; VALUES];
        let parts = x.as_chunks::<16>().0.iter().enumerate();
        for ((part, x), levels) in parts.zip(levels.as_chunks_mut::<16>().0) {
            let code = nearest(inverse * scales[part]).min(127.) as i8;
            out[192 + part] = code.cast_unsigned();
            let d = d.to_f32() * f32::from(code);
            if d != 0. {
                for index in 0..16 {
                    levels[index] = (level(x[index] / d, -32., 31.) + 32.) as u8;
                }
            }
        }
        let (low, high) = out.split_at_mut(128);
        for half in 0..2 {
            let levels = &levels[128 * half..];
            for index in 0..32 {
                let four = [0, 1, 2, 3].map(|quarter| levels[32 * quarter + index]);
                low[64 * half + index] = (four[0] & 15) | (four[2] << 4);
                low[64 * half + 32 + index] = (four[1] & 15) | (four[3] << 4);
                high[32 * half + index] = (four[0] >> 4)
                    | ((four[1] >> 4) << 2)
                    | ((four[2] >> 4) << 4)
                    | ((four[3] >> 4) << 6);
            }
        }
        out[208..].copy_from_slice(&d.to_le_bytes());
    }
}
