//! The quantisation of weights to NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3), in blocks of 64 values that share their
//! largest magnitude. The results equal those of bitsandbytes' CPU path (`bitsandbytes/backends/default/ops.py`, `quantize_4bit`) bit by bit.

#[cfg(target_arch = "x86_64")]
mod wide;

use crate::FloatType;
#[cfg(target_arch = "x86_64")]
use crate::dispatch::Isa;
use crate::dispatch::{self, Loop};

/// The number of values in a block.
pub const BLOCK: usize = 64;

/// The value of each 4-bit code: quantiles of a normal distribution, scaled to the range from -1 to 1 (Dettmers et al. 2023,
/// appendix E, in the digits of `bitsandbytes/functional.py`, `get_4bit_type`).
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The midpoints between neighbouring values of [`CODE`].
const MIDPOINTS: [f32; 15] = midpoints();

const fn midpoints() -> [f32; 15] {
    let mut midpoints = [0.; 15];
    let mut code = 0;
    while code < 15 {
        midpoints[code] = f32::midpoint(CODE[code], CODE[code + 1]);
        code += 1;
    }
    midpoints
}

/// The number of values in `bytes`.
fn count(dtype: FloatType, bytes: &[u8]) -> usize {
    let size = dtype.size();
    assert!(
        bytes.len().is_multiple_of(size),
        "{} bytes are no values of {size}",
        bytes.len()
    );
    bytes.len() / size
}

/// Writes the largest magnitude of each block of the values in `bytes` to `out`; the last block may be shorter. If a block holds
/// a NaN or an infinity, its result is not finite either.
///
/// # Panics
/// If `bytes` ends within a value, or `out` has not one element for each block.
pub fn absmax(dtype: FloatType, bytes: &[u8], out: &mut [f32]) {
    let blocks = count(dtype, bytes).div_ceil(BLOCK);
    assert_eq!(out.len(), blocks, "places for the largest magnitudes");
    #[cfg(target_arch = "x86_64")]
    let (bytes, out) = if Isa::current() >= Isa::Avx512 {
        // SAFETY: the processor has AVX-512.
        let done = unsafe { wide::absmax(dtype, bytes, out) };
        (&bytes[done * BLOCK * dtype.size()..], &mut out[done..])
    } else {
        (bytes, out)
    };
    dispatch::run(AbsMax { dtype, bytes, out });
}

/// Quantises the values in `bytes` to codes and writes two of them a byte to `packed`, the first one in the high half. A value's
/// code is the one nearest to its quotient by its block's largest magnitude; halfway between two it is the lower one. An odd last
/// value is followed by the code of 0. The codes of a block with values that are not finite are unspecified.
///
/// # Panics
/// If `bytes` ends within a value, or `packed` has not one byte for every two values.
pub fn pack(dtype: FloatType, bytes: &[u8], packed: &mut [u8]) {
    let pairs = count(dtype, bytes).div_ceil(2);
    assert_eq!(packed.len(), pairs, "bytes for the codes");
    #[cfg(target_arch = "x86_64")]
    let (bytes, packed) = if Isa::current() >= Isa::Avx512 {
        // SAFETY: the processor has AVX-512.
        let done = unsafe { wide::pack(dtype, bytes, packed) };
        (
            &bytes[done * BLOCK * dtype.size()..],
            &mut packed[done * BLOCK / 2..],
        )
    } else {
        (bytes, packed)
    };
    dispatch::run(Pack {
        dtype,
        bytes,
        packed,
    });
}

struct AbsMax<'a> {
    dtype: FloatType,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Loop for AbsMax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        absmax_plain(self.dtype, self.bytes, self.out);
    }
}

struct Pack<'a> {
    dtype: FloatType,
    bytes: &'a [u8],
    packed: &'a mut [u8],
}

impl Loop for Pack<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        pack_plain(self.dtype, self.bytes, self.packed);
    }
}

#[inline(always)]
fn absmax_plain(dtype: FloatType, bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.chunks(BLOCK * dtype.size()).zip(out) {
        *out = block_absmax(&match dtype {
            FloatType::F32 => singles(block),
            FloatType::F16 => halves(block),
            FloatType::Bf16 => uppers(block),
        });
    }
}

#[inline(always)]
fn pack_plain(dtype: FloatType, bytes: &[u8], packed: &mut [u8]) {
    let blocks = bytes
        .chunks(BLOCK * dtype.size())
        .zip(packed.chunks_mut(BLOCK / 2));
    for (block, packed) in blocks {
        let mut values = match dtype {
            FloatType::F32 => singles(block),
            FloatType::F16 => halves(block),
            FloatType::Bf16 => uppers(block),
        };
        if block.len() == BLOCK * dtype.size() {
            let scale = inverse_absmax(block_absmax(&values));
            for value in &mut values {
                *value *= scale;
            }
        } else {
            // bitsandbytes' CPU path multiplies by the reciprocal too, but divides in an incomplete last block.
            let absmax = block_absmax(&values).max(1e-38);
            for value in &mut values {
                *value /= absmax;
            }
        }
        let counts = counts(&values);
        for (byte, pair) in packed.iter_mut().zip(counts.as_chunks::<2>().0) {
            *byte = (pair[0] << 4 | pair[1]) as u8;
        }
    }
}

/// The values of a block of f32, followed by zeros if it is incomplete.
#[inline(always)]
fn singles(block: &[u8]) -> [f32; BLOCK] {
    let mut values = [0f32; BLOCK];
    for (value, bytes) in values.iter_mut().zip(block.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
    values
}

/// The values of a block of bf16, followed by zeros if it is incomplete.
#[inline(always)]
fn uppers(block: &[u8]) -> [f32; BLOCK] {
    let mut values = [0f32; BLOCK];
    for (value, bytes) in values.iter_mut().zip(block.as_chunks::<2>().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
    values
}

/// The values of a block of half precision, followed by zeros if it is incomplete.
#[inline(always)]
fn halves(block: &[u8]) -> [f32; BLOCK] {
    // Once the bits are shifted to their places in an f32, the exponent is too low by 112. The product is exact, and subnormal
    // halves become normal numbers.
    const LIFT: f32 = f32::from_bits((127 + 112) << 23);
    let mut values = [0f32; BLOCK];
    for (value, bytes) in values.iter_mut().zip(block.as_chunks::<2>().0) {
        let bits = u32::from(u16::from_le_bytes(*bytes));
        let lifted = (f32::from_bits((bits & 0x7fff) << 13) * LIFT).to_bits();
        let infinite = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        *value = f32::from_bits((bits & 0x8000) << 16 | lifted | infinite);
    }
    values
}

/// The largest magnitude of a block. Without their sign, the bits of a larger magnitude are a larger integer, and those of
/// infinities and NaNs are the largest.
#[inline(always)]
fn block_absmax(values: &[f32; BLOCK]) -> f32 {
    let mut largest = 0u32;
    for value in values {
        largest = largest.max(value.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(largest)
}

/// The factor of the values of a complete block.
#[inline(always)]
fn inverse_absmax(largest: f32) -> f32 {
    1. / largest.max(1e-38)
}

/// The number of midpoints below each value, which is its code. There are no branches, so the compiler counts for many at once.
#[inline(always)]
fn counts(values: &[f32; BLOCK]) -> [u32; BLOCK] {
    let mut counts = [0u32; BLOCK];
    for (count, value) in counts.iter_mut().zip(values) {
        let mut below = 0;
        for midpoint in MIDPOINTS {
            below += u32::from(*value > midpoint);
        }
        *count = below;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;

    fn code_by_search(t: f32) -> u8 {
        MIDPOINTS.iter().filter(|midpoint| **midpoint < t).count() as u8
    }

    /// Some numbers of all sizes.
    fn number(i: usize) -> f32 {
        let x = ((i * 7919 % 10007) as f32 - 5003.) / 5003.;
        x * x * x * [1., 1e-3, 1e4, 1e-30][i / 640 % 4]
    }

    fn bytes(dtype: FloatType, values: &[f32]) -> Vec<u8> {
        let write = |value: &f32| match dtype {
            FloatType::F32 => value.to_le_bytes().to_vec(),
            FloatType::Bf16 => ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
            FloatType::F16 => half(*value).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(write).collect()
    }

    /// A half, cut off.
    fn half(value: f32) -> u16 {
        let bits = value.to_bits();
        let sign = (bits >> 16) as u16 & 0x8000;
        let scaled = (value.abs().min(60000.) * f32::from_bits((127 - 112) << 23)).to_bits();
        sign | (scaled >> 13) as u16
    }

    #[test]
    fn codes_are_found_by_counting() {
        let mut edges: Vec<f32> = MIDPOINTS.iter().chain(&CODE).copied().collect();
        edges.extend(MIDPOINTS.iter().flat_map(|m| [m.next_down(), m.next_up()]));
        edges.extend([1. + 1e-7, -1. - 1e-7, 0., -0.]);
        for chunk in edges.chunks(BLOCK) {
            let mut values = [0f32; BLOCK];
            values[..chunk.len()].copy_from_slice(chunk);
            let found = counts(&values);
            for (value, code) in values.iter().zip(found) {
                assert_eq!(code, u32::from(code_by_search(*value)), "{value}");
            }
        }
    }

    #[test]
    fn blocks_are_packed_as_by_a_plain_loop() {
        let values: Vec<f32> = (0..64 * 40 + 21).map(number).collect();
        for dtype in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
            let bytes = bytes(dtype, &values);
            let mut magnitudes = vec![0f32; values.len().div_ceil(BLOCK)];
            absmax(dtype, &bytes, &mut magnitudes);
            let mut packed = vec![0u8; values.len().div_ceil(2)];
            pack(dtype, &bytes, &mut packed);
            with_each(|isa| {
                let (mut again, mut largest) = (vec![9; packed.len()], vec![9.; magnitudes.len()]);
                pack(dtype, &bytes, &mut again);
                absmax(dtype, &bytes, &mut largest);
                assert!(again == packed && largest == magnitudes, "{isa:?}");
            });
            for (number, block) in bytes.chunks(BLOCK * dtype.size()).enumerate() {
                let values = match dtype {
                    FloatType::F32 => singles(block),
                    FloatType::F16 => halves(block),
                    FloatType::Bf16 => uppers(block),
                };
                let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                assert_eq!(magnitudes[number].to_bits(), largest.to_bits());
                let whole = block.len() == BLOCK * dtype.size();
                let count = block.len() / dtype.size();
                for (i, value) in values[..count].iter().enumerate() {
                    let largest = largest.max(1e-38);
                    let t = if whole {
                        value * (1. / largest)
                    } else {
                        value / largest
                    };
                    let byte = packed[number * BLOCK / 2 + i / 2];
                    let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                    assert_eq!(code, code_by_search(t), "{dtype:?} {number} {i}");
                }
            }
            assert_eq!(packed.last().map(|byte| byte & 15), Some(7));
        }
    }

    #[test]
    fn shares_at_every_edge_have_the_same_code_everywhere() {
        let near = |x: f32| [x.next_down(), x, x.next_up()];
        let midpoints = MIDPOINTS.iter().chain(&CODE).copied();
        // Where the looked-up cells end.
        let cells = (-31..=31).map(|cell| cell as f32 / 2. / 15.4);
        let even = (-512..=512).map(|step| step as f32 / 512.);
        let all = midpoints.chain(cells).chain(even).flat_map(near);
        let all: Vec<f32> = all.filter(|x| x.abs() <= 1.).collect();
        // With a 1 in each block, a value is its share.
        let mut values: Vec<f32> = all
            .chunks(BLOCK - 1)
            .flat_map(|part| part.iter().copied().chain([1.]))
            .collect();
        values.resize(values.len().next_multiple_of(BLOCK), 1.);
        let bytes = bytes(FloatType::F32, &values);
        with_each(|isa| {
            let mut packed = vec![0; values.len() / 2];
            pack(FloatType::F32, &bytes, &mut packed);
            for (byte, pair) in packed.iter().zip(values.as_chunks::<2>().0) {
                let codes = [byte >> 4, byte & 15];
                assert_eq!(codes, pair.map(code_by_search), "{isa:?} {pair:?}");
            }
        });
    }

    #[test]
    fn every_half_is_read() {
        for bits in 0..=u16::MAX {
            let read = halves(&bits.to_le_bytes())[0];
            let (exponent, fraction) = (bits >> 10 & 31, f64::from(bits & 1023));
            let magnitude = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction == 0. => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024. + fraction) * 2f64.powi(i32::from(exponent) - 25),
            };
            let exact = if bits >> 15 == 1 {
                -magnitude
            } else {
                magnitude
            };
            let same = f64::from(read).to_bits() == exact.to_bits();
            assert!(same || (read.is_nan() && exact.is_nan()), "{bits:x} {read}");
        }
        with_each(|isa| {
            for bits in 0..=u16::MAX {
                let block = [bits.to_le_bytes(); BLOCK].concat();
                let (mut out, largest) = ([0f32], block_absmax(&halves(&block)));
                absmax(FloatType::F16, &block, &mut out);
                let same = out[0].to_bits() == largest.to_bits();
                assert!(
                    same || (out[0].is_nan() && largest.is_nan()),
                    "{isa:?} {bits:x}"
                );
            }
        });
    }

    #[test]
    fn what_has_no_code_shows_in_the_largest_magnitude() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1f32; 200];
            values[130] = bad;
            let mut out = [0f32; 4];
            absmax(FloatType::F32, &bytes(FloatType::F32, &values), &mut out);
            assert_eq!(out.map(f32::is_finite), [true, true, false, true]);
        }
    }
}
